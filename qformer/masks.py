"""Who sees whom in a Q-Former, as pure functions.

Rows attend, columns are attended to; both are ordered [queries; text]. True = may attend. Columns
of padded text are False everywhere; what the rows of padded text see does not matter, nobody
reads them. n queries, t text positions.

Source: BLIP-2 (arXiv 2301.12597) figure 2; InstructBLIP (arXiv 2305.06500) figure 3.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def itc_mask(num_queries: int, text_mask: Tensor) -> Tensor:
    """Image-text contrast: two separate streams, neither sees the other.

    Args:
        num_queries: n.
        text_mask: bool (b, t); False marks padding.

    Returns:
        bool (b, n + t, n + t).
    """
    text = _is_text(num_queries, text_mask)
    # Not "==", which torch.compile cannot take of booleans on a CPU.
    return _real(num_queries, text_mask) & ~(text[:, None] ^ text[None, :])


def itm_mask(num_queries: int, text_mask: Tensor) -> Tensor:
    """Image-text matching: everything sees everything. Arguments as for `itc_mask`."""
    size = num_queries + text_mask.shape[1]
    return _real(num_queries, text_mask).expand(-1, size, -1)


def itg_mask(num_queries: int, text_mask: Tensor) -> Tensor:
    """Image-grounded generation: queries see queries; text sees the queries and its own past.

    So text reaches the image through the queries alone, and these do not see the text that is to
    be written. Arguments as for `itc_mask`.
    """
    text = _is_text(num_queries, text_mask)
    place = torch.arange(len(text), device=text.device)
    # All queries come first: a causal mask over everything, opened among the queries.
    sees = (place[:, None] >= place[None, :]) | ~text[:, None] & ~text[None, :]
    return _real(num_queries, text_mask) & sees


def instruction_mask(num_queries: int, text_mask: Tensor) -> Tensor:
    """InstructBLIP: queries and instruction see one another. Arguments as for `itc_mask`."""
    return itm_mask(num_queries, text_mask)


def itc_itg_mask(num_queries: int, text_mask: Tensor) -> Tensor:
    """ITC and ITG in one pass: [queries; text; the same text again], for contrast and to write.

    The query stream of both objectives is the same one, for it sees no text in either.

    Args:
        num_queries: n.
        text_mask: bool (b, t); False marks padding.

    Returns:
        bool (b, n + 2 t, n + 2 t).
    """
    n, t = num_queries, text_mask.shape[1]
    itc, itg = itc_mask(n, text_mask), itg_mask(n, text_mask)
    contrast = F.pad(itc, (0, t, 0, 0))
    nothing = torch.zeros_like(itg[:, n:, n:])
    generation = torch.cat([itg[:, n:, :n], nothing, itg[:, n:, n:]], dim=2)
    return torch.cat([contrast, generation], dim=1)


def _real(num_queries: int, text_mask: Tensor) -> Tensor:
    """Columns that hold something: bool (b, 1, n + t)."""
    return F.pad(text_mask, (num_queries, 0), value=True)[:, None]


def _is_text(num_queries: int, text_mask: Tensor) -> Tensor:
    """Which positions are text: bool (n + t)."""
    size = num_queries + text_mask.shape[1]
    return torch.arange(size, device=text_mask.device) >= num_queries
