"""Checkpoints for resuming: whole on disk or not there, and never code."""

import os
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO

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
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        staged = target.with_name(f".{target.name}.{os.getpid()}")
        try:
            with staged.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(staged, target)
        finally:
            staged.unlink(missing_ok=True)

    def load_checkpoint(
        self, path: str | Path, map_location: Any = "cpu", weights_only: bool | None = True
    ) -> dict[str, Any]:
        """Loads tensors and plain values only, whatever the caller asks for."""
        return torch.load(path, map_location=map_location, weights_only=True)
