"""SwiGLU that keeps less for backward."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from bridges.feed_forward import FeedForward


class SwiGLU(FeedForward):
    """out(silu(gate(x)) · up(x)), without bias; backward computes the silu again.

    So it keeps the two projections and their product, and not the silu between them, for a few
    percent of the time of the three matrix products.

    Shape: (..., dim) -> (..., dim).
    """

    def __init__(self, dim: int, inner_dim: int) -> None:
        super().__init__(dim, inner_dim, "silu", gated=True)

    def forward(self, x: Tensor) -> Tensor:
        assert self.gate is not None
        return self.out(_SiluProduct.apply(self.gate(x), self.up(x)))


class _SiluProduct(torch.autograd.Function):
    """silu(gate) · up, of which only the two inputs are kept."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        to_gate = grad * up
        torch.ops.aten.silu_backward.grad_input(to_gate, gate, grad_input=to_gate)
        return to_gate, F.silu(gate).mul_(grad)
