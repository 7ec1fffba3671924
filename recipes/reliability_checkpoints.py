"""Processes killed while they write checkpoints: the last one loads, and nothing is left lying."""

import itertools
import multiprocessing
import os
import random
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import CheckpointIO
from rich.progress import track

from bridges.files import file_digest, remove_orphans
from recipes.checkpoints import DIGEST_SUFFIX, LAST, AtomicCheckpointIO

KILLS, KILLS_QUICK = 100, 8
TENSORS, VALUES = 8, 1 << 18
"""Tensors of a checkpoint, float32 values of each: 8 MiB."""

_STEPS_OF_A_WRITE = 11
"""Signals of one write by `AtomicCheckpointIO`: its start and end, six fsyncs, three renames."""


def measure(folder: Path, *, quick: bool = False) -> dict[str, Any]:
    """Kills writers of checkpoints whose ``$TMPDIR`` is on another file system than the run.

    Args:
        folder: an empty folder, which stands for a run's.
        quick: a few kills only.

    Returns:
        As `kill_writers`.
    """
    return kill_writers(folder, AtomicCheckpointIO(), KILLS_QUICK if quick else KILLS)


def kill_writers(folder: Path, io: CheckpointIO, kills: int, seed: int = 0) -> dict[str, Any]:
    """Kills a process that writes checkpoints in a loop, and starts it again, so many times.

    Half of the kills come at a random time of a write, half right after a random step of it (an
    fsync or a rename), so that the short phases get their share.

    Args:
        folder: an empty folder, which stands for a run's.
        io: what writes and reads the checkpoints; can be pickled.
        kills: how many.
        seed: of the moments.

    Returns:
        kills; unloadable: after so many the last checkpoint was refused, mixed of two steps, or
        older than one whose writing had ended; orphans: files still there after the clean-up of
        a start; removed: those that it removed; filesystems: 2 where ``$TMPDIR`` could be on
        another one than `folder`; by_phase: kills by what was found on disk.
    """
    rng = random.Random(seed)
    last = folder / LAST
    counts, phases = Counter(unloadable=0, orphans=0, removed=0), Counter()
    folder.mkdir(parents=True, exist_ok=True)
    elsewhere = _other_filesystem(folder)
    with tempfile.TemporaryDirectory(dir=elsewhere) as scratch:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([__name__])
        done = -1
        for done in range(2):
            since = time.perf_counter()
            io.save_checkpoint(_content(done), last)
        duration = time.perf_counter() - since
        for kill in track(range(kills), "kills of checkpoint writers", transient=True):
            if kill % 2:
                steps, delay = 0, rng.uniform(0, 1.2 * duration)
            else:
                steps, delay = rng.randint(1, 2 * _STEPS_OF_A_WRITE), rng.uniform(0, 5e-4)
            done = max(done, _write_and_kill(context, io, last, done, scratch, steps, delay))
            phases[_phase(last)] += 1
            counts["removed"] += remove_orphans(folder) + remove_orphans(last.parent)
            kept = {last, last.with_name(last.name + DIGEST_SUFFIX)}
            for path in {*last.parent.iterdir(), *Path(scratch).iterdir()} - kept:
                counts["orphans"] += 1
                path.unlink()
            step = _step(io, last)
            if step is None or step < done:
                counts["unloadable"] += 1
                # Anew, for the next kill not to be blamed for this one.
                io.save_checkpoint(_content(done), last)
            else:
                done = step
    return {
        "kills": kills,
        **counts,
        "filesystems": 1 if elsewhere is None else 2,
        "by_phase": dict(phases.most_common()),
    }


def _other_filesystem(folder: Path) -> Path | None:
    """A folder for temporary files on another file system."""
    here = folder.stat().st_dev
    for candidate in (Path(tempfile.gettempdir()), Path("/dev/shm"), Path.home()):
        if os.access(candidate, os.W_OK) and candidate.stat().st_dev != here:
            return candidate
    return None


def _content(step: int) -> dict[str, Any]:
    """A checkpoint that says everywhere of which step it is."""
    tensors = {str(index): torch.full((VALUES,), float(step)) for index in range(TENSORS)}
    return {"step": step, "state_dict": tensors}


def _step(io: CheckpointIO, last: Path) -> int | None:
    """The step that a whole checkpoint is of; None for one that is not whole."""
    try:
        content = io.load_checkpoint(last)
    except Exception:  # whatever a reader makes of a torn file
        return None
    step, tensors = content["step"], content["state_dict"].values()
    whole = len(tensors) == TENSORS and all((tensor == step).all() for tensor in tensors)
    return step if whole else None


def _write_and_kill(
    context: Any, io: CheckpointIO, last: Path, done: int, scratch: str, steps: int, delay: float
) -> int:
    """Lets a process write until so many seconds after so many signals; the last step it ended.

    With no steps the seconds count from its first whole write, which imports slow down.
    """
    here, there = context.Pipe(duplex=False)
    writer = context.Process(target=_write_for_ever, args=(io, last, done + 1, scratch, there))
    writer.start()
    there.close()
    try:
        with here:
            told = _told(here)
            if steps == 0:
                done = next((step for step in told if step >= 0), done)
            done = max((done, *itertools.islice(told, steps)))
            time.sleep(delay)
            writer.kill()
            done = max((done, *told))
        writer.join()
    finally:
        writer.kill()
    if writer.exitcode != -signal.SIGKILL:
        raise RuntimeError(
            f"found a writer of checkpoints that ended by itself ({writer.exitcode}); expected it "
            "to be killed: its own message says why"
        )
    return done


def _told(here: Connection) -> Iterator[int]:
    """The signals of a writer until it is gone."""
    with suppress(EOFError):
        while True:
            yield here.recv()


def _write_for_ever(
    io: CheckpointIO, last: Path, first: int, scratch: str, signals: Connection
) -> None:
    """Writes one checkpoint after the other; signals each step of it, -1 or what is done."""
    os.environ["TMPDIR"] = tempfile.tempdir = scratch
    for name in ("fsync", "replace"):
        setattr(os, name, _signalled(getattr(os, name), signals))
    for step in itertools.count(first):
        signals.send(-1)
        io.save_checkpoint(_content(step), last)
        signals.send(step)


def _signalled(function: Any, signals: Connection) -> Any:
    def call(*args: Any) -> Any:
        signals.send(-1)
        return function(*args)

    return call


def _phase(last: Path) -> str:
    """How far the write was that a kill ended, by the files that are left."""
    names = [path.name for path in last.parent.iterdir()]
    digest_file = last.with_name(last.name + DIGEST_SUFFIX)
    if any(name.startswith(f".{digest_file.name}.") for name in names):
        return "writing the digests"
    listed = digest_file.read_text().split() if digest_file.exists() else [""]
    staged = [name for name in names if name.startswith(f".{last.name}.")]
    if staged:
        # The list may stem from an earlier kill, so that its length says nothing.
        complete = file_digest(last.with_name(staged[0])) == listed[0]
        return "digests listed, not renamed" if complete else "writing the checkpoint"
    if len(listed) > 2 and file_digest(last) == listed[0]:
        return "renamed, two digests listed"
    return "before or after a write"
