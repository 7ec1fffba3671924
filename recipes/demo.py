"""`bridges demo`: two bridges between real frozen models, trained and shown in minutes."""

import json
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock
from jsonargparse import ArgumentParser
from rich.console import Console

import bridges
from bridges.embedded import cache_dir
from bridges.files import write_json, write_text
from bridges.run import RUN_FILE, WEIGHTS_FILE
from recipes import report
from recipes.batch import CaptionCollator
from recipes.cache import mean_patches
from recipes.data import CaptionData, split_shards
from recipes.evaluate import HeldOut, caption_nll, captions, scene_accuracy
from recipes.gates import GATES_FILE
from recipes.recording import PROVENANCE_FILE
from recipes.run_log import CSV_LOGS, read_log
from recipes.scene_shards import write_scenes
from recipes.shard_manifest import MANIFEST
from recipes.train import train

BRIDGES = {
    "soft_prefix": "perceiver_small",
    "gated_xattn": "gated_xattn_small",
}
"""The two bridges of the demo and their shipped configs."""

SCENES = {"train": 10080, "val": 400}
"""Scenes made: more than either bridge sees, so that none is seen twice."""

SCENES_VERSION = 1
"""Raise it when scenes change: the folder of the shards is named by it."""

SCORED_DATA = ("--data=", "--data.shards", "--data.val_shards", "--data.on_error")
"""Overrides that would have scoring read other data than training."""

RUN_FILES = (
    RUN_FILE,
    WEIGHTS_FILE,
    PROVENANCE_FILE,
    "config.yaml",
    CSV_LOGS,
    GATES_FILE,
    "tensorboard",
    "checkpoints",
    ".*",
)
"""What a run directory holds; staged files begin with a dot."""


def main(arguments: Sequence[str]) -> None:
    """Entry of the subcommand."""
    parser = ArgumentParser(
        prog="bridges demo",
        description="Trains a soft prefix and a gated cross-attention bridge, then writes "
        "report.html and summary.json.",
    )
    parser.add_argument("--out", type=Path, default=Path("runs/demo"))
    parser.add_argument(
        "--data",
        type=Path | None,
        help="folder of train-*.tar and val-*.tar in place of the emoji scenes",
    )
    parser.add_argument(
        "--bridges", type=list[str], default=list(BRIDGES), help=f"which of {list(BRIDGES)}"
    )
    parser.add_argument(
        "overrides", nargs="*", help="further arguments of `bridges train`, after --"
    )
    options = parser.parse_args(list(arguments))
    unknown = set(options.bridges) - BRIDGES.keys()
    if unknown:
        raise ValueError(f"found bridges {sorted(unknown)}; expected some of {list(BRIDGES)}")
    demo(options.out, options.data, options.bridges, options.overrides)


def demo(
    out: Path,
    data: Path | None = None,
    names: Sequence[str] = tuple(BRIDGES),
    overrides: Sequence[str] = (),
) -> dict[str, Any]:
    """Trains, scores and reports; returns what `summary.json` holds.

    Args:
        out: folder of the report, the summary and one run per bridge; runs in it are replaced.
        data: folder of shards; emoji scenes by default.
        names: bridges to train, see `BRIDGES`.
        overrides: further arguments of `bridges train`.

    Raises:
        ValueError: an override of the data, which scoring would not see.
    """
    for override in overrides:
        if override.startswith(SCORED_DATA):
            raise ValueError(
                f"found override {override!r}; expected none of the data: scoring reads it too, "
                "give --data alone or use `bridges train`"
            )
    console = Console()
    shards = data or scene_shards(console)
    results: dict[str, Any] = {}
    shown: dict[str, list[str]] = {}
    for name in names:
        run = out / name
        _clear(run)
        console.rule(f"training {name} → {run}")
        train(
            [
                f"--config={BRIDGES[name]}",
                f"--data={shards}",
                f"--data.feature_cache={cache_dir() / 'features'}",
                f"--run={run}",
                # Scoring follows in this process: it must be the only one.
                "--trainer.devices=1",
                *overrides,
            ]
        )
        console.rule(f"scoring {name} on held-out pictures")
        results[name], shown[name] = score_run(run, shards)
    summary = {"data": str(data) if data else "emoji scenes", "bridges": results}
    write_json(out / "summary.json", summary)
    curves = {name: loss_curves(out / name) for name in names}
    page = report.render(
        summary, curves, shown, report.pictures(split_shards(str(shards), None)[1])
    )
    write_text(out / "report.html", page)
    report.print_summary(summary, console)
    console.print(f"open {out / 'report.html'}")
    return summary


def scene_shards(console: Console) -> Path:
    """The shards of emoji scenes, drawn once and kept in the cache folder."""
    folder = cache_dir() / f"scenes-{SCENES_VERSION}"
    with FileLock(cache_dir() / f"{folder.name}.lock"):
        if not (folder / MANIFEST).is_file():
            with console.status("drawing emoji scenes"):
                write_scenes(
                    folder,
                    train=SCENES["train"],
                    val=SCENES["val"],
                    overwrite=True,
                    progress=False,
                )
    return folder


def score_run(run: Path, shards: Path) -> tuple[dict[str, Any], list[str]]:
    """Scores a trained bridge on held-out pictures: right, exchanged, and none at all.

    Returns:
        What the summary says of the bridge, and its captions of the held-out pictures.
    """
    model = bridges.load(run)
    data = CaptionData(str(shards), feature_cache=str(cache_dir() / "features"))
    data.connect(model.vision, CaptionCollator.of(model))
    held_out = HeldOut.collect(data.val_dataloader(), model)
    if not held_out.samples:
        raise ValueError(f"found no held-out shards in {shards}; expected val-*.tar beside train-*")
    shuffled = held_out.shuffled()
    started = time.perf_counter()
    written = captions(model, held_out)
    seconds_per_caption = (time.perf_counter() - started) / len(held_out)
    right = scene_accuracy(written, held_out)
    wrong = scene_accuracy(captions(model, shuffled, title="captioning, exchanged"), held_out)
    provenance = json.loads((run / PROVENANCE_FILE).read_text(encoding="utf-8"))
    result = {
        "trainable_parameters": provenance["trainable_parameters"],
        "frozen_parameters": provenance["frozen_parameters"],
        "steps": provenance["steps"],
        "seconds": provenance["seconds"],
        "held_out_pictures": len(held_out),
        "nll_right": caption_nll(model, held_out),
        "nll_shuffled": caption_nll(model, shuffled, title="scoring, exchanged"),
        "nll_blind": caption_nll(
            model, held_out.blind(mean_patches(data.train_shards)), title="scoring, blind"
        ),
        **{f"acc_{part}": share for part, share in right.items()},
        **{f"acc_{part}_shuffled": share for part, share in wrong.items()},
        "seconds_per_caption": seconds_per_caption,
    }
    return result, written


def loss_curves(run: Path) -> dict[str, list[tuple[int, float]]]:
    """Training and held-out loss by step, from the run's CSV logs."""
    curves: dict[str, list[tuple[int, float]]] = {"loss": [], "val_loss": []}
    logged = read_log(run, curves.__contains__)
    return curves | {name: sorted(points.items()) for name, points in logged.items()}


def _clear(run: Path) -> None:
    """Removes what an earlier demo left in its own run folder, and nothing else.

    Raises:
        ValueError: the folder holds something that no run writes.
    """
    if not run.exists():
        return
    foreign = [p.name for p in run.iterdir() if not any(map(p.match, RUN_FILES))]
    if foreign:
        raise ValueError(
            f"found {foreign[0]} in {run}; expected nothing but an earlier run of the demo: give "
            "another --out, or move it"
        )
    shutil.rmtree(run)
