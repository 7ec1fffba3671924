"""GATED XATTN-DENSE, the block that Flamingo puts before the blocks of a frozen LM."""

from typing import Literal

import torch
from einops import rearrange
from torch import Tensor, nn

from bridges.attention import Attention
from bridges.condition import Condition
from bridges.feed_forward import FeedForward

NORMS: dict[str, type[nn.LayerNorm] | type[nn.RMSNorm]] = {
    "layer": nn.LayerNorm,
    "rms": nn.RMSNorm,
}


class GatedCrossAttention(nn.Module):
    """x + tanh(α) · xattn(x, image), then x + tanh(β) · ff(x).

    α and β are scalars that start at 0, so a fresh block leaves the LM unchanged. A position
    reads only its latest preceding image; one before any image gets a zero attention output.

    The defaults are OpenFlamingo's (LayerNorm, GELU, heads of width 64); IDEFICS-1 has
    ``norm: rms``, ``feed_forward: swiglu`` and the LM's heads.

    Args:
        dim: width of the LM.
        memory_dim: width of the resampled image tokens.
        num_heads: attention heads.
        head_dim: width of a head.
        ff_dim: inner width of the feed-forward.
        norm: LayerNorm or RMSNorm before attention and feed-forward.
        feed_forward: Linear–GELU–Linear or SwiGLU, without bias.
        qk_norm: RMSNorm on each head's queries and keys (IDEFICS-1 option).
        norm_eps: epsilon of all norms.

    Source: Flamingo (arXiv 2204.14198) section 2.2 and figure 4.
    """

    def __init__(
        self,
        dim: int,
        memory_dim: int,
        *,
        num_heads: int = 8,
        head_dim: int = 64,
        ff_dim: int | None = None,
        norm: Literal["layer", "rms"] = "layer",
        feed_forward: Literal["gelu", "swiglu"] = "gelu",
        qk_norm: bool = False,
        norm_eps: float = 1e-5,
    ) -> None:
        super().__init__()
        self.attn_norm = NORMS[norm](dim, eps=norm_eps)
        self.attn = Attention(
            dim,
            memory_dim,
            num_heads=num_heads,
            head_dim=head_dim,
            qk_norm=nn.RMSNorm if qk_norm else None,
            norm_eps=norm_eps,
        )
        self.attn_gate = nn.Parameter(torch.zeros(1))
        self.ff_norm = NORMS[norm](dim, eps=norm_eps)
        swiglu = feed_forward == "swiglu"
        self.ff = FeedForward(dim, ff_dim or 4 * dim, "silu" if swiglu else "gelu", gated=swiglu)
        self.ff_gate = nn.Parameter(torch.zeros(1))

    def forward(self, hidden: Tensor, condition: Condition) -> Tensor:
        """Shape: hidden (b, t, d_lm) -> (b, t, d_lm)."""
        kv = condition.project(self, hidden, self._project)
        visible = condition.visible_images(hidden)
        tokens_per_image = kv[0].shape[2] // visible.shape[-1]
        mask = visible.repeat_interleave(tokens_per_image, dim=-1)[:, None]
        attended = self.attn(self.attn_norm(hidden), (kv[0], kv[1]), mask)
        hidden = hidden + self.attn_gate.tanh() * attended
        return hidden + self.ff_gate.tanh() * self.ff(self.ff_norm(hidden))

    def _project(self, memory: Tensor) -> tuple[Tensor, Tensor]:
        """(b, i, m, d_memory) -> two (b, h, i·m, d_head)."""
        return self.attn.project(rearrange(memory, "b i m d -> b (i m) d"))
