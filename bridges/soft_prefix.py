"""The soft-prefix reader: resampled tokens take the places of the image's placeholders."""

import torch
from torch import Tensor, nn

from bridges.contract import (
    Bridge,
    BridgeOutput,
    DecoderShape,
    Instruction,
    ResamplerFactory,
    VisionFeatures,
    VisionShape,
)
from bridges.frozen import freeze


class SoftPrefix(Bridge):
    """Any resampler, then one linear layer into the LM's embedding space.

    This is how BLIP-2, MiniGPT-4 and LLaVA speak to the LM; only the resampler differs.

    Args:
        vision: sizes of the encoder.
        decoder: sizes of the LM.
        resampler: builds the resampler.
        match_embedding_scale: normalise the soft tokens and scale them to the root mean square
            of the LM's own token embeddings. Not in the papers, which train for weeks: with a
            scale tens of times off, a frozen small LM first has to be calmed down. False gives
            the papers' bare linear layer.
        freeze_resampler: train the linear layer alone, as MiniGPT-4 does (arXiv 2304.10592
            section 3.1) with a resampler that was trained elsewhere.

    Shape: soft tokens (b, i, n, d_lm).

    Source: BLIP-2 (arXiv 2301.12597) section 3.3.
    """

    def __init__(
        self,
        *,
        vision: VisionShape,
        decoder: DecoderShape,
        resampler: ResamplerFactory,
        match_embedding_scale: bool = False,
        freeze_resampler: bool = False,
    ) -> None:
        super().__init__()
        self.resampler = resampler(vision=vision)
        self.freeze_resampler = freeze_resampler
        if freeze_resampler:
            freeze(self.resampler)
        self.num_tokens = self.resampler.num_tokens
        self.projection = nn.Linear(self.resampler.dim, decoder.dim)
        self.norm = nn.LayerNorm(decoder.dim) if match_embedding_scale else nn.Identity()
        if isinstance(self.norm, nn.LayerNorm):
            nn.init.constant_(self.norm.weight, decoder.embedding_std)

    def forward(self, vision: VisionFeatures, text: Instruction | None = None) -> BridgeOutput:
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.freeze_resampler):
            tokens: Tensor = self.resampler(vision, text)
        return BridgeOutput(self.norm(self.projection(tokens)))

    def train(self, mode: bool = True) -> "SoftPrefix":
        """As ever, but that a frozen resampler stays in evaluation mode."""
        super().train(mode)
        if self.freeze_resampler:
            self.resampler.eval()
        return self
