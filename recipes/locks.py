"""Locks between processes, each gone with the process that has it, however that ends."""

from __future__ import annotations

import errno
import os
import platform
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from filelock import FileLock

if sys.platform != "win32":
    import fcntl

RUN_LOCK = ".lock"
"""In a run's folder; it stays there, and says who has trained in it last."""

_HELD = (errno.EACCES, errno.EAGAIN)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Waits until no other process has a lock, and has it meanwhile.

    For work of which every process makes the same: where there can be no locks, each does it.

    Args:
        path: of the lock file; its folder is made.
    """
    with ExitStack() as stack:
        with suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(FileLock(path))
        yield


@contextmanager
def claim_run(folder: Path) -> Iterator[None]:
    """Holds other processes off a run: two would mix their checkpoints.

    For the first rank alone, after all that may be refused: it makes the folder. Where there are
    no locks (Windows, some network file systems), nobody is held off.

    Args:
        folder: of the run.

    Raises:
        ValueError: another process has it.
    """
    if sys.platform == "win32":
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / RUN_LOCK).open("a+", encoding="utf-8") as file:
        try:
            # Not flock, which the loader's workers would share, and hold on to for as long as they
            # live after the run was killed.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in _HELD:
                file.seek(0)
                raise ValueError(
                    f"found another process that trains in {folder} ({file.read().strip()}); "
                    "expected none: wait for its end, or give another --run"
                ) from error
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()}\n")
        file.flush()
        yield
