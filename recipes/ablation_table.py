"""The results of an ablation: intervals, tests against the baseline, and a table of all runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from recipes.ablation_cells import Cell
from recipes.ablation_report import GAIN, run_rows
from recipes.bootstrap import Sums, compare, holm, interval
from recipes.evaluate_scores import BETTER, TITLES
from recipes.gates import PREFIX

if TYPE_CHECKING:
    import pandas

COSTS = (
    "trainable_parameters",
    "visual_tokens",
    "steps",
    "samples",
    "train_flops",
    "samples_per_s",
    "peak_bytes",
    "seconds",
)
"""What a run costs, by its key."""

OF_OTHERS = "nll_"
"""Losses with other pictures begin with it: to have less of them is not better, or worse."""

PRIMARY = ("nll", "text_to_image_recall@1")
"""The metric that a report is sorted by, whichever there is first."""


@dataclass(frozen=True)
class AblationTable:
    """What `ablate` returns: iterates over a row for each cell and seed.

    Attributes:
        results: all of it, as in ``results.json``.
        out: folder of the report and of the runs.
    """

    results: Mapping[str, Any]
    out: Path

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self.rows())

    def __len__(self) -> int:
        return len(self.rows())

    def rows(self) -> list[dict[str, Any]]:
        """A row for each cell and seed, see `run_rows`."""
        return run_rows(self.results)

    def to_pandas(self) -> pandas.DataFrame:
        """The rows as a data frame.

        Raises:
            ImportError: pandas is not there (extra ``ablate``).
        """
        try:
            from pandas import DataFrame
        except ImportError as error:
            raise ImportError("data frames need pandas: pip install 'bridges[ablate]'") from error
        return DataFrame(self.rows())


def summarise(
    cells: Sequence[Cell],
    runs: Mapping[tuple[str, int], Mapping[str, Any]],
    baseline: str,
) -> tuple[list[dict[str, Any]], dict[str, dict[str, str]]]:
    """Cells with the means of their runs, 95 % intervals and tests against the baseline.

    A test has the seeds that both cells finished, the first with the first and so on; p is
    adjusted by Holm's method over the cells that are no controls, metric by metric. A control is
    tested on its own.

    Args:
        cells: all of them.
        runs: finished ones, by cell and seed.
        baseline: name of the cell that the others are compared with.

    Returns:
        The cells, and the metrics with title and direction, the primary one first.
    """
    scored = {key: _figures(run) for key, run in runs.items()}
    titles = {**TITLES, GAIN: "what the right picture is worth (nats per token)"}
    better = {**BETTER, GAIN: "higher"}
    everywhere = [n for n in titles if scored and all(n in figures for figures in scored.values())]
    if len({run["fingerprints"].get("lm") for run in runs.values()}) > 1:
        # Another tokenizer's token is another unit.
        everywhere = [name for name in everywhere if not name.startswith("nll")] or everywhere
    # What stands first is what a reader sees on a phone: the baselines of the loss come last.
    metrics = sorted(
        everywhere, key=lambda n: (n not in PRIMARY, n != GAIN, n.startswith(OF_OTHERS))
    )
    finished = {cell.name: [s for s in cell.seeds if (cell.name, s) in runs] for cell in cells}
    places = {
        cell.name: [k for k, seed in enumerate(cell.seeds) if seed in finished[cell.name]]
        for cell in cells
    }
    found = []
    for cell in cells:
        seeds = finished[cell.name]
        if not seeds:
            continue
        own = [runs[cell.name, seed] for seed in seeds]
        by_metric = {name: [scored[cell.name, seed][name] for seed in seeds] for name in metrics}
        found.append(
            {
                "name": cell.name,
                "settings": cell.settings,
                "kind": cell.kind,
                "twin_of": cell.twin_of,
                **{name: _mean([run[name] for run in own]) for name in COSTS},
                "metrics": {n: interval(sums)._asdict() for n, sums in by_metric.items()},
                "against_baseline": None,
                "runs": [
                    {
                        "seed": seed,
                        **{name: run[name] for name in ("sample_order_digest", *COSTS)},
                        "metrics": {n: scored[cell.name, seed][n].value() for n in metrics},
                        **{name: run[name] for name in ("curve", "val_curve")},
                        "gates": {n.removeprefix(PREFIX): g for n, g in run["gates"].items()},
                    }
                    for seed, run in zip(seeds, own, strict=True)
                ],
                "captions": own[0]["scored"]["written"],
                "attention": own[0]["attention"],
            }
        )
    by_name = {cell.name: cell for cell in cells}
    tested = [one for one in found if one["name"] != baseline]
    if finished[baseline]:
        for one in tested:
            both = sorted({*places[one["name"]]} & {*places[baseline]})
            if len(both) < min(2, len(by_name[baseline].seeds)):
                continue  # one seed of several would speak of pictures alone
            pairs = [
                [(by_name[n].name, by_name[n].seeds[k]) for k in both]
                for n in (one["name"], baseline)
            ]
            one["against_baseline"] = {
                name: _compared(*([scored[key][name] for key in keys] for keys in pairs))
                for name in metrics
                if not name.startswith(OF_OTHERS)
            }
        for name in metrics:
            if name.startswith(OF_OTHERS):
                continue
            _adjust([one for one in tested if one["kind"] == "cell"], name)
            for one in tested:
                if one["kind"] != "cell":
                    _adjust([one], name)
    return found, {name: {"title": titles[name], "better": better[name]} for name in metrics}


def _figures(run: Mapping[str, Any]) -> dict[str, Sums]:
    figures = {n: Sums.from_json(sums) for n, sums in run["scored"]["figures"].items()}
    if "nll_shuffled" in figures:
        right, others = figures["nll"].rows, figures["nll_shuffled"].rows
        gain = np.stack([others[:, 0] - right[:, 0], right[:, 1]], axis=1)
        figures[GAIN] = Sums("ratio", gain)
    return figures


def _compared(own: Sequence[Sums], other: Sequence[Sums]) -> dict[str, float]:
    return compare(own, other)._asdict()


def _adjust(cells: Sequence[Mapping[str, Any]], metric: str) -> None:
    there = [c["against_baseline"][metric] for c in cells if c["against_baseline"]]
    for comparison, p in zip(there, holm([one["p"] for one in there]), strict=True):
        comparison["p_adjusted"] = p


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    if not known:
        return None
    mean = sum(known) / len(known)
    return int(mean) if all(isinstance(value, int) for value in known) else mean
