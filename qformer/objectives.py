"""The formulas of BLIP-2's stage 1: similarity, contrast, and the draw of hard negatives.

b samples of this rank, g of all ranks (this rank's among them), n queries, e width.
"""

import torch
from einops import rearrange
from torch import Tensor


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


def draw_negatives(logits: Tensor, allowed: Tensor, noise: Tensor) -> Tensor:
    """Draws a hard negative for each row from softmax(logits) over what is allowed.

    The draw is the largest of logits plus Gumbel noise, which has that distribution; ranks that
    share the noise draw what one process would.

    Args:
        logits: (b, g).
        allowed: bool (b, g).
        noise: (b, g), uniform in 0…1.

    Returns:
        Columns, long (b); one that means nothing where a row may draw none.
    """
    noise = noise.clamp(1e-20, 1 - 1e-7)
    scores = logits.detach().float() - torch.log(-torch.log(noise))
    return scores.masked_fill(~allowed, -torch.inf).argmax(dim=1)
