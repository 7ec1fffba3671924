"""GATED XATTN-DENSE, the block that Flamingo puts before the blocks of a frozen LM."""

from typing import Literal, get_args

import torch
from torch import Tensor, nn

from bridges.attention import NORMS, Attention
from bridges.condition import Condition, Visible
from bridges.feed_forward import FeedForward
from bridges.precision import as_autocast
from gated_xattn.reading import read
from gated_xattn.swiglu import SwiGLU


class GatedCrossAttention(nn.Module):
    """x + tanh(α) · xattn(x, image), then x + tanh(β) · ff(x).

    α and β start at 0, so a fresh block leaves the LM unchanged. A position reads only its latest
    preceding image; one before any image gets a zero attention output.

    The defaults are OpenFlamingo's (LayerNorm, GELU, heads of width 64). Flamingo's own
    feed-forward has ``squared_relu``; IDEFICS-1 has ``norm: rms``, ``feed_forward: swiglu`` and
    the LM's heads.

    What an implementation gives to text before any image differs: zero here, as in the paper and
    in IDEFICS (by its ``cross_attention_gate``); flamingo-pytorch gives zero with
    ``only_attend_immediate_media``, and without it the average over all images, later ones
    included.

    Args:
        dim: width of the LM.
        memory_dim: width of the resampled image tokens.
        num_heads: attention heads.
        head_dim: width of a head.
        ff_dim: inner width of the feed-forward.
        norm: LayerNorm or RMSNorm before attention and feed-forward.
        feed_forward: Linear, activation, Linear (GELU or squared ReLU), or SwiGLU; without bias.
        qk_norm: RMSNorm on each head's queries and keys (IDEFICS-1 option).
        norm_eps: epsilon of all norms.
        gate: ``scalar``, one α and one β; ``channel``, one for each channel of the LM (IDEFICS-1:
            ``alpha_type: vector``); ``none``, plain residuals (the paper's ablation), which
            change the LM from the first step on.
        gate_init: α and β at the start (IDEFICS-1's ``alpha_initializer: ones`` is 1).
        gate_std: of normal noise around it (``alpha_initializer: normal``).
        visible: ``latest``, the latest preceding image; ``all``, all preceding ones, all of the
            same sample.

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
        feed_forward: Literal["gelu", "squared_relu", "swiglu"] = "gelu",
        qk_norm: bool = False,
        norm_eps: float = 1e-5,
        gate: Literal["scalar", "channel", "none"] = "scalar",
        gate_init: float = 0.0,
        gate_std: float = 0.0,
        visible: Visible = "latest",
    ) -> None:
        super().__init__()
        if visible not in get_args(Visible):
            raise ValueError(
                f"found visible={visible!r}; expected one of {', '.join(get_args(Visible))}"
            )
        self.visible: Visible = visible
        self.attn_norm = NORMS[norm](dim, eps=norm_eps)
        self.attn = Attention(
            dim,
            memory_dim,
            num_heads=num_heads,
            head_dim=head_dim,
            qk_norm=nn.RMSNorm if qk_norm else None,
            norm_eps=norm_eps,
        )
        self.attn_gate = _gate(gate, dim, gate_init, gate_std)
        self.ff_norm = NORMS[norm](dim, eps=norm_eps)
        ff_dim = ff_dim or 4 * dim
        swiglu = feed_forward == "swiglu"
        self.ff = SwiGLU(dim, ff_dim) if swiglu else FeedForward(dim, ff_dim, feed_forward)
        self.ff_gate = _gate(gate, dim, gate_init, gate_std)

    def forward(self, hidden: Tensor, condition: Condition) -> Tensor:
        """Shape: hidden (b, t, d_lm) -> (b, t, d_lm)."""
        hidden = _add(hidden, self.read(hidden, condition), self.attn_gate)
        return _add(hidden, self.ff(as_autocast(self.ff_norm(hidden))), self.ff_gate)

    def read(self, hidden: Tensor, condition: Condition) -> Tensor:
        """What each position takes from its image, before the gate: (b, t, d_lm)."""
        return read(self.attn, self.attn_norm, hidden, condition, self.visible)


def _gate(kind: str, dim: int, mean: float, std: float) -> nn.Parameter | None:
    if kind == "none":
        if mean or std:
            raise ValueError(
                f"found gate_init={mean} and gate_std={std} for gate 'none'; expected neither: "
                "without gates nothing has a start"
            )
        return None
    sizes = {"scalar": 1, "channel": dim}
    if kind not in sizes:
        raise ValueError(f"found gate={kind!r}; expected one of {', '.join(sizes)}, none")
    start = torch.full((sizes[kind],), mean)
    return nn.Parameter(torch.normal(start, std) if std else start)


def _add(hidden: Tensor, change: Tensor, gate: nn.Parameter | None) -> Tensor:
    return hidden + change if gate is None else hidden + gate.tanh() * change
