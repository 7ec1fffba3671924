"""From cells to jobs: what data they read, what they are matched on, where each run goes."""

import copy
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from bridges import VisionEncoder
from bridges.embedded import cache_dir
from recipes.ablation_grid import FIRST, Cell, Config, GridSpec, get_key, set_key
from recipes.ablation_job import RUN, Job
from recipes.ablation_match import STEPS, TRIAL_STEPS, count_trainable, solve_size
from recipes.cache import cache_features
from recipes.data import CaptionData
from recipes.demo import scene_shards

SCENES = "scenes"
EMOJI_SCENES = "emoji scenes"
LR = "model.optimizer.lr"


@dataclass(frozen=True)
class Planned:
    """A job and where it goes.

    Attributes:
        job: what is trained.
        folder: of the job, in that of the sweep.
    """

    job: Job
    folder: Path


def place_data(cells: Sequence[Cell], data: str | None, console: Console) -> str:
    """Puts the shards and the feature cache into the configs of all cells, and one device each.

    Args:
        cells: their configs are changed in place.
        data: shards, or ``scenes``; of a mixture, the folder that holds one for each source. None
            leaves what the configs say.
        console: for what takes long.

    Returns:
        What the data are called.
    """
    shards = str(scene_shards(console)) if data == SCENES else data
    for config in _configs(cells):
        for name, source in _sources(config).items():
            if shards is not None:
                source["shards"] = f"{shards}/{name}" if name else shards
            if source.get("feature_cache") is None:
                source["feature_cache"] = str(cache_dir() / "features")
        set_key(config, "trainer.devices", 1)
        set_key(config, "trainer.enable_progress_bar", False)
    return EMOJI_SCENES if data == SCENES else str(shards or get_key(cells[0].config, "data"))


def fill_caches(cells: Sequence[Cell]) -> None:
    """Computes the features that cells share, once, before any of them waits for another."""
    done: list[Any] = []
    for config in _configs(cells):
        vision, sources = config["model"]["vision"], _sources(config)
        if [vision, sources] in done:
            continue
        done.append([vision, copy.deepcopy(sources)])
        encoder: VisionEncoder | None = None
        for data in map(_data, sources.values()):
            if encoder is None:
                encoder = VisionEncoder.load(**vision)
                encoder.to("cuda" if torch.cuda.is_available() else "cpu")
            for shards in filter(None, (data.train_shards, data.held_out_shards)):
                cache_features(
                    shards,
                    encoder,
                    Path(str(data.feature_cache)),
                    on_error=data.on_error,
                    max_bad_fraction=data.max_bad_fraction,
                    form=data.cache_form(),
                    decode=data.decode,
                )


def splits(cells: Sequence[Cell]) -> list[tuple[list[Path], list[Path]]]:
    """Training and held-out shards of all that is trained, each pair once."""
    found: list[tuple[list[Path], list[Path]]] = []
    for config in _configs(cells):
        each = [_data(source) for source in _sources(config).values()]
        train = [shard for data in each for shard in data.train_shards]
        held_out = [shard for data in each for shard in data.held_out_shards]
        if (train, held_out) not in found:
            found.append((train, held_out))
    return found


def solve_sizes(cells: Sequence[Cell], baseline: Cell, grid: GridSpec) -> dict[str, dict[str, Any]]:
    """Matches trainable parameters; returns by cell what was solved for."""
    budget = grid.budget or count_trainable(baseline.config)
    return {
        cell.name: solve_size(cell.config, grid.size_key, budget, cell.name)
        for cell in cells
        if grid.budget or cell.config != baseline.config
    }


def trials(cells: Sequence[Cell], grid: GridSpec, out: Path) -> dict[str, Planned]:
    """Short runs that measure FLOPs or seconds of a step, by cell; without the first stage."""
    found = {}
    for cell in cells:
        config = seeded(cell.config, cell.seeds[0])
        _short(config, TRIAL_STEPS[grid.match])
        set_key(config, "model.init_from", None)
        found[cell.name] = Planned(
            Job(f"{cell.name}, trial", config, 0), out / "trials" / slug(cell.name)
        )
    return found


def firsts(cells: Sequence[Cell], out: Path) -> dict[tuple[str, int], Planned]:
    """Runs of the first stage by cell and seed; cells whose first stage is the same share them."""
    found: dict[tuple[str, int], Planned] = {}
    for cell in cells:
        for seed in cell.seeds if cell.first is not None else ():
            assert cell.first is not None
            job = Job(f"{cell.name}, {FIRST} stage, seed {seed}", seeded(cell.first, seed), 0)
            found[cell.name, seed] = Planned(job, out / FIRST / f"seed-{seed}-{job.digest[:8]}")
    return found


def after(config: Config, first: Planned | None) -> Config:
    """A config that starts from a run of the first stage."""
    config = copy.deepcopy(config)
    if first is not None:
        set_key(config, "model.init_from", str(first.folder / RUN))
    return config


def sweeps(
    cells: Sequence[Cell], grid: GridSpec, first: Mapping[tuple[str, int], Planned], out: Path
) -> dict[tuple[str, float], Planned]:
    """Trials of learning rates by cell and rate; a twin's are those of its cell."""
    found: dict[tuple[str, float], Planned] = {}
    for cell in cells if grid.lr is not None else ():
        assert grid.lr is not None
        seed = cell.seeds[0]
        for lr in grid.lr.values if cell.kind != "twin" else ():
            config = after(seeded(cell.config, seed), first.get((cell.name, seed)))
            _short(config, grid.lr.steps)
            set_key(config, LR, lr)
            job = Job(f"{cell.name}, lr {lr:g}", config, 0)
            found[cell.name, lr] = Planned(job, out / "sweeps" / slug(cell.name) / f"lr-{lr:g}")
    return found


def mains(
    cells: Sequence[Cell], grid: GridSpec, first: Mapping[tuple[str, int], Planned], out: Path
) -> dict[tuple[str, int], Planned]:
    """The runs that are compared, by cell and seed."""
    order = min((n for n in map(_samples, cells) if n), default=0)
    found: dict[tuple[str, int], Planned] = {}
    for cell in cells:
        for seed in cell.seeds:
            config = after(seeded(cell.config, seed), first.get((cell.name, seed)))
            scoring = grid.evaluate
            if seed != cell.seeds[0]:
                scoring = replace(scoring, attention=0)
            job = Job(f"{cell.name}, seed {seed}", config, order, scoring)
            found[cell.name, seed] = Planned(job, out / "cells" / slug(cell.name) / f"seed-{seed}")
    return found


def seeded(config: Config, seed: int) -> Config:
    """A copy of a config with a seed: of all that is drawn, but not of the order of samples."""
    return copy.deepcopy(config) | {"seed_everything": seed}


def slug(name: str) -> str:
    """A cell's name as that of a folder."""
    return re.sub(r"[^\w.]+", "-", name).strip("-") or "cell"


def _short(config: Config, steps: int) -> None:
    """A run of a few steps, which is not validated."""
    for key in ("max_epochs", "max_time", "min_steps", "min_epochs"):
        config["trainer"].pop(key, None)
    set_key(config, STEPS, steps)
    set_key(config, "trainer.limit_val_batches", 0)
    set_key(config, "trainer.num_sanity_val_steps", 0)
    set_key(config, "trainer.log_every_n_steps", 1)
    warm_up = "model.optimizer.warmup_steps"
    set_key(config, warm_up, min(get_key(config, warm_up) or 0, steps // 4))


def _samples(cell: Cell) -> int:
    """Samples that a cell is trained on, as far as its config says so; else 0."""
    steps = get_key(cell.config, STEPS) or 0
    batches = [source.get("batch_size", 24) for source in _sources(cell.config).values()]
    size = min(batches) if get_key(cell.config, "data.mixing") == "round_robin" else sum(batches)
    return max(0, steps) * size * (get_key(cell.config, "trainer.accumulate_grad_batches") or 1)


def _configs(cells: Sequence[Cell]) -> list[Config]:
    return [config for cell in cells for config in (cell.first, cell.config) if config is not None]


def _sources(config: Config) -> dict[str, Config]:
    """The parts of a config that describe shards, by the source's name; "" of a single source."""
    mixed = get_key(config, "data.sources")
    return {"": config["data"]} if mixed is None else {n: s for n, s in mixed.items() if s}


def _data(source: Config) -> CaptionData:
    return CaptionData(**{key: value for key, value in source.items() if key != "weight"})
