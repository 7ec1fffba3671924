"""Shards as files: found by name, checked by their tar headers, read from a byte on."""

from __future__ import annotations

import glob
import hashlib
import re
import tarfile
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from braceexpand import braceexpand
from webdataset.tariterators import base_plus_ext, group_by_keys, tar_file_expander

# webdataset passes over metadata members of this form; a scan must count as it reads.
_METADATA = re.compile(r"__[^/]*__($|/)")


class ShardError(ValueError):
    """A shard that is missing, truncated or ambiguous; never skipped."""


def expand_shards(spec: str | Path | Sequence[str | Path]) -> list[Path]:
    """Finds the shards that a specification names; local files only.

    Args:
        spec: A path, a brace expression (``train-{000000..000007}.tar``), a glob, a folder (all
            its ``*.tar``), or a sequence of these.

    Returns:
        The shards, in the order named; a glob and a folder in the order of names.

    Raises:
        ShardError: A URL or ``pipe:``, a pattern without a match, missing files (each is
            named), a shard named twice.
    """
    shards: list[Path] = []
    missing: list[str] = []
    for part in [spec] if isinstance(spec, (str, Path)) else spec:
        for name in _expand_braces(str(part)):
            found = _expand_name(name)
            shards.extend(found)
            if not found:
                missing.append(name)
    if missing or not shards:
        named = ", ".join(missing[:10]) or repr(spec)
        more = f" and {len(missing) - 10} more" if len(missing) > 10 else ""
        raise ShardError(
            f"no shards at {named}{more}; expected .tar files, a folder of them, a glob or "
            f"{{000000..000007}}: check the path, or make shards with 'bridges shards'"
        )
    twice = [str(shard) for shard, count in Counter(shards).items() if count > 1]
    if twice:
        raise ShardError(f"named more than once: {', '.join(twice[:10])}; name each shard once")
    return shards


def _expand_braces(name: str) -> list[str]:
    # webdataset would run "pipe:" in a shell and hand a URL to curl.
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:", name):
        raise ShardError(
            f"{name!r} is a URL or a command; expected local files: download the shards first "
            f"(a local name with a colon is written ./name)"
        )
    if Path(name).expanduser().exists():
        return [name]
    try:
        return list(braceexpand(name, escape=False))
    except ValueError as error:
        raise ShardError(f"{name!r} has unbalanced braces; expected e.g. {{0..7}}") from error


def _expand_name(name: str) -> list[Path]:
    path = Path(name).expanduser()
    if path.is_dir():
        return sorted(path.glob("*.tar"))
    if path.is_file():
        return [path]
    if glob.has_magic(name):
        found = sorted(Path(match) for match in glob.glob(str(path), recursive=True))
        return [match for match in found if match.is_file()]
    return []


def shard_digest(shard: Path) -> str:
    """The SHA-256 of a shard's bytes, in hexadecimal."""
    digest = hashlib.sha256()
    with shard.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def count_samples(shard: Path) -> int:
    """Counts the samples of a shard by its tar headers; checks it as ``ShardStream`` does."""
    return len(sample_offsets(shard))


def sample_offsets(shard: Path) -> array[int]:
    """Where each sample's first header stands, in bytes.

    Raises:
        ShardError: Unreadable or truncated (an archive cut between two members looks whole to
            a streaming reader, which then loses the rest silently), a key or a member that
            occurs twice, a link or device.
    """
    offsets: array[int] = array("Q")
    keys: set[str] = set()
    members: set[tuple[str, str]] = set()
    current = None
    try:
        with shard.open("rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                if member.isdir() or _METADATA.match(member.name):
                    continue
                if not member.isreg():
                    raise ShardError(
                        f"{shard}: member {member.name!r} is a link or device; expected plain "
                        f"files: rewrite the shard with the files themselves"
                    )
                key, extension = base_plus_ext(member.name)
                if key is None or extension is None:  # README, .DS_Store: no sample's
                    continue
                if (key, extension.lower()) in members or (key != current and key in keys):
                    raise ShardError(
                        f"{shard}: key {key!r} occurs twice (at {member.name!r}); expected each "
                        f"sample's members once and side by side: rewrite the shard"
                    )
                members.add((key, extension.lower()))
                if key != current:
                    keys.add(key)
                    offsets.append(member.offset)
                    current = key
            file.seek(tar.offset)
            if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise ShardError(
                    f"{shard}: truncated or damaged after {len(offsets)} samples (no end-of-"
                    f"archive mark at byte {tar.offset:,}); copy or write it again"
                )
    except (tarfile.TarError, OSError, EOFError) as error:
        raise ShardError(
            f"{shard}: not a complete, uncompressed tar file ({error}); copy or write it again"
        ) from error
    return offsets


def read_samples(shard: Path, offset: int = 0) -> Iterator[dict[str, Any]]:
    """The samples of a shard from the byte ``offset`` on, members as raw bytes.

    webdataset is handed an open file, never a name: there is nothing it could run or fetch.
    """
    with shard.open("rb") as file:
        file.seek(offset)
        yield from group_by_keys(tar_file_expander([{"url": str(shard), "stream": file}]))
