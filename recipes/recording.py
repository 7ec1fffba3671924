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
from recipes.batch import CaptionBatch
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


class Throughput(Callback):
    """Shows samples per second, over all ranks, without the time of validation."""

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        """Starts the clock."""
        self._start = time.perf_counter()

    def on_train_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, batch: Any, index: int
    ) -> None:
        """Logs the rate of this batch."""
        assert isinstance(batch, CaptionBatch)
        seconds = time.perf_counter() - self._start
        rate = len(batch) * trainer.world_size / seconds
        module.log("samples_per_s", rate, prog_bar=True, batch_size=len(batch))


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

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Config and provenance, before the first step."""
        if not trainer.is_global_zero:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "config.yaml").write_text(self.config, encoding="utf-8")
        data: Any = trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
        assert isinstance(data, CaptionData) and isinstance(pl_module, CaptionModule)
        provenance = {
            "command": sys.argv,
            "python": sys.version.split()[0],
            "packages": _versions(),
            "git_revision": _git_revision(),
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
        self._write(provenance)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Starts the clock."""
        self._start = time.perf_counter()

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """The bridge itself, and the samples that were skipped."""
        assert isinstance(pl_module, CaptionModule)
        if trainer.is_global_zero:
            save_run(self.folder, pl_module.vlm, self.spec)
            written = json.loads((self.folder / PROVENANCE_FILE).read_text(encoding="utf-8"))
            seconds = round(time.perf_counter() - self._start, 1)
            self._write(written | {"steps": trainer.global_step, "seconds": seconds})
        data: Any = trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
        if data.skipped:
            logger.warning("skipped samples by kind: %s", data.skipped)

    def _write(self, provenance: dict[str, Any]) -> None:
        text = json.dumps(provenance, indent=2)
        (self.folder / PROVENANCE_FILE).write_text(text + "\n", encoding="utf-8")


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
    except (OSError, subprocess.CalledProcessError):
        return None


def _git(*arguments: str) -> str:
    return subprocess.run(
        ["git", *arguments], capture_output=True, check=True, text=True, timeout=10
    ).stdout.strip()
