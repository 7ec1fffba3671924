"""The reader that speaks to the LM through gated cross-attention."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from einops import repeat
from torch import nn

from bridges.condition import Visible
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
from bridges.language import LanguageModel
from gated_xattn.layers import GatedCrossAttention


class GatedXAttn(Bridge):
    """Any resampler as memory, read by gated cross-attention before every n-th LM block.

    Each image owns one placeholder, filled by a learned marker: the ``<image>`` tag by which
    the text shows where the image stands.

    The two ways to place the blocks: Flamingo begins before the LM's first one (``first: 0``);
    OpenFlamingo has one before every LM block i with (i + 1) % n = 0 (``first: every - 1``).

    Args:
        vision: sizes of the encoder.
        decoder: sizes of the LM.
        resampler: builds the resampler.
        every: a gated block before every n-th LM block (Flamingo: 1, 4 or 7).
        first: the first LM block that gets one.
        num_heads: attention heads of a gated block.
        head_dim: width of a head.
        ff_mult: the gated feed-forward is this many times wider than the LM.
        norm: see `GatedCrossAttention`.
        feed_forward: see `GatedCrossAttention`; the paper's is ``squared_relu``.
        qk_norm: see `GatedCrossAttention`.
        norm_eps: see `GatedCrossAttention`.
        gate: see `GatedCrossAttention`.
        gate_init: see `GatedCrossAttention`.
        gate_std: see `GatedCrossAttention`.
        visible: see `GatedCrossAttention`.
        next_image_probability: how often, in training, all text of a row reads the image after it
            in the place of the one before it. ½ for web pages in the paper, where a picture may
            stand before or after the text that it belongs to.
        train_marker: whether the marker is trained. If it is not, nothing below the first gated
            block is, and backward stops there.

    Shape: soft tokens (b, i, 1, d_lm), memory (b, i, m, d_resampler).

    Raises:
        ValueError: `first` leaves no block, a probability outside of 0…1, or a next image where
            all images before are visible.

    Source: Flamingo (arXiv 2204.14198) section 2.2; of the next image, the appendix on M3W.
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
        feed_forward: Literal["gelu", "squared_relu", "swiglu"] = "gelu",
        qk_norm: bool = False,
        norm_eps: float = 1e-5,
        gate: Literal["scalar", "channel", "none"] = "scalar",
        gate_init: float = 0.0,
        gate_std: float = 0.0,
        visible: Visible = "latest",
        next_image_probability: float = 0.0,
        train_marker: bool = True,
    ) -> None:
        super().__init__()
        if not 0 <= next_image_probability <= 1:
            raise ValueError(
                f"found next_image_probability={next_image_probability}; expected 0 to 1"
            )
        if next_image_probability and visible == "all":
            raise ValueError(
                "found next_image_probability with visible='all'; expected one of them: which "
                "image is the next matters only to text that reads one image"
            )
        self.next_image_probability = next_image_probability
        self.block_indices = list(range(first, decoder.num_layers, every))
        if not self.block_indices:
            raise ValueError(
                f"found first={first} for an LM of {decoder.num_layers} layers; expected at "
                "least one gated block: lower first"
            )
        self.resampler = resampler(vision=vision)
        marker = torch.randn(1, decoder.dim) * decoder.embedding_std
        self.marker = nn.Parameter(marker, requires_grad=train_marker)
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
                norm_eps=norm_eps,
                gate=gate,
                gate_init=gate_init,
                gate_std=gate_std,
                visible=visible,
            )
            for _ in self.block_indices
        )

    def forward(self, vision: VisionFeatures, text: Instruction | None = None) -> BridgeOutput:
        memory = self.resampler(vision, text)
        marker = repeat(self.marker, "n d -> b i n d", b=memory.shape[0], i=memory.shape[1])
        next_image = None
        # Also in training mode, what is written or looked at is not augmented.
        if self.training and torch.is_grad_enabled() and self.next_image_probability:
            drawn = torch.rand(memory.shape[0], device=memory.device)
            next_image = drawn < self.next_image_probability
        return BridgeOutput(marker, memory, next_image=next_image)

    def load_pretrained(self, path: str | Path, lm: LanguageModel) -> None:
        """Takes an OpenFlamingo ``.pt`` or an HF Idefics folder, else what the resampler knows.

        See `gated_xattn.official.load_bridge`.
        """
        from gated_xattn.official import load_bridge
        from gated_xattn.official_files import is_flamingo

        if is_flamingo(path):
            load_bridge(path, self, lm)
        else:
            super().load_pretrained(path, lm)

    def inserts(self) -> Sequence[LayerInsert]:
        return [
            LayerInsert(layer, "layer_input", block)
            for layer, block in zip(self.block_indices, self.blocks, strict=True)
        ]
