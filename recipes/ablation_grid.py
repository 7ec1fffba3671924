"""The grid of an ablation: a YAML, read and checked."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

import yaml
from jsonargparse import ArgumentError, ArgumentParser
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from recipes.config_keys import Config, set_key

GRIDS = Path(__file__).parent / "configs" / "grids"
"""The shipped grids."""

Match = Literal["steps", "flops", "params", "time"]
Control = Literal["blind", "twin"]

GRID = "grid."
"""On the command line: keys of the grid itself begin with it."""

RESAMPLER = "model.bridge.init_args.resampler"


@dataclass(frozen=True)
class Sweep:
    """The search for each cell's learning rate, of the same budget for every cell.

    Attributes:
        values: learning rates, each tried once by every cell, with the first of its seeds.
        steps: of each trial, which is a whole short run: its schedule ends there, too.
    """

    values: list[float]
    steps: int


@dataclass(frozen=True)
class Scoring:
    """What is scored on the held-out pictures.

    Attributes:
        pictures: the first so many.
        captions: whether captions are written, and compared with the true ones.
        likelihood: whether the loss of the true captions is taken: with the right picture, with
            another one, and with none.
        max_new_tokens: longest caption.
        batch_size: pictures that go through the LM together.
        attention: the first so many pictures have attention maps, of the first seed.
    """

    pictures: int = 200
    captions: bool = True
    likelihood: bool = True
    max_new_tokens: int = 32
    batch_size: int = 32
    attention: int = 4


@dataclass(frozen=True)
class GridSpec:
    """The keys of a grid's YAML.

    A *setting* maps keys of the config, with dots, to values: ``{model.bridge.init_args.every:
    2}``. A value takes the place of all that was below its key. Keys that begin with ``first.``
    are those of the first stage; ``first: null`` leaves that out.

    Attributes:
        base: config that all cells start from: a shipped one's name, or a path.
        title: of the report.
        data: shards, as ``data.shards``, or ``scenes`` for emoji scenes, drawn once; ``--data``
            comes before it.
        first: config of a first stage whose run a cell starts from, by ``model.init_from``.
        overrides: a setting of every cell.
        axes: by name, settings by name: every combination is a cell. A list of values is an axis
            whose name is the key.
        cells: further cells: settings by name, on top of the base and `overrides`.
        controls: cells that are added: ``blind``, the baseline with a constant in the place of
            the picture's features and without a first stage, and ``twin``, the baseline with
            other seeds.
        baseline: the cell that all are compared with; the first one by default.
        seeds: of initialisation, dropout and other draws, not of the order of samples, which is
            the same for all.
        match: what all cells have as much of as the baseline: optimiser steps, training FLOPs (by
            their number of steps), trainable parameters (by `size_key`) or seconds (by steps).
        size_key: with ``match: params``, the whole number that makes a cell larger.
        budget: FLOPs, parameters or seconds to match; those of the baseline by default.
        lr: the search for learning rates; null trains with the config's.
        evaluate: what is scored.
    """

    base: str
    title: str = ""
    data: str | None = None
    first: str | None = None
    overrides: dict[str, Any] = field(default_factory=dict)
    axes: dict[str, Any] = field(default_factory=dict)
    cells: dict[str, dict[str, Any]] = field(default_factory=dict)
    controls: list[Control] = field(default_factory=lambda: ["blind", "twin"])
    baseline: str | None = None
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    match: Match = "steps"
    size_key: str = f"{RESAMPLER}.init_args.dim"
    budget: float | None = None
    lr: Sweep | None = None
    evaluate: Scoring = field(default_factory=Scoring)


def read_grid(
    source: str | Path | Mapping[str, Any], overrides: Mapping[str, Any] | None = None
) -> tuple[str, GridSpec]:
    """A grid and its name.

    Args:
        source: a file, a shipped grid's name, or what such a file holds.
        overrides: keys with values, added to the grid's own ``overrides``; those that begin with
            ``grid.`` are keys of the grid itself: ``grid.seeds``, ``grid.lr.steps``.

    Raises:
        ValueError: no such file, no YAML, an unknown key or a value of another type.
    """
    name, content = "grid", source
    if not isinstance(source, Mapping):
        path = _find(str(source))
        name = path.stem
        try:
            content = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
        except (yaml.YAMLError, OmegaConfBaseException) as error:
            raise ValueError(
                f"found {path}, which is no YAML ({error}); expected a grid"
            ) from error
    content: Any = copy.deepcopy(content)
    for key, value in (overrides or {}).items():
        if isinstance(content, dict):
            own = key.startswith(GRID)
            key = key.removeprefix(GRID)
            (set_key if own else _set_override)(content, key, value)
    known = GridSpec.__dataclass_fields__
    if not isinstance(content, Mapping) or "base" not in content:
        found = list(content) if isinstance(content, Mapping) else type(content).__name__
        raise ValueError(
            f"found {found} in the grid {name}; expected `base` and any of {', '.join(known)}"
        )
    for key, kind in {"": GridSpec, "lr": Sweep, "evaluate": Scoring}.items():
        _check_known(content.get(key) if key else content, key, kind, name)
    # Kept from the parser, which would make classes of what has a class_path.
    changes = {key: content.get(key) or {} for key in ("overrides", "axes", "cells")}
    for key, change in changes.items():
        if not isinstance(change, Mapping):
            raise ValueError(f"found {key}: {change!r} in the grid {name}; expected a mapping")
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--grid", type=GridSpec)
    try:
        plain = {key: value for key, value in content.items() if key not in changes}
        parsed = parser.parse_object({"grid": plain})
    except ArgumentError as error:
        raise ValueError(f"found a grid {name} that cannot be read: {error}") from error
    return name, replace(parser.instantiate(parsed).grid, **changes)


def check_spec(grid: GridSpec) -> None:
    """Refuses what would be found wrong only after hours.

    Raises:
        ValueError: naming the key.
    """
    if not grid.seeds or len(set(grid.seeds)) < len(grid.seeds):
        raise ValueError(f"found seeds {grid.seeds}; expected at least one, and none twice")
    scoring = grid.evaluate
    if scoring.pictures < 2 or not (scoring.captions or scoring.likelihood):
        raise ValueError(
            f"found evaluate: {scoring}; expected at least 2 pictures, and captions or likelihood"
        )
    if grid.lr is not None and (not grid.lr.values or grid.lr.steps < 4):
        raise ValueError(
            f"found lr: {grid.lr}; expected at least one value and 4 steps, or `lr: null`"
        )


def _check_known(found: Any, key: str, kind: type, name: str) -> None:
    """Refuses keys that nobody reads, with the nearest that somebody does."""
    known = [one.name for one in fields(kind)]
    for unknown in set(found) - set(known) if isinstance(found, Mapping) else ():
        near = get_close_matches(str(unknown), known, 1)
        did_you = f", perhaps {near[0]}" if near else ""
        where = f"{key}.{unknown}" if key else unknown
        raise ValueError(
            f"found the key {where!r} in the grid {name}; expected any of {', '.join(known)}"
            f"{did_you}"
        )


def _set_override(content: Config, key: str, value: Any) -> None:
    content["overrides"] = {**(content.get("overrides") or {}), key: value}


def _find(name: str) -> Path:
    if Path(name).is_file():
        return Path(name)
    shipped = GRIDS / f"{name.removesuffix('.yaml')}.yaml"
    if not shipped.is_file():
        names = ", ".join(sorted(path.stem for path in GRIDS.glob("*.yaml")))
        raise ValueError(f"found no grid {name!r}; expected a path or one of the shipped {names}")
    return shipped
