"""Where the tokens of a pass through the Q-Former lie: no work on padding, one place for masks."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """Rows of [queries; text], held as one flat list of tokens without padding.

    The flat order is all queries, row by row, then all real text tokens, row by row: linear
    layers, norms and feed-forwards run on it, so that a query's and a text's part is a slice, and
    captions of 13 tokens in a batch of 32 cost 13. Attention alone sees padded rows.

    Attributes:
        rows: r.
        num_queries: n of each row.
        text: long (m), the place of each real text token among the ``r · t`` text slots, rising;
            None without text.
        length: t.
        mask: bool (r, n + t, n + t), True = may attend; None = all of it.
    """

    rows: int
    num_queries: int
    text: Tensor | None = None
    length: int = 0
    mask: Tensor | None = None

    @classmethod
    def of(
        cls, num_queries: int, text_mask: Tensor, visibility: Callable[[int, Tensor], Tensor]
    ) -> "Layout":
        """Queries and padded text, with a mask of `qformer.masks`.

        Args:
            num_queries: n.
            text_mask: bool (r, t); False marks padding.
            visibility: one of `qformer.masks`.
        """
        places = text_mask.flatten().nonzero().squeeze(1)
        mask = visibility(num_queries, text_mask)
        return cls(text_mask.shape[0], num_queries, places, text_mask.shape[1], mask)

    @property
    def query_tokens(self) -> int:
        """How many of the flat tokens are queries; text follows."""
        return self.rows * self.num_queries

    def heads(self, flat: Tensor, num_heads: int) -> Tensor:
        """Flat tokens (m, h · d) -> padded rows (r, h, n + t, d), zeros at padding."""
        queries = rearrange(
            flat[: self.query_tokens], "(r n) (h d) -> r h n d", r=self.rows, h=num_heads
        )
        if self.text is None:
            return queries
        slots = flat.new_zeros(self.rows * self.length, flat.shape[1])
        slots = slots.index_copy(0, self.text, flat[self.query_tokens :])
        text = rearrange(slots, "(r t) (h d) -> r h t d", r=self.rows, h=num_heads)
        return torch.cat([queries, text], dim=2)

    def flat(self, padded: Tensor) -> Tensor:
        """The inverse of `heads`: (r, h, n + t, d) -> (m, h · d)."""
        rows = rearrange(padded, "r h s d -> r s (h d)")
        queries = rows[:, : self.num_queries].flatten(0, 1)
        if self.text is None:
            return queries
        text = rows[:, self.num_queries :].flatten(0, 1)
        return torch.cat([queries, text.index_select(0, self.text)])

    def select(self, rows: Tensor) -> tuple["Layout", Tensor]:
        """Chosen rows, repeats allowed, and which flat tokens of this layout they are made of.

        Args:
            rows: long (r').

        Returns:
            The layout of the r' rows, and long (m') into this layout's flat tokens.
        """
        if self.text is None or self.mask is None:
            raise ValueError("found a layout without text; expected one made by Layout.of")
        real = self.text.new_zeros(self.rows * self.length, dtype=torch.bool)
        real[self.text] = True
        place = self.text.new_zeros(self.rows * self.length)
        place[self.text] = torch.arange(len(self.text), device=place.device)
        chosen = real.view(self.rows, self.length)[rows]
        text = place.view(self.rows, self.length)[rows][chosen] + self.query_tokens
        queries = torch.arange(self.query_tokens, device=rows.device)
        queries = queries.view(self.rows, self.num_queries)[rows].flatten()
        layout = Layout(
            len(rows),
            self.num_queries,
            chosen.flatten().nonzero().squeeze(1),
            self.length,
            self.mask[rows],
        )
        return layout, torch.cat([queries, text])
