"""Indexes on disk, as safetensors: beside their shards, or in the user's cache."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from bridges.embedded import cache_dir
from bridges.files import write_bytes
from recipes.shard_files import INDEX_SUFFIX
from recipes.shard_scan import Fault, ShardIndex

_FORMAT = 1
_ARRAYS = ("offsets", "ends", "checksums", "members", "starts", "sizes", "extensions")


def index_path(shard: Path) -> Path:
    """Where a shard's index is kept, if its folder can be written."""
    return shard.with_name(shard.name + INDEX_SUFFIX)


def cached_indexes() -> Path:
    """The folder of the indexes of shards whose own folder cannot be written."""
    return cache_dir() / "indexes"


def _cached_path(shard: Path) -> Path:
    return cached_indexes() / f"{_name(shard)}.index"


def _name(path: Path) -> str:
    absolute = str(path.absolute()).encode("utf-8", "surrogateescape")
    return hashlib.sha256(absolute).hexdigest()[:32]


def lock_of(path: Path) -> Path:
    """The lock file of what is kept about a shard, or about a folder of them.

    In the cache: a folder of shards may be read-only.
    """
    return cache_dir() / "locks" / f"{_name(path)}.lock"


def save_index(index: ShardIndex, shard: Path) -> None:
    """Keeps an index; where not even the cache can be written, it is made anew each time."""
    described = {
        "format": _FORMAT,
        "size": index.size,
        "sha256": index.sha256,
        "names": index.names,
        "keys": index.keys,
        "faults": [(fault.kind, fault.key, fault.problem) for fault in index.faults],
    }
    arrays = {name: np.ascontiguousarray(getattr(index, name)) for name in _ARRAYS}
    arrays["text"] = np.frombuffer(json.dumps(described).encode(), np.uint8)
    for path in (index_path(shard), _cached_path(shard)):
        try:
            write_bytes(path, save(arrays, {"digest": _digest(arrays)}))
            return
        except (OSError, SafetensorError):
            continue


def load_index(shard: Path) -> ShardIndex | None:
    """A shard's index; None if there is none, or one that is damaged or of another format.

    Of two, it is the one of a shard of this size, of two such the newer: in a folder that cannot be
    written an old one may stand beside the shard.
    """
    found: list[tuple[bool, int, ShardIndex]] = []
    size = None
    with contextlib.suppress(OSError):
        size = shard.stat().st_size
    for path in (index_path(shard), _cached_path(shard)):
        # Whatever a crafted file makes the libraries raise, it is no index.
        with contextlib.suppress(Exception):
            index = _load(path)
            found.append((index.size == size, path.stat().st_mtime_ns, index))
    if not any(fits for fits, _, _ in found):
        return found[0][2] if found else None
    return max(found, key=lambda one: one[:2])[2]


def drop_index(shard: Path) -> None:
    """Forgets a shard's index.

    Raises:
        OSError: there is one that cannot be removed.
    """
    with contextlib.suppress(OSError):
        _cached_path(shard).unlink()
    beside = index_path(shard)
    try:
        beside.unlink(missing_ok=True)
    except OSError:
        if beside.is_file():
            raise


def _load(path: Path) -> ShardIndex:
    with safe_open(path, "numpy") as file:
        arrays = {name: file.get_tensor(name) for name in (*_ARRAYS, "text")}
        if (file.metadata() or {}).get("digest") != _digest(arrays):
            raise ValueError("the index is damaged")
    described = json.loads(arrays.pop("text").tobytes())
    if described["format"] != _FORMAT:
        raise ValueError("the index is of another format")
    index = ShardIndex(
        size=described["size"],
        sha256=described["sha256"],
        names=tuple(described["names"]),
        keys=tuple(described["keys"]),
        faults=tuple(Fault(*fault) for fault in described["faults"]),
        **{name: arrays[name] for name in _ARRAYS},
    )
    if not _consistent(index):
        raise ValueError("the index contradicts itself")
    return index


def _consistent(index: ShardIndex) -> bool:
    """Whether every offset lies where it may; the digest only says that nothing was flipped."""
    n, m = len(index.keys), len(index.starts)
    lengths = {"offsets": n, "ends": n, "checksums": n, "members": n + 1, "sizes": m}
    shapes = {"starts": m, "extensions": m, **lengths}
    for name, length in shapes.items():
        array: NDArray = getattr(index, name)
        wanted = np.uint64 if name == "checksums" else np.int64
        if array.shape != (length,) or array.dtype != wanted:
            return False
    faults = [(fault.kind, fault.key or "", fault.problem) for fault in index.faults]
    texts = (*index.names, *index.keys, *(text for fault in faults for text in fault))
    if not all(isinstance(text, str) for text in texts) or type(index.size) is not int:
        return False
    "".join(texts).encode()  # JSON may hold halves of surrogate pairs
    if not re.fullmatch("[0-9a-f]{64}", index.sha256) or len(set(index.keys)) != n:
        return False
    # Compared, not subtracted: that may overflow.
    members = index.members
    if members[0] != 0 or members[-1] != m or (members[1:] <= members[:-1]).any():
        return False
    counts = np.diff(members)
    starts, sizes = index.starts, index.sizes
    bounds = np.stack([index.offsets, index.ends], axis=1).ravel()
    ordered = bounds.size == 0 or (bounds[0] >= 0 and bounds[-1] <= index.size)
    ordered = ordered and (bounds[1:] >= bounds[:-1]).all()
    within = (starts >= np.repeat(index.offsets, counts)) & (sizes >= 0)
    within &= sizes <= np.repeat(index.ends, counts) - starts
    known = (index.extensions >= 0) & (index.extensions < len(index.names))
    return bool(ordered and within.all() and known.all())


def _digest(arrays: dict[str, NDArray]) -> str:
    digest = hashlib.sha256()
    for name in sorted(arrays):
        digest.update(f"{name} {arrays[name].dtype} {arrays[name].shape}\n".encode())
        digest.update(arrays[name].tobytes())
    return digest.hexdigest()
