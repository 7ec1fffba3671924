"""What a run writes down about itself."""

import json
import logging
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback

from bridges import RunSpec, save_run
from bridges.files import write_json, write_text
from recipes.data import CaptionData
from recipes.module import CaptionModule
from recipes.shard_files import shard_digest

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

logger = logging.getLogger(__name__)


class RunRecorder(Callback):
    """Writes config, provenance and the trained bridge into the run directory.

    Args:
        folder: the run directory.
        spec: the model's parts.
        config: the resolved configuration, as YAML.
        seed: of initialisation.
    """

    def __init__(self, folder: Path, spec: RunSpec, config: str, seed: Any) -> None:
        self.folder = folder
        self.spec = spec
        self.config = config
        self.seed = seed
        self._before = 0.0
        self._start = time.perf_counter()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Config and provenance, before the first step."""
        self._start = time.perf_counter()
        if not trainer.is_global_zero:
            return
        data: Any = trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
        assert isinstance(data, CaptionData)
        assert isinstance(pl_module, CaptionModule)
        write_text(self.folder / "config.yaml", self.config)
        provenance = {
            "command": sys.argv,
            "first_step": trainer.global_step,
            "python": sys.version.split()[0],
            "packages": _versions(),
            "git_revision": _git_revision(),
            "precision": str(trainer.precision),
            "seed": self.seed,
            "data_seed": data.seed,
            "fingerprints": {
                "vision": pl_module.vlm.vision.fingerprint,
                "lm": pl_module.vlm.lm.fingerprint,
            },
            "trainable_parameters": count_parameters(pl_module, trainable=True),
            "frozen_parameters": count_parameters(pl_module, trainable=False),
            "shards": {str(p): shard_digest(p) for p in data.source_shards},
        }
        path = self.folder / PROVENANCE_FILE
        if trainer.global_step and path.is_file():
            earlier = json.loads(path.read_text(encoding="utf-8"))
            provenance["earlier_starts"] = [*earlier.pop("earlier_starts", []), earlier]
        write_json(path, provenance)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """The bridge itself, and the samples that were skipped."""
        assert isinstance(pl_module, CaptionModule)
        if trainer.is_global_zero:
            save_run(self.folder, pl_module.vlm, self.spec)
            path = self.folder / PROVENANCE_FILE
            provenance = json.loads(path.read_text(encoding="utf-8"))
            done = {"steps": trainer.global_step, "seconds": round(self._seconds(), 1)}
            write_json(path, provenance | done)
        data: Any = trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
        if data.skipped:
            logger.warning("skipped samples by kind: %s", data.skipped)

    def state_dict(self) -> dict[str, float]:
        """The seconds so far, for a run that is resumed."""
        return {"seconds": self._seconds()}

    def load_state_dict(self, state_dict: dict[str, float]) -> None:
        """Goes on counting."""
        self._before = state_dict["seconds"]

    def _seconds(self) -> float:
        return self._before + time.perf_counter() - self._start


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


def _git_revision() -> str | None:
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
