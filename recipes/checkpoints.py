"""Checkpoints for resuming: whole on disk or not there, checked by a digest, and never code."""

import hashlib
import io
import logging
import os
import re
import sys
from functools import lru_cache
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.plugins.io import TorchCheckpointIO

from bridges.files import file_digest, staged, write_text

LAST = Path("checkpoints/last.ckpt")
"""Where a run keeps the checkpoint that it resumes from, relative to its folder."""

DIGEST_SUFFIX = ".sha256"
"""After a checkpoint's name: the file of its digest, as ``sha256sum`` writes and checks it."""

_log = logging.getLogger(__name__)


class CheckpointError(ValueError):
    """A checkpoint that is damaged, not of its digest, or holds more than tensors and values."""


def save_checkpoint(checkpoint: dict[str, Any], path: Path) -> None:
    """Writes a checkpoint and its digest; a kill at any moment leaves a whole one that is loaded.

    Two files cannot be renamed at once. So the digest file lists the digests of the checkpoint to
    come and of the one that is there, before the one takes the place of the other
    (docs/decisions/0012-checkpoints.md).

    Raises:
        OSError: a full disk, among others; the previous checkpoint is untouched.
    """
    with staged(path, needs=lambda: _size(checkpoint)) as temporary:
        with _Sink(io.FileIO(temporary, "w")) as sink:
            torch.save(checkpoint, sink)
        digest = sink.sha256.hexdigest()
        listed = _listed(path)
        if listed is None:
            listed = (file_digest(path),) if path.exists() else ()
        _list_digests(path, digest, *listed)
    _list_digests(path, digest)


def read_checkpoint(path: Path, map_location: Any = "cpu") -> dict[str, Any]:
    """Reads a checkpoint: tensors and plain values only, of the bytes that were written.

    One that an older version wrote, without a digest, is read with a logged warning. Reading the
    same file again does not hash it again.

    Args:
        path: the checkpoint.
        map_location: device that the tensors go to, as of `torch.load`.

    Raises:
        CheckpointError: the file has another digest, is damaged, or holds other Python objects,
            of which none is made.
        OSError: there is no such file, or it cannot be read.
    """
    stat = path.stat()
    _check(path, (stat.st_ino, stat.st_size, stat.st_mtime_ns), _listed(path))
    try:
        content = torch.load(path, map_location=map_location, weights_only=True)
    except (OSError, MemoryError):
        raise
    except Exception as error:  # torch raises of every kind for what is no checkpoint
        found = re.search(r"GLOBAL (\S+)", str(error))
        what = f"the Python object {found[1]}" if found else "what torch cannot read"
        raise CheckpointError(
            f"found {what} in {path}; expected tensors and plain values, as `bridges train` "
            "writes them; nothing in the file was executed: take the checkpoint of a run of your "
            "own, or start a new run"
        ) from error
    if not isinstance(content, dict):
        raise CheckpointError(
            f"found a {type(content).__name__} in {path}; expected the dict that `bridges train` "
            "writes: take the checkpoint of a run"
        )
    return content


@lru_cache(maxsize=1)  # for one start, which reads the fingerprints first and then the rest
def _check(path: Path, version: tuple[int, int, int], listed: tuple[str, ...] | None) -> None:
    if listed is None:
        _log.warning(
            "found no %s%s; expected the digest of the checkpoint, which older versions did not "
            "write: it is read unchecked, and gets one when it is next written",
            path,
            DIGEST_SUFFIX,
        )
        return
    found = file_digest(path)
    if found not in listed:
        raise CheckpointError(
            f"found {path} with SHA-256 {found}; expected {' or '.join(listed) or 'any listed'}, "
            f"of {path.name}{DIGEST_SUFFIX}: the file is damaged or of another run; copy both "
            "files again from where they came, or delete the digest file if you replaced the "
            "checkpoint on purpose"
        )


def _digest_file(path: Path) -> Path:
    return path.with_name(path.name + DIGEST_SUFFIX)


def _listed(path: Path) -> tuple[str, ...] | None:
    """The digests listed beside a checkpoint; None where there is no such file."""
    try:
        text = _digest_file(path).read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return None
    return tuple(re.findall(r"^[0-9a-f]{64}\b", text, re.MULTILINE))


def _list_digests(path: Path, *digests: str) -> None:
    distinct = dict.fromkeys(digests)
    write_text(_digest_file(path), "".join(f"{digest}  {path.name}\n" for digest in distinct))


class _Sink(io.BufferedWriter):
    """A file that hashes what it is given: what is meant to be there, whatever the disk keeps."""

    def __init__(self, raw: io.FileIO) -> None:
        super().__init__(raw)
        self.sha256 = hashlib.sha256()
        self.size = 0

    def write(self, data: Any) -> int:
        self.sha256.update(data)
        self.size += len(data)
        return super().write(data)


def _size(checkpoint: dict[str, Any]) -> int:
    """Bytes that the checkpoint takes as a file."""
    with _Sink(io.FileIO(os.devnull, "w")) as sink:
        torch.save(checkpoint, sink)
    return sink.size


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes beside the target and renames; Lightning's own stages in ``$TMPDIR`` and copies.

    A kill then leaves the previous checkpoint, also where temporary files are on another disk.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None
    ) -> None:
        """Saves with a digest."""
        save_checkpoint(checkpoint, Path(path))

    def load_checkpoint(
        self, path: str | Path, map_location: Any = "cpu", weights_only: bool | None = True
    ) -> dict[str, Any]:
        """Loads tensors and plain values only, whatever the caller asks for."""
        return read_checkpoint(Path(path), map_location)


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
        loop = trainer.fit_loop.epoch_loop
        if loop.restarted_on_train_batch_end and loop.batch_progress.is_last_batch:
            # That epoch is over. Lightning asks whether as many batches are done as the next epoch
            # has, which on fewer ranks, or in smaller batches, is longer.
            loop.batch_progress.current.completed = sys.maxsize

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        """Saves where due; between two steps of accumulated gradients nothing is."""
        step = trainer.global_step
        if step == self._saved_at:
            return
        last_epoch = trainer.current_epoch + 1 == trainer.max_epochs
        ending = step == trainer.max_steps or (trainer.is_last_batch and last_epoch)
        if ending or step % self.every == 0:
            self._save(trainer)
            self._saved_at = step

    def _save(self, trainer: L.Trainer) -> None:
        """Saves on the first rank; where it cannot, all ranks raise."""
        failure = None
        try:
            trainer.save_checkpoint(self.path)
        except OSError as error:
            failure = error
            # The others wait for this rank in `trainer.save_checkpoint`: for ever, where the
            # processes are not ended together.
            trainer.strategy.barrier()
        saved = trainer.strategy.reduce_boolean_decision(failure is None)
        if failure is not None:
            raise failure
        if not saved:
            raise RuntimeError(
                f"found rank 0 without a checkpoint at {self.path}; expected it to write one: its "
                "own message says why"
            )
