"""The attention that every bridge shares."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn

NORMS: dict[str, type[nn.LayerNorm] | type[nn.RMSNorm]] = {
    "layer": nn.LayerNorm,
    "rms": nn.RMSNorm,
}
"""Norms of bridge layers, by their names in a YAML."""


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Scaled dot-product attention; a query that may attend to nothing gets zeros.

    Zeros, and neither NaN nor a uniform average over forbidden keys: text before any image must
    not depend on images (Flamingo section 2.3).

    Args:
        q: (b, h, t, d). Scores are scaled by d ** -0.5.
        k: (b, h, s, d), or fewer heads, each shared by neighbouring heads of queries.
        v: as k.
        mask: bool, broadcastable to (b, h, t, s); True = may attend.

    Returns:
        (b, h, t, d).
    """
    if k.shape[1] != q.shape[1]:
        return _attend_grouped(q, k, v, mask)
    reduced = q.dtype == torch.bfloat16 or torch.get_float32_matmul_precision() != "highest"
    if q.device.type == "cpu" and reduced:
        # Measured on CPU: SDPA, forward + backward, is several times slower than this in bf16, and
        # up to as much in fp32 under a matmul precision that the fused kernel does not know.
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


def attend_runs(q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int]) -> Tensor:
    """`attend` for runs of queries, each with keys and values of its own.

    The same as one `attend` under a mask that hides all other keys, without the scores that such
    a mask hides.

    Args:
        q: (1, h, n, d), run after run.
        k: (r, h, s, d), or fewer heads, as in `attend`.
        v: as k.
        lengths: queries of each of the r runs.

    Returns:
        (1, h, n, d).
    """
    # Measured on CPU. Not the fused kernel: on runs this short it is slower, in fp32 several times
    # so under the matmul precision "medium". Compact operands: matmul would copy them anyway, at
    # worse strides and in backward again. Split and joined, not indexed: their backward copies
    # every run once. Few and plain operations: there are many runs.
    if k.shape[1] != q.shape[1]:
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    k = k.contiguous() * q.shape[-1] ** -0.5
    v = v if v.dtype == torch.float32 else v.contiguous()
    runs = zip(q[0].split(list(lengths), dim=1), k.unbind(), v.unbind(), strict=True)
    out = []
    for queries, keys, values in runs:
        # A copy in any case: a view would hold all queries until backward.
        queries = queries.clone(memory_format=torch.contiguous_format)
        weights = torch.bmm(queries, keys.transpose(1, 2)).softmax(dim=-1)
        out.append(torch.bmm(weights, values).transpose(0, 1))
    # Joined where the heads of a position lie side by side, as the next projection wants them.
    return torch.cat(out).transpose(0, 1)[None]


def _attend_grouped(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Heads of queries that share keys become more positions of one head: no key is repeated."""
    shared, positions = q.shape[1] // k.shape[1], q.shape[2]
    q = rearrange(q, "b (h g) t d -> b h (g t) d", g=shared)
    if mask is not None and mask.shape[1] > 1:
        mask = mask.expand(*mask.shape[:2], positions, -1)
        mask = rearrange(mask, "b (h g) t s -> b h (g t) s", g=shared)
    elif mask is not None and mask.shape[2] > 1:
        mask = repeat(mask, "b 1 t s -> b 1 (g t) s", g=shared)
    return rearrange(attend(q, k, v, mask), "b h (g t) d -> b (h g) t d", g=shared)


class Attention(nn.Module):
    """Multi-head attention from `x` to a memory whose keys and values can be projected once.

    Args:
        dim: width of the queries' input and of the output.
        memory_dim: width of the memory; `dim` by default.
        num_heads: number of heads.
        num_kv_heads: heads of keys and values, each shared by ``num_heads // num_kv_heads``
            heads of queries; `num_heads` by default.
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
        num_kv_heads: int | None = None,
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
        num_kv_heads = num_kv_heads or num_heads
        if num_heads % num_kv_heads:
            raise ValueError(
                f"found {num_heads} heads for {num_kv_heads} heads of keys; expected a multiple: "
                "change num_kv_heads"
            )
        memory_dim = memory_dim or dim
        inner, kv_inner = num_heads * head_dim, num_kv_heads * head_dim
        self.num_heads, self.num_kv_heads = num_heads, num_kv_heads
        self.q = nn.Linear(dim, inner, bias=bias)
        self.k = nn.Linear(memory_dim, kv_inner, bias=bias)
        self.v = nn.Linear(memory_dim, kv_inner, bias=bias)
        self.out = nn.Linear(inner, dim, bias=bias)
        self.q_norm = qk_norm(head_dim, eps=norm_eps) if qk_norm else nn.Identity()
        self.k_norm = qk_norm(head_dim, eps=norm_eps) if qk_norm else nn.Identity()

    def project(self, memory: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of a memory: (b, s, d_memory) -> two (b, h_kv, s, d_head)."""
        k = rearrange(self.k(memory), "b s (h d) -> b h s d", h=self.num_kv_heads)
        v = rearrange(self.v(memory), "b s (h d) -> b h s d", h=self.num_kv_heads)
        return self.norm_keys(k), v

    def norm_keys(self, k: Tensor) -> Tensor:
        """`qk_norm` of keys that were projected elsewhere: (b, h_kv, s, d_head)."""
        return _normalise(self.k_norm, k)

    def forward(self, x: Tensor, kv: tuple[Tensor, Tensor], mask: Tensor | None = None) -> Tensor:
        """Shape: x (b, t, d), kv from `project`, mask bool (b, 1|h, t, s) -> (b, t, d)."""
        q = self._queries(x)
        out = attend(q, kv[0].to(q.dtype), kv[1].to(q.dtype), mask)
        return self.out(rearrange(out, "b h t d -> b t (h d)"))

    def forward_runs(self, x: Tensor, kv: tuple[Tensor, Tensor], lengths: Sequence[int]) -> Tensor:
        """Attention of runs of positions, each to a memory of its own: see `attend_runs`.

        Args:
            x: (n, d), run after run.
            kv: from `project`, a row for each run: (r, h, s, d_head).
            lengths: positions of each of the r runs.

        Returns:
            (n, d).
        """
        q = self._queries(x[None])
        out = attend_runs(q, kv[0].to(q.dtype), kv[1].to(q.dtype), lengths)
        return self.out(rearrange(out, "1 h n d -> n (h d)"))

    def weights(self, x: Tensor, keys: Tensor, mask: Tensor | None = None) -> Tensor:
        """Attention probabilities, for looking at: (b, h, t, s), fp32.

        Args:
            x: (b, t, d).
            keys: (b, h_kv, s, d_head), from `project`.
            mask: bool, broadcastable to (b, h, t, s); at least one True in a row.
        """
        q = self._queries(x).float()
        keys = keys.float().repeat_interleave(self.num_heads // self.num_kv_heads, dim=1)
        scores = (q * q.shape[-1] ** -0.5) @ keys.transpose(-1, -2)
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
