"""Checkpoints for resuming: whole on disk or not there, and never code."""

from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.plugins.io import TorchCheckpointIO

from bridges.files import staged

LAST = Path("checkpoints/last.ckpt")
"""Where a run keeps the checkpoint that it resumes from, relative to its folder."""


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes beside the target and renames; Lightning's own stages in ``$TMPDIR`` and copies.

    A kill then leaves the previous checkpoint, also where temporary files are on another disk.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None
    ) -> None:
        """Saves to a temporary file of the same folder, syncs, renames."""
        with staged(Path(path)) as temporary:
            torch.save(checkpoint, temporary)

    def load_checkpoint(
        self, path: str | Path, map_location: Any = "cpu", weights_only: bool | None = True
    ) -> dict[str, Any]:
        """Loads tensors and plain values only, whatever the caller asks for."""
        return torch.load(path, map_location=map_location, weights_only=True)


class LastCheckpoint(Callback):
    """Keeps one checkpoint to resume from: every n steps, and after the very last one.

    Lightning's ModelCheckpoint, when it saves as training ends in mid-epoch, notes the epoch as
    complete; a run resumed from there would leave out the rest of it.

    Args:
        path: of the checkpoint, replaced each time.
        every: optimiser steps between checkpoints.
    """

    def __init__(self, path: Path, every: int) -> None:
        self.path = path
        self.every = every
        self._saved_at = 0

    def on_train_start(self, trainer: L.Trainer, *_: Any) -> None:
        """The step that training resumes from is on disk already."""
        self._saved_at = trainer.global_step

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        """Saves where due; between two steps of accumulated gradients nothing is."""
        step = trainer.global_step
        if step == self._saved_at:
            return
        last_epoch = trainer.current_epoch + 1 == trainer.max_epochs
        ending = step == trainer.max_steps or (trainer.is_last_batch and last_epoch)
        if ending or step % self.every == 0:
            trainer.save_checkpoint(self.path)
            self._saved_at = step
