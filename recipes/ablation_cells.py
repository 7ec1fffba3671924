"""The cells of an ablation: a grid's combinations and controls, each with its training config."""

import copy
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from omegaconf import DictConfig, OmegaConf

from recipes.ablation_grid import RESAMPLER, GridSpec, check_spec
from recipes.arguments import shipped_config
from recipes.config_keys import Config, get_key, set_key

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

BLIND = "bridges.BlindResampler"

TWIN_SEEDS = 1000
"""What the seeds of a twin are further."""


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


def _check_names(cells: list[Cell]) -> None:
    names = [cell.name for cell in cells]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"found the cell {twice[0]!r} twice; expected a name of its own for each")


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
