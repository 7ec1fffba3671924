"""An ablation's training, a small figure for each cell: its loss, and its gates."""

import itertools
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from recipes.ablation_plots import looks, new_figure, ranked, svg

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SIZE = (3.1, 2.2)
"""Inches."""

AROUND_POINTS = 40
"""Of a line in the background of every other cell's figure."""

STROKES = ("-", "--", ":", "-.")

Line = list[tuple[float, float, float, float]]
"""Step; mean, lowest and highest over the seeds."""


def loss_plots(results: Mapping[str, Any]) -> dict[str, str]:
    """Training and held-out loss of each cell that has them, before those of all others in grey.

    Returns:
        By the cell's name, best first: an SVG element; all have the same axes.
    """
    look = looks(results)
    trained: dict[str, Line] = {}
    held_out: dict[str, Line] = {}
    for cell in ranked(results):
        if line := over_seeds(run["curve"] for run in cell["runs"]):
            trained[cell["name"]] = line
            held_out[cell["name"]] = over_seeds(run["val_curve"] for run in cell["runs"])
    limits = _limits([*trained.values(), *held_out.values()])
    plots = {}
    for place, (name, line) in enumerate(trained.items()):
        figure = new_figure(SIZE)
        axes = figure.subplots()
        for other in trained.values():
            thinned = other[:: max(1, len(other) // AROUND_POINTS)]
            axes.plot([p[0] for p in thinned], [p[1] for p in thinned], color="#d1d5db", lw=0.7)
        _draw(axes, line, color=look[name].colour)
        _draw(axes, held_out[name], color=look[name].colour, ls="--", marker="o", ms=2.5)
        axes.set_ylim(*limits)
        _log_loss(axes, limits)
        axes.set_xlabel("step")
        axes.set_ylabel("loss")
        plots[name] = svg(figure, f"loss-{place}", f"loss of {name}")
    return plots


def gate_plots(results: Mapping[str, Any]) -> dict[str, str]:
    """Each gate over the steps, mean over the seeds, of every cell that has gates.

    Returns:
        By the cell's name, best first: an SVG element; all have the same axes.
    """
    lines = {}
    for cell in ranked(results):
        names = sorted({name for run in cell["runs"] for name in run["gates"]}, key=_kind_and_block)
        if names:
            lines[cell["name"]] = {
                name: over_seeds(run["gates"].get(name, ()) for run in cell["runs"])
                for name in names
            }
    colours, strokes = gate_legend(results)
    means = [p[1] for gates in lines.values() for line in gates.values() for p in line]
    plots = {}
    for place, (name, gates) in enumerate(lines.items()):
        figure = new_figure(SIZE)
        axes = figure.subplots()
        axes.axhline(0, color="#9ca3af", lw=0.6, zorder=0)
        for gate, line in gates.items():
            kind, block = _kind_and_block(gate)
            points = [p[0] for p in line], [p[1] for p in line]
            axes.plot(*points, color=colours[block], ls=STROKES[strokes.index(kind) % 4], lw=1.3)
        margin = 0.05 * (max(means) - min(means)) or 0.05
        axes.set_ylim(min(means) - margin, max(means) + margin)
        axes.set_xlabel("step")
        axes.set_ylabel("tanh of the gate")
        plots[name] = svg(figure, f"gates-{place}", f"gates of {name}")
    return plots


def gate_legend(results: Mapping[str, Any]) -> tuple[dict[int, str], list[str]]:
    """How gates are drawn: LM block -> colour, from dark to bright with depth; kinds by stroke."""
    found = {
        _kind_and_block(name)
        for cell in results["cells"]
        for run in cell["runs"]
        for name in run["gates"]
    }
    if not found:
        return {}, []
    new_figure(SIZE)  # says what to install where matplotlib is not there
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    blocks = sorted({block for _, block in found})
    # The brightest yellow is not seen on white.
    colours = {
        block: to_hex(colormaps["plasma"](0.88 * place / max(1, len(blocks) - 1)))
        for place, block in enumerate(blocks)
    }
    return colours, sorted({kind for kind, _ in found})


def over_seeds(series: Iterable[Sequence[Sequence[float]]]) -> Line:
    """Mean, lowest and highest at each step, of the seeds that have a figure there."""
    at: dict[float, list[float]] = defaultdict(list)
    for step, value in itertools.chain.from_iterable(series):
        at[step].append(value)
    return [(step, sum(v) / len(v), min(v), max(v)) for step, v in sorted(at.items())]


def _draw(axes: "Axes", line: Line, **style: Any) -> None:
    steps, means, lows, highs = zip(*line, strict=True) if line else ((), (), (), ())
    axes.plot(steps, means, lw=1.3, **style)
    if lows != highs:
        axes.fill_between(steps, lows, highs, color=style["color"], alpha=0.2, lw=0)


def _limits(lines: Sequence[Line]) -> tuple[float, float]:
    """Of a logarithmic axis; what is not positive has no place there."""
    values = [v for line in lines for p in line for v in p[2:] if v > 0 and math.isfinite(v)]
    low, high = min(values, default=1.0), max(values, default=1.0)
    margin = max(1.05, (high / low) ** 0.05)
    return low / margin, high * margin


def _log_loss(axes: "Axes", limits: tuple[float, float]) -> None:
    """A logarithmic axis with plain numbers; evenly spaced ones where it is short."""
    from matplotlib.ticker import FormatStrFormatter, LogLocator, MaxNLocator

    axes.set_yscale("log")
    wide = limits[1] / limits[0] > 5
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)) if wide else MaxNLocator(4))
    axes.yaxis.set_major_formatter(FormatStrFormatter("%g"))
    axes.minorticks_off()


def _kind_and_block(name: str) -> tuple[str, int]:
    kind, _, block = name.rpartition(".")
    return kind, int(block)
