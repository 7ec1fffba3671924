"""The page of `bridges evaluate`: all figures with their intervals, and some pictures."""

from collections.abc import Mapping
from importlib.resources import files
from typing import Any

from jinja2 import Environment
from rich.table import Table

from recipes.evaluate_found import Line
from recipes.evaluate_pictures import Pictures, spread
from recipes.evaluate_scores import BETTER, TITLES
from recipes.gallery import thumbnails

SHOWN = 12
"""Pictures on the page."""

SIDE = 224
"""Pixels of the longer side of a picture on the page."""

NAMES = {
    "caption": "Captions",
    "likelihood": "Likelihood of the true captions",
    "vqa": "Questions",
    "retrieval": "Retrieval",
    "fewshot": "Few-shot",
    "classify": "Zero-shot classes",
}
"""Tasks, for people."""


def render(
    result: Mapping[str, Any], lines: Mapping[str, Mapping[int, list[Line]]], found: Pictures
) -> str:
    """The page.

    Args:
        result: what ``evaluation.json`` holds.
        lines: of the examples, by task and picture.
        found: the pictures.
    """
    samples = found.held_out.samples
    shown = spread(len(samples), SHOWN)
    small = thumbnails(found.shards, {samples[row]["name"]: row for row in shown}, SIDE)
    cards = [
        {
            "uri": small.get(row, ""),
            "truth": samples[row]["captions"][0] if samples[row]["captions"] else "",
            "tasks": {NAMES[task]: each[row] for task, each in lines.items() if each.get(row)},
        }
        for row in shown
    ]
    template = Environment(autoescape=True).from_string(
        files("recipes").joinpath("templates/evaluate.html").read_text(encoding="utf-8")
    )
    return template.render(
        result=result,
        names=NAMES,
        grids={task: grid(one) for task, one in result["tasks"].items()},
        cards=cards,
    )


def grid(task: Mapping[str, Any]) -> dict[str, Any]:
    """The figures of a task as a table: a row for each, a column for what differs.

    Args:
        task: of the JSON.
    """
    columns: Mapping[str, str] = task["columns"]
    rows: dict[str, dict[str, Mapping[str, Any]]] = {}
    for name, figure in task["metrics"].items():
        ending = max((end for end in columns if name.endswith(end)), key=len)
        rows.setdefault(name.removesuffix(ending), {})[ending] = figure
    return {
        "columns": [*columns.values(), *(["chance"] if task["chance"] else [])],
        "rows": [
            {
                "title": TITLES[base],
                "better": BETTER[base],
                "cells": [
                    *(cells.get(ending) for ending in columns),
                    *([_point(task["chance"].get(base))] if task["chance"] else []),
                ],
            }
            for base, cells in rows.items()
        ],
    }


def tables(result: Mapping[str, Any]) -> list[Table]:
    """The figures on the terminal."""
    found = []
    for task, one in result["tasks"].items():
        content = grid(one)
        table = Table(title=NAMES[task])
        table.add_column("")
        for column in content["columns"]:
            table.add_column(column, justify="right")
        for row in content["rows"]:
            table.add_row(row["title"], *map(_cell, row["cells"]))
        found.append(table)
    return found


def _point(value: float | None) -> dict[str, float | None] | None:
    return None if value is None else {"value": value, "low": None, "high": None}


def _cell(figure: Mapping[str, Any] | None) -> str:
    if figure is None:
        return "–"
    if figure["low"] is None:
        return f"{figure['value']:.3f}"
    return f"{figure['value']:.3f}\n[{figure['low']:.3f}, {figure['high']:.3f}]"
