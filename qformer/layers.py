"""The transformer layer of BLIP-2's Q-Former."""

import torch
from einops import rearrange
from torch import Tensor, nn

from bridges.attention import Attention, attend
from bridges.feed_forward import FeedForward
from bridges.precision import as_autocast
from qformer.layout import Layout

BERT_EPS = 1e-12
"""LayerNorm epsilon of BERT's layers, which the Q-Former inherits."""

Projected = tuple[Tensor, Tensor]
"""Keys and values of one layer's image: two (b, h, p, d)."""


class QFormerLayer(nn.Module):
    """A BERT layer (post-norm) whose queries may also read the image.

    Order: self-attention over queries and text, with shared weights; cross-attention of the
    queries into the image (only where `cross_attention`); a feed-forward for the queries and
    another one for the text; each followed by add and LayerNorm.

    Args:
        dim: width of queries and text.
        vision_dim: width of the image features.
        num_heads: attention heads.
        ff_dim: inner width of the feed-forwards.
        cross_attention: whether this layer reads the image (every second one does).
        text_branch: whether there is a feed-forward for text.

    Source: BLIP-2 (arXiv 2301.12597) section 3.1.
    """

    def __init__(
        self,
        dim: int,
        vision_dim: int,
        num_heads: int,
        ff_dim: int,
        *,
        cross_attention: bool,
        text_branch: bool = False,
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
        self.text_ff = FeedForward(dim, ff_dim, "gelu", bias=True) if text_branch else None
        self.text_norm = nn.LayerNorm(dim, eps=BERT_EPS) if text_branch else None

    def attend(self, x: Tensor, layout: Layout, keep: Tensor | None = None) -> Tensor:
        """Self-attention, add and norm.

        Args:
            x: flat tokens (m, d).
            layout: of them.
            keep: long (m'), the tokens that are wanted afterwards; all by default.

        Returns:
            (m', d).
        """
        block, low = self.self_attention, as_autocast(x)
        q, k, v = (layout.heads(p(low), block.num_heads) for p in (block.q, block.k, block.v))
        mask = layout.mask[:, None] if layout.mask is not None else None
        out = layout.flat(attend(q, k, v, mask))
        if keep is not None:
            x, out = x.index_select(0, keep), out.index_select(0, keep)
        return self.self_norm(x + block.out(out))

    def read(self, queries: Tensor, rows: int, own: Projected, other: Projected | None) -> Tensor:
        """Cross-attention into the image, add and norm; for layers that have it.

        Args:
            queries: (r · n, d).
            rows: r.
            own: keys and values of b images, for the first rows, which go round them in turn.
            other: keys and values of the rows left over, one image each, or None.

        Returns:
            (r · n, d).
        """
        block = self.cross_attention
        assert block is not None and self.cross_norm is not None
        q = rearrange(block.q(queries), "(r n) (h d) -> r h n d", r=rows, h=block.num_heads)
        images = len(own[0])
        repeats = (rows - (len(other[0]) if other is not None else 0)) // images
        # All rows of an image in one attention, so that its keys are not copied for each of them.
        merged = rearrange(q[: repeats * images], "(f b) h n d -> b h (f n) d", f=repeats)
        out = attend(merged, own[0].to(q.dtype), own[1].to(q.dtype))
        out = rearrange(out, "b h (f n) d -> (f b n) (h d)", f=repeats)
        if other is not None:
            rest = attend(q[repeats * images :], other[0].to(q.dtype), other[1].to(q.dtype))
            out = torch.cat([out, rearrange(rest, "r h n d -> (r n) (h d)")])
        return self.cross_norm(queries + block.out(out))

    def feed_queries(self, queries: Tensor) -> Tensor:
        """The queries' feed-forward, add and norm: (m, d) -> (m, d)."""
        return self.query_norm(queries + self.query_ff(queries))

    def feed_text(self, text: Tensor) -> Tensor:
        """The text's feed-forward, add and norm: (m, d) -> (m, d)."""
        assert self.text_ff is not None and self.text_norm is not None
        return self.text_norm(text + self.text_ff(text))
