"""The attention that every bridge shares."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Scaled dot-product attention; a query that may attend to nothing gets zeros.

    Zeros, and neither NaN nor a uniform average over forbidden keys: text before any image must
    not depend on images (Flamingo section 2.3).

    Args:
        q: (b, h, t, d). Scores are scaled by d ** -0.5.
        k: (b, h, s, d).
        v: (b, h, s, d).
        mask: bool, broadcastable to (b, h, t, s); True = may attend.

    Returns:
        (b, h, t, d).
    """
    if q.device.type == "cpu" and q.dtype == torch.bfloat16:
        # Measured: on CPU in bf16, SDPA forward + backward is several times slower than this.
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
        if mask is not None:
            scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
        out = scores.softmax(dim=-1) @ v
    else:
        bias = None
        if mask is not None:
            # A finite floor keeps fully masked rows free of NaN, in backward too.
            bias = torch.zeros(mask.shape, dtype=q.dtype, device=q.device)
            bias = bias.masked_fill(~mask, torch.finfo(q.dtype).min)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    if mask is not None:
        out = out.masked_fill(~mask.any(dim=-1, keepdim=True), 0.0)
    return out


class Attention(nn.Module):
    """Multi-head attention from `x` to a memory whose keys and values can be projected once.

    Args:
        dim: width of the queries' input and of the output.
        memory_dim: width of the memory; `dim` by default.
        num_heads: number of heads.
        head_dim: width of a head; ``dim // num_heads`` by default.
        bias: whether the four projections have a bias.
        qk_norm: a norm class applied to each head's queries and keys, or None.
        norm_eps: epsilon of `qk_norm`.
    """

    def __init__(
        self,
        dim: int,
        memory_dim: int | None = None,
        *,
        num_heads: int,
        head_dim: int | None = None,
        bias: bool = False,
        qk_norm: type[nn.LayerNorm] | type[nn.RMSNorm] | None = None,
        norm_eps: float = 1e-5,
    ) -> None:
        super().__init__()
        if head_dim is None and dim % num_heads:
            raise ValueError(
                f"found width {dim} for {num_heads} heads; expected a multiple of the number of "
                "heads, or set head_dim"
            )
        head_dim = head_dim or dim // num_heads
        memory_dim = memory_dim or dim
        inner = num_heads * head_dim
        self.num_heads = num_heads
        self.q = nn.Linear(dim, inner, bias=bias)
        self.k = nn.Linear(memory_dim, inner, bias=bias)
        self.v = nn.Linear(memory_dim, inner, bias=bias)
        self.out = nn.Linear(inner, dim, bias=bias)
        self.q_norm = qk_norm(head_dim, eps=norm_eps) if qk_norm else nn.Identity()
        self.k_norm = qk_norm(head_dim, eps=norm_eps) if qk_norm else nn.Identity()

    def project(self, memory: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of a memory: (b, s, d_memory) -> two (b, h, s, d_head)."""
        k = rearrange(self.k(memory), "b s (h d) -> b h s d", h=self.num_heads)
        v = rearrange(self.v(memory), "b s (h d) -> b h s d", h=self.num_heads)
        return _normalise(self.k_norm, k), v

    def forward(self, x: Tensor, kv: tuple[Tensor, Tensor], mask: Tensor | None = None) -> Tensor:
        """Shape: x (b, t, d), kv from `project`, mask bool (b, 1|h, t, s) -> (b, t, d)."""
        q = self._queries(x)
        out = attend(q, kv[0].to(q.dtype), kv[1].to(q.dtype), mask)
        return self.out(rearrange(out, "b h t d -> b t (h d)"))

    def forward_runs(
        self, x: Tensor, kv: tuple[Tensor, Tensor], lengths: Sequence[int]
    ) -> Tensor:
        """Attention of runs of positions, each to a memory of its own.

        The same as `forward` under a mask that hides all other memories, without the scores that
        such a mask hides.

        Args:
            x: (n, d), run after run.
            kv: from `project`, a row for each run: (r, h, s, d_head).
            lengths: positions of each of the r runs.

        Returns:
            (n, d).
        """
        q = self._queries(x[None])
        k, v = kv[0].to(q.dtype), kv[1].to(q.dtype)
        # Splitting and joining, not indexing: their backward copies each run once.
        runs = zip(q.split(list(lengths), dim=2), k.split(1), v.split(1), strict=True)
        out = torch.cat([rearrange(attend(*run), "1 h t d -> t (h d)") for run in runs])
        return self.out(out)

    def weights(self, x: Tensor, keys: Tensor, mask: Tensor | None = None) -> Tensor:
        """Attention probabilities, for looking at: (b, h, t, s), fp32.

        Args:
            x: (b, t, d).
            keys: (b, h, s, d_head), from `project`.
            mask: bool, broadcastable to (b, h, t, s); at least one True in a row.
        """
        q = self._queries(x).float()
        scores = (q * q.shape[-1] ** -0.5) @ keys.float().transpose(-1, -2)
        if mask is not None:
            scores = scores.masked_fill(~mask, -torch.inf)
        return scores.softmax(dim=-1)

    def _queries(self, x: Tensor) -> Tensor:
        q = rearrange(self.q(x), "b t (h d) -> b h t d", h=self.num_heads)
        return _normalise(self.q_norm, q)


def _normalise(norm: nn.Module, x: Tensor) -> Tensor:
    """Norms in the precision of their weights; autocast leaves RMSNorm to its inputs' type."""
    if isinstance(norm, nn.Identity):
        return x
    return norm(x.to(next(norm.parameters()).dtype)).to(x.dtype)
