"""The page of `bridges retrieve`: what was found for some texts and some pictures."""

from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from jinja2 import Environment
from torch import Tensor

from qformer.retrieval import KS, first
from recipes.gallery import Gallery, Scores, thumbnails

SHOWN = 8
"""Texts on the page, and pictures."""

FOUND = 5
"""What is shown of each ranking."""

SIDE = 224
"""Pixels of the longer side of a picture on the page."""

KINDS = {"itc": "ITC", "itm": "re-ranked by ITM", "random": "at random"}
"""Rankings, by their name in `retrieval.json`."""


def render(
    result: Mapping[str, Any], gallery: Gallery, scores: Scores, shards: Sequence[Path]
) -> str:
    """The page.

    Args:
        result: what `retrieval.json` holds.
        gallery: pictures and texts.
        scores: of them.
        shards: the pictures themselves; where there are only features, texts stand for them.
    """
    owners, pictures = gallery.owners, torch.arange(len(gallery.names))
    by_text = {"itc": scores.itc.T, "itm": scores.itm_images}
    by_picture = {"itc": scores.itc, "itm": scores.itm_texts}
    texts = [
        {"row": row, "found": _found(by_text, row, owners[row], pictures)}
        for row in _spread(len(owners))
    ]
    shown = [
        {"row": row, "found": _found(by_picture, row, pictures[row], owners)}
        for row in _spread(len(pictures))
    ]
    wanted = {card["row"] for card in shown} | {
        place["column"] for card in texts for found in card["found"].values() for place in found[0]
    }
    template = Environment(autoescape=True).from_string(
        files("recipes").joinpath("templates/retrieve.html").read_text(encoding="utf-8")
    )
    captions: dict[int, str] = {}
    for owner, text in zip(owners.tolist(), gallery.texts, strict=True):
        captions.setdefault(owner, text)
    return template.render(
        result=result,
        ks=KS,
        kinds=KINDS,
        texts=texts,
        pictures=shown,
        all_texts=gallery.texts,
        captions=captions,
        thumbnails=thumbnails(shards, {gallery.names[row]: row for row in wanted}, SIDE),
    )


def _found(
    scores: Mapping[str, Tensor], row: int, owner: Tensor, owners: Tensor
) -> dict[str, tuple[list[dict[str, Any]], int]]:
    """The first of each ranking, and the place of the first right one, from 1."""
    found = {}
    for kind, values in scores.items():
        ranked = first(values[row : row + 1], len(owners))[0]
        right = owners[ranked] == owner
        places = [
            {"column": int(column), "right": bool(hit)}
            for column, hit in zip(ranked[:FOUND], right[:FOUND], strict=True)
        ]
        found[kind] = (places, int(right.int().argmax()) + 1)
    return found


def _spread(total: int) -> list[int]:
    """Some of so many rows, evenly spread: nobody has chosen them."""
    return sorted({round(step * (total - 1) / (SHOWN - 1)) for step in range(SHOWN)})
