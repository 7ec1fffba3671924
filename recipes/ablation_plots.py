"""How each cell of an ablation looks in every figure, and quality against what it costs."""

import html
import io
import math
import re
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Better = Literal["lower", "higher"]

PALETTE = {
    "#0072b2": "#ffffff",
    "#d55e00": "#000000",
    "#009e73": "#000000",
    "#cc79a7": "#000000",
    "#e69f00": "#000000",
    "#56b4e9": "#000000",
    "#332288": "#ffffff",
}
"""Colours that the colour-blind tell apart, and what is read on each.

Source: Okabe and Ito, "Color Universal Design"; indigo (Tol) in place of their black and yellow.
"""

CONTROL, CONTROL_INK = "#9ca3af", "#000000"

MARKERS = {"o": "round", "s": "square", "D": "diamond"}
"""After the last colour they begin again with another shape; matplotlib's name, and the page's."""

COSTS = {
    "trainable_parameters": "trainable parameters",
    "visual_tokens": "visual tokens",
    "train_flops": "training FLOPs",
}

SIZE = (4.2, 3.3)
"""Inches of a figure: three beside each other on a page, one on a phone, letters stay readable."""

TITLE_WIDTH = 32
"""Letters of a metric's title that find room along the axis."""

LABEL_GAP = 0.055
"""Of the axis: how far points stand apart, for a label of two digits beside each."""

NO_METADATA = ("Creator", "Date", "Format", "Type")
"""Matplotlib's: left out, the same figure is the same bytes at any time."""

LEAST_SPAN = math.log10(4)
"""Of the axis of costs, where all are alike: small differences shall look small."""


@dataclass(frozen=True)
class Look:
    """What a cell is recognised by in every table and figure.

    Attributes:
        label: its rank by the primary metric; a letter for a control.
        colour: hex; grey for a control.
        ink: the colour of letters on it.
        marker: matplotlib's.
    """

    label: str
    colour: str
    ink: str
    marker: str

    @property
    def shape(self) -> str:
        """The marker as a CSS class."""
        return MARKERS[self.marker]


def ranked(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The cells, best first by the primary metric; those without it last."""
    primary, described = next(iter(results["metrics"].items()))
    sign = 1.0 if described["better"] == "lower" else -1.0

    def key(cell: Mapping[str, Any]) -> float:
        found = cell["metrics"].get(primary)
        return math.inf if found is None else sign * found["value"]

    return sorted(results["cells"], key=key)


def looks(results: Mapping[str, Any]) -> dict[str, Look]:
    """Of every cell, by name; colours follow the grid's order, labels the ranks."""
    cells = [cell["name"] for cell in results["cells"] if cell["kind"] == "cell"]
    colours = list(PALETTE.items())
    found: dict[str, Look] = {}
    controls = 0
    for cell in ranked(results):
        if cell["kind"] == "cell":
            turn, place = divmod(cells.index(cell["name"]), len(colours))
            label = str(len(found) - controls + 1)
            marker = list(MARKERS)[turn % len(MARKERS)]
            found[cell["name"]] = Look(label, *colours[place], marker)
        else:
            label = chr(ord("A") + controls)
            controls += 1
            found[cell["name"]] = Look(label, CONTROL, CONTROL_INK, "o")
    return found


def pareto(points: Sequence[tuple[float, float]], better: Better) -> list[int]:
    """Which points no other point beats at its cost or at less.

    Args:
        points: cost, of which less is better, and quality.
        better: which quality is.

    Returns:
        Indices by rising cost; of equal points the first.
    """
    sign = 1.0 if better == "lower" else -1.0
    front: list[int] = []
    for index in sorted(range(len(points)), key=lambda i: (points[i][0], sign * points[i][1])):
        if not front or sign * points[index][1] < sign * points[front[-1]][1]:
            front.append(index)
    return front


def spread(places: Sequence[float], gap: float) -> list[float]:
    """Places moved apart to at least a gap, in their order, as little as can be.

    Least squares: the places less their share of gaps are made to rise by pooling neighbours.
    """
    order = sorted(range(len(places)), key=places.__getitem__)
    pools: list[tuple[float, int]] = []  # sum, how many
    for rank, index in enumerate(order):
        total, count = places[index] - rank * gap, 1
        while pools and pools[-1][0] / pools[-1][1] >= total / count:
            before, more = pools.pop()
            total, count = before + total, more + count
        pools.append((total, count))
    levels = [total / count for total, count in pools for _ in range(count)]
    moved = [0.0] * len(places)
    for rank, index in enumerate(order):
        moved[index] = levels[rank] + rank * gap
    return moved


def cost_plots(results: Mapping[str, Any]) -> dict[str, str]:
    """The primary metric against each cost that is known of some cell.

    Returns:
        By the cost's title: an SVG element.
    """
    look = looks(results)
    metric = next(iter(results["metrics"]))
    plots = {}
    for cost, title in COSTS.items():
        known = [c for c in ranked(results) if c[cost] and metric in c["metrics"]]
        if known:
            plots[title] = _cost_plot(results, known, look, cost)
    return plots


def _cost_plot(
    results: Mapping[str, Any],
    cells: Sequence[Mapping[str, Any]],
    look: Mapping[str, Look],
    cost: str,
) -> str:
    from matplotlib.ticker import EngFormatter, LogLocator

    metric, described = next(iter(results["metrics"].items()))
    better = described["better"]
    found = [cell["metrics"][metric] for cell in cells]
    figure = new_figure(SIZE)
    axes = figure.subplots()
    places, limits = _apart([math.log10(cell[cost]) for cell in cells])
    places = [10**place for place in places]
    axes.set_xscale("log")
    axes.set_xlim(*(10**limit for limit in limits))

    for place, cell, value in zip(places, cells, found, strict=True):
        mine = look[cell["name"]]
        around = [[value["value"] - value["low"]], [value["high"] - value["value"]]]
        axes.errorbar(
            [place],
            [value["value"]],
            yerr=[[max(0.0, side)] for (side,) in around],
            color=mine.colour,
            marker=mine.marker,
            ms=6,
            capsize=3,
            lw=1.4,
        )
        # From where it stands to what it costs.
        axes.plot(
            [cell[cost], place],
            [0, 0.04],
            transform=axes.get_xaxis_transform(),
            color="#6b7280",
            lw=0.6,
        )
        # On the side where the front does not come from.
        below = better == "lower"
        axes.annotate(
            mine.label,
            (place, value["low"] if below else value["high"]),
            xytext=(0, -4 if below else 4),
            textcoords="offset points",
            ha="center",
            va="top" if below else "bottom",
            fontsize=8.5,
        )

    own = [index for index, cell in enumerate(cells) if cell["kind"] == "cell"]
    # At the true costs: where equal ones are drawn beside each other does not count.
    points = [(float(cells[index][cost]), float(found[index]["value"])) for index in own]
    front = [own[index] for index in pareto(points, better)]
    if front:
        steps = [(places[index], found[index]["value"]) for index in front]
        steps.append((10 ** limits[1], steps[-1][1]))
        axes.step(*zip(*steps, strict=True), where="post", color="#6b7280", lw=1.1, zorder=0)
    blind = [f["value"] for f, cell in zip(found, cells, strict=True) if cell["kind"] == "blind"]
    if blind:
        floor = min(blind) if better == "lower" else max(blind)
        axes.axhline(floor, color=CONTROL, lw=0.9, ls=":", zorder=0)

    tokens = cost == "visual_tokens"
    axes.xaxis.set_major_locator(LogLocator(2) if tokens else LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:g}" if tokens else EngFormatter(sep=""))
    axes.minorticks_off()
    axes.margins(y=0.14)
    axes.set_xlabel(COSTS[cost])
    lines = [*textwrap.wrap(described["title"], TITLE_WIDTH), f"({better} is better)"]
    axes.set_ylabel("\n".join(lines))
    return svg(figure, f"cost-{cost}", f"{described['title']} against {COSTS[cost]}")


def _apart(places: Sequence[float]) -> tuple[list[float], tuple[float, float]]:
    """Places on an axis, moved apart, and the axis' limits around them."""
    share = min(LABEL_GAP, 0.75 / len(places))
    moved = list(places)
    low, high = min(places), max(places)
    for _ in range(8):  # the gap is a share of the axis, and the axis grows with what is moved
        span = max(high - low, LEAST_SPAN)
        low, high = (low + high - span) / 2, (low + high + span) / 2
        moved = spread(places, share * span)
        low, high = min(low, *moved), max(high, *moved)
    margin = share * (high - low)
    return moved, (low - margin, high + margin)


def new_figure(size: tuple[float, float]) -> "Figure":
    """An empty figure.

    Args:
        size: width and height in inches.

    Raises:
        ImportError: matplotlib is not there (extra ``ablate``).
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("the report needs matplotlib: pip install 'bridges[ablate]'") from error
    return Figure(figsize=size, layout="constrained")


def svg(figure: "Figure", name: str, title: str) -> str:
    """A figure as an SVG element to stand in a page among others.

    Args:
        figure: whose axes lose the frame above and at the right, and get a grid.
        name: before every id, which no other figure of the page may share.
        title: read aloud in place of the figure.
    """
    from matplotlib import rc_context

    for axes in figure.axes:
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    written = io.StringIO()
    # Letters stay letters: they can be searched, and the page sets their font.
    with rc_context({"svg.hashsalt": name, "svg.fonttype": "none"}):
        figure.savefig(written, format="svg", metadata=dict.fromkeys(NO_METADATA))
    text = written.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", text)
    return text.replace("<svg ", f'<svg role="img" aria-label="{html.escape(title)}" ', 1)
