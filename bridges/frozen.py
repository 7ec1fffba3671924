"""What frozen means, and the fingerprint by which a checkpoint knows its frozen ends."""

import hashlib

import torch
from torch import nn


def freeze(module: nn.Module) -> nn.Module:
    """No gradients, eval mode; returns the module. `Frozen` keeps it in eval mode."""
    return module.requires_grad_(False).eval()


class Frozen(nn.Module):
    """A module that stays in eval mode when its parents are put into training mode."""

    def train(self, mode: bool = True) -> "Frozen":
        """Ignores `mode`: dropout or batch statistics of a frozen end would be a bug."""
        return super().train(False)


def fingerprint(module: nn.Module) -> str:
    """A short digest of a module's architecture and weights.

    Sixteen evenly spaced values of every parameter and buffer, rounded to bf16 so that the same
    weights loaded in fp32 and in bf16 agree, with names and shapes; a full hash of a 7B model
    would take longer than loading it. Non-persistent buffers (rotary tables) do not count.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict(keep_vars=False).items()):
        flat = tensor.detach().reshape(-1)
        picks = torch.linspace(0, flat.numel() - 1, min(16, flat.numel()), dtype=torch.float64)
        values = flat[picks.long().to(flat.device)].float().cpu().to(torch.bfloat16)
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        digest.update(values.view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:16]
