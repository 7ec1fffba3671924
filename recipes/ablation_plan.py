"""From cells to jobs: what data they read, what they are matched on, where each run goes."""

import copy
import hashlib
import json
import os
import re
import shutil
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from inspect import signature
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from jsonargparse import ArgumentError
from rich.console import Console

from bridges import VisionEncoder
from bridges.embedded import cache_dir
from recipes.ablation_cells import FIRST, LR, Cell
from recipes.ablation_grid import GridSpec
from recipes.ablation_job import RUN, Job
from recipes.ablation_match import STEPS, TRIAL_STEPS, count_trainable, solve_size
from recipes.cache import cache_features, is_cached
from recipes.config_keys import Config, get_key, set_key
from recipes.data import CaptionData
from recipes.demo import scene_shards
from recipes.shard_index import each_index
from recipes.train import check_arguments

SCENES = "scenes"
EMOJI_SCENES = "emoji scenes"


@dataclass(frozen=True)
class Planned:
    """A job and where it goes.

    Attributes:
        job: what is trained.
        folder: of the job, in that of the sweep.
    """

    job: Job
    folder: Path


def place_data(
    cells: Sequence[Cell], data: str | None, console: Console, *, draw: bool = True
) -> str:
    """Puts the shards and the feature cache into the configs of all cells, and one device each.

    Args:
        cells: their configs are changed in place.
        data: shards, or ``scenes``; of a mixture, the folder that holds one for each source. None
            leaves what the configs say.
        console: for what takes long.
        draw: draw emoji scenes that are not there.

    Returns:
        What the data are called.
    """
    shards = str(scene_shards(console)) if data == SCENES and draw else data
    if shards is not None and "://" not in shards:
        shards = os.path.abspath(shards)  # a worker, or a node of a cluster, may be elsewhere
    for config in _configs(cells):
        for name, source in _sources(config).items():
            if shards is not None:
                source["shards"] = f"{shards}/{name}" if name else shards
            if source.get("feature_cache") is None:
                source["feature_cache"] = str(cache_dir() / "features")
        set_key(config, "trainer.devices", 1)
        set_key(config, "trainer.enable_progress_bar", False)
    named = (str(source.get("shards")) for source in _sources(cells[0].config).values())
    return EMOJI_SCENES if data == SCENES else shards or ", ".join(named)


def check_configs(cells: Sequence[Cell]) -> dict[str, str]:
    """Reads the config of every cell, and of its first stage, as its run will read it.

    Returns:
        Cells whose configs cannot be read, and why: they would fail, and are not begun.
    """
    lost: dict[str, str] = {}
    with TemporaryDirectory() as folder:
        path = Path(folder) / "config.yaml"
        for cell in cells:
            for config in filter(None, (cell.first, cell.config)):
                path.write_text(json.dumps(config | {"run": "run"}), encoding="utf-8")
                try:
                    check_arguments([f"--config={path}"])
                except (ArgumentError, ValueError, TypeError) as error:
                    lost[cell.name] = f"its config cannot be read: {error}"
    return lost


def fill_caches(cells: Sequence[Cell]) -> dict[str, str]:
    """Computes the features that cells share, once, before any of them waits for another.

    Returns:
        Cells whose features cannot be had, and why.
    """
    lost: dict[str, str] = {}
    done: list[Any] = []
    for cell in cells:
        for config in filter(None, (cell.first, cell.config)):
            vision, sources = config["model"]["vision"], _sources(config)
            if [vision, sources] in done:
                continue
            try:
                _fill_cache(vision, sources)
            except (ValueError, OSError, RuntimeError) as error:
                lost[cell.name] = f"{type(error).__name__}: {error}"
            else:
                done.append([copy.deepcopy(vision), copy.deepcopy(sources)])
    return lost


def _fill_cache(vision: Config, sources: Mapping[str, Config]) -> None:
    encoder = VisionEncoder.load(**vision)
    encoder.to("cuda" if torch.cuda.is_available() else "cpu")
    try:
        for data in map(_data, sources.values()):
            for shards in filter(None, (data.train_shards, data.held_out_shards)):
                _check_room(shards, encoder, Path(str(data.feature_cache)))
                cache_features(
                    shards,
                    encoder,
                    Path(str(data.feature_cache)),
                    on_error=data.on_error,
                    max_bad_fraction=data.max_bad_fraction,
                    form=data.cache_form(),
                    decode=data.decode,
                )
    finally:
        # The first worker needs the memory of the device.
        del encoder
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _check_room(shards: Sequence[Path], encoder: VisionEncoder, cache: Path) -> None:
    """Refuses a cache for which the disk has no room, as far as one picture a sample tells."""
    if any(map(is_cached, shards)):
        return
    samples = sum(len(index) for index in each_index(list(shards), progress=True))
    needed = samples * encoder.shape.num_patches * encoder.shape.dim * 2
    there = next(folder for folder in (cache, *cache.absolute().parents) if folder.exists())
    if (free := shutil.disk_usage(there).free) < needed and not any(cache.glob("*/features.json")):
        raise OSError(
            f"found {free:,} bytes free for features at {cache}; expected about {needed:,}, for "
            f"{samples:,} samples: set data.feature_cache to a folder on a larger disk, or give "
            "features that `bridges cache` has made in a smaller form (int8) as data.shards"
        )


def splits(cells: Sequence[Cell]) -> list[tuple[list[Path], list[Path]]]:
    """Of each cell, all that it is trained on and all that is held out, its first stage's too."""
    found: list[tuple[list[Path], list[Path]]] = []
    for cell in cells:
        configs = [config for config in (cell.first, cell.config) if config is not None]
        each = [_data(source) for config in configs for source in _sources(config).values()]
        train = list(dict.fromkeys(shard for data in each for shard in data.train_shards))
        held_out = list(dict.fromkeys(s for data in each for s in data.held_out_shards))
        if (train, held_out) not in found:
            found.append((train, held_out))
    return found


def solve_sizes(
    cells: Sequence[Cell], baseline: Cell, grid: GridSpec
) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """Matches trainable parameters.

    Returns:
        By cell what was solved for; and cells that cannot be matched, and why.

    Raises:
        ValueError: the baseline cannot be built.
    """
    budget = grid.budget or count_trainable(baseline.config)
    solved, lost = {}, {}
    for cell in cells:
        if not grid.budget and cell.config == baseline.config:
            continue
        try:
            solved[cell.name] = solve_size(cell.config, grid.size_key, budget, cell.name)
        except ValueError as error:
            lost[cell.name] = str(error)
    return solved, lost


def trials(cells: Sequence[Cell], grid: GridSpec, out: Path) -> dict[str, Planned]:
    """Short runs that measure FLOPs or seconds of a step, by cell; a twin has its cell's."""
    found = {}
    for cell in cells:
        if cell.kind == "twin":
            continue
        config = seeded(cell.config, cell.seeds[0])
        _short(config, TRIAL_STEPS[grid.match])
        job = Job(f"{cell.name}, trial", config, 0)
        found[cell.name] = Planned(job, out / "trials" / slug(cell.name))
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
            before = first.get((cell.name, seed))
            config = after(seeded(cell.config, seed), before)
            _short(config, grid.lr.steps)
            set_key(config, LR, lr)
            job = Job(f"{cell.name}, lr {lr:g}", config, 0, first=_digest(before))
            found[cell.name, lr] = Planned(job, out / "sweeps" / slug(cell.name) / f"lr-{lr:g}")
    return found


def mains(
    cells: Sequence[Cell],
    grid: GridSpec,
    first: Mapping[tuple[str, int], Planned],
    out: Path,
    without: Collection[tuple[str, int]] = (),
) -> dict[tuple[str, int], Planned]:
    """The runs that are compared, by cell and seed, but for those without a first stage."""
    order = min((n for n in map(_samples, cells) if n), default=0)
    found: dict[tuple[str, int], Planned] = {}
    for cell in cells:
        for seed in cell.seeds:
            if (cell.name, seed) in without:
                continue
            before = first.get((cell.name, seed))
            config = after(seeded(cell.config, seed), before)
            scoring = grid.evaluate
            if seed != cell.seeds[0]:
                scoring = replace(scoring, attention=0)
            job = Job(f"{cell.name}, seed {seed}", config, order, scoring, first=_digest(before))
            found[cell.name, seed] = Planned(job, out / "cells" / slug(cell.name) / f"seed-{seed}")
    return found


def seeded(config: Config, seed: int) -> Config:
    """A copy of a config with a seed: of all that is drawn, but not of the order of samples."""
    return copy.deepcopy(config) | {"seed_everything": seed}


def slug(name: str) -> str:
    """A cell's name as that of a folder, which no other name has, in any case of its letters."""
    digest = hashlib.sha256(name.encode()).hexdigest()[:6]
    return f"{re.sub(r'[^A-Za-z0-9_]+', '-', name).strip('-')[:60]}-{digest}"


def _digest(first: Planned | None) -> str:
    return "" if first is None else first.job.digest


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
    """Samples that a cell is trained on at least, as far as its config says so; else 0.

    Fewer than all where gradients are accumulated: an epoch may end in the midst of a step.
    """
    steps = get_key(cell.config, STEPS) or 0
    sizes = [_data(source).batch_size for source in _sources(cell.config).values()]
    turn = min(sizes) if get_key(cell.config, "data.mixing") == "round_robin" else sum(sizes)
    return max(0, steps) * turn


def _configs(cells: Sequence[Cell]) -> list[Config]:
    return [config for cell in cells for config in (cell.first, cell.config) if config is not None]


def _sources(config: Config) -> dict[str, Config]:
    """The parts of a config that describe shards, by the source's name; "" of a single source."""
    mixed = get_key(config, "data.sources")
    return {"": config["data"]} if mixed is None else {n: s for n, s in mixed.items() if s}


def _data(source: Config) -> CaptionData:
    try:
        return CaptionData(**{key: value for key, value in source.items() if key != "weight"})
    except TypeError as error:
        known = ", ".join(list(signature(CaptionData).parameters))
        raise ValueError(f"found data that cannot be read ({error}); expected {known}") from error
