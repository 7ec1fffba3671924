"""The formulas of BLIP-2's stage 1: similarity, contrast, and the draw of hard negatives.

b samples of this rank, g of all ranks (this rank's among them), n queries, e width.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from qformer.gather import joined_mean


def similarity(images: Tensor, texts: Tensor) -> Tensor:
    """How well each text fits each image: the best of the image's queries, (i, j).

    Args:
        images: (i, n, e), L2-normalised.
        texts: (j, e), L2-normalised.
    """
    scores = rearrange(images, "i n e -> (i n) e") @ texts.T
    return rearrange(scores, "(i n) j -> i n j", i=len(images)).amax(dim=1)


def contrastive_loss(
    logits: Tensor, own: Tensor, allowed: Tensor, label_smoothing: float = 0.0
) -> Tensor:
    """Cross-entropy of picking one's own counterpart among the candidates, for each sample: (b).

    Args:
        logits: (b, g), similarity over temperature.
        own: long (b), column of the counterpart.
        allowed: bool (b, g), candidates that count: the counterpart and the true negatives.
        label_smoothing: share of the target that is spread evenly over all candidates allowed.
    """
    log_probabilities = logits.masked_fill(~allowed, -torch.inf).log_softmax(dim=1)
    picked = log_probabilities.gather(1, own[:, None]).squeeze(1)
    spread = log_probabilities.masked_fill(~allowed, 0.0).sum(dim=1) / allowed.sum(dim=1)
    return -((1 - label_smoothing) * picked + label_smoothing * spread)


def soft_contrastive_loss(logits: Tensor, targets: Tensor, allowed: Tensor) -> Tensor:
    """Cross-entropy with soft targets, for each sample: (b).

    Args:
        logits: (b, c).
        targets: (b, c), rows sum to 1; zero where not allowed.
        allowed: bool (b, c).

    Source: ALBEF (arXiv 2107.07651) equation 6.
    """
    log_probabilities = logits.masked_fill(~allowed, -torch.inf).log_softmax(dim=1)
    return -(targets * log_probabilities.masked_fill(~allowed, 0.0)).sum(dim=1)


def matching_loss(logits: Tensor, exists: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy, over the batch of all ranks, and accuracy of ITM.

    Args:
        logits: (3, b, 2), of the pairs, of negative texts, of negative images.
        exists: bool (b), which samples have a negative at all; the others' do not count.
    """
    counts = torch.stack([torch.ones_like(exists), exists, exists])
    targets = torch.zeros(counts.shape, dtype=torch.long, device=logits.device)
    targets[0] = 1
    losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    right = (logits.argmax(dim=-1) == targets)[counts]
    return joined_mean(losses[counts.flatten()]), right.float().mean()


def draw_negatives(logits: Tensor, allowed: Tensor, noise: Tensor) -> Tensor:
    """Draws a hard negative for each row from softmax(logits) over what is allowed.

    Ranks that share the noise draw what one process would.

    Args:
        logits: (b, g).
        allowed: bool (b, g).
        noise: (b), uniform in 0…1: the place in each row's cumulative distribution.

    Returns:
        Columns, long (b); one that means nothing where a row may draw none.
    """
    masked = logits.detach().double().masked_fill(~allowed, -torch.inf)
    reached = masked.softmax(dim=1).nan_to_num().cumsum(dim=1)
    # Not beyond the last column allowed, whatever rounding says.
    place = (noise.double() * reached[:, -1]).clamp(max=1.0 - 1e-12)[:, None]
    drawn = torch.searchsorted(reached, place, right=True).squeeze(1)
    last = (allowed * torch.arange(allowed.shape[1], device=allowed.device)).amax(dim=1)
    return drawn.minimum(last)
