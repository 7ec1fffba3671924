"""The caption loss, with vocabulary-sized logits only where labels are."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

IGNORE = -100
"""Label of the positions that carry no loss."""

CHUNK_ELEMENTS = 2**25
"""Logits held at once when the loss is chunked: 128 MiB in fp32."""


def label_positions(hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Hidden states that predict a label, and the labels.

    Shape: (b, t, d), long (b, t) -> (n, d), long (n).
    """
    targets = labels[:, 1:]
    wanted = targets != IGNORE
    return hidden[:, :-1][wanted], targets[wanted]


def token_losses(
    head: Callable[[Tensor], Tensor],
    hidden: Tensor,
    targets: Tensor,
    vocabulary: int,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Cross-entropy of each label, chunk by chunk with recomputation where there are many.

    Args:
        head: (n, d) -> (n, vocabulary).
        hidden: (n, d).
        targets: long (n).
        vocabulary: size of the vocabulary, from which the chunk size follows.
        label_smoothing: share of the target spread evenly over the vocabulary.

    Returns:
        (n), in nats.
    """

    def losses(hidden: Tensor, targets: Tensor) -> Tensor:
        logits = head(hidden).float()
        return F.cross_entropy(logits, targets, reduction="none", label_smoothing=label_smoothing)

    rows = max(1, CHUNK_ELEMENTS // vocabulary)
    if len(targets) <= rows:
        return losses(hidden, targets)
    return torch.cat(
        [
            # Keeping every chunk's logits for backward would undo the chunking.
            checkpoint(losses, h, t, use_reentrant=False)
            for h, t in zip(hidden.split(rows), targets.split(rows), strict=True)
        ]
    )
