"""Shards indexed and verified: what is wrong with them, by file and by sample."""

from __future__ import annotations

import contextlib
import errno
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import xxhash
from rich.console import Console
from rich.table import Table
from rich.text import Text

from recipes.locks import locked
from recipes.remote_cache import url_of
from recipes.shard_decode import undecodable
from recipes.shard_files import ShardError, expand_shards, tars_in
from recipes.shard_index import in_parallel, shard_indexes
from recipes.shard_manifest import MANIFEST, Entry, read_manifest, write_manifest
from recipes.shard_scan import ShardIndex, scan_shard
from recipes.shard_store import cached_indexes, drop_index, load_index, lock_of, save_index

_READ_ONLY = (errno.EROFS, errno.EACCES, errno.EPERM)


@dataclass(frozen=True)
class Finding:
    """Something wrong with a shard, or with the sample that `key` names.

    Attributes:
        shard: its path.
        key: of the sample, if it is one that is bad and its key is known.
        kind: what such findings are counted by.
        problem: what was found.
    """

    shard: str
    key: str | None
    kind: str
    problem: str


@dataclass
class Check:
    """What `index_shards` or `verify_shards` looked at and found.

    ``read_only`` are folders that got no manifest, because they cannot be written; ``known`` is how
    many shards were indexed before, and so were not read again.
    """

    shards: int = 0
    samples: int = 0
    findings: list[Finding] = field(default_factory=list)
    read_only: list[str] = field(default_factory=list)
    known: int = 0

    @property
    def by_kind(self) -> dict[str, int]:
        """Findings of each kind."""
        return dict(Counter(finding.kind for finding in self.findings))


def index_shards(
    shards: Sequence[str | Path], *, overwrite: bool = False, progress: bool = True
) -> Check:
    """Makes the indexes and the manifest of shards, whoever wrote them.

    Args:
        shards: As for `expand_shards`.
        overwrite: Take the shards as they are now for right, whatever was indexed before.
        progress: Show a bar.

    Raises:
        ShardError: As `expand_shards` and `shard_indexes`; a URL.
    """
    paths = _local(shards)
    known = 0 if overwrite else sum(load_index(path) is not None for path in paths)
    if overwrite:
        indexes = in_parallel(_index_anew, paths, "indexing", progress)
    else:
        indexes = shard_indexes(paths, progress=progress)
    read_only = []
    for folder in dict.fromkeys(path.parent for path in paths):
        own = [pair for pair in zip(paths, indexes, strict=True) if pair[0].parent == folder]
        try:
            with locked(lock_of(folder)):
                _describe(folder, own, overwrite)
        except OSError as error:
            if error.errno not in _READ_ONLY:
                raise
            read_only.append(str(folder))
    findings = [
        Finding(str(path), fault.key, fault.kind, fault.problem)
        for path, index in zip(paths, indexes, strict=True)
        for fault in index.faults
    ]
    listed = {folder: read_manifest(folder) for folder in {path.parent for path in paths}}
    findings += _missing(listed, paths, {Path(shard) for shard in shards})
    return Check(len(paths), sum(map(len, indexes)), findings, read_only, known)


def verify_shards(
    shards: Sequence[str | Path],
    *,
    decode: bool = False,
    workers: int | None = None,
    progress: bool = True,
) -> Check:
    """Compares shards with their manifest and their indexes, to the byte.

    Args:
        shards: As for `expand_shards`.
        decode: Open every picture, text and JSON, too.
        workers: Shards at a time; as many as there are cores unless given.
        progress: Show a bar.

    Raises:
        ShardError: As `expand_shards`; nothing to compare the shards with; a URL.
    """
    if workers is not None and workers < 1:
        raise ValueError(f"workers is {workers}; expected at least 1")
    folders = [Path(shard) for shard in shards if Path(shard).is_dir()]
    listed = {folder: read_manifest(folder) for folder in folders}
    # A folder of which every shard is lost is not an empty one.
    given = [shard for shard in shards if not listed.get(Path(shard)) or tars_in(Path(shard))]
    paths = _local(given) if given else []
    for folder in {path.parent for path in paths}:
        listed.setdefault(folder, read_manifest(folder))
    findings = _missing(listed, paths, set(folders))
    check = Check(len(paths), 0, findings)

    def one(path: Path) -> tuple[int, list[Finding]]:
        entries = listed[path.parent]
        return _verify(path, entries, decode)

    for samples, found in in_parallel(one, paths, "verifying", progress, workers):
        check.samples += samples
        check.findings += found
    return check


def print_check(check: Check, console: Console | None = None, *, names: int = 5) -> None:
    """Prints what was found; at most ``names`` of each kind."""
    console = console or Console()
    console.print(f"{check.shards:,} shards, {check.samples:,} samples without a fault")
    if check.known:
        console.print(
            f"{check.known:,} shards were indexed before and not read again: 'bridges shards "
            "verify' compares them with their indexes"
        )
    for folder in check.read_only:
        kept = "as it was" if (Path(folder) / MANIFEST).exists() else "not there"
        where = f"the indexes are kept in {cached_indexes()}; the manifest is {kept}"
        console.print(Text(f"{folder} cannot be written: {where}"))
    if not check.findings:
        console.print("No faults.")
        return
    table = Table("fault", "count", "which", title="Faults")
    for kind, count in check.by_kind.items():
        found = [finding for finding in check.findings if finding.kind == kind]
        shown = [f"{one.shard}: {one.key or ''}\n  {one.problem}" for one in found[:names]]
        if count > names:
            shown.append(f"… and {count - names:,} more")
        # Text, not str: a name with [brackets] would be taken for markup.
        table.add_row(kind, f"{count:,}", Text("\n".join(shown)))
    console.print(table)


def _local(shards: Sequence[str | Path]) -> list[Path]:
    paths = expand_shards(shards)
    if remote := [url for path in paths if (url := url_of(path))]:
        raise ShardError(
            f"found {remote[0]}, a URL; expected local files: index and verify shards where they "
            "are, and copy their indexes and shards.json with them"
        )
    return paths


def _verify(
    path: Path, entries: Mapping[str, Entry] | None, decode: bool
) -> tuple[int, list[Finding]]:
    def finding(kind: str, problem: str, key: str | None = None) -> Finding:
        return Finding(str(path), key, kind, problem)

    entry, kept = (entries or {}).get(path.name), load_index(path)
    if entries is None and kept is None:
        raise ShardError(
            f"{path}: found neither a manifest nor an index; expected something to compare it "
            f"with: run 'bridges shards index {path.parent}' while the shards are known to be right"
        )
    try:
        index = scan_shard(path)
    except ShardError as error:
        return 0, [finding("unreadable shard", str(error))]
    findings = [finding(fault.kind, fault.problem, fault.key) for fault in index.faults]
    if kept and entry and kept.sha256 != entry.sha256:
        kept = None  # of another file than the manifest describes
    if kept and kept.sha256 != index.sha256:
        named = {fault.key for fault in index.faults}
        findings += [
            finding(kind, problem, key)
            for key, kind, problem in _changed(path, kept, index.size)
            if key not in named
        ]
    if entries is not None and entry is None:
        findings.append(finding("surplus shard", f"{MANIFEST} does not list it"))
    found = {"bytes": index.size, "sha256": index.sha256}
    expected = entry or (Entry.of(path.name, kept) if kept else None)
    if expected:
        wrong = [
            f"{name} {value}, expected {getattr(expected, name)}"
            for name, value in found.items()
            if value != getattr(expected, name)
        ]
        if not wrong and expected.keys_sha256 not in (None, index.keys_sha256):
            wrong = [f"keys_sha256 {index.keys_sha256}, expected {expected.keys_sha256}"]
        if len(index) != expected.samples:
            wrong.append(f"{len(index)} samples, expected {expected.samples}")
        if wrong:
            problem = f"found {'; '.join(wrong)}: copy it again"
            findings.append(finding("changed shard", problem))
    if decode:
        findings += [finding(*bad) for bad in undecodable(path, index)]
    bad = {one.key for one in findings if one.key is not None}
    return sum(key not in bad for key in index.keys), findings


def _changed(path: Path, kept: ShardIndex, size: int) -> list[tuple[str, str, str]]:
    """(key, kind, problem) of the samples whose bytes are no longer those of the index."""
    changed = []
    with path.open("rb") as file:
        for row, key in enumerate(kept.keys):
            start, end = int(kept.offsets[row]), int(kept.ends[row])
            if end > size:
                cut = f"the file ends at byte {size:,} of {kept.size:,}"
                changed.append((key, "truncated shard", cut))
                continue
            hasher = xxhash.xxh3_64()
            file.seek(start)
            while start < end and (chunk := file.read(min(end - start, 1 << 20))):
                hasher.update(chunk)
                start += len(chunk)
            if hasher.intdigest() != int(kept.checksums[row]):
                where = f"bytes {int(kept.offsets[row]):,} to {end:,} are not those indexed"
                changed.append((key, "damaged bytes", where))
    return changed


def _missing(
    listed: Mapping[Path, Mapping[str, Entry] | None],
    paths: Sequence[Path],
    folders: set[Path],
) -> list[Finding]:
    """Shards that a manifest lists, in the splits that were asked for, and that are gone."""
    findings = []
    for folder, entries in listed.items():
        named = {path.name for path in paths if path.parent == folder}
        splits = {entry.split for entry in (entries or {}).values() if entry.name in named}
        findings += [
            Finding(str(folder / name), None, "missing shard", f"{MANIFEST} lists it")
            for name, entry in (entries or {}).items()
            if (folder in folders or entry.split in splits) and not (folder / name).is_file()
        ]
    return findings


def _index_anew(path: Path) -> ShardIndex:
    index = scan_shard(path)
    with contextlib.suppress(OSError):  # of a read-only folder; the one that is saved is newer
        drop_index(path)
    save_index(index, path)
    return index


def _describe(folder: Path, indexes: Sequence[tuple[Path, ShardIndex]], overwrite: bool) -> None:
    """Brings a folder's manifest up to date."""
    before = None if overwrite else read_manifest(folder)
    known = dict(before or {})
    if overwrite:
        known = {name: entry for name, entry in _listed(folder) if (folder / name).is_file()}
    for path, index in indexes:
        if overwrite or path.name not in known:
            # A shard cut since it was indexed is described as it was.
            whole = index if overwrite else load_index(path) or index
            split = known[path.name].split if path.name in known else None
            known[path.name] = Entry.of(path.name, whole, split)
    if known != before:
        write_manifest(folder, sorted(known.values(), key=lambda entry: entry.name))


def _listed(folder: Path) -> list[tuple[str, Entry]]:
    try:
        return list((read_manifest(folder) or {}).items())
    except ShardError:  # it is replaced
        return []
