"""Comparing a module with its reference implementation: copied weights, outputs and gradients."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

TOLERANCE = 1e-5
"""Largest absolute error in fp32."""

Pairs = list[tuple[str, nn.Parameter, nn.Parameter]]


def pair_up(ours: nn.Module, theirs: nn.Module, names: Mapping[str, str]) -> Pairs:
    """Parameters of `ours` beside those of `theirs`, by prefixes of their names.

    Every parameter of both sides must be covered, so that none is silently left at random.
    """
    found = dict(theirs.named_parameters())
    pairs: Pairs = []
    for name, parameter in ours.named_parameters():
        prefixes = [p for p in names if name == p or name.startswith(f"{p}.")]
        assert len(prefixes) == 1, f"{name} is matched by {prefixes}"
        partner = names[prefixes[0]] + name.removeprefix(prefixes[0])
        pairs.append((name, parameter, found.pop(partner)))
    assert not found, f"not in ours: {sorted(found)}"
    return pairs


def copy_weights(pairs: Pairs, seed: int = 0) -> None:
    """Random weights on both sides."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, ours, theirs in pairs:
            noise = torch.randn(ours.shape, generator=generator)
            start = theirs if theirs.ndim < 2 else torch.zeros_like(ours)
            # Some references keep a vector in other axes than we do.
            ours.copy_(start.reshape(ours.shape) + 0.2 * noise)
            theirs.copy_(ours.reshape(theirs.shape))


def assert_parity(
    pairs: Pairs,
    outputs: tuple[Tensor, Tensor],
    inputs: Iterable[tuple[Tensor, Tensor]],
) -> None:
    """Equal outputs, and equal gradients of parameters and inputs, neither of them zero."""
    ours, theirs = outputs
    close(ours, theirs, "output")
    weights = torch.randn(ours.shape, generator=torch.Generator().manual_seed(1)) / ours.numel()
    (ours * weights).sum().backward()
    (theirs * weights.reshape(theirs.shape)).sum().backward()
    for name, a, b in pairs:
        assert a.grad is not None and b.grad is not None, name
        close(a.grad, b.grad.reshape(a.shape), f"gradient of {name}")
    for number, (a, b) in enumerate(inputs):
        assert a.grad is not None and b.grad is not None and a.grad.any()
        close(a.grad, b.grad.reshape(a.shape), f"gradient of input {number}")


def close(ours: Tensor, theirs: Tensor, what: str) -> None:
    """Within `TOLERANCE`, also relative to the scale where that is smaller than 1."""
    assert ours.shape == theirs.shape, what
    error = (ours - theirs).abs().max().item()
    scale = min(1.0, theirs.abs().max().item())
    # A gradient that is zero in theory (bias of keys) is noise on both sides.
    assert error < TOLERANCE * max(scale, 1e-2), f"{what}: error {error:.2e} at scale {scale:.2e}"


def small(*shape: int) -> Tensor:
    """Inputs so small that the epsilons of the norms matter."""
    return (0.03 * torch.randn(shape)).requires_grad_()
