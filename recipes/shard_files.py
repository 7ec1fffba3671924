"""Shards as files: found by what names them."""

from __future__ import annotations

import glob
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from braceexpand import braceexpand

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:")

INDEX_SUFFIX = ".index"
"""After a shard's name: its index, which ``train-*`` does not mean."""


class ShardError(ValueError):
    """A shard that is missing, truncated or ambiguous; never skipped."""


def expand_shards(spec: str | Path | Sequence[str | Path]) -> list[Path]:
    """Finds the shards that a specification names.

    Args:
        spec: A path, a brace expression (``train-{000000..000007}.tar``), a glob, a folder (all
            its ``*.tar``), a URL of shards or of a folder (`recipes.remote.expand_url`), or a
            sequence of these.

    Returns:
        The shards, in the order named; a glob and a folder in the order of names. A remote one
        is where the cache will have it once it is opened.

    Raises:
        ShardError: ``pipe:`` or another scheme that is not read, a pattern without a match,
            missing files (each is named), a shard named twice.
    """
    shards: list[Path] = []
    missing: list[str] = []
    for part in [spec] if isinstance(spec, (str, Path)) else spec:
        if _SCHEME.match(str(part)):
            # Not before it is needed: the network's libraries take a while to load.
            from recipes.remote import expand_url

            shards.extend(expand_url(str(part)))
            continue
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


def tars_in(folder: Path) -> list[Path]:
    """The shards in a folder, by name; without ``._00000.tar``, which macOS puts beside them."""
    return sorted(path for path in folder.glob("*.tar") if not path.name.startswith("."))


def _expand_braces(name: str) -> list[str]:
    if Path(name).expanduser().exists():
        return [name]
    try:
        return list(braceexpand(name, escape=False))
    except ValueError as error:
        raise ShardError(f"{name!r} has unbalanced braces; expected e.g. {{0..7}}") from error


def _expand_name(name: str) -> list[Path]:
    from recipes.remote_cache import url_of

    path = Path(name).expanduser()
    if url_of(path):  # it is fetched when it is opened
        return [path]
    if path.is_dir():
        return tars_in(path)
    if path.is_file():
        return [path]
    if glob.has_magic(name):
        found = sorted(Path(match) for match in glob.glob(str(path), recursive=True))
        return [path for path in found if path.is_file() and path.suffix != INDEX_SUFFIX]
    return []
