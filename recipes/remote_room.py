"""Room in the cache of shards: those used longest ago go first, those in use never."""

from __future__ import annotations

import logging
import os
import shutil
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import IO

from filelock import FileLock

from recipes.shard_files import ShardError

if sys.platform != "win32":
    import fcntl

_LIMIT = "BRIDGES_SHARD_CACHE_GB"
_MOST = 100 * 10**9

logger = logging.getLogger(__name__)


def room(root: Path) -> int:
    """Bytes that the cache may hold.

    $BRIDGES_SHARD_CACHE_GB in units of 10⁹ bytes; else 100, but at most half of what the disk
    would have free without the cache.

    Raises:
        ShardError: the variable is no positive number.
    """
    if own := os.environ.get(_LIMIT):
        with suppress(ValueError, OverflowError):
            if (limit := int(float(own) * 10**9)) > 0:
                return limit
        raise ShardError(f"{_LIMIT} is {own!r}; expected gigabytes, more than 0, e.g. 100")
    return min(_MOST, (shutil.disk_usage(root).free + sum(_sizes(root).values())) // 2)


def make_room(root: Path, needed: int, keep: Path | None = None) -> None:
    """Removes shards until the cache has room for more bytes; what is in use stays.

    A bound that is too small for the shards in use is passed, with a warning: to stop a run over
    it would be worse.

    Args:
        root: of the cache.
        needed: bytes that are about to be fetched.
        keep: a shard that stays, too.

    Raises:
        ShardError: the disk has no room for them.
    """
    with FileLock(root / ".room.lock"):
        limit, sizes = room(root), _sizes(root)
        total = sum(sizes.values())
        for shard in sorted((path for path in sizes if path.suffix == ".tar"), key=_last_use):
            if total + needed <= limit:
                return
            if shard != keep and _remove(shard):
                total -= sizes[shard]
    free = shutil.disk_usage(root).free
    if needed > free:
        raise ShardError(
            f"found {free:,} bytes free for {root}; expected {needed:,} for the next shard: free "
            "some, or set BRIDGES_CACHE to a folder on a larger disk"
        )
    if total + needed > limit:
        logger.warning(
            "the shards in use take %s bytes in %s, where %s are to be kept: raise %s, or shards "
            "are fetched again and again",
            f"{total + needed:,}",
            root,
            f"{limit:,}",
            _LIMIT,
        )


def in_use(file: IO[bytes]) -> None:
    """Marks an open shard as used now, and as in use for as long as it is open."""
    # Such a mark saves room that removing an open file would not give; without, reading goes on.
    with suppress(OSError):
        times = time.time_ns(), os.fstat(file.fileno()).st_mtime_ns
        os.utime(file.fileno() if os.utime in os.supports_fd else file.name, ns=times)
        if sys.platform != "win32":
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)


def _remove(shard: Path) -> bool:
    with suppress(OSError):
        if sys.platform == "win32":  # an open file cannot be removed there
            shard.unlink()
        else:
            with shard.open("rb+") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shard.unlink()
        return True
    return False


def _last_use(path: Path) -> float:
    with suppress(OSError):
        return path.stat().st_atime
    return 0.0


def _sizes(root: Path) -> dict[Path, int]:
    """Bytes of every file of the cache, of those that are being written, too."""
    sizes = {}
    for path in root.glob("*/*"):
        with suppress(OSError):  # renamed or removed meanwhile
            sizes[path] = path.stat().st_size
    return sizes
