"""Remote shards on this machine: each is fetched whole, once, and from there on is a file.

A remote shard is a path in the cache from the start, ``CACHE/shards/FOLDER/NAME.tar``, where FOLDER
stands for the folder's URL, which a file in it names. It need not exist until `open_shard`.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Sequence
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from threading import Thread
from typing import IO

from filelock import FileLock

from bridges.embedded import cache_dir
from bridges.files import file_digest, staged, write_json
from recipes.remote_room import in_use, make_room, room
from recipes.shard_files import ShardError
from recipes.shard_manifest import read_manifest
from recipes.shard_store import load_index

_ORIGIN = "remote.json"

logger = logging.getLogger(__name__)


def cache_place(folder: str) -> Path:
    """The folder of the cache that stands for the URL of a folder; made if it is not there."""
    place = _root() / hashlib.sha256(folder.encode()).hexdigest()[:24]
    if not (place / _ORIGIN).exists():
        write_json(place / _ORIGIN, {"url": folder})
    return place


def url_of(path: Path) -> str | None:
    """Where a shard in the cache comes from; None of any other shard."""
    if path.parent.parent != _root():
        return None
    try:
        return _origin(path.parent) + path.name
    except FileNotFoundError:
        return None


def open_shard(path: Path) -> IO[bytes]:
    """Opens a shard for reading, unbuffered; a remote one is fetched first if it is not there.

    While the file is open, the cache keeps the shard.

    Raises:
        ShardError: it cannot be fetched, or is not what its manifest says.
        OSError: as `open`; the disk is full.
    """
    url = url_of(path)
    if url is None:
        return path.open("rb", buffering=0)
    while True:
        with suppress(FileNotFoundError):
            return _opened(path)
        with _lock(path):
            if not path.exists():
                _fetch(path, url)


def _opened(path: Path) -> IO[bytes]:
    file = path.open("rb", buffering=0)
    in_use(file)
    return file


def _fetch(path: Path, url: str) -> None:
    # Not before it is needed: the network's libraries take a while to load.
    from recipes.remote_fetch import fetch

    expected = _expected(path)
    limit = expected[0] if expected else room(_root())
    make_room(_root(), limit if expected else 0)
    try:
        with staged(path, (lambda: limit) if expected else None) as temporary:
            fetch(url, temporary, limit)
            if expected:
                _verify(temporary, url, *expected)
    except FileNotFoundError as error:
        raise ShardError(
            f"no shard at {url} that may be read; expected one: check the address"
        ) from error
    # Of a size that was not known before.
    make_room(_root(), 0, keep=path)


_waiting: list[Path] = []
_fetcher: Thread | None = None


def prefetch(shards: Sequence[Path]) -> None:
    """Begins to fetch shards that are soon opened, in the background, one after the other.

    They take the place of those of an earlier call that still wait.
    """
    global _waiting, _fetcher
    _waiting = [shard for shard in shards if url_of(shard) and not shard.exists()]
    # A thread does not live on in a forked worker.
    if _waiting and (_fetcher is None or not _fetcher.is_alive()):
        _fetcher = Thread(target=_fetch_waiting, name="shards", daemon=True)
        _fetcher.start()


def _fetch_waiting() -> None:
    while waiting := _waiting:
        try:
            open_shard(waiting.pop(0)).close()
        except Exception as error:  # who opens the shard meets it again, and raises it
            logger.warning("not fetched ahead of time: %s", error)


def _expected(shard: Path) -> tuple[int, str, str] | None:
    """Bytes and SHA-256 of a shard, and what says so."""
    if entry := (read_manifest(shard.parent) or {}).get(shard.name):
        return entry.bytes, entry.sha256, "the shards.json beside it"
    index = load_index(shard)
    return (index.size, index.sha256, "its index") if index else None


def _verify(path: Path, url: str, size: int, digest: str, source: str) -> None:
    found = path.stat().st_size, file_digest(path)
    if found != (size, digest):
        raise ShardError(
            f"{url}: found {found[0]:,} bytes with SHA-256 {found[1]}; expected {size:,} bytes "
            f"with {digest}, as {source} says; nothing of it was kept: copy the shard there "
            "again, or if it is meant to be so, run 'bridges shards index' where it was written"
        )


def _lock(path: Path) -> FileLock:
    return FileLock(path.with_name(f".{path.name}.lock"))


def _root() -> Path:
    return Path(os.path.abspath(cache_dir())) / "shards"


@lru_cache(maxsize=256)
def _origin(place: Path) -> str:
    return json.loads((place / _ORIGIN).read_bytes())["url"]
