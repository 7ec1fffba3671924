"""Indexes of shards: made once, kept beside them, and compared with them ever after."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from filelock import FileLock
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from bridges.embedded import cache_dir
from recipes.remote_cache import url_of
from recipes.shard_files import ShardError
from recipes.shard_manifest import Entry, missing_shards, read_manifest
from recipes.shard_scan import Fault, ShardIndex, scan_shard
from recipes.shard_store import load_index, save_index

__all__ = ["Fault", "ShardIndex", "missing_shards", "scan_shard", "shard_indexes"]


def shard_indexes(shards: Sequence[Path], *, progress: bool = False) -> list[ShardIndex]:
    """The indexes of shards: those kept beside them, or else made and kept.

    A shard that is shorter than it was has the samples that are still whole, and a fault for each
    one lost.

    Args:
        shards: any.
        progress: show a bar while shards are scanned.

    Returns:
        In the order of `shards`.

    Raises:
        ShardError: a shard that is another than its index or the folder's manifest says, or that
            is no tar file; an unreadable manifest.
    """
    manifests = {folder: read_manifest(folder) or {} for folder in {s.parent for s in shards}}

    def one(shard: Path) -> ShardIndex:
        return _index(shard, manifests[shard.parent].get(shard.name))

    columns = (TextColumn("indexing"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with (
        Progress(*columns, console=console, disable=not progress, transient=True) as bar,
        ThreadPoolExecutor(max(1, min(len(shards), os.cpu_count() or 1))) as pool,
    ):
        return list(bar.track(pool.map(one, shards), total=len(shards)))


def _index(shard: Path, entry: Entry | None) -> ShardIndex:
    try:
        there = load_index(shard) if url_of(shard) and not shard.exists() else None
        size = there.size if there else shard.stat().st_size
    except OSError as error:
        raise ShardError(f"{shard}: found no readable file ({error}); check the path") from error
    index = _usable(load_index(shard), entry, size)
    if index is None:
        # Of several ranks one scans, the others wait for what it kept.
        with _lock(shard):
            index = _usable(load_index(shard), entry, size)
            if index is None:
                index = scan_shard(shard)
                _check(shard, index, entry, index.size)
                save_index(index, shard)
    _check(shard, index, entry, size)
    if size < index.size:
        return _cut(index, size)
    lost = entry.samples - len(index) - len(index.faults) if entry and size < entry.bytes else 0
    if entry and lost > 0:
        problem = f"the file ends at byte {size:,} of {entry.bytes:,}"
        return replace(
            index, faults=(*index.faults, *[Fault("truncated shard", None, problem)] * lost)
        )
    return index


def _usable(index: ShardIndex | None, entry: Entry | None, size: int) -> ShardIndex | None:
    """None where the shard has been put right since it was indexed."""
    if index and entry and size == entry.bytes and index.sha256 != entry.sha256:
        return None
    return index


def _check(shard: Path, index: ShardIndex, entry: Entry | None, size: int) -> None:
    """Refuses a shard of which nothing says any more what it should be."""
    problem = None
    if size > index.size:
        problem = f"{size:,} bytes; expected the {index.size:,} of its index"
    elif entry and size >= entry.bytes and index.sha256 != entry.sha256:
        problem = (
            f"sha256 {index.sha256}, {index.size:,} bytes; expected {entry.sha256}, "
            f"{entry.bytes:,} bytes, as the manifest says"
        )
    if problem:
        raise ShardError(
            f"{shard}: changed since indexed: found {problem}: copy it again, or if it is meant "
            f"to be so, run 'bridges shards index {shard.parent} --overwrite true'"
        )


def _cut(index: ShardIndex, size: int) -> ShardIndex:
    """What is left of a shard that was `index` and is `size` bytes long."""
    kept = int((index.ends <= size).sum())
    problem = f"the file ends at byte {size:,} of {index.size:,}"
    lost = [Fault("truncated shard", key, problem) for key in index.keys[kept:]]
    members = int(index.members[kept])
    return replace(
        index,
        offsets=index.offsets[:kept],
        ends=index.ends[:kept],
        checksums=index.checksums[:kept],
        members=index.members[: kept + 1],
        starts=index.starts[:members],
        sizes=index.sizes[:members],
        extensions=index.extensions[:members],
        keys=index.keys[:kept],
        faults=(*index.faults, *(lost or [Fault("truncated shard", None, problem)])),
    )


@contextlib.contextmanager
def _lock(shard: Path) -> Iterator[None]:
    # In the cache: a folder of shards may be read-only. Without any lock, each rank scans.
    name = hashlib.sha256(str(shard.absolute()).encode("utf-8", "surrogateescape")).hexdigest()
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):
            locks = cache_dir() / "locks"
            locks.mkdir(parents=True, exist_ok=True)
            stack.enter_context(FileLock(locks / f"{name[:32]}.lock"))
        yield
