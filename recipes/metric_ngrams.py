"""N-grams of captions: counts, TF-IDF, and the clipped cosine of CIDEr-D."""

import math
from collections import Counter
from collections.abc import Sequence

NGram = tuple[str, ...]


class TfIdf:
    """How often an n-gram stands in a text, times how rare it is among images.

    Args:
        documents: in how many images' references each n-gram stands.
        images: how many images there are.
        n: the longest n-gram.
    """

    def __init__(self, documents: Counter[NGram], images: int, n: int) -> None:
        self.documents = documents
        self.log_images = math.log(max(1, images))
        self.n = n

    def vectors(self, words: Sequence[str]) -> list[dict[NGram, float]]:
        """Of a text, a vector for each length of n-gram."""
        found: list[dict[NGram, float]] = [{} for _ in range(self.n)]
        for ngram, count in counted(words, self.n).items():
            # What stands in no reference is as rare as what stands in those of one image.
            rarity = self.log_images - math.log(max(1, self.documents[ngram]))
            found[len(ngram) - 1][ngram] = count * rarity
        return found


def counted(words: Sequence[str], n: int) -> Counter[NGram]:
    """How often each n-gram of 1 to `n` words stands in a text."""
    return Counter(
        tuple(words[start : start + size])
        for size in range(1, n + 1)
        for start in range(len(words) - size + 1)
    )


def clipped_cosine(written: dict[NGram, float], right: dict[NGram, float]) -> float:
    """Cosine, but what is written more often than in the reference counts only as often."""
    both = written.keys() & right.keys()
    product = sum(min(written[ngram], right[ngram]) * right[ngram] for ngram in both)
    norms = math.hypot(*written.values()) * math.hypot(*right.values())
    return product / norms if norms else 0.0
