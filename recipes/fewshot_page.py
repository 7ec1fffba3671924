"""The page of `bridges fewshot`: metrics over shots, and what some queries were shown and said."""

import io
from collections.abc import Mapping
from importlib.resources import files
from typing import Any

from jinja2 import Environment
from rich.table import Table

from recipes.fewshot_curve import Evaluation
from recipes.report import COLOURS

STYLES = ("-", "--", ":", "-.")


def render(result: Mapping[str, Any], found: Evaluation) -> str:
    """The page.

    Args:
        result: what the JSON holds.
        found: examples, and what the metrics measure.
    """
    template = Environment(autoescape=True).from_string(
        files("recipes").joinpath("templates/fewshot.html").read_text(encoding="utf-8")
    )
    return template.render(
        result=result,
        rows=_rows(result),
        exchanged=_exchanged(result["exchange"]) if "exchange" in result else {},
        plot=_plot(result, found.axis),
        cards=found.cards,
    )


def tables(result: Mapping[str, Any]) -> list[Table]:
    """The metrics on the terminal, and of documents what each picture does for the texts."""
    grids = [_curve_table(result)]
    if "exchange" in result:
        grid = Table(title="loss per token with one picture exchanged")
        grid.add_column("")
        for name in next(iter(result["exchange"]["gap"].values())):
            grid.add_column(name, justify="right")
        for name, values in _exchanged(result["exchange"]).items():
            grid.add_row(name, *values)
        grids.append(grid)
    return grids


def _curve_table(result: Mapping[str, Any]) -> Table:
    grid = Table(title=f"{result['task']}, {result['queries']} queries")
    grid.add_column("shots")
    for shots in result["shots"]:
        grid.add_column(shots, justify="right")
    for name, values in _rows(result).items():
        grid.add_row(name, *values)
    return grid


def _rows(result: Mapping[str, Any]) -> dict[str, list[str]]:
    """Metric and selection -> a value for each number of shots."""
    rows: dict[str, list[str]] = {}
    for name, series in _series(result).items():
        by_shots = {point["shots"]: point for point in series}
        rows[name] = [_value(by_shots.get(int(shots))) for shots in result["shots"]]
    return rows


def _exchanged(exchange: Mapping[str, Any]) -> dict[str, list[str]]:
    """The pictures that a document has -> loss of each text, and its gap to the right pictures."""
    loss, gap = exchange["loss"], exchange["gap"]
    rows = {"the right pictures": [f"{value:.3f}" for value in loss["right"]]}
    for name, gaps in gap.items():
        rows[f"{name} exchanged"] = [
            f"{value:.3f} ({one['mean']:+.3f}\N{NO-BREAK SPACE}±\N{NO-BREAK SPACE}{one['se']:.3f})"
            for value, one in zip(loss[name], gaps.values(), strict=True)
        ]
    return rows


def _value(point: Mapping[str, Any] | None) -> str:
    if point is None:
        return "–"
    spread = "" if point["std"] is None else f" ± {point['std']:.3f}"
    return f"{point['mean']:.3f}{spread}"


def _series(result: Mapping[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """The points of each line: metric and selection -> shots, mean, std."""
    series: dict[str, list[dict[str, Any]]] = {}
    for shots, selections in result["shots"].items():
        for selection, metrics in selections.items():
            for metric, value in metrics.items():
                name = metric if selection == "document" else f"{metric}, {selection}"
                point = {"shots": int(shots), "mean": value["mean"], "std": value["std"]}
                series.setdefault(name, []).append(point)
    return series


def _plot(result: Mapping[str, Any], axis: str) -> str:
    """The lines as an SVG element: a colour for each metric, a stroke for each selection."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("the page needs matplotlib: pip install 'bridges[demo]'") from error
    figure = Figure(figsize=(8, 3.6), layout="constrained")
    axes = figure.subplots()
    metrics: list[str] = []
    selections: list[str] = []
    for name, points in _series(result).items():
        metric, _, selection = name.partition(", ")
        for known, one in ((metrics, metric), (selections, selection)):
            if one not in known:
                known.append(one)
        axes.errorbar(
            [point["shots"] for point in points],
            [point["mean"] for point in points],
            yerr=[point["std"] or 0.0 for point in points],
            color=COLOURS[metrics.index(metric) % len(COLOURS)],
            ls=STYLES[selections.index(selection) % len(STYLES)],
            marker="o",
            ms=4,
            lw=1.4,
            capsize=2,
            label=name,
        )
    axes.set_xticks([int(shots) for shots in result["shots"]])
    axes.set_xlabel("shots")
    axes.set_ylabel(axis)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    svg = io.StringIO()
    figure.savefig(svg, format="svg", metadata={"Date": None})
    text = svg.getvalue()
    return text[text.index("<svg") :]
