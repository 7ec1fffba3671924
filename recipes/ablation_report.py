"""The report of an ablation: a page, a table for a paper, a CSV, and a table on the terminal."""

import csv
import io
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from itertools import islice
from typing import Any

from jinja2 import Environment
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from recipes.ablation_plots import cost_plots, looks, ranked
from recipes.ablation_plots_curves import gate_legend, gate_plots, loss_plots
from recipes.report import marks

GAIN = "picture_gain"
"""Loss with another's picture, less that with the right one: what a bridge tells of pictures.

A reader that adapts the LM to the captions lowers the loss without a look at any picture; this it
does not raise.
"""

ALPHA = 0.05
"""Of an adjusted p: below it, a difference is marked."""

BETTER, WORSE = "▲", "▼"

NONE = "–"

FIRST_COSTS = 2
"""On the terminal."""

NO_BREAK = "\N{NO-BREAK SPACE}"

FIRST_METRICS, MORE_METRICS = 2, 5
"""Beside the costs, and in each further table: more are no longer printed on a page."""

CSV_COSTS = ("trainable_parameters", "visual_tokens", "train_flops")
CSV_SPEED = ("samples_per_s", "peak_bytes", "seconds")


@dataclass(frozen=True)
class Measured:
    """A metric of a cell, as text; what is not known is empty.

    Attributes:
        value: mean.
        interval: 95 %.
        mark: `BETTER` or `WORSE` where it differs significantly from the baseline.
        difference: to the baseline, with its interval.
        p: adjusted.
    """

    value: str = NONE
    interval: str = ""
    mark: str = ""
    difference: str = ""
    p: str = ""

    def __str__(self) -> str:
        return " ".join(part for part in (self.value, self.interval, self.mark) if part)


def render(results: Mapping[str, Any]) -> str:
    """The page: self-contained, without scripts; the same results give the same bytes.

    Args:
        results: what `results.json` holds.

    Raises:
        ImportError: matplotlib is not there (extra ``demo``).
    """
    environment = Environment(autoescape=True)
    environment.filters |= {"duration": _duration, "marks": marks}
    template = environment.from_string(
        files("recipes").joinpath("templates/ablation.html").read_text(encoding="utf-8")
    )
    cells = ranked(results)
    metrics = list(results["metrics"])
    later = range(FIRST_METRICS, len(metrics), MORE_METRICS)
    blocks, kinds = gate_legend(results)
    return template.render(
        results=results,
        primary=metrics[0],
        cells=cells,
        looks=looks(results),
        axes=axes_of(results),
        costs={cell["name"]: _costs(cell) for cell in cells},
        measured={cell["name"]: _measured(results, cell) for cell in cells},
        groups=[metrics[:FIRST_METRICS], *(metrics[k : k + MORE_METRICS] for k in later)],
        notes=notes(results),
        summary=_summary(results),
        remarks={cell["name"]: _remark(results, cell) for cell in cells},
        edges={cell["name"]: _edge(cell) for cell in cells},
        cost_plots=cost_plots(results),
        loss_plots=loss_plots(results),
        gate_plots=gate_plots(results),
        gate_colours=blocks,
        gate_kinds=kinds,
    )


def markdown_table(results: Mapping[str, Any]) -> str:
    """A row for each cell, best first, and what the marks mean."""
    metrics = results["metrics"]
    cells = ranked(results)
    costs = [_costs(cell) for cell in cells]
    head = ["cell", *(costs[0] if costs else ()), *(_title(m) for m in metrics.values())]
    lines = [head, ["---", *["---:"] * (len(head) - 1)]]
    for cell, cost in zip(cells, costs, strict=True):
        name = " ".join(filter(None, [cell["name"], _remark(results, cell)]))
        lines.append([name, *cost.values(), *map(str, _measured(results, cell).values())])
    rows = ["| " + " | ".join(map(_markdown, line)) + " |" for line in lines]
    failed = [f"Failed: {f['name']}, seed {f['seed']}: {f['error']}" for f in results["failed"]]
    return "\n".join([*rows, "", "\n\n".join(map(_markdown, [*notes(results), *failed])), ""])


def run_rows(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A row for each cell and seed: settings, what was given, costs, metrics of that seed.

    A run that failed has an ``error``, and nothing in the columns of figures. All rows have the
    same keys; an axis that is called like another column is ``setting.AXIS``.
    """
    axes, metrics = axes_of(results), list(results["metrics"])
    fixed = ["kind", "seed", "sample_order_digest", "steps", "samples", "lr"]
    after = [*fixed, *CSV_COSTS, *CSV_SPEED, *metrics, "error"]
    # An axis may be the learning rate or the seed: two columns of a name are read as one.
    columns = {axis: f"setting.{axis}" if axis in {"cell", *after} else axis for axis in axes}
    empty = dict.fromkeys(["cell", *columns.values(), *after])

    def row(cell: Mapping[str, Any], **of_run: Any) -> dict[str, Any]:
        settings = {columns[axis]: value for axis, value in cell["settings"].items()}
        return {**empty, "cell": cell["name"], "kind": cell["kind"], **settings, **of_run}

    noted = ("seed", "sample_order_digest", "steps", "samples", *CSV_COSTS, *CSV_SPEED)
    rows = [
        row(cell, **{key: run[key] for key in noted}, lr=cell["lr"], **run["metrics"])
        for cell in results["cells"]
        for run in cell["runs"]
    ]
    known = {cell["name"]: cell for cell in results["cells"]}
    for failed in results["failed"]:
        nameless = {"name": failed["name"], "kind": None, "settings": {}}
        cell = known.get(failed["name"], nameless)
        rows.append(row(cell, seed=failed["seed"], error=failed["error"]))
    return rows


def csv_text(results: Mapping[str, Any]) -> str:
    """`run_rows` as CSV."""
    rows = run_rows(results)
    written = io.StringIO()
    table = csv.DictWriter(written, list(rows[0]) if rows else [], lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    return written.getvalue()


def print_table(results: Mapping[str, Any], console: Console) -> None:
    """The cells on the terminal, best first, and what failed; as much as is read at a glance."""
    table = Table(title=escape(results["title"]))
    look = looks(results)
    metrics = dict(islice(results["metrics"].items(), FIRST_METRICS))
    table.add_column("", justify="right")
    table.add_column("cell")
    cells = ranked(results)
    costs = list(islice(_costs(cells[0]), FIRST_COSTS)) if cells else []
    for title in [*costs, *map(_title, metrics.values())]:
        table.add_column(escape(title), justify="right")
    for cell in cells:
        name = "\n".join(filter(None, [cell["name"], _remark(results, cell)]))
        measured = _measured(results, cell)
        found = [str(measured[metric]) for metric in metrics]
        texts = [look[cell["name"]].label, name, *(_costs(cell)[cost] for cost in costs), *found]
        table.add_row(*map(escape, texts), style="dim" if cell["kind"] != "cell" else None)
    console.print(table)
    for note in notes(results):
        console.print(escape(note), style="dim")
    for failed in results["failed"]:
        text = f"failed: {failed['name']}, seed {failed['seed']}: {failed['error']}"
        console.print(escape(text), style="red")


def axes_of(results: Mapping[str, Any]) -> list[str]:
    """The settings that cells differ in, in the order of the grid."""
    return list(dict.fromkeys(axis for cell in results["cells"] for axis in cell["settings"]))


def notes(results: Mapping[str, Any]) -> list[str]:
    """What the figures and marks of a table mean."""
    seeds = len(results["seeds"])
    over = f"{seeds} seeds and all held-out pictures" if seeds > 1 else "held-out pictures (1 seed)"
    return [
        f"Values with their 95 % intervals [low, high] over {over}; these are symmetric, and wide "
        "where seeds are few: they may leave a metric's range. ↓: lower is better; ↑: higher. "
        "k, M, G, T, P: 10³, 10⁶, 10⁹, 10¹², 10¹⁵.",
        f"{BETTER} better, {WORSE} worse than the baseline ({results['baseline']}): paired "
        f"bootstrap, p < {ALPHA} after Holm's correction. No mark: no difference is shown.",
    ]


def _title(metric: Mapping[str, str]) -> str:
    return f"{metric['title']} {'↓' if metric['better'] == 'lower' else '↑'}"


def _remark(results: Mapping[str, Any], cell: Mapping[str, Any]) -> str:
    kinds = {"blind": "control: blind", "twin": f"control: {cell['twin_of']} again"}
    remarks = [kinds[cell["kind"]]] if cell["kind"] in kinds else []
    if cell["name"] == results["baseline"]:
        remarks.append("baseline")
    if len(cell["runs"]) < len(results["seeds"]):
        remarks.append(f"{len(cell['runs'])} of {len(results['seeds'])} seeds")
    return f"({'; '.join(remarks)})" if remarks else ""


def _costs(cell: Mapping[str, Any]) -> dict[str, str]:
    return {
        "parameters": _figure(cell["trainable_parameters"]),
        "visual tokens": _figure(cell["visual_tokens"]),
        "FLOPs": _figure(cell["train_flops"]),
        "samples/s": _figure(cell["samples_per_s"]),
        "memory": _figure(cell["peak_bytes"], "B"),
    }


def _measured(results: Mapping[str, Any], cell: Mapping[str, Any]) -> dict[str, Measured]:
    """By metric."""
    against, found = cell["against_baseline"] or {}, {}
    for name, described in results["metrics"].items():
        value, other = cell["metrics"].get(name), against.get(name)
        if value is None:
            found[name] = Measured()
            continue
        largest = max(
            abs(c["metrics"][name]["value"]) for c in results["cells"] if name in c["metrics"]
        )
        places = 3 if largest < 10 else 2 if largest < 100 else 1
        text = [f"{value[key]:.{places}f}" for key in ("value", "low", "high")]
        parts = [text[0], f"[{text[1]}, {text[2]}]"]
        if other is not None:
            gap = [f"{other[key]:+.{places}f}" for key in ("difference", "low", "high")]
            p = other["p_adjusted"]
            parts += [
                _sign(described["better"], other),
                f"{gap[0]} [{gap[1]}, {gap[2]}]",
                "p < 0.001" if p < 0.001 else f"p = {p:.3f}",
            ]
        found[name] = Measured(*parts)
    return found


def _sign(better: str, against: Mapping[str, float]) -> str:
    if against["p_adjusted"] >= ALPHA:
        return ""
    return BETTER if (against["difference"] < 0) == (better == "lower") else WORSE


def _summary(results: Mapping[str, Any]) -> dict[str, Any]:
    """What the page says in its first paragraph, as lists of cells."""
    primary, described = next(iter(results["metrics"].items()))
    lower = described["better"] == "lower"
    cells = [cell for cell in ranked(results) if primary in cell["metrics"]]
    own = [cell for cell in cells if cell["kind"] == "cell"]
    groups: dict[str, list[str]] = {BETTER: [], WORSE: [], "": []}
    for cell in own:
        against = (cell["against_baseline"] or {}).get(primary)
        if against and cell["name"] != results["baseline"]:
            groups[_sign(described["better"], against)].append(cell["name"])
    floor = next((cell for cell in cells if cell["kind"] == "blind"), None)  # the best of them
    near = []
    if floor is not None:
        bound = floor["metrics"][primary]["low" if lower else "high"]
        reach = {c["name"]: c["metrics"][primary]["high" if lower else "low"] for c in own}
        near = [name for name, edge in reach.items() if (edge >= bound if lower else edge <= bound)]
    values = {cell["name"]: cell["metrics"][primary]["value"] for cell in cells}
    twins = [c for c in cells if c["kind"] == "twin" and c["twin_of"] in values]
    gains = {c["name"]: c["metrics"][GAIN]["low"] for c in own if GAIN in c["metrics"]}
    return {
        "own": own,
        "gains": bool(gains),
        "seeing": [name for name, low in gains.items() if low > 0],
        "unseeing": [name for name, low in gains.items() if low <= 0],
        "better": groups[BETTER],
        "worse": groups[WORSE],
        "alike": groups[""],
        "floor": floor,
        "near": near,
        "twins": {twin["name"]: values[twin["name"]] - values[twin["twin_of"]] for twin in twins},
    }


def _edge(cell: Mapping[str, Any]) -> bool:
    """Whether the chosen learning rate is the lowest or the highest that was tried."""
    tried = [lr for lr, _ in cell["lr_sweep"]]
    return len(tried) > 1 and cell["lr"] in (min(tried), max(tried))


def _markdown(text: str) -> str:
    """Text in a cell of a table, with no markup of its own."""
    return re.sub(r"([\\`*|<>])", r"\\\1", " ".join(text.splitlines()))


def _figure(value: float | None, unit: str = "") -> str:
    """Three digits with k, M, G, … as the SI has them."""
    if value is None:
        return NONE
    prefixes = ["", "k", "M", "G", "T", "P", "E"]
    while abs(value) >= 999.5 and len(prefixes) > 1:
        value, prefixes = value / 1000, prefixes[1:]
    suffix = prefixes[0] + unit
    return f"{value:.3g}{NO_BREAK if suffix else ''}{suffix}"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    parts = [(hours, "h"), (minutes, "min"), (rest, "s")]
    return " ".join(f"{n}{NO_BREAK}{unit}" for n, unit in parts if n) or f"0{NO_BREAK}s"
