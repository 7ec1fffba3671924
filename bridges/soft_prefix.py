"""The soft-prefix reader: resampled tokens take the places of the image's placeholders."""

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
    ) -> None:
        super().__init__()
        self.resampler = resampler(vision=vision)
        self.num_tokens = self.resampler.num_tokens
        self.projection = nn.Linear(self.resampler.dim, decoder.dim)
        self.norm = nn.LayerNorm(decoder.dim) if match_embedding_scale else nn.Identity()
        if isinstance(self.norm, nn.LayerNorm):
            nn.init.constant_(self.norm.weight, decoder.embedding_std)

    def forward(self, vision: VisionFeatures, text: Instruction | None = None) -> BridgeOutput:
        tokens: Tensor = self.resampler(vision, text)
        return BridgeOutput(self.norm(self.projection(tokens)))
