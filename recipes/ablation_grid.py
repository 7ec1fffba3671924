"""The grid of an ablation: a YAML as cells, each with its whole training config."""

import copy
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

import yaml
from jsonargparse import ArgumentError, ArgumentParser
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from recipes.arguments import shipped_config

GRIDS = Path(__file__).parent / "configs" / "grids"
"""The shipped grids."""

Match = Literal["steps", "flops", "params", "time"]
Control = Literal["blind", "twin"]
Config = dict[str, Any]

GRID = "grid."
"""On the command line: keys of the grid itself begin with it."""

LR = "model.optimizer.lr"

RESERVED = {
    "seed_everything": "give `seeds`, with which every cell is trained",
    "run": "runs lie in the folder of the sweep",
    "trainer.devices": "a cell is trained on one device",
    "trainer.enable_progress_bar": "the sweep has a bar of its own",
}
"""Keys that the sweep itself sets, and what to do in their place."""

FIRST = "first"
"""Of keys: settings of the first stage begin with it."""

RESAMPLER = "model.bridge.init_args.resampler"
BLIND = "bridges.BlindResampler"
TWIN_SEEDS = 1000
"""What the seeds of a twin are further."""


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


@dataclass(frozen=True)
class Cell:
    """One setting that is trained with every seed.

    Attributes:
        name: of the cell.
        settings: by axis, the name of its value.
        config: of the run.
        first: config of the first stage; None without one.
        seeds: of its runs.
        kind: a control or not.
        twin_of: of a twin, whose.
    """

    name: str
    settings: dict[str, str]
    config: Config
    first: Config | None
    seeds: list[int]
    kind: Literal["cell", "blind", "twin"] = "cell"
    twin_of: str | None = None


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


def cells_of(grid: GridSpec) -> list[Cell]:
    """The cells of a grid, controls last.

    Raises:
        ValueError: no such config, a name twice, no such baseline, a bridge that cannot be made
            blind, or a setting that is none.
    """
    check_spec(grid)
    base = _load(grid.base)
    first = None if grid.first is None else _load(grid.first)
    cells: list[Cell] = []
    for name, settings, changes in [*_combinations(grid), *_further(grid)]:
        config, before = copy.deepcopy(base), copy.deepcopy(first)
        for change in changes:
            _check_keys(grid, change, name)
        for change in (grid.overrides, *changes):
            before = _apply(config, before, change, name)
        cells.append(Cell(name, settings, config, before, list(grid.seeds)))
    _check_names(cells)
    baseline = baseline_of(grid, cells)
    if "blind" in grid.controls:
        cells.append(_blind(baseline))
    if "twin" in grid.controls:
        seeds = [TWIN_SEEDS + seed for seed in baseline.seeds]
        cells.append(
            Cell(
                f"{baseline.name} (twin)",
                baseline.settings,
                copy.deepcopy(baseline.config),
                copy.deepcopy(baseline.first),
                seeds,
                "twin",
                baseline.name,
            )
        )
    _check_names(cells)
    return cells


def baseline_of(grid: GridSpec, cells: list[Cell]) -> Cell:
    """The cell that all others are compared with.

    Raises:
        ValueError: there is none of that name.
    """
    if grid.baseline is None:
        return cells[0]
    found = [cell for cell in cells if cell.name == grid.baseline]
    if not found:
        raise ValueError(
            f"found baseline {grid.baseline!r}; expected a cell: "
            f"{'; '.join(cell.name for cell in cells)}"
        )
    return found[0]


def get_key(config: Mapping[str, Any], key: str) -> Any:
    """The value at a key with dots; None where there is none."""
    found: Any = config
    for part in key.split("."):
        found = found.get(part) if isinstance(found, Mapping) else None
    return found


def set_key(config: Config, key: str, value: Any) -> None:
    """Puts a value in the place of all that is below a key with dots.

    Raises:
        ValueError: something on the way is no mapping.
    """
    *path, last = key.split(".")
    inner = config
    for part in path:
        if inner.get(part) is None:
            inner[part] = {}
        elif isinstance(inner[part], str):
            # A class by its path alone: what follows are its arguments.
            inner[part] = {"class_path": inner[part]}
        inner = inner[part]
        if not isinstance(inner, dict):
            raise ValueError(
                f"found {inner!r} at {part!r} of the key {key!r}; expected a mapping there"
            )
    inner[last] = copy.deepcopy(value)


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


def _check_names(cells: list[Cell]) -> None:
    names = [cell.name for cell in cells]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"found the cell {twice[0]!r} twice; expected a name of its own for each")


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


def _load(name: str) -> Config:
    loaded = OmegaConf.load(shipped_config(name))
    if not isinstance(loaded, DictConfig):
        raise ValueError(f"found no mapping in the config {name!r}; expected one as for training")
    content = OmegaConf.to_container(loaded)
    assert isinstance(content, dict)
    return {str(key): value for key, value in content.items()}


def _combinations(grid: GridSpec) -> Iterator[tuple[str, dict[str, str], list[Any]]]:
    """Every combination of the axes: name, value by axis, settings."""
    if not grid.axes:
        if not grid.cells:
            yield "base", {}, []
        return
    axes = {name: _values(name, axis) for name, axis in grid.axes.items()}
    for chosen in itertools.product(*(axis.items() for axis in axes.values())):
        settings = dict(zip(axes, (value for value, _ in chosen), strict=True))
        yield ", ".join(settings.values()), settings, [change for _, change in chosen]


def _values(name: str, axis: Any) -> dict[str, Any]:
    if isinstance(axis, list) and axis:
        short = name.rpartition(".")[2]
        return {f"{short} {value}": {name: value} for value in axis}
    if isinstance(axis, Mapping) and axis:
        return {str(value): change for value, change in axis.items()}
    raise ValueError(
        f"found {axis!r} as the axis {name!r}; expected settings by name, or a list of values for "
        "the key that the axis is called by"
    )


def _further(grid: GridSpec) -> Iterator[tuple[str, dict[str, str], list[Any]]]:
    for name, change in grid.cells.items():
        yield name, {}, [change]


def _check_keys(grid: GridSpec, change: Any, name: str) -> None:
    """Refuses keys of a cell that the sweep itself sets: they would be of no effect."""
    own = dict(RESERVED)
    if grid.lr is not None:
        own[LR] = "leave `lr` out of the grid to compare rates"
    for key in change if isinstance(change, Mapping) else ():
        if key in own:
            raise ValueError(
                f"found {key} in the cell {name!r}; expected no cell to set it: {own[key]}"
            )


def _apply(config: Config, first: Config | None, change: Any, name: str) -> Config | None:
    """Changes a config in place; returns that of the first stage."""
    if not isinstance(change, Mapping):
        raise ValueError(
            f"found {change!r} as a setting of {name!r}; expected keys of the config with values"
        )
    for key, value in change.items():
        stage, _, rest = str(key).partition(".")
        if stage != FIRST:
            set_key(config, str(key), value)
        elif not rest and value is None:
            first = None
        elif first is None or not rest:
            raise ValueError(
                f"found {key}: {value!r} in {name!r}; expected `first: null`, or a key of the "
                "first stage where the grid has one (`first: CONFIG`)"
            )
        else:
            set_key(first, rest, value)
    return first


def _blind(baseline: Cell) -> Cell:
    resampler = get_key(baseline.config, RESAMPLER)
    if resampler is None:
        raise ValueError(
            f"found no {RESAMPLER} in the baseline {baseline.name!r}, to be made blind; expected "
            "one: choose another baseline, or take blind out of `controls`"
        )
    config = copy.deepcopy(baseline.config)
    blind = {"class_path": BLIND, "init_args": {"resampler": copy.deepcopy(resampler)}}
    set_key(config, RESAMPLER, blind)
    # A first stage has seen pictures, and a blind bridge must not have.
    if "init_from" in config["model"]:
        config["model"]["init_from"] = None
    return Cell("blind", baseline.settings, config, None, baseline.seeds, "blind")
