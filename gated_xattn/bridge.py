"""The reader that speaks to the LM through gated cross-attention."""

from collections.abc import Sequence
from typing import Literal

import torch
from einops import repeat
from torch import nn

from bridges.contract import (
    Bridge,
    BridgeOutput,
    DecoderShape,
    Instruction,
    LayerInsert,
    ResamplerFactory,
    VisionFeatures,
    VisionShape,
)
from gated_xattn.layers import GatedCrossAttention


class GatedXAttn(Bridge):
    """Any resampler as memory, read by gated cross-attention before every n-th LM block.

    Each image owns one placeholder, filled by a learned marker: the ``<image>`` tag by which
    the text shows where the image stands.

    Args:
        vision: sizes of the encoder.
        decoder: sizes of the LM.
        resampler: builds the resampler.
        every: a gated block before every n-th LM block (Flamingo: 1, 4 or 7).
        first: the first LM block that gets one. Flamingo: 0; OpenFlamingo: ``every - 1``.
        num_heads: attention heads of a gated block.
        head_dim: width of a head.
        ff_mult: the gated feed-forward is this many times wider than the LM.
        norm: see `GatedCrossAttention`.
        feed_forward: see `GatedCrossAttention`.
        qk_norm: see `GatedCrossAttention`.

    Shape: soft tokens (b, i, 1, d_lm), memory (b, i, m, d_resampler).

    Source: Flamingo (arXiv 2204.14198) section 2.2.
    """

    num_tokens = 1

    def __init__(
        self,
        *,
        vision: VisionShape,
        decoder: DecoderShape,
        resampler: ResamplerFactory,
        every: int = 4,
        first: int = 0,
        num_heads: int = 8,
        head_dim: int = 64,
        ff_mult: float = 4.0,
        norm: Literal["layer", "rms"] = "layer",
        feed_forward: Literal["gelu", "swiglu"] = "gelu",
        qk_norm: bool = False,
    ) -> None:
        super().__init__()
        self.block_indices = list(range(first, decoder.num_layers, every))
        if not self.block_indices:
            raise ValueError(
                f"found first={first} for an LM of {decoder.num_layers} layers; expected at "
                "least one gated block: lower first"
            )
        self.resampler = resampler(vision=vision)
        self.marker = nn.Parameter(torch.randn(1, decoder.dim) * decoder.embedding_std)
        self.blocks = nn.ModuleList(
            GatedCrossAttention(
                decoder.dim,
                self.resampler.dim,
                num_heads=num_heads,
                head_dim=head_dim,
                ff_dim=int(ff_mult * decoder.dim),
                norm=norm,
                feed_forward=feed_forward,
                qk_norm=qk_norm,
            )
            for _ in self.block_indices
        )

    def forward(self, vision: VisionFeatures, text: Instruction | None = None) -> BridgeOutput:
        memory = self.resampler(vision, text)
        marker = repeat(self.marker, "n d -> b i n d", b=memory.shape[0], i=memory.shape[1])
        return BridgeOutput(marker, memory)

    def inserts(self) -> Sequence[LayerInsert]:
        return [
            LayerInsert(layer, "layer_input", block)
            for layer, block in zip(self.block_indices, self.blocks, strict=True)
        ]
