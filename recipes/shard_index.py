"""Indexes of shards: made once, kept beside them, and compared with them ever after."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from recipes.locks import locked
from recipes.remote_cache import url_of
from recipes.shard_files import ShardError
from recipes.shard_manifest import Entry, missing_shards, read_manifest
from recipes.shard_scan import MAX_FAULTS, Fault, ShardIndex, scan_shard
from recipes.shard_store import load_index, lock_of, save_index

__all__ = [
    "Fault",
    "ShardIndex",
    "each_index",
    "in_parallel",
    "missing_shards",
    "scan_shard",
    "shard_indexes",
]

T = TypeVar("T")

_AT_ONCE = 256
_END = 1024
_MAX_PADDING = 1 << 20


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

    return in_parallel(one, shards, "indexing", progress)


def in_parallel(
    function: Callable[[Path], T],
    shards: Sequence[Path],
    title: str,
    progress: bool,
    workers: int | None = None,
) -> list[T]:
    """What a function makes of each shard, in order.

    In threads, for hashing and decoding leave Python's lock alone.

    Args:
        function: of a shard.
        shards: any.
        title: of the progress bar.
        progress: show the bar.
        workers: shards at a time; as many as there are cores unless given.
    """
    columns = (TextColumn(title), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with (
        Progress(*columns, console=console, disable=not progress, transient=True) as bar,
        ThreadPoolExecutor(max(1, min(len(shards), workers or os.cpu_count() or 1))) as pool,
    ):
        return list(bar.track(pool.map(function, shards), total=len(shards)))


def _index_of_remote(shard: Path) -> ShardIndex | None:
    """Of a shard that is not here: it is fetched when it is opened."""
    from recipes.remote import fetch_indexes  # which imports this module

    fetch_indexes([shard])
    return load_index(shard)


def each_index(shards: Sequence[Path], *, progress: bool = False) -> Iterator[ShardIndex]:
    """The indexes of many shards one after the other, few of them in memory at once.

    Raises:
        ShardError: as `shard_indexes`.
    """
    for at in range(0, len(shards), _AT_ONCE):
        yield from shard_indexes(shards[at : at + _AT_ONCE], progress=progress)


def _index(shard: Path, entry: Entry | None) -> ShardIndex:
    try:
        size = shard.stat().st_size
    except OSError as error:
        there = _index_of_remote(shard) if url_of(shard) else None
        if there is None:
            found = f"found no readable file ({error})"
            raise ShardError(f"{shard}: {found}; check the path") from error
        size = there.size
    index = _usable(load_index(shard), entry, size)
    if index is None:
        # Of several ranks one scans, the others wait for what it kept.
        with locked(lock_of(shard)):
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
        faults = [Fault("truncated shard", None, problem)] * min(lost, MAX_FAULTS)
        if lost > MAX_FAULTS:
            problem += f"; {lost - MAX_FAULTS:,} more samples are lost, not listed"
            faults.append(Fault("truncated shard", None, problem))
        return replace(index, faults=(*index.faults, *faults))
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
    elif size < index.size and _rewritten(shard, index.size, index.sha256):
        problem = (
            f"an archive of {size:,} bytes that is not cut short; expected the {index.size:,} "
            "bytes of its index"
        )
    elif (
        entry
        and size == index.size < entry.bytes
        and not any(fault.kind == "truncated shard" for fault in index.faults)
        and _rewritten(shard, entry.bytes, entry.sha256)
    ):
        problem = (
            f"an archive of {size:,} bytes that is not cut short; expected {entry.bytes:,} bytes, "
            "as the manifest says"
        )
    if problem:
        raise ShardError(
            f"{shard}: changed since indexed: found {problem}: copy or write the shards again, or "
            "if they are meant to be so, run 'bridges shards index "
            f"{shard.parent} --overwrite true'"
        )


def _rewritten(shard: Path, size: int, sha256: str) -> bool:
    """Whether a shard that is shorter than it was is another one, and not what is left of it."""
    if not shard.is_file():  # a remote one, whose index is of another
        return True
    with shard.open("rb") as file:
        found = file.seek(0, os.SEEK_END)
        file.seek(max(0, found - _END))
        if file.read() != bytes(_END):
            return False
        if any(fault.kind == "truncated shard" for fault in scan_shard(shard).faults):
            return False  # cut within a picture of zeros
        if size - found > _MAX_PADDING:
            return True
        # Of the zeros after the mark of the end, some may be cut off, and nothing is lost.
        file.seek(0)
        digest = hashlib.sha256()
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    digest.update(bytes(size - found))
    return digest.hexdigest() != sha256


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
