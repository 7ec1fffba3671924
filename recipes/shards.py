"""Shards made of a folder of pictures and its captions, in the img2dataset/COCO convention.

A sample is ``key.jpg`` (or png, webp) beside ``key.txt`` (its first caption) and ``key.json``
(all of them, and its questions and answers). The same pictures and captions give the same bytes.
"""

from __future__ import annotations

import hashlib
import io
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from bridges.images import ImageError, open_image
from recipes.captions_files import CaptionRow, read_captions, scan_folder
from recipes.samples import text_problem
from recipes.shard_manifest import Entry
from recipes.shard_writer import SPLIT_NAME, ShardSet


@dataclass(frozen=True)
class ShardReport:
    """What `build_shards` wrote, and what it left out and why.

    ``shards`` are those of the manifest that were written.
    ``skipped`` lists by kind the rows or pictures left out, by name.
    """

    out: Path
    shards: list[Entry]
    captions: int
    skipped: dict[str, list[str]] = field(default_factory=dict)

    @property
    def samples(self) -> dict[str, int]:
        """Samples of each split."""
        counts: Counter[str] = Counter()
        for shard in self.shards:
            counts[shard.split] += shard.samples
        return dict(counts)


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
    every shard with its samples, bytes and SHA-256; see `recipes.shard_manifest`.

    Args:
        images: The folder that the names in the captions file are relative to.
        captions: The captions file; None when each picture's caption stands beside it
            (``a.jpg``, ``a.txt``), as img2dataset writes them, and its questions and answers in
            ``qa`` of ``a.json``.
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
    with ShardSet(out, samples_per_shard, overwrite) as shards:
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
        shards = sum(shard.split == split for shard in report.shards)
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
    qa: Any = None

    def members(self) -> dict[str, Any]:
        known = {"captions": self.captions, "image": self.name, "id": self.id, "qa": self.qa}
        meta = {name: value for name, value in known.items() if value not in (None, [])}
        # Who is asked questions needs no caption.
        return {"txt": self.captions[0], "json": meta} if self.captions else {"json": meta}


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
            pictures[name] = _Picture(name, row.split, row.id, [caption] if caption else [], row.qa)
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
    if row.split and not SPLIT_NAME.fullmatch(row.split):
        return "bad split name"
    if not caption and not row.qa:
        return "empty caption"
    if picture and row.split and picture.split != row.split:
        return "image in two splits"
    if picture and caption in picture.captions:
        return "duplicate caption"
    if found := text_problem(caption):
        return found[0]
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
