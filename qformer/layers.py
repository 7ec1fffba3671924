"""The transformer layer of BLIP-2's Q-Former, query stream."""

from torch import Tensor, nn

from bridges.attention import Attention
from bridges.feed_forward import FeedForward

BERT_EPS = 1e-12
"""LayerNorm epsilon of BERT's layers, which the Q-Former inherits."""


class QFormerLayer(nn.Module):
    """A BERT layer (post-norm) whose queries may also read the image.

    Order: self-attention, cross-attention into the image (only where `cross_attention`), the
    queries' own feed-forward; each followed by add and LayerNorm.

    Args:
        dim: width of the queries.
        vision_dim: width of the image features.
        num_heads: attention heads.
        ff_dim: inner width of the feed-forward.
        cross_attention: whether this layer reads the image (every second one does).

    Source: BLIP-2 (arXiv 2301.12597) section 3.1.
    """

    def __init__(
        self, dim: int, vision_dim: int, num_heads: int, ff_dim: int, *, cross_attention: bool
    ) -> None:
        super().__init__()
        self.self_attention = Attention(dim, num_heads=num_heads, bias=True)
        self.self_norm = nn.LayerNorm(dim, eps=BERT_EPS)
        self.cross_attention = (
            Attention(dim, vision_dim, num_heads=num_heads, bias=True) if cross_attention else None
        )
        self.cross_norm = nn.LayerNorm(dim, eps=BERT_EPS) if cross_attention else None
        self.query_ff = FeedForward(dim, ff_dim, "gelu", bias=True)
        self.query_norm = nn.LayerNorm(dim, eps=BERT_EPS)

    def forward(self, queries: Tensor, image: Tensor) -> Tensor:
        """Shape: queries (b, n, d), image (b, p, d_vision) -> (b, n, d)."""
        attended = self.self_attention(queries, self.self_attention.project(queries))
        queries = self.self_norm(queries + attended)
        if self.cross_attention is not None and self.cross_norm is not None:
            read = self.cross_attention(queries, self.cross_attention.project(image))
            queries = self.cross_norm(queries + read)
        return self.query_norm(queries + self.query_ff(queries))
