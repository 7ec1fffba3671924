"""The feed-forward of bridge layers, in the variants that published bridges use."""

from typing import Literal

from torch import Tensor, nn

Activation = Literal["gelu", "relu", "squared_relu", "silu"]


class SquaredReLU(nn.Module):
    """relu(x)², the activation of Flamingo's own feed-forwards (arXiv 2204.14198, A.1)."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.relu(x).square()


ACTIVATIONS: dict[str, type[nn.Module]] = {
    "gelu": nn.GELU,
    "relu": nn.ReLU,
    "squared_relu": SquaredReLU,
    "silu": nn.SiLU,
}


class FeedForward(nn.Module):
    """out(act(up(x))), or out(act(gate(x)) · up(x)) when `gated` (SwiGLU with silu).

    Shape: (..., dim) -> (..., out_dim), which is `dim` by default.
    """

    def __init__(
        self,
        dim: int,
        inner_dim: int,
        activation: Activation = "gelu",
        *,
        gated: bool = False,
        bias: bool = False,
        out_dim: int | None = None,
    ) -> None:
        super().__init__()
        self.up = nn.Linear(dim, inner_dim, bias=bias)
        self.gate = nn.Linear(dim, inner_dim, bias=bias) if gated else None
        self.activation = ACTIVATIONS[activation]()
        self.out = nn.Linear(inner_dim, out_dim or dim, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.up(x)
        if self.gate is None:
            return self.out(self.activation(hidden))
        return self.out(self.activation(self.gate(x)) * hidden)
