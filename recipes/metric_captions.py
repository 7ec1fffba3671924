"""CIDEr-D, BLEU, ROUGE-L with the figures of COCO's official scorer, and exact match."""

import math
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from recipes.fewshot_match import same_text
from recipes.metric_ngrams import NGram, TfIdf, clipped_cosine, counted
from recipes.metric_rows import PerImage, PerImageMean, check_pairs, mean, total
from recipes.metric_texts import CaptionTexts
from recipes.metric_tokens import ptb_tokens

MAX_N = 4
"""BLEU counts n-grams of 1 to 4 words."""


class CiderD(CaptionTexts):
    """CIDEr-D of the corpus: the mean over the images, in 0…10.

    The document frequencies are those of the references at hand: figures of different sets of
    images, or of one image, do not compare (one image alone has 0, as every n-gram is in all
    documents). pycocoevalcap calls it CIDEr.

    Args:
        n: n-grams of 1 to n words.
        sigma: width of the Gaussian penalty on a length that differs.

    Source: Vedantam et al. (arXiv 1411.5726); the figures are those of pycocoevalcap's ``Cider``.
    """

    higher_is_better = True

    def __init__(self, n: int = 4, sigma: float = 6.0) -> None:
        super().__init__()
        self.n = n
        self.sigma = sigma

    def compute(self) -> Tensor:
        """The mean over the images, fp64.

        Raises:
            ValueError: no image yet.
        """
        return mean(self._each())

    def _each(self) -> Tensor:
        images = self.captions()
        documents: Counter[NGram] = Counter()
        for _, *references in images:
            documents.update(set().union(*(counted(words, self.n) for words in references)))
        weights = TfIdf(documents, len(images), self.n)
        scores = [self._score(prediction, rights, weights) for prediction, *rights in images]
        return torch.tensor(scores, dtype=torch.float64, device=self.device)

    def _score(
        self, prediction: Sequence[str], references: Sequence[Sequence[str]], weights: TfIdf
    ) -> float:
        written = weights.vectors(prediction)
        agreement = 0.0
        for reference in references:
            cosines = map(clipped_cosine, written, weights.vectors(reference))
            gap = len(prediction) - len(reference)
            agreement += sum(cosines) * math.exp(-(gap**2) / (2 * self.sigma**2))
        return 10.0 * agreement / self.n / len(references)


class Bleu(PerImage):
    """BLEU-1 to BLEU-4 of the corpus, the reference closest in length (of two, the shorter one).

    torchmetrics' BLEUScore is another figure: a corpus without a match of four words has 0 there
    and some 1e-4 here; of two references as close in length it takes the one given first; and it
    adds up in fp32.

    Source: Papineni et al. 2002; pycocoevalcap's ``Bleu``, whose 1e-15 in the numerators and 1e-9
    in the denominators are kept.
    """

    higher_is_better = True

    def __init__(self) -> None:
        super().__init__()
        self.add_rows("sums", 2 * MAX_N + 2)

    def update(self, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> None:
        """Adds images.

        Args:
            predictions: one caption for each.
            references: the right ones of each.
        """
        check_pairs(predictions, references)
        pairs = zip(predictions, references, strict=True)
        self.append("sums", [_bleu_sums(text, right) for text, right in pairs])

    def compute(self) -> dict[str, float]:
        """``{"bleu_1": …, … "bleu_4": …}``, in 0…1.

        Raises:
            ValueError: no image yet.
        """
        return bleu_of(total(self.rows("sums")))

    def per_image_sums(self) -> Tensor:
        """What BLEU is made of, for each image: add rows up, and give the sum to `bleu_of`.

        Returns:
            (N, 10): matches of 1 to 4 words, n-grams written of 1 to 4 words, words written, words
            of the closest reference.
        """
        with self.sync_context():
            return self.rows("sums")

    def _each(self) -> Tensor:
        """BLEU-4 of each image alone."""
        scores = [bleu_of(row)["bleu_4"] for row in self.rows("sums")]
        return torch.tensor(scores, dtype=torch.float64, device=self.device)


def bleu_of(sums: Tensor) -> dict[str, float]:
    """BLEU-1 to BLEU-4 of a sum of rows of `Bleu.per_image_sums`.

    Args:
        sums: (10,).
    """
    matches, written = sums[:MAX_N].tolist(), sums[MAX_N : 2 * MAX_N].tolist()
    words, right = sums[2 * MAX_N :].tolist()
    ratio = (words + 1e-15) / (right + 1e-9)
    brevity = math.exp(1 - 1 / ratio) if ratio < 1 else 1.0
    scores, product = {}, 1.0
    for n in range(1, MAX_N + 1):
        product *= (matches[n - 1] + 1e-15) / (written[n - 1] + 1e-9)
        scores[f"bleu_{n}"] = product ** (1 / n) * brevity
    return scores


class RougeL(PerImageMean):
    """ROUGE-L, the mean over the images.

    Precision and recall of the longest common subsequence, each the best over the references, which
    need not be the same one; then F with beta 1.2. torchmetrics' ROUGEScore is another formula: F
    with beta 1 of one reference at a time, and words stripped of all but letters and digits.

    Source: Lin 2004; pycocoevalcap's ``Rouge``. As there, an empty caption counts as one word that
    only an empty reference has.
    """

    BETA = 1.2

    def update(self, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> None:
        """Adds images; the arguments are those of `Bleu.update`."""
        check_pairs(predictions, references)
        pairs = zip(predictions, references, strict=True)
        self.append("scores", [self._score(text, right) for text, right in pairs])

    def _score(self, prediction: str, references: Sequence[str]) -> float:
        written = ptb_tokens(prediction) or [""]
        rights = [ptb_tokens(reference) or [""] for reference in references]
        common = [_longest_common(written, right) for right in rights]
        precision = max(common) / len(written)
        recall = max(found / len(right) for found, right in zip(common, rights, strict=True))
        if not precision or not recall:
            return 0.0
        square = self.BETA**2
        return (1 + square) * precision * recall / (recall + square * precision)


class ExactMatch(PerImageMean):
    """Share of predictions that equal one of the right texts, as `same_text` compares them."""

    def update(self, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> None:
        """Adds images; the arguments are those of `Bleu.update`."""
        check_pairs(predictions, references)
        pairs = zip(predictions, references, strict=True)
        self.append("scores", [float(same_text(text, right)) for text, right in pairs])


def _bleu_sums(prediction: str, references: Sequence[str]) -> list[int]:
    words = ptb_tokens(prediction)
    rights = [ptb_tokens(reference) for reference in references]
    most: Counter[NGram] = Counter()
    for right in rights:
        most |= counted(right, MAX_N)
    matches = [0] * MAX_N
    for ngram, count in (counted(words, MAX_N) & most).items():
        matches[len(ngram) - 1] += count
    written = [max(0, len(words) - n) for n in range(MAX_N)]
    closest = min((abs(len(right) - len(words)), len(right)) for right in rights)[1]
    return [*matches, *written, len(words), closest]


def _longest_common(one: Sequence[str], other: Sequence[str]) -> int:
    """Length of the longest common subsequence."""
    above = [0] * (len(other) + 1)
    for word in one:
        row = [0]
        for column, against in enumerate(other):
            match = above[column] + 1 if word == against else max(row[-1], above[column + 1])
            row.append(match)
        above = row
    return above[-1]
