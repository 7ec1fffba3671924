"""The manifest of a folder of shards: what each of them holds, to the byte."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

from bridges.files import write_json
from recipes.shard_files import ShardError
from recipes.shard_scan import ShardIndex

MANIFEST = "shards.json"
_FORMAT = 1
_SPLIT = re.compile(r"(.+?)[-_.]?\d+\.tar")
_NUMBER = re.compile(r"\d+\.tar")


@dataclass(frozen=True)
class Entry:
    """One shard in a manifest.

    Attributes:
        name: of the file.
        split: e.g. ``train``.
        bytes: its size.
        sha256: of its bytes, in hexadecimal.
        samples: that can be read.
        keys_sha256: see `ShardIndex.keys_sha256`; None in manifests of older versions.
    """

    name: str
    split: str
    bytes: int
    sha256: str
    samples: int
    keys_sha256: str | None = None

    @classmethod
    def of(cls, name: str, index: ShardIndex, split: str | None = None) -> Entry:
        """Describes a shard; its split is what stands before the number in its name.

        Names that are numbers, as img2dataset gives them, are of one split, ``shards``.
        """
        match = _SPLIT.fullmatch(name)
        found = match[1] if match else Path(name).stem
        if _NUMBER.fullmatch(name):
            found = "shards"
        return cls(name, split or found, index.size, index.sha256, len(index), index.keys_sha256)


def read_manifest(folder: Path) -> Mapping[str, Entry] | None:
    """Name -> entry of the shards that a folder's manifest lists; None if it has no manifest.

    Raises:
        ShardError: a manifest that cannot be read, or of a newer version.
    """
    path = folder / MANIFEST
    try:
        stat = path.stat()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise _unreadable(path, f"no readable file ({error})") from error
    return _entries(path.absolute(), (stat.st_ino, stat.st_size, stat.st_mtime_ns))


# It is asked for with every shard, and one of 10,000 takes a tenth of a second to read.
@lru_cache(maxsize=16)
def _entries(path: Path, version: tuple[int, ...]) -> Mapping[str, Entry] | None:
    content = _read(path.parent)
    if "shards" not in content:
        return None
    try:
        entries = [_entry(entry) for entry in content["shards"]]
    except (TypeError, KeyError, ValueError, OverflowError) as error:
        raise _unreadable(path, f"an entry that does not describe a shard ({error})") from error
    return MappingProxyType({entry.name: entry for entry in entries})


def write_manifest(
    folder: Path, entries: Sequence[Entry], extra: Mapping[str, Any] | None = None
) -> None:
    """Writes the manifest.

    Args:
        folder: of the shards.
        entries: of all of them.
        extra: what else it says, e.g. ``skipped``; None keeps what it says.
    """
    kept = manifest_extra(folder) if extra is None else dict(extra)
    listed = [{k: v for k, v in asdict(entry).items() if v is not None} for entry in entries]
    write_json(folder / MANIFEST, {"format": _FORMAT, "shards": listed, **kept})


def manifest_extra(folder: Path) -> dict[str, Any]:
    """What a folder's manifest says beside its shards; empty if there is none."""
    try:
        content = _read(folder)
    except ShardError:  # it is to be replaced
        return {}
    return {key: value for key, value in content.items() if key not in ("format", "shards")}


def missing_shards(shards: Sequence[Path]) -> list[str]:
    """Shards that a manifest lists beside the given ones, in their splits, and that are gone.

    Raises:
        ShardError: as `read_manifest`.
    """
    from recipes.remote_cache import url_of  # which imports this module

    missing = []
    for folder in dict.fromkeys(shard.parent for shard in shards):
        entries = read_manifest(folder) or {}
        named = {shard.name for shard in shards if shard.parent == folder}
        splits = {entry.split for entry in entries.values() if entry.name in named}
        missing += [
            str(folder / entry.name)
            for entry in entries.values()
            if entry.split in splits
            and not (folder / entry.name).exists()
            and url_of(folder / entry.name) is None
        ]
    return missing


def _read(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise _unreadable(path, f"no JSON ({error})") from error
    if not isinstance(content, dict) or not isinstance(content.get("shards", []), list):
        raise _unreadable(path, "something else than a manifest")
    if content.get("format", _FORMAT) != _FORMAT:
        raise _unreadable(path, f"a manifest of format {content['format']!r}")
    return content


def _entry(found: Any) -> Entry:
    size, samples = found["bytes"], found["samples"]
    # A sample has a header of 512 bytes at least.
    if type(size) is not int or type(samples) is not int or not 0 <= samples <= size // 512:
        raise ValueError(f"{samples!r:.99} samples in {size!r:.99} bytes")
    entry = Entry(
        str(found["name"]),
        str(found["split"]),
        size,
        str(found["sha256"]),
        samples,
        None if found.get("keys_sha256") is None else str(found["keys_sha256"]),
    )
    if Path(entry.name).name != entry.name or "\\" in entry.name:
        raise ValueError(f"{entry.name!r} is no file name")
    return entry


def _unreadable(path: Path, what: str) -> ShardError:
    return ShardError(
        f"{path}: found {what}; expected a manifest of format {_FORMAT}: make it again with "
        f"'bridges shards index {path.parent} --overwrite true'"
    )
