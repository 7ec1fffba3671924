"""Retrieval by a stage-1 Q-Former: ranking by ITC, re-ranking by ITM, recall at k.

N images, M texts; `owners`, long (M,), says which image each text describes. A row's right columns
are those of its own image: a text has one, an image as many as it has texts. A text that stands
word for word under another image as well still counts for its own image only, as in the published
figures (COCO, Flickr30k). `count_duplicates` says how many there are: which of their images is
meant, nobody can know.

Source: BLIP-2 (arXiv 2301.12597) section 4.4: ITC picks the first 128, ITM re-ranks them.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torchmetrics.retrieval import RetrievalHitRate

KS = (1, 5, 10)
"""Where recall is published."""

BELOW = -100.0
"""What is added to the similarity of a pair that was not re-ranked: below every one that was."""

Match = Callable[[Tensor, Tensor], Tensor]
"""ITM of pairs: images long (c,), texts long (c,) -> logits of "they belong together" (c,)."""


def itc_similarity(images: Tensor, texts: Tensor, *, max_elements: int = 2**25) -> Tensor:
    """Similarity of every image with every text: the maximum over the image's queries.

    Computed for a few images at a time, so that N × n × M never lies in memory.

    Args:
        images: (N, n, e), L2-normalised.
        texts: (M, e), L2-normalised.
        max_elements: numbers held at a time for the maximum (128 MiB of fp32 by default).

    Returns:
        (N, M), in -1…1.
    """
    rows = max(1, max_elements // max(1, images.shape[1] * len(texts)))
    similarity = images.new_empty(len(images), len(texts))
    for start in range(0, len(images), rows):
        chunk = images[start : start + rows]
        similarity[start : start + rows] = (chunk @ texts.T).amax(dim=1)
    return similarity


def rerank(similarity: Tensor, match: Match, top_k: int = 128) -> tuple[Tensor, Tensor]:
    """Scores in which the first `top_k` of every row and of every column are judged by ITM.

    Their score is the ITM logit + the ITC similarity; the others keep their order by ITC, below.
    A pair that is among the first in both directions is matched once.

    Args:
        similarity: (N, M), from `itc_similarity`.
        match: called once with all pairs, those of an image one after another.
        top_k: candidates of each image and of each text; all there are, if fewer.

    Returns:
        Scores of texts for each image (N, M), and of images for each text (M, N).

    Source: as LAVIS evaluates, which has a flat -100 for the others; the difference is seen only
    in recall at k > top_k, where a flat value leaves the order to chance.
    """
    n, m = similarity.shape
    by_image = torch.arange(n, device=similarity.device)[:, None] * m + first(similarity, top_k)
    by_text = first(similarity.T, top_k) * m + torch.arange(m, device=similarity.device)[:, None]
    pairs, place = torch.cat([by_image.flatten(), by_text.flatten()]).unique(return_inverse=True)
    logits = match(pairs // m, pairs % m).to(similarity)
    scores = logits + similarity.flatten()[pairs]
    image_scores = (similarity + BELOW).flatten()
    text_scores = image_scores.clone()
    image_scores[by_image.flatten()] = scores[place[: by_image.numel()]]
    text_scores[by_text.flatten()] = scores[place[by_image.numel() :]]
    return image_scores.view(n, m), text_scores.view(n, m).T


def first(scores: Tensor, k: int, *, seed: int = 0) -> Tensor:
    """The columns with the k highest scores of each row, the best first.

    Ties are broken at random, the same way every time: the order of the columns often is that of
    the rows, and would hand a tie to the right column.

    Shape: (rows, columns) -> long (rows, min(k, columns)).

    Raises:
        ValueError: a score is NaN, which would rank first.
    """
    if scores.isnan().any():
        rows = int(scores.isnan().any(dim=1).sum())
        raise ValueError(
            f"found NaN in {rows} of {len(scores)} rows of scores; expected numbers: the "
            "embeddings overflowed, or the checkpoint is of a run that had diverged"
        )
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(scores.shape[1], generator=generator).to(scores.device)
    return order[scores[:, order].topk(min(k, scores.shape[1]), dim=1).indices]


def recall_at(
    scores: Tensor, row_owners: Tensor, column_owners: Tensor, ks: Sequence[int] = KS
) -> dict[str, float]:
    """Share of rows that have a right column among their first k.

    Args:
        scores: (rows, columns).
        row_owners: long (rows,), the image that each row is, or describes.
        column_owners: long (columns,), likewise; a column with a row's image is right for it.
        ks: the k's.

    Returns:
        ``{"recall@1": …, …}``, in 0…1.
    """
    ranked = first(scores, max(ks))
    right = column_owners[ranked] == row_owners[:, None]
    # A position's score is its rank: no tie is left for the metric to break.
    positions = -torch.arange(ranked.shape[1], device=scores.device).float().expand_as(right)
    rows = torch.arange(len(right), device=scores.device)[:, None].expand_as(right)
    # A row without a right column among its first max(ks) is a miss at every k ("neg").
    metrics = {k: RetrievalHitRate(top_k=k, empty_target_action="neg") for k in ks}
    return {
        f"recall@{k}": float(metric(positions, right, indexes=rows))
        for k, metric in metrics.items()
    }


def chance_recall(right: Tensor, columns: int, ks: Sequence[int] = KS) -> dict[str, float]:
    """Recall of a ranking at random.

    Args:
        right: long (rows,), how many of the columns are right for each row.
        columns: how many there are.
        ks: the k's.
    """
    wrong, miss = (columns - right).double(), torch.ones(len(right), dtype=torch.float64)
    found: dict[int, float] = {}
    for draw in range(max(ks)):
        # One more column, drawn without replacement; no miss once no wrong column is left.
        miss = miss * (wrong.cpu() - draw).clamp(min=0) / max(1, columns - draw)
        found[draw + 1] = float(1 - miss.mean())
    return {f"recall@{k}": found[k] for k in ks}


def count_duplicates(texts: Sequence[str], owners: Tensor) -> int:
    """How many texts stand word for word under another image too.

    Case and spacing make no difference: to an uncased tokenizer they are none.

    Args:
        texts: M of them.
        owners: long (M,), the image of each.
    """
    wordings = [" ".join(text.lower().split()) for text in texts]
    images: dict[str, set[int]] = {}
    for wording, owner in zip(wordings, owners.tolist(), strict=True):
        images.setdefault(wording, set()).add(owner)
    return sum(len(images[wording]) > 1 for wording in wordings)
