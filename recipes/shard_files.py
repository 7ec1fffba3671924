"""Shards as files: found by what names them."""

from __future__ import annotations

import glob
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from braceexpand import braceexpand


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
