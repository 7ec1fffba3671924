"""Shards written: webdataset ``.tar`` files of which all appear together, or none does.

The same samples give the same bytes. A set's shards stand under temporary names until the last of
them is complete.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import secrets
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import IO, Any

from webdataset.writer import TarWriter

from bridges.files import claimed, remove_orphans, sync_folder
from recipes.locks import locked
from recipes.samples import MEMBERS, is_member
from recipes.shard_faults import is_key
from recipes.shard_files import ShardError, tars_in
from recipes.shard_manifest import Entry, manifest_extra, read_manifest, write_manifest
from recipes.shard_scan import ShardIndex, scan_shard
from recipes.shard_store import drop_index, lock_of, save_index

SPLIT_NAME = re.compile(r"[A-Za-z0-9_]+")
_SHARD_NAME = re.compile(r"[A-Za-z0-9_]+-\d{6}\.tar")
# Not what `remove_orphans` takes: a lock on each would need as many open files as there are shards.
_TEMPORARY = re.compile(r"\.([0-9a-f]{8})\..+\.tar\.partial")


def write_shards(
    samples: Iterable[Mapping[str, str | bytes | dict[str, Any]]],
    out: str | Path,
    split: str,
    *,
    samples_per_shard: int = 1000,
    overwrite: bool = False,
) -> list[Path]:
    """Writes ``out/split-000000.tar`` and on; all of them, or on any failure none.

    Args:
        samples: Each with ``__key__`` (see `is_key`; unique) and its
            members: bytes for jpg, jpeg, png, webp, 0.jpg (and other numbered pictures), mp4,
            npy; a string for txt; a dict for json.
        out: The folder; made when it does not exist.
        split: The first part of the shards' names.
        samples_per_shard: All shards but the last hold this many.
        overwrite: Replace this split's shards if there are any.

    Raises:
        ValueError: No samples, a bad or repeated key, a member of another kind, or the split's
            shards exist and ``overwrite`` is not set.
    """
    out = Path(out)
    with ShardSet(out, samples_per_shard, overwrite, only=split) as shards:
        for sample in samples:
            shards.add(split, sample)
        return [out / shard.name for shard in shards.commit()]


class ShardSet:
    """Shards of several splits under temporary names, until `commit` renames them all."""

    def __init__(
        self, out: Path, samples_per_shard: int, overwrite: bool, only: str | None = None
    ) -> None:
        if samples_per_shard < 1:
            raise ValueError(f"samples_per_shard is {samples_per_shard}; expected at least 1")
        self.out, self.samples_per_shard = out, samples_per_shard
        self.keys: set[str] = set()
        if out.exists() and not out.is_dir():
            raise ValueError(f"{out} is a file; expected a folder for the shards: name another")
        self._only, self._overwrite = only, overwrite
        self._replaced()
        self._made_out = not out.exists()
        self._shards: dict[str, list[_TarFile]] = {}
        self._token = ""
        self._claim = contextlib.ExitStack()

    def __enter__(self) -> ShardSet:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Removes whatever `commit` has not renamed."""
        for shard in (shard for shards in self._shards.values() for shard in shards):
            shard.discard()
        self._claim.close()
        if self._made_out and self.out.is_dir() and not any(self.out.iterdir()):
            self.out.rmdir()

    def free_key(self, name: str) -> str:
        """A key made of a picture's name that no sample has yet."""
        stem = str(PurePosixPath(name).with_suffix(""))
        key = re.sub(r"[^A-Za-z0-9_-]+", "_", stem)
        if len(key) > 80 or key in self.keys:
            key = f"{key[:64]}-{hashlib.sha256(name.encode()).hexdigest()[:16]}"
        return key

    def add(self, split: str, sample: Mapping[str, str | bytes | dict[str, Any]]) -> None:
        encoded = encode_sample(sample)
        key = encoded["__key__"]
        if key in self.keys:
            raise ValueError(f"two samples have the key {key!r}; expected unique keys")
        self.keys.add(key)
        shards = self._shards.setdefault(split, [])
        if not shards or shards[-1].samples == self.samples_per_shard:
            if shards:
                shards[-1].close()
            elif not SPLIT_NAME.fullmatch(split):
                raise ValueError(f"split is {split!r}; expected letters, digits and _")
            if not self._token:
                self.out.mkdir(parents=True, exist_ok=True)
                _remove_orphans(self.out)
                self._token, self._claim = _claim(self.out)
            shards.append(_TarFile(self.out, f"{split}-{len(shards):06d}.tar", self._token))
        shards[-1].write(encoded)

    def commit(self, manifest: Mapping[str, Any] | None = None) -> list[Entry]:
        """Writes the manifest, renames every shard into place, then writes their indexes.

        What a kill leaves of it contradicts the manifest, and so is refused when it is read.

        Args:
            manifest: What it says beside the shards; None keeps what an old one says.
        """
        if not self.keys:
            raise ValueError("no samples to write; expected at least one")
        indexes: dict[Path, ShardIndex] = {}
        written: dict[str, Entry] = {}
        for split, shards in self._shards.items():
            for shard in shards:
                shard.close()
                index = indexes[self.out / shard.name] = scan_shard(shard.temporary)
                written[shard.name] = Entry.of(shard.name, index, split)
        with locked(lock_of(self.out)):
            replaced = self._replaced()  # another writer may have come before this one
            listed = [*self._kept(), *written.values()]
            extra = manifest_extra(self.out) if manifest is None else manifest
            surplus = [old for old in replaced if old.name not in written]
            # Listed as what they are not, or they would be read as part of the new set.
            refused = [Entry(old.name, _split(old.name), 0, "0" * 64, 0) for old in surplus]
            write_manifest(self.out, [*listed, *refused], extra)
            for old in replaced:
                drop_index(old)
            for shards in self._shards.values():
                for shard in shards:
                    os.replace(shard.temporary, self.out / shard.name)
            for old in surplus:
                old.unlink()
            for path, index in indexes.items():
                save_index(index, path)
            if surplus:
                write_manifest(self.out, listed, extra)
            sync_folder(self.out)
        return list(written.values())

    def _replaced(self) -> list[Path]:
        """The shards in the place of which these come."""
        found = [shard for shard in tars_in(self.out) if self._replaces(shard.name)]
        if found and not self._overwrite:
            raise ValueError(
                f"{self.out} already holds {len(found)} shards, e.g. {found[0].name}; expected "
                "none: name another folder, or give --overwrite true"
            )
        return found

    def _replaces(self, name: str) -> bool:
        return _SHARD_NAME.fullmatch(name) is not None and self._only in (None, _split(name))

    def _kept(self) -> list[Entry]:
        """What the manifest says of the shards that stay."""
        try:
            found = read_manifest(self.out) or {}
        except ShardError:  # it is replaced
            return []
        return [entry for entry in found.values() if not self._replaces(entry.name)]


def _split(name: str) -> str:
    return name[: -len("-000000.tar")]


def _claim(out: Path) -> tuple[str, contextlib.ExitStack]:
    """A name for a writer's temporary files, and the file, locked, that says that it lives."""
    while True:
        token = secrets.token_hex(4)
        path = _claim_path(out, token)
        with contextlib.ExitStack() as stack:
            stack.callback(path.unlink, missing_ok=True)
            stack.enter_context(claimed(path))
            stack.enter_context(path.open("ab"))
            if path.exists():  # nobody took it for an orphan before it was locked
                return token, stack.pop_all()


def _claim_path(out: Path, token: str) -> Path:
    return out / f".shards.{token}.partial"


def _remove_orphans(out: Path) -> None:
    """Removes the shards that killed writers left under temporary names."""
    remove_orphans(out)
    for path in out.glob(".*.tar.partial"):
        match = _TEMPORARY.fullmatch(path.name)
        if match and not _claim_path(out, match[1]).exists():
            path.unlink(missing_ok=True)


class _TarFile:
    """One shard under its temporary name, in the folder it will stay in."""

    def __init__(self, out: Path, name: str, token: str) -> None:
        self.name, self.samples = name, 0
        self.temporary = out / f".{token}.{name}.partial"
        self._file: IO[bytes] = self.temporary.open("wb")
        # Time and owner fixed, or the same samples would give other bytes; encoder=False, or
        # webdataset would pickle some types; pax, for names above 100 bytes.
        self._tar = TarWriter(self._file, encoder=False, mtime=0, format="PAX_FORMAT")

    def write(self, sample: Mapping[str, Any]) -> None:
        self._tar.write(dict(sample))
        self.samples += 1

    def close(self) -> None:
        """Completes the file and waits until the disk has it."""
        if not self._file.closed:
            self._tar.close()
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()

    def discard(self) -> None:
        # Closing writes, and on a full disk fails; the first error is the one to be seen.
        with contextlib.suppress(OSError):
            self._tar.close()
        with contextlib.suppress(OSError):
            self._file.close()
        self.temporary.unlink(missing_ok=True)


def encode_sample(sample: Mapping[str, str | bytes | dict[str, Any]]) -> dict[str, Any]:
    """A sample's key, and its members as bytes.

    Raises:
        ValueError: a bad key, or a member that `write_shards` does not take.
    """
    key = sample.get("__key__")
    if not isinstance(key, str) or not is_key(key):
        raise ValueError(
            f"the key {key!r} of a sample; expected a path within the shard, e.g. 00000 or a/0: "
            "without dots in its last part, '..', backslashes and control characters, not "
            "beginning with a slash, of 1,000 bytes at most"
        )
    return {"__key__": key, **_encode(key, sample)}


def _encode(key: str, sample: Mapping[str, str | bytes | dict[str, Any]]) -> dict[str, bytes]:
    encoded: dict[str, bytes] = {}
    for extension, member in sample.items():
        if extension == "__key__":
            continue
        if not is_member(extension):
            raise ValueError(f"sample {key!r} has the member {extension!r}; expected {MEMBERS}")
        if extension == "json" and isinstance(member, dict):
            encoded[extension] = json.dumps(member, ensure_ascii=False, sort_keys=True).encode()
        elif extension == "txt" and isinstance(member, str):
            encoded[extension] = member.encode()
        elif extension not in ("txt", "json") and isinstance(member, bytes):
            encoded[extension] = member
        else:
            raise ValueError(
                f"sample {key!r}: {extension} is a {type(member).__name__}; expected a string for "
                f"txt, a dict for json, bytes for the others"
            )
    if not encoded:
        raise ValueError(f"sample {key!r} has no members; expected a picture and a caption")
    return encoded
