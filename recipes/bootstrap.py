"""Intervals and tests over seeds and images, honest with two to five seeds.

A cell of an ablation is trained with S seeds, and each run is evaluated on the same N images. Its
figure is the mean of the runs' figures; a comparison is the mean of the differences to the
baseline's run with the same seed. Seeds and images are both samples (Clark 1973), and they are
crossed: every seed met every image. The error has two parts:

- **Seeds**: s²/S, where s² is the variance of the S figures (or differences), with S - 1 degrees
  of freedom. It holds what a seed does to all images, and its chance on each.
- **Images**: what the runs share because they saw the same images, with N - 1 degrees of freedom.
  N images are drawn with replacement, the same ones for every run of both cells, and each figure
  is computed anew from its sums (paired bootstrap, Koehn 2004); the part is N / (N - 1) times the
  covariance of the runs over the draws. This is the model of Obuchowski and Rockette (1995) for
  readers × cases, with seeds for readers. The total is at least the variance of the bootstrap over
  images alone: that seeds agree by chance makes no result more certain than that.

Each part has a half-width of Student's t, and the interval's is the root of the sum of their
squares (Banerjee 1960): with normal effects it covers at least as often as it says, whichever part
prevails. One t with Satterthwaite's degrees of freedom does not: with two seeds it rejects up to
13 % of true nulls at 5 %. p is the level of the test whose interval just touches 0: p < 0.05 if and
only if the 95 % interval excludes 0.

Seeds are not resampled: where three seeds happen to differ in one direction, as in 1 of 4
comparisons of equals, every resample does so too, and p would be 0.

Measured on normal effects in several mixtures, 50 images, 3000 comparisons of equals each: p < 0.05
in 0.5 to 5.0 % with two seeds, 0.6 to 4.9 % with three, 1.1 to 5.2 % with five. The bootstrap that
draws seeds too says so in up to 46, 28 and 17 % (of 600). The price: Student's t of the seeds' part
is 12.7 with two seeds, 4.3 with three, 2.8 with five. Where seeds prevail, a difference of three
standard deviations of a seed is found in 17, 48 and 93 % (of 400). One seed speaks of images only:
"these two sets of weights", never "these two bridges".

Not covered: the choice of data, split and learning rate; images that depend on each other (sum the
rows of several views of a scene); figures in which images meet, such as recall, whose gallery is
held fixed; effects far from normal: fewer than some 20 images, rare events, a seed in several that
diverges. Intervals are symmetric and may pass the end of a scale. `holm` corrects for the
comparisons it is given, not for those that were looked at and left out.

Source: Clark, J. Verbal Learning and Verbal Behavior 12 (1973), 335-359. Koehn, EMNLP 2004.
Obuchowski and Rockette, Comm. Statist. Simulation Comput. 24 (1995), 285-308. Banerjee, Sankhyā 22
(1960), 357-358. Holm, Scand. J. Statist. 6 (1979), 65-70. We deviate from Obuchowski and Rockette
in the floor, and in Banerjee's interval in place of an F test.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from scipy.optimize import root_scalar
from scipy.special import stdtr, stdtrit

COLUMNS = {"ratio": 2, **{f"bleu_{order}": 10 for order in (1, 2, 3, 4)}}
"""Sums of an image, by kind of figure."""

BLOCK = 2_000_000
"""Multiplicities that are held in memory at a time: 16 MB."""

ROUNDING = 1e-12
"""Differences below this share of the figures are none."""

SMALLEST = 1e-100
"""p that is told from 0."""


@dataclass(frozen=True, eq=False)
class Sums:
    """A figure of one run as a function of sums over images.

    Attributes:
        kind: ``ratio``: Σ first / Σ second; ``bleu_1`` … ``bleu_4``: corpus BLEU of up to so many
            words, as `recipes.metric_captions.bleu_of` has it.
        rows: (images, 2), or (images, 10) of clipped matches and guesses of 1 … 4 words, the
            caption's length and the reference's.

    Raises:
        ValueError: another kind or shape, sums that no evaluation gives, weights that sum to 0.
    """

    kind: str
    rows: np.ndarray

    def __post_init__(self) -> None:
        if self.kind not in COLUMNS:
            raise ValueError(f"found figure {self.kind!r}; expected one of {', '.join(COLUMNS)}")
        rows, columns = np.array(self.rows, dtype=np.float64), COLUMNS[self.kind]
        if rows.ndim != 2 or rows.shape[1] != columns or not len(rows):
            raise ValueError(
                f"found sums of shape {rows.shape} for {self.kind}; expected (images, {columns}), "
                "one row for each image"
            )
        counts = rows[:, 1:] if self.kind == "ratio" else rows
        wrong = ~np.isfinite(rows).all(axis=1) | (counts < 0).any(axis=1)
        if columns == 10:
            wrong |= (rows[:, :4] > rows[:, 4:8]).any(axis=1)
        if wrong.any():
            image = int(wrong.argmax())
            raise ValueError(
                f"found {rows[image].tolist()} as sums of image {image} for {self.kind}; expected "
                "finite ones, no weight or count below 0, no more matches than guesses: check the "
                "order of the columns, or leave the image out of every run"
            )
        rows.flags.writeable = False
        object.__setattr__(self, "rows", rows)
        self.value()  # a weight of 0 is found here, not after training

    def value(self) -> float:
        """The figure over all images."""
        return float(self._figures(self.rows.sum(axis=0)[None])[0])

    def resampled(self, counts: np.ndarray) -> np.ndarray:
        """The figure of each draw of images.

        Args:
            counts: (r, images), how often each image is in a draw.

        Returns:
            (r,)

        Raises:
            ValueError: a draw whose weights sum to 0.
        """
        return self._figures(np.asarray(counts, dtype=np.float64) @ self.rows)

    @classmethod
    def mean_of(cls, values: Sequence[float]) -> "Sums":
        """The mean of a value of each image."""
        column = np.asarray(values, dtype=np.float64)
        return cls("ratio", np.stack([column, np.ones_like(column)], axis=-1))

    def to_json(self) -> dict[str, Any]:
        """For `json.dump`; `from_json` restores it to the bit."""
        return {"kind": self.kind, "rows": self.rows.tolist()}

    @classmethod
    def from_json(cls, found: dict[str, Any]) -> "Sums":
        """Restores what `to_json` gave."""
        return cls(found["kind"], np.array(found["rows"], dtype=np.float64))

    def _figures(self, totals: np.ndarray) -> np.ndarray:
        """(r, k) -> (r,)."""
        if not (totals[:, -1] > 0).all():
            raise ValueError(
                f"found a weight of 0 over {len(self.rows)} images of {self.kind}, or over a draw "
                "of them; expected every image to weigh something: evaluate on more images"
            )
        if self.kind == "ratio":
            return totals[:, 0] / totals[:, 1]
        order = int(self.kind[-1])
        precision = (totals[:, :order] + 1e-15) / (totals[:, 4 : 4 + order] + 1e-9)
        shorter = (totals[:, 9] + 1e-9) / (totals[:, 8] + 1e-15)
        return np.exp(np.log(precision).mean(axis=1) + np.minimum(0.0, 1 - shorter))


class Interval(NamedTuple):
    """A figure, and where it is with the confidence asked for."""

    value: float
    low: float
    high: float


class Comparison(NamedTuple):
    """A figure less the baseline's, its interval, and p of the null that there is none."""

    difference: float
    low: float
    high: float
    p: float


def interval(
    runs: Sequence[Sums], *, resamples: int = 2000, seed: int = 0, level: float = 0.95
) -> Interval:
    """The mean figure of a cell's runs with its interval over seeds and images.

    One run alone has an interval over images: another seed may lie outside.

    Args:
        runs: one for each seed, of the same images in the same order.
        resamples: draws of images.
        seed: of the draws; the same seed gives the same interval to the bit.
        level: confidence.

    Raises:
        ValueError: runs of different kinds or numbers of images, fewer than two images with a part
            in the figure, or draws without any weight.
    """
    values, drawn, images = _draw(runs, resamples, seed, level)
    spread = _Spread.of(values, drawn, images, ROUNDING * np.abs(values).max())
    value, half = float(values.mean()), spread.half_width(1 - level)
    return Interval(value, value - half, value + half)


def compare(
    runs: Sequence[Sums],
    baseline: Sequence[Sums],
    *,
    resamples: int = 2000,
    seed: int = 0,
    level: float = 0.95,
) -> Comparison:
    """The mean difference of two cells, paired by image and by the place of the seed.

    One run against one speaks of images only: two seeds of one and the same cell may differ
    significantly. Where all images and seeds differ by exactly the same, there is no spread to
    measure by, and p is that of the sign test over images, 2^(1 - N).

    Args:
        runs: one for each seed, of the same images in the same order.
        baseline: as many, of the same images, with the same seeds in the same order.
        resamples: draws of images.
        seed: of the draws; the same seed gives the same result to the bit.
        level: confidence of the interval.

    Raises:
        ValueError: another number of runs than the baseline's; see also `interval`.
    """
    seeds = len(runs)
    if seeds != len(baseline):
        raise ValueError(
            f"found {seeds} runs and {len(baseline)} of the baseline; expected one of each for "
            "every seed: compare the seeds that both have"
        )
    values, drawn, images = _draw([*runs, *baseline], resamples, seed, level)
    rounding = ROUNDING * np.abs(values).max()
    differences = values[:seeds] - values[seeds:]
    spread = _Spread.of(differences, drawn[:, :seeds] - drawn[:, seeds:], images, rounding)
    difference = float(differences.mean())
    difference = 0.0 if abs(difference) <= rounding else difference
    half = spread.half_width(1 - level)
    return Comparison(difference, difference - half, difference + half, spread.p(difference))


def holm(p: Sequence[float]) -> list[float]:
    """p adjusted for as many comparisons, in the order given (Holm-Bonferroni).

    To call those below 0.05 significant is to be wrong about any of them in at most 5 % of
    ablations, however the comparisons depend on each other.

    Raises:
        ValueError: a p outside 0 … 1, or NaN.
    """
    wrong = [one for one in p if not 0 <= one <= 1]
    if wrong:
        raise ValueError(f"found p = {wrong[0]}; expected 0 to 1: leave failed comparisons out")
    adjusted, largest = [0.0] * len(p), 0.0
    for rank, place in enumerate(sorted(range(len(p)), key=p.__getitem__)):
        largest = max(largest, min(1.0, (len(p) - rank) * p[place]))
        adjusted[place] = largest
    return adjusted


def _draw(
    runs: Sequence[Sums], resamples: int, seed: int, level: float
) -> tuple[np.ndarray, np.ndarray, int]:
    """Figures of the runs (s,), those of the draws (r, s), and the number of images."""
    if resamples < 100 or not 0 < level < 1:
        raise ValueError(
            f"found {resamples} resamples at level {level}; expected at least 100, and a level "
            "between 0 and 1, such as 0.95"
        )
    found = sorted({(run.kind, len(run.rows)) for run in runs})
    if len(found) != 1:
        what = " and ".join(f"{kind} of {images} images" for kind, images in found) or "no runs"
        raise ValueError(
            f"found {what}; expected runs with one figure of the same images: evaluate all on one "
            "held-out set"
        )
    # An image whose sums are 0 everywhere (no question of this kind) has no part in the figure.
    part = np.any([run.rows.any(axis=1) for run in runs], axis=0)
    images = int(part.sum())
    if images < 2:
        raise ValueError(
            f"found {images} image with a part in {runs[0].kind}; expected at least 2 to see how "
            "images differ: evaluate on more"
        )
    runs = [Sums(run.kind, run.rows[part]) for run in runs]
    rng, drawn = np.random.default_rng(seed), []
    for start in range(0, resamples, size := max(1, BLOCK // images)):
        rows = min(size, resamples - start)
        places = rng.integers(images, size=(rows, images)) + np.arange(rows)[:, None] * images
        counts = np.bincount(places.ravel(), minlength=rows * images).reshape(rows, images)
        drawn.append(np.stack([run.resampled(counts) for run in runs], axis=1))
    return np.array([run.value() for run in runs]), np.concatenate(drawn), images


class _Spread(NamedTuple):
    """Variances of a mean over seeds that come of seeds and of images, and their numbers."""

    of_seeds: float
    of_images: float
    seeds: int
    images: int

    @classmethod
    def of(cls, values: np.ndarray, drawn: np.ndarray, images: int, rounding: float) -> "_Spread":
        """Of figures (s,) and those of draws of images (r, s)."""
        seeds, unbiased = len(values), images / (images - 1)
        whole = float(drawn.mean(axis=1).var(ddof=1)) * unbiased
        if seeds == 1:
            of_seeds, of_images = 0.0, whole
        else:
            of_seeds = float(values.var(ddof=1)) / seeds
            # whole is 1/S of the mean variance of a seed, and (S-1)/S of the mean covariance.
            alone = float(drawn.var(axis=0, ddof=1).mean()) * unbiased
            shared = (seeds * whole - alone) / (seeds - 1)
            of_images = max(shared, whole - of_seeds, 0.0)
        if math.sqrt(of_seeds + of_images) <= rounding:
            of_seeds = of_images = 0.0
        return cls(of_seeds, of_images, seeds, images)

    def half_width(self, alpha: float) -> float:
        """Of the interval that misses with probability alpha at most."""
        squares = self.of_images * _quantile(alpha, self.images) ** 2
        if self.of_seeds:
            squares += self.of_seeds * _quantile(alpha, self.seeds) ** 2
        return math.sqrt(squares)

    def p(self, difference: float) -> float:
        """The alpha whose half-width is the difference."""
        size, total = abs(difference), self.of_seeds + self.of_images
        if not size:
            return 1.0
        if not total:
            return 2.0 ** (1 - self.images)
        # If all came of images, or all of seeds: p lies between.
        t = size / math.sqrt(total)
        ends = [2 * float(stdtr(n - 1, -t)) for n in (self.images, self.seeds) if n > 1]
        low, high = (math.log(max(end, SMALLEST)) for end in (min(ends), max(ends)))

        def excess(log_alpha: float) -> float:
            return self.half_width(math.exp(log_alpha)) / size - 1

        # At an end, but for rounding.
        if excess(low) <= 0:
            return math.exp(low)
        if excess(high) >= 0:
            return math.exp(high)
        return math.exp(root_scalar(excess, bracket=(low, high), xtol=1e-12).root)


def _quantile(alpha: float, drawn: int) -> float:
    """The t that Student's |T| of so many draws exceeds with probability alpha."""
    return -float(stdtrit(drawn - 1, alpha / 2))
