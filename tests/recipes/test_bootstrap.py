"""Intervals and tests over seeds and images: what they promise, by simulation and by hand."""

import itertools
import json
import math

import numpy as np
import pytest

from recipes.bootstrap import Sums, _Spread, compare, holm, interval
from recipes.metric_captions import Bleu

IMAGES = 50


def effects(rng, seeds, *, seed=0.0, image=0.0, chance=0.0, images=IMAGES) -> np.ndarray:
    """(seeds, images): normal effects of seeds, of images and of both together."""
    shape = (seeds, images)
    of_seeds, of_images = rng.normal(size=(seeds, 1)), rng.normal(size=(1, images))
    return seed * of_seeds + image * of_images + chance * rng.normal(size=shape)


def cell(values: np.ndarray) -> list[Sums]:
    return [Sums.mean_of(row) for row in values]


def naive(differences: np.ndarray, rng: np.random.Generator) -> float:
    """p of the bootstrap that draws seeds and images, as one would write it first."""
    seeds, images = differences.shape
    rows = rng.integers(seeds, size=(200, seeds))[:, :, None]
    columns = rng.integers(images, size=(200, images))[:, None]
    means = differences[rows, columns].mean(axis=(1, 2))
    return 2 * min((means <= 0).mean(), (means >= 0).mean())


def captions(seed: int, images: int = 30) -> np.ndarray:
    """(images, 10): sums as of captions of 3 … 12 words."""
    rng = np.random.default_rng(seed)
    length = rng.integers(3, 13, size=images)
    guesses = np.maximum(length[:, None] - np.arange(4), 0)
    matches = rng.binomial(guesses, [0.8, 0.6, 0.5, 0.4])
    reference = np.maximum(length + rng.integers(-2, 5, size=images), 1)
    return np.column_stack([matches, guesses, length, reference]).astype(float)


# --- figures


def test_a_ratio_is_the_mean_weighted_by_the_second_sum():
    rng = np.random.default_rng(0)
    values, weights = rng.normal(size=20), rng.integers(0, 5, size=20).astype(float)
    sums = Sums("ratio", np.stack([values * weights, weights], axis=1))
    assert sums.value() == pytest.approx(np.average(values, weights=weights), abs=1e-12)
    assert Sums.mean_of(values).value() == pytest.approx(values.mean(), abs=1e-12)


@pytest.mark.parametrize("order", [1, 2, 3, 4])
@pytest.mark.parametrize("shorter", [0, 3])
def test_bleu_is_the_formula_of_the_paper(order, shorter):
    rows = captions(1)
    rows[:, 9] = np.maximum(rows[:, 9] - shorter, 0)
    assert (rows[:, 8].sum() > rows[:, 9].sum()) == bool(shorter)  # both sides of the penalty
    total = rows.sum(axis=0)
    precision = math.prod(total[n] / total[4 + n] for n in range(order)) ** (1 / order)
    brevity = 1.0 if total[8] > total[9] else math.exp(1 - total[9] / total[8])
    value = Sums(f"bleu_{order}", rows).value()
    assert value == pytest.approx(precision * brevity, abs=1e-9)


def test_bleu_is_that_of_the_metric():
    said = ["a red cat on a mat", "two dogs", "", "a bird on the blue sea today"]
    right = [["a cat on a mat"], ["two dogs", "dogs that run"], ["a fox"], ["a bird on the sea"]]
    for shown in (slice(0, 4), slice(1, 3)):  # with and without a match of four words
        metric = Bleu()
        metric.update(said[shown], right[shown])
        rows = metric.per_image_sums().numpy()
        found = {f"bleu_{n}": Sums(f"bleu_{n}", rows).value() for n in range(1, 5)}
        assert found == pytest.approx(metric.compute(), abs=1e-12)
        assert (found["bleu_4"] > 0.1) == (shown.start == 0)


def test_nothing_said_has_a_bleu_of_0():
    assert Sums("bleu_1", np.array([[0.0] * 9 + [7.0]] * 3)).value() == 0.0


@pytest.mark.parametrize("kind", ["ratio", "bleu_1", "bleu_4"])
def test_a_draw_has_the_figure_of_its_images(kind):
    rows = captions(3)[:, [0, 4]] if kind == "ratio" else captions(3)
    rng = np.random.default_rng(4)
    places = rng.integers(len(rows), size=(5, len(rows)))
    counts = np.stack([np.bincount(p, minlength=len(rows)) for p in places])
    expected = [Sums(kind, rows[p]).value() for p in places]
    found = Sums(kind, rows).resampled(counts)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12)
    assert len(set(expected)) == 5


def test_json_restores_sums_to_the_bit():
    sums = Sums("bleu_2", captions(5) / 3)
    again = Sums.from_json(json.loads(json.dumps(sums.to_json())))
    assert again.kind == sums.kind
    np.testing.assert_array_equal(again.rows, sums.rows)


@pytest.mark.parametrize(
    ("kind", "rows", "message"),
    [
        ("rouge", np.ones((3, 2)), "expected one of ratio, bleu_1"),
        ("ratio", np.ones((3, 10)), r"\(3, 10\) for ratio; expected \(images, 2\)"),
        ("ratio", np.ones((0, 2)), r"shape \(0, 2\)"),
        ("ratio", [[1, 1], [math.nan, 1]], "image 1 for ratio"),
        ("ratio", [[1, math.inf]], "finite"),
        ("ratio", [[1, 1], [1, -1]], "below 0"),
        ("ratio", [[1, 0], [2, 0]], "weight of 0 over 2 images"),
        ("bleu_1", np.arange(20, 0, -1).reshape(2, 10), "no more matches than guesses"),
        ("bleu_1", np.eye(10)[[4]], "weight of 0"),
    ],
)
def test_sums_that_no_evaluation_gives_are_refused(kind, rows, message):
    with pytest.raises(ValueError, match=message):
        Sums(kind, np.asarray(rows))


# --- Student's t


def test_half_widths_are_those_of_the_tables():
    # Any textbook's table of the two-sided 5 %.
    table = {1: 12.706, 2: 4.303, 4: 2.776, 10: 2.228, 30: 2.042, 120: 1.980}
    for df, t in table.items():
        for spread in (_Spread(4.0, 0.0, df + 1, 9), _Spread(0.0, 4.0, 9, df + 1)):
            assert round(spread.half_width(0.05) / 2, 3) == t


def test_p_is_the_level_whose_interval_touches_0():
    for seeds, images, alpha in itertools.product((1, 2, 5), (2, 50), (0.9, 0.05, 1e-6, 1e-40)):
        spread = _Spread(4.0 if seeds > 1 else 0.0, 0.3, seeds, images)
        assert spread.p(spread.half_width(alpha)) == pytest.approx(alpha, rel=1e-6)
        assert spread.p(-spread.half_width(alpha)) == spread.p(spread.half_width(alpha))


# --- what the tests promise

MIXTURES = {
    "seeds": {"seed": 1.0, "image": 0.1, "chance": 0.1},
    "seeds, some images": {"seed": 1.0, "image": 2.4, "chance": 0.7},
    "images": {"seed": 0.1, "image": 7.0, "chance": 1.0},
    "all": {"seed": 1.0, "image": 7.0, "chance": 7.0},
    "chance": {"seed": 0.0, "image": 0.0, "chance": 1.0},
}


@pytest.mark.parametrize("seeds", [2, 3, 5])
def test_equals_are_told_apart_in_at_most_5_percent(seeds):
    # Of 100 comparisons 5 % has a standard error of 2.2 %, of all 500 of 1 %.
    rng = np.random.default_rng(seeds)
    wrong = dict.fromkeys(MIXTURES, 0.0)
    for name, mixture in MIXTURES.items():
        for _ in range(100):
            one, other = (effects(rng, seeds, **mixture) for _ in range(2))
            wrong[name] += (compare(cell(one), cell(other), resamples=100).p < 0.05) / 100
    assert max(wrong.values()) <= 0.1, wrong
    assert np.mean(list(wrong.values())) <= 0.05


@pytest.mark.parametrize("seeds", [2, 3])
def test_where_seeds_prevail_the_naive_bootstrap_is_wrong_often_and_ours_is_not(seeds):
    rng = np.random.default_rng(10 + seeds)
    p, naive_p = [], []
    for _ in range(150):
        one, other = (effects(rng, seeds, **MIXTURES["seeds"]) for _ in range(2))
        p.append(compare(cell(one), cell(other), resamples=100).p)
        naive_p.append(naive(one - other, rng))
    assert np.mean(np.array(p) < 0.05) <= 0.07
    assert np.mean(np.array(naive_p) < 0.05) > 0.15


def test_the_same_cell_with_other_seeds_is_not_significant():
    # The images are the same ones, easy and hard for both cells.
    rng = np.random.default_rng(20)
    wrong = []
    for _ in range(200):
        both = effects(rng, 6, seed=0.3, image=3.0, chance=1.0) + 10
        wrong.append(compare(cell(both[:3]), cell(both[3:]), resamples=100).p < 0.05)
    assert np.mean(wrong) <= 0.07


def test_a_difference_of_three_standard_deviations_of_a_seed_is_found():
    rng = np.random.default_rng(30)
    found = []
    for _ in range(100):
        one, other = (effects(rng, 5, seed=1.0, image=0.5, chance=0.5) for _ in range(2))
        found.append(compare(cell(one + 3), cell(other), resamples=100).p < 0.05)
    assert np.mean(found) >= 0.9


def test_pairing_finds_what_the_difficulty_of_images_hides():
    rng = np.random.default_rng(31)
    hard = effects(rng, 5, image=10.0)
    one, other = (hard + effects(rng, 5, seed=0.1, chance=0.1) for _ in range(2))
    assert compare(cell(one + 1), cell(other)).p < 0.001
    (_, low, high), (value, _, _) = interval(cell(one + 1)), interval(cell(other))
    assert low < value < high


@pytest.mark.parametrize("seeds", [1, 2, 3, 5])
@pytest.mark.parametrize("mixture", ["images", "all"])
def test_intervals_hold_the_truth(seeds, mixture):
    rng = np.random.default_rng(40 + seeds)
    sizes = MIXTURES[mixture] | ({"seed": 0.0} if seeds == 1 else {})
    held = []
    for _ in range(150):
        _, low, high = interval(cell(effects(rng, seeds, **sizes) + 3), resamples=100)
        held.append(low <= 3 <= high)
    assert np.mean(held) >= 0.92


def test_the_parts_are_those_of_the_analysis_of_variance():
    # Balanced means: the bootstrap only estimates what the mean squares give exactly.
    rng = np.random.default_rng(50)
    seeds, values = 3, effects(rng, 3, seed=1.0, image=7.0, chance=3.0)
    of_seeds = values.mean(axis=1).var(ddof=1) / seeds
    shared = np.cov(values)[~np.eye(seeds, dtype=bool)].mean() / IMAGES
    half = math.sqrt(of_seeds * 4.3027**2 + shared * 2.0096**2)
    value, low, high = interval(cell(values), resamples=20_000)
    assert value == pytest.approx(values.mean(), abs=1e-12)
    assert (high - low) / 2 == pytest.approx(half, rel=0.02)


def test_seeds_that_agree_by_chance_are_no_surer_than_images_alone():
    rng = np.random.default_rng(51)
    values = effects(rng, 2, chance=1.0)
    values -= values.mean(axis=1, keepdims=True)  # the seeds' part is 0
    _, low, high = interval(cell(values + 1), resamples=20_000)
    alone = 2.0096 * values.mean(axis=0).std(ddof=1) / math.sqrt(IMAGES)
    assert (high - low) / 2 == pytest.approx(alone, rel=0.02)


def test_p_is_below_5_percent_if_and_only_if_the_interval_excludes_0():
    rng = np.random.default_rng(60)
    results = []
    for seeds, shift in itertools.product((1, 2, 3, 5), np.linspace(0, 4, 8)):
        one, other = (effects(rng, seeds, seed=1.0, image=2.0) for _ in range(2))
        found = compare(cell(one + shift), cell(other), resamples=100)
        results.append((found.p < 0.05, not found.low <= 0 <= found.high))
        if found.p > 1e-6:  # p is a level: the interval of that level ends at 0
            touching = compare(cell(one + shift), cell(other), resamples=100, level=1 - found.p)
            nearest = min(abs(touching.low), abs(touching.high))
            assert nearest < 1e-6 * abs(found.difference)
    assert all(small == excluded for small, excluded in results)
    assert {small for small, _ in results} == {True, False}


# --- what does not matter, and what ends


def test_bleu_is_compared_too():
    good, bad = captions(6), captions(6)
    bad[:, :4] = np.floor(bad[:, :4] / 2)
    found = compare([Sums("bleu_2", good)], [Sums("bleu_2", bad)])
    assert found.difference == pytest.approx(
        Sums("bleu_2", good).value() - Sums("bleu_2", bad).value(), abs=1e-12
    )
    assert found.p < 0.001 and found.low > 0


def test_the_seed_of_the_draws_gives_the_result_to_the_bit():
    rng = np.random.default_rng(70)
    one, other = (cell(effects(rng, 3, seed=1.0, image=3.0)) for _ in range(2))
    assert compare(one, other) == compare(one, other)
    assert compare(one, other) != compare(one, other, seed=1)
    assert interval(one) == interval(one) != interval(one, seed=1)


def test_more_images_than_a_block_holds_are_drawn_in_several(monkeypatch):
    runs = cell(effects(np.random.default_rng(71), 2, seed=1.0, image=3.0))
    whole = interval(runs)
    monkeypatch.setattr("recipes.bootstrap.BLOCK", 7 * IMAGES)
    assert interval(runs) == pytest.approx(whole, abs=1e-12)


def test_the_order_of_seeds_and_the_sides_do_not_matter():
    rng = np.random.default_rng(72)
    one, other = (cell(effects(rng, 3, seed=1.0, image=3.0)) for _ in range(2))
    found = compare(one, other)
    assert compare(one[::-1], other[::-1]) == pytest.approx(found, abs=1e-9)
    difference, low, high, p = compare(other, one)
    assert (-difference, -high, -low, p) == pytest.approx(found, abs=1e-9)
    assert interval(one[::-1]) == pytest.approx(interval(one), abs=1e-9)
    # Which seed is compared with which does matter.
    assert compare(one[::-1], other).p != pytest.approx(found.p, abs=1e-3)


def test_the_order_of_images_matters_no_more_than_the_draws():
    rng = np.random.default_rng(73)
    values = effects(rng, 3, seed=1.0, image=3.0)
    shuffled = values[:, rng.permutation(IMAGES)]
    one, other = (interval(cell(v), resamples=20_000) for v in (values, shuffled))
    assert one == pytest.approx(other, rel=0.02, abs=0.02)


def test_images_without_a_part_change_nothing():
    rng = np.random.default_rng(74)
    rows = [np.stack([rng.normal(size=9), rng.uniform(1, 2, size=9)], axis=1) for _ in range(4)]
    padded = [np.concatenate([np.zeros((80, 2)), r]) for r in rows]
    runs, wide = ([Sums("ratio", r) for r in some] for some in (rows, padded))
    assert compare(wide[:2], wide[2:]) == compare(runs[:2], runs[2:])


@pytest.mark.parametrize("seeds", [1, 2, 3])
def test_identical_runs_do_not_differ(seeds):
    values = effects(np.random.default_rng(80), seeds, seed=1.0, image=1.0)
    assert compare(cell(values), cell(values)) == (0.0, 0.0, 0.0, 1.0)


def test_no_spread_is_an_interval_without_width():
    half = [Sums.mean_of([0.1] * 10)] * 3
    value, low, high = interval(half)
    assert value == low == high == pytest.approx(0.1)
    assert compare(half, half) == (0.0, 0.0, 0.0, 1.0)
    zero = [Sums.mean_of([0.0] * 10)] * 3
    assert interval(zero) == (0.0, 0.0, 0.0)
    assert compare(zero, zero) == (0.0, 0.0, 0.0, 1.0)


@pytest.mark.parametrize("images", [2, 10])
def test_a_difference_without_spread_has_the_p_of_the_sign_test(images):
    one, other = [Sums.mean_of([0.9] * images)] * 2, [Sums.mean_of([0.2] * images)] * 2
    difference, low, high, p = compare(one, other)
    assert difference == low == high == pytest.approx(0.7)
    assert p == 2.0 ** (1 - images)


def test_huge_differences_have_a_tiny_p():
    rng = np.random.default_rng(81)
    values = rng.normal(size=(1, 3000))
    assert 0 < compare(cell(values + 1e6), cell(-values)).p < 1e-90
    both = np.repeat(values, 2, axis=0)
    assert 0 < compare(cell(both + 1e6), cell(-both)).p < 1e-90


@pytest.mark.parametrize(
    ("runs", "baseline", "message"),
    [
        ([], [], "found no runs"),
        ([[1, 2]], [[1, 2], [2, 3]], "found 1 runs and 2 of the baseline"),
        ([[1, 2]], [[1, 2, 3]], "ratio of 2 images and ratio of 3 images"),
        ([[1]], [[2]], "found 1 image with a part"),
    ],
)
def test_what_cannot_be_compared_is_refused(runs, baseline, message):
    with pytest.raises(ValueError, match=message):
        compare([Sums.mean_of(r) for r in runs], [Sums.mean_of(r) for r in baseline])


def test_figures_of_two_kinds_are_refused():
    with pytest.raises(ValueError, match="bleu_1 of 30 images and bleu_2 of 30 images"):
        interval([Sums("bleu_1", captions(0)), Sums("bleu_2", captions(0))])


def test_a_draw_without_weight_is_refused():
    # One run weighs every image, the other a single one.
    one, other = Sums.mean_of([1.0] * 5), Sums("ratio", np.array([[1, 1]] + [[1, 0]] * 4))
    with pytest.raises(ValueError, match="or over a draw of them"):
        compare([one], [other])


@pytest.mark.parametrize("options", [{"resamples": 50}, {"level": 95}, {"level": 0.0}])
def test_options_out_of_range_are_refused(options):
    with pytest.raises(ValueError, match="expected at least 100, and a level"):
        interval([Sums.mean_of([1, 2, 3])], **options)


# --- Holm


def test_holm_by_hand():
    # 4 × 0.005, 3 × 0.01, 2 × 0.03 and, no less than that, 1 × 0.04.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.4, 0.6]) == pytest.approx([0.8, 0.8])
    assert holm([0.9, 0.8, 0.7]) == [1.0, 1.0, 1.0]
    assert holm([0.02]) == [0.02]
    assert holm([]) == []


def test_holm_keeps_the_order_and_never_lessens():
    p = np.random.default_rng(90).uniform(size=30).tolist()
    adjusted = holm(p)
    assert all(a >= b for a, b in zip(adjusted, p, strict=True))
    by_p = [a for _, a in sorted(zip(p, adjusted, strict=True))]
    assert by_p == sorted(adjusted)
    assert holm(p[::-1]) == adjusted[::-1]


@pytest.mark.parametrize("wrong", [math.nan, -0.1, 1.1])
def test_holm_refuses_what_is_no_p(wrong):
    with pytest.raises(ValueError, match="expected 0 to 1"):
        holm([0.5, wrong])
