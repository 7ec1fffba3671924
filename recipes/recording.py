"""What a run writes down about itself."""

import json
import logging
import subprocess
import sys
import time
from collections import Counter
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback

from bridges.files import write_json, write_text
from recipes.bad_samples import read_bad_samples
from recipes.finite import SkipNonFinite
from recipes.mixture import TrainingData, sources_of
from recipes.shard_index import each_index
from recipes.training import BridgeModule

PACKAGES = (
    "bridges",
    "torch",
    "transformers",
    "lightning",
    "webdataset",
    "einops",
    "omegaconf",
    "jsonargparse",
    "torchmetrics",
    "peft",
    "bitsandbytes",
)

PROVENANCE_FILE = "provenance.json"
SKIPPED = "skipped-{}.jsonl"
"""Of a run's folder: the bad samples that one rank passed over, a line of JSON each."""

logger = logging.getLogger(__name__)


class RunRecorder(Callback):
    """Writes config, provenance and what was trained into the run directory.

    Args:
        folder: the run directory.
        config: the resolved configuration.
        dumped: the same as YAML.
        skips: counts the steps that were left out.
    """

    def __init__(
        self, folder: Path, config: dict[str, Any], dumped: str, skips: SkipNonFinite
    ) -> None:
        self.folder = folder
        self.config = config
        self.dumped = dumped
        self.skips = skips
        self._before = 0.0
        self._start = time.perf_counter()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Config and provenance, before the first step."""
        self._start = time.perf_counter()
        data: Any = trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
        assert isinstance(data, TrainingData)
        data.keep_skipped(self.folder / SKIPPED.format(trainer.global_rank))
        if not trainer.is_global_zero:
            return
        assert isinstance(pl_module, BridgeModule)
        write_text(self.folder / "config.yaml", self.dumped)
        provenance = {
            "command": sys.argv,
            "first_step": trainer.global_step,
            "python": sys.version.split()[0],
            "packages": _versions(),
            "git_revision": git_revision(),
            "precision": str(trainer.precision),
            "seed": self.config["seed_everything"],
            "data_seed": data.seed,
            "fingerprints": pl_module.fingerprints(),
            "trainable_parameters": count_parameters(pl_module, trainable=True),
            "frozen_parameters": count_parameters(pl_module, trainable=False),
            "shards": {
                str(path): index.sha256
                for source in sources_of(data)
                for path, index in zip(
                    source.source_shards, each_index(source.source_shards), strict=True
                )
            },
        }
        path = self.folder / PROVENANCE_FILE
        if trainer.global_step and path.is_file():
            earlier = json.loads(path.read_text(encoding="utf-8"))
            provenance["earlier_starts"] = [*earlier.pop("earlier_starts", []), earlier]
        write_json(path, provenance)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """What was trained, and how many steps and samples were skipped."""
        assert isinstance(pl_module, BridgeModule)
        if trainer.is_global_zero:
            pl_module.save(self.folder, self.config["model"])
            path = self.folder / PROVENANCE_FILE
            provenance = json.loads(path.read_text(encoding="utf-8"))
            done = {
                "steps": trainer.global_step,
                "skipped_steps": self.skips.skipped,
                "skipped_samples": count_skipped(self.folder),
                "seconds": round(self._seconds(), 1),
            }
            write_json(path, provenance | done)
            if done["skipped_samples"]:
                named = self.folder / SKIPPED.format("*")
                kinds = done["skipped_samples"]
                logger.warning("skipped samples by kind: %s; named in %s", kinds, named)

    def state_dict(self) -> dict[str, float]:
        """The seconds so far, for a run that is resumed."""
        return {"seconds": self._seconds()}

    def load_state_dict(self, state_dict: dict[str, float]) -> None:
        """Goes on counting."""
        self._before = state_dict["seconds"]

    def _seconds(self) -> float:
        return self._before + time.perf_counter() - self._start


def count_skipped(folder: Path) -> dict[str, int]:
    """Bad samples of a run by kind; one that several ranks, or several starts, met counts once."""
    files = sorted(folder.glob(SKIPPED.format("*")))
    found = {bad.identity: bad.kind for file in files for bad in read_bad_samples(file)}
    return dict(Counter(found.values()))


def count_parameters(module: L.LightningModule, *, trainable: bool) -> int:
    """Parameters that training changes, or that it does not."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad == trainable)


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def git_revision() -> str | None:
    """Revision of the working folder's repository, with a + where it has changes."""
    try:
        head = _git("rev-parse", "HEAD")
        return head + ("+" if _git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _git(*arguments: str) -> str:
    return subprocess.run(
        ["git", *arguments], capture_output=True, check=True, text=True, timeout=10
    ).stdout.strip()
