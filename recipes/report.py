"""The demo's report: one self-contained HTML page."""

import base64
import io
from collections.abc import Mapping, Sequence
from importlib.resources import files
from itertools import islice
from pathlib import Path
from typing import Any

from jinja2 import Environment
from rich.console import Console
from rich.table import Table

from bridges.embedded import licences
from recipes.samples import decode_caption_sample, image_extension
from recipes.scene_captions import score
from recipes.stream import ShardStream

SHOWN = 24
"""Held-out pictures on the page."""

COLOURS = ("#2563eb", "#d97706", "#059669", "#7c3aed")

Curves = Mapping[str, Sequence[tuple[int, float]]]


def pictures(shards: Sequence[Path], limit: int = SHOWN) -> list[dict[str, Any]]:
    """The first pictures of some shards: data URI, captions, json."""
    return [
        described(raw)
        for raw in islice(ShardStream(list(shards), dict, seed=0, shuffle=False), limit)
    ]


def described(raw: Mapping[str, Any]) -> dict[str, Any]:
    """A picture of a raw sample for a page: data URI, captions, json."""
    extension = image_extension(raw)
    kind = "jpeg" if extension == "jpg" else extension
    data = base64.b64encode(raw[extension]).decode()
    sample = decode_caption_sample(raw)
    return {
        "uri": f"data:image/{kind};base64,{data}",
        "captions": sample["captions"],
        "meta": sample["meta"],
    }


def render(
    summary: Mapping[str, Any],
    curves: Mapping[str, Curves],
    captions: Mapping[str, Sequence[str]],
    shown: Sequence[Mapping[str, Any]],
) -> str:
    """The page.

    Args:
        summary: what `summary.json` holds.
        curves: training and held-out loss of each bridge.
        captions: of each bridge, for the held-out pictures in order.
        shown: from `pictures`.
    """
    cards = [
        {
            "uri": picture["uri"],
            "truth": picture["captions"][0],
            "written": {
                name: {"text": texts[index], "marks": marks(texts[index], picture["meta"])}
                for name, texts in captions.items()
            },
        }
        for index, picture in enumerate(shown)
    ]
    environment = Environment(autoescape=True)
    template = environment.from_string(
        files("recipes").joinpath("templates/demo.html").read_text(encoding="utf-8")
    )
    return template.render(
        summary=summary,
        bridges=summary["bridges"],
        scenes=any(b["acc_object"] is not None for b in summary["bridges"].values()),
        plot=plot_curves(curves),
        cards=cards,
        colours=dict(zip(captions, COLOURS, strict=False)),
        licences=licences().splitlines() if summary["data"] == "emoji scenes" else [],
    )


def plot_curves(curves: Mapping[str, Curves]) -> str:
    """Loss curves as an SVG element."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FormatStrFormatter, LogLocator, NullFormatter

    figure = Figure(figsize=(8, 3.6), layout="constrained")
    axes = figure.subplots()
    for (name, series), colour in zip(curves.items(), COLOURS, strict=False):
        if series["loss"]:
            axes.plot(*zip(*series["loss"], strict=True), color=colour, lw=1.2, label=name)
        if series["val_loss"]:
            steps, losses = zip(*series["val_loss"], strict=True)
            axes.plot(steps, losses, "o--", color=colour, ms=4, lw=0.8, label=f"{name}, held out")
    axes.set_xlabel("step")
    axes.set_ylabel("loss per caption token (nats)")
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FormatStrFormatter("%g"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    svg = io.StringIO()
    figure.savefig(svg, format="svg", metadata={"Date": None})
    text = svg.getvalue()
    return text[text.index("<svg") :]


def print_summary(summary: Mapping[str, Any], console: Console) -> None:
    """The summary as a table on the terminal."""
    table = Table(title="held-out pictures")
    table.add_column("")
    for name in summary["bridges"]:
        table.add_column(name, justify="right")
    rows = next(iter(summary["bridges"].values()))
    for key in rows:
        values = [bridge[key] for bridge in summary["bridges"].values()]
        table.add_row(key, *("–" if v is None else f"{v:,.4g}" for v in values))
    console.print(table)


def marks(text: str, meta: Mapping[str, Any]) -> dict[str, bool]:
    """Which parts of a scene's caption are right; nothing for photographs."""
    if "objects" not in meta:
        return {}
    return {part: right for part, right in score(text, dict(meta)).items() if right is not None}
