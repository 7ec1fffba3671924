"""The Q-Former as a resampler: the query stream of BLIP-2's stage 2."""

import torch
from einops import rearrange, repeat
from torch import Tensor, nn

from bridges.contract import Instruction, Resampler, VisionFeatures, VisionShape
from qformer.layers import BERT_EPS, QFormerLayer


class QFormer(Resampler):
    """Learned queries read the image through every second layer of a BERT-shaped transformer.

    The queries have no position embedding but do pass the embedding LayerNorm; a trainable
    LayerNorm (`ln_vision`) sits on the image features. The text branch of stage 1 plays no part
    in stage 2 and is not built here.

    Args:
        vision: sizes of the encoder.
        num_queries: tokens per image.
        dim: width of the queries.
        depth: number of layers.
        num_heads: attention heads.
        ff_dim: inner width of the feed-forward; ``4 * dim`` by default.
        cross_attention_every: the image is read in layers 0, 2, 4, … by default.

    Shape: patches (b, i, p, d_vision) -> (b, i, num_queries, dim).

    Source: BLIP-2 (arXiv 2301.12597) section 3.1. Deviation: no dropout (BERT's 0.1).
    """

    def __init__(
        self,
        *,
        vision: VisionShape,
        num_queries: int = 32,
        dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        ff_dim: int | None = None,
        cross_attention_every: int = 2,
    ) -> None:
        super().__init__()
        self.num_tokens = num_queries
        self.dim = dim
        self.queries = nn.Parameter(torch.randn(num_queries, dim) * 0.02)
        self.embedding_norm = nn.LayerNorm(dim, eps=BERT_EPS)
        self.ln_vision = nn.LayerNorm(vision.dim)
        self.layers = nn.ModuleList(
            QFormerLayer(
                dim,
                vision.dim,
                num_heads,
                ff_dim or 4 * dim,
                cross_attention=layer % cross_attention_every == 0,
            )
            for layer in range(depth)
        )
        self.apply(_init_bert)

    def forward(self, vision: VisionFeatures, text: Instruction | None = None) -> Tensor:
        b, i = vision.patches.shape[:2]
        image = self.ln_vision(rearrange(vision.patches, "b i p d -> (b i) p d"))
        queries = repeat(self.embedding_norm(self.queries), "n d -> b n d", b=b * i)
        for layer in self.layers:
            queries = layer(queries, image)
        return rearrange(queries, "(b i) n d -> b i n d", b=b)


def _init_bert(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)
