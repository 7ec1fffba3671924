"""`bridges ablate`: a grid of bridges, trained alike, scored alike, compared in a report."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import date
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from bridges.embedded import licences
from bridges.files import write_json, write_text
from recipes import ablation_plan as plan
from recipes import ablation_report
from recipes.ablation_cells import LR, Cell, baseline_of, cells_of
from recipes.ablation_fair import check_leaks, check_planned, skipped
from recipes.ablation_grid import GridSpec, read_grid
from recipes.ablation_job import held_out_pictures, named_samples
from recipes.ablation_pool import Devices, run_local, run_on_ray
from recipes.ablation_sweep import Runner, Sweep
from recipes.ablation_table import AblationTable, summarise
from recipes.config_keys import get_key
from recipes.locks import claim_run
from recipes.report import described

REPORT_FILES = ("report.html", "results.csv", "results.md", "results.json")
"""What a finished sweep writes, beside the runs."""

GRID_FILE = "grid.json"
"""The grid, as it was read."""

SHOWN = 12
"""Held-out pictures in the report."""


def ablate(
    grid: str | Path | Mapping[str, Any],
    out: str | Path,
    *,
    data: str | None = None,
    devices: int | None = None,
    ray: str | None = None,
    ray_cpus: float = 1,
    ray_gpus: float | None = None,
    overrides: Mapping[str, Any] | None = None,
    command: str | None = None,
) -> AblationTable:
    """Trains and scores all cells of a grid and writes the report.

    All cells see the same samples in the same order, read the same frozen features, and have as
    much of what the grid matches; a difference is an error, whenever it is found. A sweep that was
    killed goes on when it is started again with the same folder: what is finished is kept, as long
    as its config is the same. A run that fails is named in the report, and tried again at the next
    start.

    Args:
        grid: a YAML (see `GridSpec`), a shipped grid's name, or what such a file holds.
        out: folder of the report (``report.html``, ``results.csv``, ``results.md``,
            ``results.json``) and of all runs.
        data: shards in place of the grid's; ``scenes`` for emoji scenes.
        devices: runs beside each other: on a GPU each, all by default; without any, on an equal
            share of the cores, one core each by default.
        ray: address of a Ray cluster to run on, ``auto`` or ``local``; see `run_on_ray`.
        ray_cpus: that a run takes of the cluster.
        ray_gpus: that a run takes of the cluster; by default one where this machine has any.
        overrides: keys of the config with values, for every cell, before the grid's axes; or with
            ``grid.`` before them, keys of the grid.
        command: said in the report.

    Returns:
        A row for each cell and seed; ``to_pandas()`` makes a data frame.

    Raises:
        UnfairError: cells that were not given the same, or held-out pictures that are trained on.
        ValueError: a grid that cannot be read, or not one cell that could be trained.
    """
    console, folder = Console(), Path(out).absolute()
    name, spec = read_grid(grid, overrides)
    cells = cells_of(spec)
    check_planned(cells, spec.match)
    check_packages(ray)
    print_plan(name, spec, cells, console)
    console.print(f"what the runs say is in {folder / 'workers'}", soft_wrap=True, markup=False)
    if ray_gpus is None:
        ray_gpus = 1 if torch.cuda.is_available() else 0
    where = None if ray else Devices.find(devices)
    placed = plan.place_data(cells, data or spec.data, console)
    runner: Runner = (
        partial(run_local, where, folder / "workers")
        if where is not None
        else partial(run_on_ray, str(ray), ray_cpus, ray_gpus)
    )
    with claim_run(folder):
        for file in REPORT_FILES:  # what an earlier start wrote would be taken for this one's
            (folder / file).unlink(missing_ok=True)
        write_json(folder / GRID_FILE, asdict(spec))
        with console.status("looking for held-out pictures that are trained on"):
            samples = max(check_leaks(*split) for split in plan.splits(cells))
        sweep = Sweep(spec, cells, folder, runner, console)
        sweep.lost |= plan.check_configs(cells)
        sweep.lost |= plan.fill_caches([cell for cell in cells if cell.name not in sweep.lost])
        for cell, why in sweep.lost.items():
            console.print(f"{cell} cannot be trained: {why}", style="red", markup=False)
        sweep.match()
        sweep.train()
        if not sweep.runs:
            errors = [*sweep.lost.values(), *sweep.failed.values()]
            raise ValueError(
                f"found not one run that could be finished: {errors[0]}; expected some: the "
                f"results in {folder} hold the traceback of each"
            )
        results = {
            "name": name,
            "title": spec.title or name,
            "command": command or f"recipes.ablate({name!r}, {str(out)!r})",
            **_results(sweep, samples),
            "device": f"Ray at {ray}" if where is None else where.described,
            "seconds": round(sum(run["seconds"] for run in sweep.runs.values()), 1),
            "date": date.today().isoformat(),
        }
        results["data"] |= {"path": placed}
        if placed == plan.EMOJI_SCENES:
            results["data"]["licences"] = licences().splitlines()
        write_json(folder / "results.json", results)
        write_text(folder / "results.csv", ablation_report.csv_text(results))
        write_text(folder / "results.md", ablation_report.markdown_table(results))
        write_text(folder / "report.html", ablation_report.render(results))
    return AblationTable(results, Path(out))


def check_packages(ray: str | None) -> None:
    """Refuses to begin what could not be reported, or placed.

    Raises:
        ImportError: naming the extra.
    """
    needed = {"matplotlib": "ablate"} | ({} if ray is None else {"ray": "ray"})
    for package, extra in needed.items():
        if find_spec(package) is None:
            raise ImportError(f"found no {package}; expected it: pip install 'bridges[{extra}]'")


def _results(sweep: Sweep, samples: int) -> dict[str, Any]:
    """What the report shows of a sweep that is done."""
    spec, runs = sweep.grid, sweep.runs
    baseline = baseline_of(spec, list(sweep.cells)).name
    cells, metrics = summarise(sweep.cells, runs, baseline)
    configs = {cell.name: cell.config for cell in sweep.cells}
    for cell in cells:
        rates = sweep.rates.get(cell["name"], {})
        cell["lr"] = get_key(configs[cell["name"]], LR)
        cell["lr_sweep"] = [[rate, loss] for rate, loss in rates.items()]
        cell["solved"] = sweep.solved.get(cell["name"], {})
    one = next(iter(runs.values()))
    failed = [{"name": n, "seed": s, "error": e} for (n, s), e in sweep.failed.items()]
    seeds = {cell.name: cell.seeds for cell in sweep.cells}
    failed += [{"name": n, "seed": s, "error": e} for n, e in sweep.lost.items() for s in seeds[n]]
    return {
        "match": spec.match,
        "baseline": baseline,
        "seeds": spec.seeds,
        "data": {"train_samples": samples, "held_out_pictures": len(one["scored"]["images"])},
        "versions": one["packages"],
        "metrics": metrics,
        "fairness": _fairness(sweep, samples),
        "cells": cells,
        "failed": failed,
        "shown": _shown(sweep),
    }


def _fairness(sweep: Sweep, samples: int) -> dict[str, Any]:
    spec, runs = sweep.grid, list(sweep.runs.values())
    shortest = min(run["samples"] for run in runs)
    digests = sorted({run["sample_order_digest"] for run in runs})
    features = sorted({run["features_digest"] for run in runs})
    threads = {(run["device"], run["threads"]) for run in runs}
    of = "the same" if len({run["samples"] for run in runs}) == 1 else "the same first"
    said = [
        f"Every run saw {of} {shortest:,} samples in the same order, that of data.seed (digest "
        f"{', '.join(digests)}); seeds change initialisation and other draws, not the order.",
        f"Every run read the same frozen features (digest {', '.join(features)})."
        if len(features) == 1
        else f"Runs of one encoder read the same frozen features ({len(features)} encoders).",
        f"None of the held-out pictures is among the {samples:,} trained on, by the bytes of the "
        "picture.",
        {
            "steps": "All cells were trained for the same number of optimiser steps.",
            "flops": "All cells were given the same training FLOPs, by their number of steps; the "
            "FLOPs of a step are those of the first one.",
            "params": "All cells have the same number of trainable parameters, by "
            f"{spec.size_key}.",
            "time": "All cells were given the same seconds of training, by their number of steps, "
            "from a short trial of each: started anew, they may be others.",
        }[spec.match],
    ]
    if spec.lr is not None:
        rates = ", ".join(f"{rate:g}" for rate in spec.lr.values)
        said.append(
            f"Every cell's learning rate was chosen from {rates} by a run of {spec.lr.steps} steps "
            "each with its first seed: the one with the lowest training loss over the last "
            "quarter. Held-out pictures had no part in it. A twin has the rate of its cell."
        )
    else:
        said.append("All learning rates are those of the config: none was searched for.")
    if any(cell.first is not None for cell in sweep.cells):
        said.append(
            "Cells with a first stage were trained for its steps as well: their FLOPs and seconds "
            "are those of both stages. The blind cell has none, which would have seen pictures."
        )
    if len({run["fingerprints"].get("lm") for run in runs}) > 1:
        said.append(
            "Cells have different LMs, whose tokens are not the same: losses per token are neither "
            "shown nor compared."
        )
    if len(spec.seeds) == 1:
        said.append("There is one seed: intervals and tests speak of pictures, not of seeds.")
    if len(threads) > 1:
        said.append(
            f"Runs were made on {len(threads)} kinds of device or numbers of threads "
            f"({', '.join(f'{d}, {n} threads' for d, n in sorted(threads))}): times are not "
            "comparable, and a repetition may differ in the last bits."
        )
    said += [f"Left out in {one}." for one in skipped({run["name"]: run for run in runs})]
    lr = spec.lr and {
        "values": spec.lr.values,
        "steps": spec.lr.steps,
        "criterion": "mean training loss of the last quarter",
    }
    return {
        "sample_order_digest": ", ".join(digests),
        "features_digest": ", ".join(features),
        "leaked_pictures": 0,
        "statements": said,
        "lr": lr,
    }


def _shown(sweep: Sweep) -> list[dict[str, Any]]:
    """The first pictures that were scored; none where there are features only."""
    key, run = next(iter(sweep.runs.items()))
    names = run["scored"]["images"][:SHOWN]
    return [
        described(raw) for raw in named_samples(held_out_pictures(sweep.planned[key].job), names)
    ]


def print_plan(name: str, spec: GridSpec, cells: Sequence[Cell], console: Console) -> None:
    """What a sweep would train."""
    trials = 0 if spec.lr is None else len(spec.lr.values)
    console.print(f"{name}: {spec.title}", soft_wrap=True, markup=False)
    for cell in cells:
        own = 0 if cell.kind == "twin" else trials
        text = f"  {cell.name}: {len(cell.seeds)} seeds, {own} learning rates"
        if cell.first is not None:
            text += ", after a first stage"
        console.print(text, soft_wrap=True, markup=False)
    runs = sum(len(cell.seeds) for cell in cells)
    console.print(f"{len(cells)} cells, {runs} runs, matched on {spec.match}", markup=False)
