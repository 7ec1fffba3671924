"""What the text of a document owes to each of its pictures: one exchanged at a time.

Text before the exchanged picture cannot change. If the LM reads the pictures, the text right after
it becomes less likely; how much later text does, shows how far a picture reaches.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from bridges.loss import IGNORE
from recipes.fewshot_documents import Chunk, DocumentPool
from recipes.fewshot_runner import Prompt, Runner, other_pictures


@dataclass(frozen=True)
class Exchange:
    """Losses of documents of k pictures, each with a text, with the right pictures and others.

    A chunk with several pictures side by side counts as one picture.

    Attributes:
        losses: (1 + k, n, k) summed over the tokens of each text in nats, fp64: of the documents
            as they are, then with the first, second, … picture of another document.
        tokens: (n, k), of each text, its end included.
        largest_change_before: of the loss of any token before an exchanged picture; 0 where no
            image reaches back.
    """

    losses: Tensor
    tokens: Tensor
    largest_change_before: float

    def summary(self) -> dict[str, Any]:
        """Losses per token, and their gaps (exchanged - right), for the JSON."""
        documents, texts = self.tokens.shape
        per_token = (self.losses.sum(dim=1) / self.tokens.sum(dim=0)).tolist()
        settings = ["right", *(f"image {k + 1}" for k in range(texts))]
        gaps = self.losses[1:] - self.losses[0]
        return {
            "images": texts,
            "documents": documents,
            "loss": dict(zip(settings, per_token, strict=True)),
            "gap": {
                setting: {
                    f"text {k + 1}": _mean(gap[:, k], self.tokens[:, k]) for k in range(texts)
                }
                for setting, gap in zip(settings[1:], gaps, strict=True)
            },
            "largest_change_before": self.largest_change_before,
        }


def exchange_pictures(runner: Runner, pool: DocumentPool, images: int = 2) -> Exchange:
    """Scores the last pictures and texts of documents, whole, with one picture exchanged at a time.

    The other picture is the one at the same place of the next document where it is another, see
    `other_pictures`. All settings go through
    the model in the same batches, of which only those patches differ, so that a difference is none
    of rounding.

    Args:
        runner: of the pool's patches; is told of ``images + 1`` passes of each document.
        pool: at least two documents.
        images: how many of the last pictures, each with its text.

    Raises:
        ValueError: fewer documents, documents of fewer pictures, or all of the same picture.
    """
    documents = [chunks[-images:] for chunks in pool.documents]
    if len(documents) < 2 or images < 1 or any(len(chunks) < images for chunks in documents):
        raise ValueError(
            f"found {len(documents)} documents of {min(map(len, documents), default=0)} pictures "
            f"or more; expected at least 2 documents of {images}, to exchange pictures: take more "
            "queries or fewer images"
        )
    rows = [Prompt(_ids(pool.bos, chunks), _pictures(chunks)) for chunks in documents]
    labels = [_labels(pool.bos, chunks) for chunks in documents]
    lengths = [[len(chunk.answer) for chunk in chunks] for chunks in documents]

    def texts(rows: Sequence[Prompt]) -> list[Sequence[Tensor]]:
        """The loss of each token of each text of each document."""
        pairs = zip(runner.losses(rows, labels), lengths, strict=True)
        return [losses.split(each) for losses, each in pairs]

    right = texts(rows)
    sums, change = [_sums(right)], 0.0
    for place in range(images):
        pictures = map(_pictures, _exchanged(documents, place))
        wrong = texts([replace(r, pictures=p) for r, p in zip(rows, pictures, strict=True)])
        sums.append(_sums(wrong))
        for before, after in zip(right, wrong, strict=True):
            for one, other in zip(before[:place], after[:place], strict=True):
                change = max(change, float((other - one).abs().max()))
    return Exchange(torch.stack(sums), torch.tensor(lengths), change)


def _exchanged(documents: Sequence[list[Chunk]], place: int) -> list[list[Chunk]]:
    """Every document with other documents' pictures at a place."""
    given = other_pictures([chunks[place].pictures for chunks in documents])
    return [
        [*chunks[:place], replace(chunks[place], pictures=pictures), *chunks[place + 1 :]]
        for chunks, pictures in zip(documents, given, strict=True)
    ]


def _ids(bos: Sequence[int], chunks: Sequence[Chunk]) -> list[int]:
    return [*bos, *(token for chunk in chunks for token in (*chunk.head, *chunk.answer))]


def _labels(bos: Sequence[int], chunks: Sequence[Chunk]) -> list[int]:
    hidden = [IGNORE] * len(bos)
    return hidden + [x for c in chunks for x in ([IGNORE] * len(c.head) + c.answer)]


def _pictures(chunks: Sequence[Chunk]) -> list[int]:
    return [row for chunk in chunks for row in chunk.pictures]


def _sums(texts: Sequence[Sequence[Tensor]]) -> Tensor:
    """(n, k), fp64."""
    return torch.stack([torch.stack([text.double().sum() for text in row]) for row in texts])


def _mean(gaps: Tensor, tokens: Tensor) -> dict[str, float]:
    """Mean per token of summed gaps (n), and its standard error over the documents.

    A document weighs as much as it has tokens, as in the losses; the error is that of a ratio of
    two sums, to first order.
    """
    mean, count = gaps.sum() / tokens.sum(), len(gaps)
    spread = (gaps - mean * tokens).square().sum()
    error = math.sqrt(float(spread) * count / (count - 1)) / float(tokens.sum())
    return {"mean": float(mean), "se": error}
