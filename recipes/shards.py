"""Shards written: webdataset ``.tar`` files in the img2dataset/COCO convention.

A sample is ``key.jpg`` (or png, webp, npy) beside ``key.txt`` (its first caption) and
``key.json`` (all of them). The same samples give the same bytes. All of a set's shards appear
together once the last is complete, or none does.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import IO, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text
from webdataset.writer import TarWriter

from bridges.images import ImageError, open_image
from recipes.captions_files import CaptionRow, read_captions, scan_folder
from recipes.stream import EXTENSIONS, shard_digest

MANIFEST = "shards.json"

# No dots: what follows the first is the extension. Shards are copied too (see the feature cache),
# so whatever other keys webdataset reads are keys here.
_KEY = re.compile(r"[^./\\\0][^.\\\0]*")
_SPLIT = re.compile(r"[A-Za-z0-9_]+")
_SHARD_NAME = re.compile(r"[A-Za-z0-9_]+-\d{6}\.tar")


@dataclass(frozen=True)
class ShardReport:
    """What :func:`build_shards` wrote, and what it left out and why.

    ``shards`` holds what the manifest holds: name, split, samples, bytes and sha256 of each.
    ``skipped`` lists by kind the rows or pictures left out, by name.
    """

    out: Path
    shards: list[dict[str, Any]]
    captions: int
    skipped: dict[str, list[str]] = field(default_factory=dict)

    @property
    def samples(self) -> dict[str, int]:
        """Samples of each split."""
        counts: Counter[str] = Counter()
        for shard in self.shards:
            counts[shard["split"]] += shard["samples"]
        return dict(counts)


def write_shards(
    samples: Iterable[Mapping[str, str | bytes | dict[str, Any]]],
    out: Path,
    split: str,
    *,
    samples_per_shard: int = 1000,
    overwrite: bool = False,
) -> list[Path]:
    """Writes ``out/split-000000.tar`` and on; all of them, or on any failure none.

    Args:
        samples: Each with ``__key__`` (without dots; unique) and its
            members: bytes for jpg, jpeg, png, webp, npy; a string for txt; a dict for json.
        out: The folder; made when it does not exist.
        split: The first part of the shards' names.
        samples_per_shard: All shards but the last hold this many.
        overwrite: Replace this split's shards if there are any.

    Raises:
        ValueError: No samples, a bad or repeated key, a member of another kind, or the split's
            shards exist and ``overwrite`` is not set.
    """
    with _ShardSet(out, samples_per_shard, overwrite, only=split) as shards:
        for sample in samples:
            shards.add(split, sample)
        return [out / shard["name"] for shard in shards.commit()]


def build_shards(
    images: Path,
    captions: Path | None,
    out: Path,
    *,
    format: str = "auto",
    samples_per_shard: int = 1000,
    val_fraction: float = 0.05,
    overwrite: bool = False,
    progress: bool = True,
) -> ShardReport:
    """Makes shards of a folder of pictures and a captions file; one sample per picture.

    JPEG, PNG and WEBP files go in byte for byte, other formats as PNG. ``out/shards.json`` names
    every shard with its samples, bytes and SHA-256.

    Args:
        images: The folder that the names in the captions file are relative to.
        captions: The captions file; None when each picture's caption stands beside it
            (``a.jpg``, ``a.txt``), as img2dataset writes them.
        out: The folder for the shards; made when it does not exist.
        format: ``auto``, ``csv``, ``json``, ``flickr8k``, ``karpathy`` or ``coco``.
        samples_per_shard: All shards of a split but the last hold this many.
        val_fraction: Where the captions file states no splits, the share of pictures that go to
            ``val``, by a hash of the name, so that a picture stays where it is when others come.
        overwrite: Replace the shards in ``out`` if there are any.
        progress: Show a progress bar.

    Raises:
        ValueError: Missing folder or file, a captions file of no known format, shards in ``out``
            already, or not one usable picture.
    """
    if not images.is_dir():
        raise ValueError(f"no folder of images at {images}: check the path")
    if not 0 <= val_fraction < 1:
        raise ValueError(f"val_fraction is {val_fraction}; expected 0 or more and less than 1")
    with _ShardSet(out, samples_per_shard, overwrite) as shards:
        rows = read_captions(captions, format) if captions else scan_folder(images)
        skipped: dict[str, list[str]] = {}
        pictures = _group_by_image(rows, skipped)
        by_hash = not any(picture.split for picture in pictures)
        captions_written = 0
        for picture in _track(pictures, progress):
            try:
                extension, data = _read_picture(images / picture.name)
            except FileNotFoundError:
                skipped.setdefault("missing file", []).append(picture.name)
                continue
            except (ImageError, OSError) as error:
                skipped.setdefault("unreadable image", []).append(f"{picture.name}: {error}")
                continue
            split = picture.split or "train"
            if by_hash and _unit_hash(picture.name) < val_fraction:
                split = "val"
            key = shards.free_key(picture.name)
            shards.add(split, {"__key__": key, extension: data, **picture.members()})
            captions_written += len(picture.captions)
        if not shards.keys:
            raise ValueError(
                f"none of {len(rows)} rows gives a sample: {_first_of_each(skipped)}; check that "
                f"the names in the captions file are relative to {images}"
            )
        counts = {kind: len(names) for kind, names in skipped.items()}
        written = shards.commit(manifest={"skipped": counts})
    return ShardReport(out, written, captions_written, skipped)


def print_report(report: ShardReport, console: Console | None = None, *, names: int = 5) -> None:
    """Prints what was written and what was skipped; at most ``names`` names of each kind."""
    console = console or Console()
    written = Table("split", "shards", "samples", title=f"Shards in {report.out}")
    for split, samples in report.samples.items():
        shards = sum(shard["split"] == split for shard in report.shards)
        written.add_row(split, f"{shards:,}", f"{samples:,}")
    console.print(written)
    console.print(f"{report.captions:,} captions of {sum(report.samples.values()):,} pictures")
    if not report.skipped:
        console.print("Nothing skipped.")
        return
    skipped = Table("skipped because", "count", "which", title="Skipped")
    for kind, all_names in report.skipped.items():
        shown = "\n".join(all_names[:names])
        if len(all_names) > names:
            shown += f"\n… and {len(all_names) - names:,} more"
        # Text, not str: a name with [brackets] would be taken for markup.
        skipped.add_row(kind, f"{len(all_names):,}", Text(shown))
    console.print(skipped)


@dataclass
class _Picture:
    name: str
    split: str | None
    id: str | int | None
    captions: list[str]

    def members(self) -> dict[str, Any]:
        meta: dict[str, Any] = {"captions": self.captions, "image": self.name}
        if self.id is not None:
            meta["id"] = self.id
        return {"txt": self.captions[0], "json": meta}


def _group_by_image(rows: Iterable[CaptionRow], skipped: dict[str, list[str]]) -> list[_Picture]:
    """One picture per name, its captions in the file's order; other rows go to ``skipped``."""
    pictures: dict[str, _Picture] = {}
    for row in rows:
        name = PurePosixPath(row.image).as_posix() if row.image else ""
        caption = " ".join(row.caption.split())
        picture = pictures.get(name)
        problem = row.problem or _problem(row, name, caption, picture)
        if problem:
            where = f"{name} ({row.where})" if name and row.where != name else name or row.where
            skipped.setdefault(problem, []).append(where)
        elif picture is None:
            pictures[name] = _Picture(name, row.split, row.id, [caption])
        else:
            picture.captions.append(caption)
    return list(pictures.values())


def _problem(row: CaptionRow, name: str, caption: str, picture: _Picture | None) -> str:
    """The kind of problem that keeps a row out; empty when there is none."""
    path = PurePosixPath(name)
    if not name:
        return "no image name"
    try:
        (name + caption).encode()
    except UnicodeEncodeError:  # half of a surrogate pair, or a file name that is not UTF-8
        return "not valid Unicode"
    if path.is_absolute() or ".." in path.parts or "\\" in name or "\0" in name:
        return "path outside the folder"
    if row.split and not _SPLIT.fullmatch(row.split):
        return "bad split name"
    if not caption:
        return "empty caption"
    if picture and row.split and picture.split != row.split:
        return "image in two splits"
    if picture and caption in picture.captions:
        return "duplicate caption"
    return ""


def _read_picture(path: Path) -> tuple[str, bytes]:
    """(extension, bytes) to store; checks that the picture decodes."""
    data = path.read_bytes()
    image = open_image(data)
    if data.startswith(b"\xff\xd8\xff"):
        return "jpg", data
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "png", data
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "webp", data
    encoded = io.BytesIO()
    image.save(encoded, format="PNG")
    return "png", encoded.getvalue()


def _unit_hash(name: str) -> float:
    """A number in [0, 1) that depends on the name alone."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:6], "big") / 2**48


def _first_of_each(skipped: Mapping[str, list[str]]) -> str:
    return "; ".join(f"{kind} ({len(names)}, e.g. {names[0]})" for kind, names in skipped.items())


def _track(pictures: list[_Picture], show: bool) -> Iterable[_Picture]:
    columns = (TextColumn("shards"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not show) as bar:
        yield from bar.track(pictures)


class _ShardSet:
    """Shards of several splits under temporary names, until :meth:`commit` renames them all."""

    def __init__(
        self, out: Path, samples_per_shard: int, overwrite: bool, only: str | None = None
    ) -> None:
        if samples_per_shard < 1:
            raise ValueError(f"samples_per_shard is {samples_per_shard}; expected at least 1")
        self.out, self.samples_per_shard = out, samples_per_shard
        self.keys: set[str] = set()
        if out.exists() and not out.is_dir():
            raise ValueError(f"{out} is a file; expected a folder for the shards: name another")
        found = sorted(out.glob("*.tar")) if out.exists() else []
        self._replaced = [
            shard
            for shard in found
            if _SHARD_NAME.fullmatch(shard.name)
            and only in (None, shard.name[: -len("-000000.tar")])
        ]
        if self._replaced and not overwrite:
            raise ValueError(
                f"{out} already holds {len(self._replaced)} shards, e.g. "
                f"{self._replaced[0].name}; expected none: name another folder, or pass overwrite"
            )
        self._made_out = not out.exists()
        self._shards: dict[str, list[_TarFile]] = {}

    def __enter__(self) -> _ShardSet:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Removes whatever :meth:`commit` has not renamed."""
        for shard in (shard for shards in self._shards.values() for shard in shards):
            shard.discard()
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
        key = sample.get("__key__")
        if not isinstance(key, str) or not _KEY.fullmatch(key):
            raise ValueError(
                f"the key {key!r} of a sample; expected text without dots and backslashes, "
                f"not beginning with a slash"
            )
        if key in self.keys:
            raise ValueError(f"two samples have the key {key!r}; expected unique keys")
        encoded = {"__key__": key, **_encode(key, sample)}
        self.keys.add(key)
        shards = self._shards.setdefault(split, [])
        if not shards or shards[-1].samples == self.samples_per_shard:
            if shards:
                shards[-1].close()
            elif not _SPLIT.fullmatch(split):
                raise ValueError(f"split is {split!r}; expected letters, digits and _")
            shards.append(_TarFile(self.out, f"{split}-{len(shards):06d}.tar"))
        shards[-1].write(encoded)

    def commit(self, manifest: Mapping[str, Any] | None = None) -> list[dict[str, Any]]:
        """Renames every shard into place; then writes the manifest, if one is given."""
        if not self.keys:
            raise ValueError("no samples to write; expected at least one")
        written = []
        for split, shards in self._shards.items():
            for shard in shards:
                shard.close()
                written.append(shard.describe(split))
        # From here on an old manifest would describe shards that are gone.
        (self.out / MANIFEST).unlink(missing_ok=True)
        for shards in self._shards.values():
            for shard in shards:
                os.replace(shard.temporary, self.out / shard.name)
        for old in self._replaced:
            if old.name not in {shard["name"] for shard in written}:
                old.unlink()
        if manifest is not None:
            _write_json(self.out / MANIFEST, {"shards": written, **manifest})
        _sync_folder(self.out)
        return written


class _TarFile:
    """One shard under its temporary name, in the folder it will stay in."""

    def __init__(self, out: Path, name: str) -> None:
        out.mkdir(parents=True, exist_ok=True)
        self.name, self.samples = name, 0
        self.temporary = out / f".{name}.partial"
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

    def describe(self, split: str) -> dict[str, Any]:
        return {
            "name": self.name,
            "split": split,
            "samples": self.samples,
            "bytes": self.temporary.stat().st_size,
            "sha256": shard_digest(self.temporary),
        }


def _encode(key: str, sample: Mapping[str, str | bytes | dict[str, Any]]) -> dict[str, bytes]:
    encoded: dict[str, bytes] = {}
    for extension, member in sample.items():
        if extension == "__key__":
            continue
        if extension not in EXTENSIONS:
            raise ValueError(
                f"sample {key!r} has the member {extension!r}; expected {sorted(EXTENSIONS)}"
            )
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


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    temporary = path.with_name(f".{path.name}.partial")
    with temporary.open("w", encoding="utf-8") as file:
        json.dump(content, file, indent=2, ensure_ascii=False)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _sync_folder(folder: Path) -> None:
    """Makes the renames themselves last through a power cut, where the system offers it."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
