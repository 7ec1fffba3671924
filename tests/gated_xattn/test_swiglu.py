"""The lean SwiGLU: what autograd computes, from fewer kept activations."""

import parity
import torch

from bridges.feed_forward import FeedForward
from gated_xattn.swiglu import SwiGLU


def both() -> tuple[SwiGLU, FeedForward]:
    torch.manual_seed(0)
    ours, plain = SwiGLU(6, 10), FeedForward(6, 10, "silu", gated=True)
    plain.load_state_dict(ours.state_dict())
    return ours, plain


def kept_bytes(module: torch.nn.Module, x: torch.Tensor) -> int:
    kept = {p.untyped_storage().data_ptr(): 0 for p in module.parameters()}

    def count(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept.setdefault(storage.data_ptr(), storage.nbytes())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        out = module(x)
    assert out.requires_grad
    return sum(kept.values())


def test_outputs_and_gradients():
    ours, plain = both()
    inputs = [(3 * torch.randn(2, 5, 6)).requires_grad_()]
    inputs.append(inputs[0].detach().clone().requires_grad_())
    names = {name: name for name, _ in ours.named_parameters()}
    pairs = parity.pair_up(ours, plain, names)
    parity.assert_parity(pairs, (ours(inputs[0]), plain(inputs[1])), [(inputs[0], inputs[1])])


def test_under_autocast():
    ours, plain = both()
    x = torch.randn(2, 5, 6, requires_grad=True)
    gradients = []
    for module in (ours, plain):
        with torch.autocast("cpu", torch.bfloat16):
            out = module(x)
        assert out.dtype == torch.bfloat16
        gradients.append(torch.autograd.grad(out.sum(), [x, *module.parameters()]))
    for mine, theirs in zip(*gradients, strict=True):
        assert mine.dtype == theirs.dtype
        torch.testing.assert_close(mine, theirs, rtol=0.02, atol=0.02)


def test_less_is_kept_for_backward():
    ours, plain = both()
    x = torch.randn(2, 5, 6, requires_grad=True)
    assert kept_bytes(plain, x) - kept_bytes(ours, x) == 2 * 5 * 10 * 4  # the silu
