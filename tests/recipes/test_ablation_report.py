"""The report of an ablation, over made-up results: nothing is trained here."""

import csv
import io
import itertools
import math
import random
import re
from html.parser import HTMLParser
from typing import Any

import pytest
from PIL import Image, ImageDraw
from rich.console import Console

from recipes.ablation_plots import cost_plots, looks, pareto, ranked, spread
from recipes.ablation_plots_curves import loss_plots, over_seeds
from recipes.ablation_report import csv_text, markdown_table, print_table, render
from recipes.gallery import uri

DIGEST = "9f3c27d1"
GROUNDS = {"red": (200, 30, 30), "green": (30, 160, 60), "blue": (40, 70, 200)}
SHAPES = {"cat": "ellipse", "dog": "rectangle"}

GRID = [
    ("mlp", "soft_prefix"),
    ("perceiver", "soft_prefix"),
    ("qformer", "soft_prefix"),
    ("mlp", "gated_xattn"),
    ("perceiver", "gated_xattn"),
    ("qformer", "gated_xattn"),
]

MANY = list(
    itertools.product(
        ("mlp", "perceiver", "qformer", "c_abstractor", "pixel_shuffle", "honeybee"),
        ("soft_prefix", "gated_xattn"),
    )
)


def interval(value: float, width: float) -> dict[str, float]:
    return {"value": value, "low": value - width, "high": value + width}


def made_cell(rng: random.Random, place: int, settings: dict[str, str], seeds: list[int]) -> dict:
    quality = 1.9 - 0.08 * place + rng.uniform(-0.04, 0.04)
    cider = 0.2 + 0.11 * place
    gated = settings["reader"] == "gated_xattn"
    steps = range(5, 205, 5)

    def run(seed: int) -> dict[str, Any]:
        return {
            "seed": seed,
            "sample_order_digest": DIGEST,
            "metrics": {"nll": quality + 0.03 * (seed - 1), "cider_d": cider + 0.01 * seed},
            "curve": [
                [s, quality - 0.1 + 0.15 * seed + 3 * math.exp(-s / 30) + rng.uniform(0, 0.2)]
                for s in steps
            ],
            "val_curve": [[s, quality + 3 * math.exp(-s / 30)] for s in (50, 100, 150, 200)],
            "gates": {
                f"{kind}.{block}": [
                    [s, sign * 0.004 * s / (block + 1) + 0.01 * seed] for s in (0, *steps)
                ]
                for block in (0, 1, 2, 3)
                for kind, sign in (("attn", 1), ("ff", -0.5))
            }
            if gated
            else {},
        }

    costs = {
        "trainable_parameters": 400_000 + 1_300_000 * place + 900_000 * gated,
        "visual_tokens": 16,
        "steps": 200,
        "samples": 3200,
        "train_flops": 1.1e14 * (1 + 0.3 * place),
        "samples_per_s": 40.0 - 2 * place,
        "peak_bytes": 2.1e9 + 1e8 * place,
        "seconds": 70.2,
    }
    return {
        "name": ", ".join(settings.values()),
        "settings": settings,
        "kind": "cell",
        "twin_of": None,
        **costs,
        "lr": 0.001 if place else 0.0005,
        "lr_sweep": [[0.0005, 2.31 if place else 2.01], [0.001, 2.11], [0.002, None]],
        "solved": {"model.bridge.init_args.resampler.init_args.dim": 384} if place == 1 else {},
        "metrics": {"nll": interval(quality, 0.05), "cider_d": interval(cider, 0.08)},
        "against_baseline": {
            "nll": {
                "difference": -0.2,
                "low": -0.3,
                "high": -0.1,
                "p": 0.0001,
                "p_adjusted": 0.0006,
            },
            "cider_d": {"difference": 0.1, "low": -0.1, "high": 0.3, "p": 0.2, "p_adjusted": 0.4},
        }
        if place
        else None,
        "runs": [run(seed) | costs for seed in seeds],
        "captions": [],
        "attention": [],
    }


def made_picture(index: int) -> dict[str, Any]:
    colour, thing = list(GROUNDS)[index % 3], list(SHAPES)[index % 2]
    image = Image.new("RGB", (96, 96), GROUNDS[colour])
    getattr(ImageDraw.Draw(image), SHAPES[thing])((20, 24, 76, 72), fill=(250, 230, 120))
    text = f"a {thing} on a {colour} background"
    meta = {"captions": [text], "objects": [thing], "relation": None, "colour": colour}
    return {"uri": uri(image), "captions": [text], "meta": meta}


def made_map(place: int) -> str:
    image = Image.linear_gradient("L").resize((64, 64)).rotate(37 * place)
    return uri(image.convert("RGB"))


def made_results(
    grid: list[tuple[str, str]] | None = None,
    seeds: tuple[int, ...] = (0, 1, 2),
    shown: int = 6,
    drawn: bool = True,
) -> dict[str, Any]:
    """A grid's cells, a blind one and a twin of the baseline, and one run that failed.

    Not drawn: nothing is known that a figure would be made of, and a page takes no time.
    """
    rng = random.Random(0)
    cells = [
        made_cell(rng, place, {"resampler": resampler, "reader": reader}, list(seeds))
        for place, (resampler, reader) in enumerate(grid or GRID)
    ]
    cells[1]["runs"] = cells[1]["runs"][:2]
    blind, twin = (
        made_cell(random.Random(0), 0, dict(cells[0]["settings"]), list(seeds)) for _ in range(2)
    )
    against = {"difference": 0.4, "low": 0.3, "high": 0.5, "p": 0.0, "p_adjusted": 0.0}
    blind |= {
        "name": "mlp, soft_prefix (blind)",
        "kind": "blind",
        "metrics": {"nll": interval(2.4, 0.05), "cider_d": interval(0.05, 0.02)},
        "against_baseline": {"nll": against},
    }
    none = {"difference": 0.0, "low": -0.02, "high": 0.02, "p": 1.0, "p_adjusted": 1.0}
    twin |= {
        "name": "mlp, soft_prefix (twin)",
        "kind": "twin",
        "twin_of": cells[0]["name"],
        "against_baseline": {"nll": none, "cider_d": none},
    }
    cells += [blind, twin]
    if not drawn:
        for cell in cells:
            cell |= dict.fromkeys(("trainable_parameters", "visual_tokens", "train_flops"))
            for run in cell["runs"]:
                run |= {"curve": [], "val_curve": [], "gates": {}}
    pictures = [made_picture(index) for index in range(shown)]
    for place, cell in enumerate(cells):
        right = [picture["captions"][0] for picture in pictures]
        wrong = ["a cat on a green background"] * shown
        cell["captions"] = wrong if cell["kind"] == "blind" else right if place % 2 else wrong
        if "mlp" not in cell["name"]:
            cell["attention"] = [
                made_map(place + k) if k != 1 else None for k in range(min(3, shown))
            ]
    return {
        "name": "adapters_small",
        "title": "Every resampler with every reader, on emoji scenes",
        "command": "bridges ablate adapters_small --out runs/adapters",
        "match": "steps",
        "baseline": cells[0]["name"],
        "seeds": list(seeds),
        "data": {
            "path": "emoji scenes",
            "train_samples": 10_080,
            "held_out_pictures": 96,
            "licences": ["Noto Emoji: Apache-2.0"],
        },
        "versions": {"bridges": "0.1.0", "torch": "2.13.0"},
        "device": "cpu, 2 × 1 thread",
        "seconds": 1234.5,
        "date": "2026-11-30",
        "metrics": {
            "nll": {"title": "loss per token (nats)", "better": "lower"},
            "cider_d": {"title": "CIDEr-D", "better": "higher"},
        },
        "fairness": {
            "sample_order_digest": DIGEST,
            "features_digest": "a17be0",
            "leaked_pictures": 0,
            "statements": ["Every cell saw the same 3,200 samples in the same order."],
            "lr": {
                "values": [0.0005, 0.001, 0.002],
                "steps": 40,
                "criterion": "mean training loss of the last 10 steps",
            },
        },
        "cells": cells,
        "failed": [{"name": cells[1]["name"], "seed": 2, "error": "RuntimeError: loss is nan"}],
        "shown": pictures,
    }


@pytest.fixture(scope="module")
def results() -> dict[str, Any]:
    return made_results()


@pytest.fixture(scope="module")
def page(results) -> str:
    return render(results)


class Tags(HTMLParser):
    """Every attribute of a page, every tag, and its text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.text = ""
        self.feed(page)
        self.text = " ".join(self.text.split())

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_data(self, data):
        self.text += data

    def values(self, *names: str) -> list[str]:
        return [value for name, value in self.attributes if name in names]


def test_the_page_stands_alone(page):
    tags = Tags(page)
    fetched = tags.values("src", "href", "xlink:href", "srcset", "data")
    assert fetched
    assert all(value.startswith(("data:image/", "#")) for value in fetched)
    assert not {"script", "link", "iframe", "object"} & set(tags.tags)
    assert all(url.startswith("#") for url in re.findall(r"url\(([^)]*)\)", page))
    assert "@import" not in page


def test_the_figures_share_no_id(page):
    ids = Tags(page).values("id")
    assert len(ids) > 100
    assert len(ids) == len(set(ids))
    # What a figure refers to is in the page.
    assert set(re.findall(r"url\(#([^)]*)\)", page)) <= set(ids)


def test_every_cell_is_everywhere(results, page):
    text = Tags(page).text
    pictures = len(results["shown"])
    maps = sum(uri is not None for uri in results["cells"][1]["attention"])
    for cell in results["cells"]:
        gates = bool(cell["runs"][0]["gates"])
        # Tables of results and rates, legend, loss; then what it has.
        least = 4 + gates + pictures + (maps if cell["attention"] else 0)
        assert text.count(cell["name"]) >= least, cell["name"]
    assert text.count("RuntimeError: loss is nan") == 1
    assert page.count("<svg") == 3 + len(results["cells"]) + 3
    assert page.count("data:image/jpeg") == pictures + 2 * (1 + 4)


def test_the_summary_says_what_was_found(page):
    text = Tags(page).text
    assert "6 cells, each a bridge trained on emoji scenes with the same number of steps" in text
    assert "3 seeds, compared on 96 held-out pictures by loss per token (nats)" in text
    assert "all 5 others are significantly better." in text
    assert "is at 2.400 [2.350, 2.450]; every cell is clear of it." in text
    assert "differs by 0.0000 (p = 1.000): no significant difference, as it must be." in text
    assert "1 run failed." in text


def test_the_summary_knows_a_floor_a_loser_and_a_broken_pair():
    results = made_results(drawn=False)
    _, second, third, *_, blind, twin = results["cells"]
    second["against_baseline"]["nll"] |= {"difference": 0.2, "p_adjusted": 0.01}
    third["against_baseline"]["nll"] |= {"p_adjusted": 0.3}
    twin["against_baseline"]["nll"] = {**second["against_baseline"]["nll"], "p_adjusted": 0.049}
    blind["metrics"]["nll"] = interval(1.85, 0.01)
    text = Tags(render(results)).text
    assert re.search(
        r"significantly better and . perceiver, soft_prefix is significantly worse", text
    )
    assert re.search(r"No difference is shown for . qformer, soft_prefix\.", text)
    # Both intervals reach 1.84, from above and from below.
    assert re.search(r"the interval of . perceiver, soft_prefix and . mlp, soft_prefix reach", text)
    assert "(p = 0.049): a significant difference of two equal cells" in text


def test_the_baseline_is_not_compared_to_itself():
    results = made_results(drawn=False)
    results["cells"][0]["against_baseline"] = results["cells"][-1]["against_baseline"]
    text = Tags(render(results)).text
    assert "all 5 others" in text and "No difference is shown for" not in text


def test_higher_is_better_where_the_metric_says_so():
    results = made_results(drawn=False)
    results["metrics"] = dict(reversed(results["metrics"].items()))
    assert ranked(results)[0]["name"] == "qformer, gated_xattn"
    results["cells"][2]["against_baseline"]["cider_d"]["p_adjusted"] = 0.01
    found = [row for row in markdown_table(results).splitlines() if "qformer, soft" in row]
    assert "0.420 [0.340, 0.500] ▲" in found[0]
    text = Tags(render(results)).text
    assert re.search(r"correction, . qformer, soft_prefix is significantly better\.", text)
    assert "every cell is clear of it" in text


def test_nothing_is_markup():
    results = made_results(GRID[:2])
    evil = "<script>alert(1)</script> & <b>"
    cell = results["cells"][1]
    cell["name"] = f"{evil} one"
    cell["captions"][0] = f"{evil} two"
    results["failed"][0]["error"] = f"{evil} three"
    results["title"] = f"{evil} four"
    results["metrics"]["nll"]["title"] = f"{evil} five"
    tags = Tags(page := render(results))
    assert "script" not in tags.tags
    assert "<script" not in page
    for word in ("one", "two", "three", "four", "five"):
        assert f"{evil} {word}" in tags.text


def test_the_same_results_give_the_same_bytes(results, page):
    assert render(made_results()) == page
    assert csv_text(made_results()) == csv_text(results)


def test_scenes_are_marked_part_by_part(page):
    text = Tags(page).text
    # "a cat on a green background" of the first picture, a cat on red.
    assert "a cat on a green background ✓ object✗ colour" in text
    photographs = made_results(drawn=False)
    for picture in photographs["shown"]:
        picture["meta"] = {"captions": picture["captions"]}
    assert "✗" not in render(photographs)


def test_rates_that_diverged_or_are_at_the_edge_say_so(page):
    text = Tags(page).text
    assert "diverged" in text and "2.010*" in text and "2.110*" not in text
    inside = made_results(drawn=False)
    for cell in inside["cells"]:
        cell["lr"] = 0.001
    assert "the chosen rate is the lowest or the highest" not in render(inside)
    inside["fairness"]["lr"] = None
    assert "Learning rates" not in render(inside)


def test_one_seed_has_no_bands():
    assert all("PolyCollection" in plot for plot in loss_plots(made_results(GRID[:2])).values())
    single = made_results(GRID[:2], seeds=(0,))
    assert not any("PolyCollection" in plot for plot in loss_plots(single).values())
    text = Tags(render(single)).text
    assert "Loss of one seed." in text and "and 1 seed, compared" in text


def test_without_captions_attention_and_gates_there_are_no_such_sections(page):
    heads = ("captioned by every cell</h2>", "<h2>Attention</h2>", "<h2>Gates</h2>")
    bare = made_results([pair for pair in GRID if pair[1] == "soft_prefix"], shown=0)
    for cell in bare["cells"]:
        cell["captions"] = cell["attention"] = []
    found = render(bare)
    assert all(head in page and head not in found for head in heads)


def test_many_cells_are_told_apart():
    many = made_results(MANY)
    assert len(many["cells"]) == 14
    look = looks(many)
    shown = [(one.colour, one.marker) for one in look.values() if one.label.isdigit()]
    assert len(set(shown)) == len(shown) == 12
    assert [one.label for one in look.values()] == [*map(str, range(1, 13)), "A", "B"]
    assert {look[cell["name"]].colour for cell in many["cells"][-2:]} == {"#9ca3af"}
    render(many)


def test_many_metrics_are_several_tables():
    many = made_results(drawn=False)
    for k in range(1, 9):
        many["metrics"][f"bleu_{k}"] = {"title": f"BLEU-{k}", "better": "higher"}
        for cell in many["cells"][1:]:
            cell["metrics"][f"bleu_{k}"] = interval(0.1 * k, 0.01)
    page = render(many)
    assert page.count("<table>") == 1 + 2 + 1
    assert all(page.count(f"BLEU-{k}&nbsp;↑") == 1 for k in range(1, 9))


def test_a_sweep_in_which_everything_failed_has_a_page():
    results = made_results() | {"cells": [], "shown": []}
    page = render(results)
    assert "has no result" in page and "RuntimeError: loss is nan" in page
    assert csv_text(results).count("\n") == 2
    assert "Failed: perceiver, soft_prefix, seed 2" in markdown_table(results)
    print_table(results, Console(file=io.StringIO()))


def test_the_csv_has_a_row_for_each_cell_and_seed(results):
    rows = list(csv.DictReader(io.StringIO(csv_text(results))))
    done = [row for row in rows if not row["error"]]
    runs = [(cell, run) for cell in results["cells"] for run in cell["runs"]]
    assert len(done) == len(runs) == 8 * 3 - 1
    for row, (cell, run) in zip(done, runs, strict=True):
        assert row["cell"] == cell["name"] and row["kind"] == cell["kind"]
        assert int(row["seed"]) == run["seed"]
        assert row["sample_order_digest"] == DIGEST
        assert float(row["nll"]) == run["metrics"]["nll"]
        assert float(row["cider_d"]) == run["metrics"]["cider_d"]
        assert (row["resampler"], row["reader"]) == tuple(cell["settings"].values())
        assert float(row["train_flops"]) == cell["train_flops"]
    (failed,) = (row for row in rows if row["error"])
    assert failed["error"] == "RuntimeError: loss is nan"
    known = {"cell", "resampler", "reader", "kind", "seed", "error"}
    assert all(bool(value) == (name in known) for name, value in failed.items())


def test_an_axis_may_be_the_learning_rate():
    results = made_results()
    for cell in results["cells"]:
        cell["settings"] = {"lr": "5e-4"}
    (row, *_) = csv.DictReader(io.StringIO(csv_text(results)))
    assert (row["setting.lr"], row["lr"]) == ("5e-4", "0.0005")


def test_the_markdown_table_has_a_row_for_each_cell():
    results = made_results()
    results["cells"][0]["name"] = results["baseline"] = "a|b *c*"
    text = markdown_table(results)
    rows = [re.split(r"(?<!\\)\|", line) for line in text.splitlines() if line.startswith("|")]
    assert len(rows) == 2 + 8
    assert {len(row) for row in rows} == {9 + 1}
    assert any(row[1].strip() == r"a\|b \*c\* (baseline)" for row in rows)
    best = [cell.strip() for cell in rows[2]]
    assert best[1] == "qformer, gated_xattn"
    assert [text.split() for text in best[2:7]] == [
        ["7.8", "M"],
        ["16"],
        ["275", "T"],
        ["30"],
        ["2.6", "GB"],
    ]
    assert best[7].endswith("▲") and not best[8].endswith("▲")
    assert "▼" in rows[-1][7]
    assert "Holm" in text and "95 % intervals" in text and "3 seeds" in text
    assert "(2 of 3 seeds)" in text


def test_the_terminal_shows_names_as_they_are():
    results = made_results()
    results["cells"][1]["name"] = "mlp [red]"
    console = Console(file=io.StringIO(), width=200)
    print_table(results, console)
    text = console.file.getvalue()
    assert "mlp [red]" in text and "failed: perceiver, soft_prefix, seed 2" in text
    assert "1.507 [1.457, 1.557] ▲" in text


def test_the_front_holds_what_nothing_cheaper_beats():
    points = [(4.0, 1.0), (1.0, 3.0), (2.0, 3.0), (2.0, 2.0), (3.0, 2.5), (4.0, 1.0), (5.0, 1.0)]
    assert pareto(points, "lower") == [1, 3, 0]
    assert pareto([(cost, -quality) for cost, quality in points], "higher") == [1, 3, 0]
    assert pareto(points, "higher") == [1]
    assert pareto([], "lower") == []


def front(plot: str) -> int:
    """How many heights the front has."""
    (line,) = re.findall(r'd="([^"]*)" [^>]*stroke-width: 1.1', plot)
    return len(set(re.findall(r"[ML] \S+ (\S+)", line)))


def test_controls_are_not_on_the_front():
    results = made_results(GRID[:3])
    assert front(cost_plots(results)["training FLOPs"]) == 3
    # The cheapest by far the best: as a cell, it would be the front alone.
    results["cells"][-1]["metrics"]["nll"] = interval(1.0, 0.01)
    assert front(cost_plots(results)["training FLOPs"]) == 3
    results["cells"][-1]["kind"] = "cell"
    assert front(cost_plots(results)["training FLOPs"]) == 1


def test_a_cost_that_nobody_knows_is_not_drawn():
    results = made_results(GRID[:2])
    for cell in results["cells"]:
        cell["train_flops"] = cell["peak_bytes"] = None
    assert list(cost_plots(results)) == ["trainable parameters", "visual tokens"]
    assert "<td>–</td>" in render(results)


def test_places_are_moved_apart_in_order():
    assert spread([0.0, 5.0, 9.0], 1.0) == [0.0, 5.0, 9.0]
    assert spread([3.0, 3.0, 3.0], 2.0) == pytest.approx([1.0, 3.0, 5.0])
    rng = random.Random(1)
    places = [rng.uniform(0, 4) for _ in range(14)]
    moved = spread(places, 0.4)
    order = sorted(range(14), key=places.__getitem__)
    gaps = [moved[b] - moved[a] for a, b in itertools.pairwise(order)]
    assert min(gaps) > 0.4 - 1e-9
    assert sum(moved) == pytest.approx(sum(places))


def test_curves_are_means_of_the_seeds_that_go_so_far():
    line = over_seeds([[[5, 1.0], [10, 2.0]], [[5, 3.0]]])
    assert line == [(5, 2.0, 1.0, 3.0), (10, 2.0, 2.0, 2.0)]
