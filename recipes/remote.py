"""URLs of shards: which may be read, which shards they name, and where their indexes come from."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

from braceexpand import braceexpand
from filelock import FileLock
from rich.console import Console
from rich.progress import track

from bridges.files import remove_orphans, staged
from recipes.cache_set import FEATURES_FILE
from recipes.remote_cache import cache_place, open_shard, prefetch, url_of
from recipes.remote_fetch import fetch, find
from recipes.shard_files import ShardError, expand_shards
from recipes.shard_index import shard_indexes
from recipes.shard_manifest import MANIFEST, Entry, read_manifest
from recipes.shard_store import index_path, load_index

SCHEMES = ("file", "http", "https", "s3", "gs")
_LISTED = ("s3", "gs")
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):")
_HOST = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[^]:@[\s\\]+)(:[0-9]+)?")
# Of a drive, a hidden file, a folder or a query there is nothing in it.
_SHARD = re.compile(r"[^./\\:?#\x00-\x1f][^/\\:?#\x00-\x1f]{0,200}\.tar")
_MAX_MANIFEST = 256 << 20
_MAX_INDEX = 4 << 30
_AT_ONCE = 8


def is_url(name: str) -> bool:
    """Whether it begins with a scheme; a local name with a colon is written ``./name``."""
    return _SCHEME.match(name) is not None


def is_remote_folder(name: str) -> bool:
    """Whether it is the URL of a folder, which has splits in it as a local one has."""
    return is_url(name) and not name.endswith(".tar") and not any(c in _path(name) for c in "*[{")


def _path(url: str) -> str:
    return url.partition("://")[2].partition("/")[2]


def check_url(url: str) -> str:
    """The scheme of a URL that shards may be read from.

    Raises:
        ShardError: any other scheme, credentials, a query, or no host.
    """
    match = _SCHEME.match(url)
    scheme = match[1].lower() if match else ""
    # What is refused is shown, but for what may be secret in it.
    shown = re.sub(r"[?#].*", "?…", re.sub(r"//.*@", "//…@", url, flags=re.S), flags=re.S)
    if scheme not in SCHEMES:
        raise ShardError(
            f"{shown!r} is of a kind that is not read; expected a local path or a URL of "
            f"{', '.join(f'{allowed}:' for allowed in SCHEMES)}: download the shards first "
            "(a local name with a colon is written ./name)"
        )
    host, slash, path = url[len(scheme) + 1 :].removeprefix("//").partition("/")
    if "@" in host or (scheme not in _LISTED and re.search(r"[?#]", url)):
        raise ShardError(
            f"{shown!r} holds credentials or a query; expected the bare address, as it is written "
            "into logs and runs: put passwords into .netrc, tokens into fsspec's configuration"
        )
    if scheme == "file":
        whole = host in ("", "localhost")
    else:
        whole = url[len(scheme) :].startswith("://") and _HOST.fullmatch(host) is not None
    if not (whole and slash and path):
        example = "file:///folder/train-000000.tar" if scheme == "file" else f"{scheme}://host/set/"
        raise ShardError(f"{shown!r} names no place; expected a form like {example}")
    return scheme


def expand_url(url: str) -> list[Path]:
    """The shards that a URL names, as paths that `open_shard` fetches when they are opened.

    Args:
        url: of a shard, with a brace expression (``https://host/train-{000000..000007}.tar``) if
            you like; of a folder with a ``shards.json`` in it; on ``s3:`` and ``gs:`` also a
            glob, or any folder. ``file:`` is as the local path.

    Returns:
        In the order named; those of a glob and of a folder in the order of names.

    Raises:
        ShardError: as `check_url`; a folder or glob that cannot be listed; a shard that the
            ``shards.json`` beside it does not name; names that are no plain file names.
    """
    scheme = check_url(url)
    if scheme == "file":
        return expand_shards(url2pathname(urlsplit(url).path))
    url = scheme + url[len(scheme) :]
    try:
        urls = list(braceexpand(url, escape=False))
    except ValueError as error:
        raise ShardError(f"{url!r} has unbalanced braces; expected e.g. {{0..7}}") from error
    places: dict[str, Path] = {}
    return [path for one in urls for path in _expand(one, scheme, places)]


def _expand(url: str, scheme: str, places: dict[str, Path]) -> list[Path]:
    if any(character in _path(url) for character in "*["):
        if scheme not in _LISTED:
            raise ShardError(
                f"{url!r} is a glob; expected a plain address, as {scheme}: has no lists of files: "
                f"name the shards {{000000..000007}}, or a folder with a {MANIFEST}"
            )
        return [_place(found, places) for found in find(url) if found.endswith(".tar")]
    if url.endswith(".tar"):
        return [_place(url, places)]
    folder = url.rstrip("/") + "/"
    names = _entries(_prepare(folder, places))
    if names:
        return [_place(folder + name, places) for name in sorted(names)]
    if scheme in _LISTED:
        return [_place(found, places) for found in find(folder + "*.tar")]
    raise ShardError(
        f"no {MANIFEST} at {folder}; expected one that lists the shards: make it with 'bridges "
        "shards index' and copy it there, or name the shards {000000..000007}.tar"
    )


def _place(url: str, places: dict[str, Path]) -> Path:
    folder, _, name = url.rpartition("/")
    _check_name(name, folder)
    place = _prepare(f"{folder}/", places)
    listed = _entries(place)
    if listed and name not in listed:
        raise ShardError(
            f"found no {name} among the {len(listed)} shards of {folder}/{MANIFEST}; expected all "
            "of them: check the name, or write the manifest again with 'bridges shards index'"
        )
    return place / name


def _check_name(name: str, where: str) -> None:
    if not _SHARD.fullmatch(name):
        raise ShardError(f"{where} names a shard {name!r}; expected a file name such as a-000.tar")


def _prepare(folder: str, places: dict[str, Path]) -> Path:
    """The folder of the cache that stands for a URL, with the manifest as it is there now."""
    if folder in places:
        return places[folder]
    place = places[folder] = cache_place(folder)
    remove_orphans(place)
    with FileLock(place / ".lock"):
        try:
            old = _entries(place)
        except ShardError:
            old = {}
        try:
            with staged(place / MANIFEST) as temporary:
                fetch(folder + MANIFEST, temporary, _MAX_MANIFEST)
        except FileNotFoundError:
            (place / MANIFEST).unlink(missing_ok=True)
            return place
        try:
            with staged(place / FEATURES_FILE) as temporary:
                fetch(folder + FEATURES_FILE, temporary, _MAX_MANIFEST)
        except FileNotFoundError:  # these are shards of pictures
            (place / FEATURES_FILE).unlink(missing_ok=True)
        new = _new_entries(place, folder + MANIFEST)
        for path in place.glob("*.tar*"):
            name = path.name.removesuffix(".index")
            if old.get(name) != new.get(name):
                path.unlink(missing_ok=True)
    return place


def _new_entries(place: Path, url: str) -> Mapping[str, Entry]:
    try:
        entries = _entries(place)
        for entry in entries.values():
            _check_name(entry.name, url)
            if entry.bytes < 0 or not re.fullmatch("[0-9a-f]{64}", entry.sha256):
                raise ShardError(f"{entry.bytes} bytes with SHA-256 {entry.sha256!r}")
    except ShardError as error:
        (place / MANIFEST).unlink()
        raise ShardError(f"{url} cannot be relied on: {error}") from error
    return entries


def _entries(place: Path) -> Mapping[str, Entry]:
    return read_manifest(place) or {}


def fetch_indexes(shards: Sequence[Path], *, progress: bool = False) -> None:
    """Sees to it that `shard_indexes` finds an index for every remote shard.

    ``NAME.tar.index`` is fetched from beside the shard. A shard that has none, or none that can be
    read, is fetched itself and indexed, which the progress bar says.

    Raises:
        ShardError: as `open_shard`; an index of another shard than the manifest's.
    """
    wanted = [shard for shard in shards if url_of(shard) and not index_path(shard).exists()]
    if not wanted:
        return
    options: dict[str, Any] = {"console": Console(stderr=True), "disable": not progress}
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        fetching = pool.map(_fetch_index, wanted)
        found = list(track(fetching, "fetching indexes", len(wanted), **options))
    whole = [shard for shard, there in zip(wanted, found, strict=True) if not there]
    said = "fetching whole shards, as no .tar.index is beside them"
    for number, shard in enumerate(track(whole, said, **options)):
        prefetch(whole[number + 1 : number + 3])
        with open_shard(shard):
            shard_indexes([shard])


def _fetch_index(shard: Path) -> bool:
    url, path = url_of(shard), index_path(shard)
    with FileLock(path.with_name(f".{path.name}.lock")):
        if path.exists():
            return True
        try:
            with staged(path) as temporary:
                fetch(f"{url}.index", temporary, _MAX_INDEX)
        except FileNotFoundError:
            return False
        index, entry = load_index(shard), _entries(shard.parent).get(shard.name)
        if index and (entry is None or entry.sha256 == index.sha256):
            return True
        path.unlink()
    if index is None or entry is None:
        return False
    raise ShardError(
        f"{url}.index is of a shard with SHA-256 {index.sha256}; expected {entry.sha256}, as in "
        f"{MANIFEST} beside it: write both again with 'bridges shards index'"
    )
