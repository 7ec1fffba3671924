"""Draws the Q-Former's masks for `masks.md` at every build, from the functions themselves."""

import io
from collections.abc import Callable
from typing import Any

import torch
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from mkdocs.structure.files import File, Files
from torch import Tensor

from qformer.masks import instruction_mask, itc_itg_mask, itc_mask, itg_mask, itm_mask

QUERIES = ["q1", "q2", "q3", "q4"]
CAPTION = ["[CLS]", "a", "cat", "[SEP]", "[PAD]"]
WRITTEN = ["[DEC]", "a", "cat", "[SEP]", "[PAD]"]
INSTRUCTION = ["[CLS]", "what", "colour", "[SEP]", "[PAD]"]

DRAWINGS = {
    "itc": (itc_mask, CAPTION, CAPTION),
    "itm": (itm_mask, CAPTION, CAPTION),
    "itg": (itg_mask, WRITTEN, WRITTEN),
    "itc-itg": (itc_itg_mask, CAPTION, CAPTION + WRITTEN),
    "instruction": (instruction_mask, INSTRUCTION, INSTRUCTION),
}
"""File names of the drawings: the function, its text, and what stands after the queries."""

TO_QUERY, TO_TEXT, NOTHING = "#4f46e5", "#d97706", "#eceef1"


def on_files(files: Files, *, config: Any) -> Files:
    """Adds ``masks/*.svg`` to the site."""
    for name, drawing in DRAWINGS.items():
        files.append(File.generated(config, f"masks/{name}.svg", content=draw(*drawing)))
    return files


def draw(visibility: Callable[[int, Tensor], Tensor], text: list[str], beside: list[str]) -> str:
    """One mask as SVG: a row for each position that attends, a column for each attended to.

    Args:
        visibility: of `qformer.masks`.
        text: what it is called with.
        beside: the positions after the queries.
    """
    n, labels = len(QUERIES), QUERIES + beside
    size = len(labels)
    real = torch.tensor([[token != "[PAD]" for token in text]])
    mask = visibility(n, real)[0]
    figure = Figure(
        figsize=(1.3 + 0.42 * size, 1.2 + 0.42 * size), layout="constrained", facecolor="white"
    )
    axes = figure.subplots()
    for row in range(size):
        for column in range(size):
            colour = (TO_QUERY if column < n else TO_TEXT) if mask[row, column] else NOTHING
            axes.add_patch(
                Rectangle((column, row), 1, 1, facecolor=colour, edgecolor="white", lw=2)
            )
    for place in (place for place, token in enumerate(labels) if token == "[PAD]"):
        for corner, width, height in (((place, 0), 1, size), ((0, place), size, 1)):
            axes.add_patch(
                Rectangle(
                    corner, width, height, fill=False, hatch="////", edgecolor="#9ca3af", lw=0
                )
            )
    for start in range(n, size, len(text)):
        axes.axhline(start, color="#111827", lw=1.2)
        axes.axvline(start, color="#111827", lw=1.2)
    axes.set(xlim=(0, size), ylim=(size, 0), aspect="equal")
    places = [place + 0.5 for place in range(size)]
    axes.set_xticks(places, labels, rotation=90)
    axes.set_yticks(places, labels)
    axes.xaxis.tick_top()
    axes.xaxis.set_label_position("top")
    axes.set_xlabel("is attended to")
    axes.set_ylabel("attends")
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    figure.legend(
        handles=[
            Patch(facecolor=TO_QUERY, label="sees a query"),
            Patch(facecolor=TO_TEXT, label="sees text"),
            Patch(facecolor=NOTHING, label="not seen"),
            Patch(facecolor="white", edgecolor="#9ca3af", hatch="////", label="padding"),
        ],
        loc="outside lower center",
        ncols=4,
        frameon=False,
        fontsize="small",
        handlelength=1,
        columnspacing=1.2,
    )
    svg = io.StringIO()
    with rc_context({"svg.hashsalt": "bridges"}):
        figure.savefig(svg, format="svg", metadata={"Date": None})
    return svg.getvalue()
