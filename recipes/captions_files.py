"""Captions files of the field, each read to the same rows of (image, caption, split)."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recipes.samples import read_questions

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")

_IDS = (str, int, float)
_FLICKR8K_LINE = re.compile(r"(?P<image>.+?)#\d+\t(?P<caption>.*)")


@dataclass(frozen=True)
class CaptionRow:
    """One caption of one image, as the file states it.

    ``problem`` names what makes the row useless (a kind, for counting); such a row is
    reported, never dropped by the reader. ``where`` says where it stands in the file. ``qa`` are
    questions and answers about the image, as `recipes.samples.read_questions` takes them.
    """

    image: str
    caption: str = ""
    split: str | None = None
    id: str | int | None = None
    where: str = ""
    problem: str = ""
    qa: Any = None


def read_captions(path: Path, format: str = "auto") -> list[CaptionRow]:
    """Reads a captions file of any known format.

    Args:
        path: The file; UTF-8.
        format: One of ``READERS``, or ``auto`` to tell from the suffix and the content.

    Raises:
        ValueError: Missing file, unknown format, or a file that is not of that format.
    """
    if not path.is_file():
        raise ValueError(f"no captions file at {path}: check the path")
    try:
        name = _detect(path) if format == "auto" else format
        if name not in READERS:
            raise ValueError(f"unknown format {name!r}; expected auto, {', '.join(READERS)}")
        rows = list(READERS[name](path))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 ({error}): convert it, e.g. with iconv") from error
    except csv.Error as error:
        raise ValueError(
            f"{path} is not a valid CSV file: {error}; mend it or give format"
        ) from error
    if not rows:
        raise ValueError(f"{path} holds no captions (read as {name}): check the file or the format")
    return rows


def scan_folder(images: Path) -> list[CaptionRow]:
    """Reads a folder where each picture's caption stands beside it, as img2dataset writes it.

    The caption of ``a/b.jpg`` is the text of ``a/b.txt``, else ``caption`` in ``a/b.json``; its
    questions and answers are ``qa`` in ``a/b.json``.

    Raises:
        ValueError: The folder holds no pictures.
    """
    rows = []
    for path in sorted(images.rglob("*")):
        if path.suffix.lower() not in IMAGE_SUFFIXES or not path.is_file():
            continue
        name = path.relative_to(images).as_posix()
        try:
            caption, qa = _siblings(path)
        except (ValueError, RecursionError) as error:
            rows.append(CaptionRow(name, where=str(error), problem="unreadable caption"))
            continue
        problem = "no caption" if caption is None and not qa else ""
        rows.append(CaptionRow(name, caption or "", where=name, problem=problem, qa=qa))
    if not rows:
        raise ValueError(
            f"no pictures in {images}; expected files ending in {', '.join(IMAGE_SUFFIXES)}, "
            f"each with a .txt beside it, or give a captions file"
        )
    return rows


def _siblings(path: Path) -> tuple[str | None, Any]:
    """The caption of a picture, and its questions and answers."""
    text, meta = path.with_suffix(".txt"), path.with_suffix(".json")
    found = json.loads(meta.read_text(encoding="utf-8-sig")) if meta.is_file() else {}
    found = found if isinstance(found, dict) else {}
    caption, qa = found.get("caption"), found.get("qa")
    if qa:
        named = {"__shard__": meta, "__key__": path.stem}
        read_questions({**named, "json": json.dumps(found).encode()})
    if text.is_file():
        return text.read_text(encoding="utf-8-sig"), qa
    return caption if isinstance(caption, str) else None, qa


def _detect(path: Path) -> str:
    if path.suffix.lower() in (".csv", ".tsv"):
        return "csv"
    if path.suffix.lower() == ".json":
        found = _load_json(path)
        if isinstance(found, dict) and isinstance(found.get("images"), list):
            return "coco" if "annotations" in found else "karpathy"
        return "json"
    with path.open(encoding="utf-8-sig") as lines:
        first = next((line.rstrip("\n") for line in lines if line.strip()), "")
    if _FLICKR8K_LINE.fullmatch(first):
        return "flickr8k"
    # Flickr8k is also handed round as a captions.txt that is a CSV inside.
    if {"image", "caption"} <= set(first.split(",")):
        return "csv"
    raise ValueError(
        f"cannot tell the format of {path}: it begins with {first[:60]!r}; "
        f"give format as one of {', '.join(READERS)}"
    )


def _read_csv(path: Path) -> Iterator[CaptionRow]:
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    with path.open(encoding="utf-8-sig", newline="") as file:
        table = csv.DictReader(file, delimiter=delimiter, strict=True)
        columns = [column.strip() for column in table.fieldnames or ()]
        table.fieldnames = columns
        if not {"image", "caption"} <= set(columns):
            raise ValueError(
                f"{path} has the columns {columns}; expected image, caption and, if you like, "
                f"split in the first line"
            )
        for cells in table:
            where = f"{path.name} line {table.line_num}"
            if None in cells:  # an unquoted comma has cut the caption short
                image = cells["image"] or ""
                yield CaptionRow(image, where=where, problem="more cells than columns")
                continue
            yield CaptionRow(
                image=cells["image"] or "",
                caption=cells["caption"] or "",
                split=cells.get("split") or None,
                where=where,
            )


def _read_json(path: Path) -> Iterator[CaptionRow]:
    found = _load_json(path)
    if isinstance(found, dict):
        found = [{"image": image, "captions": captions} for image, captions in found.items()]
    if not isinstance(found, list):
        raise ValueError(
            f"{path} holds a {type(found).__name__}; expected a list of "
            f'{{"image": ..., "caption" or "captions": ...}} or a mapping from image to captions'
        )
    for index, item in enumerate(found):
        where = f"{path.name} item {index}"
        if not isinstance(item, dict) or not isinstance(item.get("image"), str):
            yield CaptionRow("", where=where, problem="no image name")
            continue
        captions = item.get("captions", item.get("caption"))
        yield from _rows(captions, item["image"], item.get("split"), item.get("id"), where)


def _read_flickr8k(path: Path) -> Iterator[CaptionRow]:
    with path.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            where = f"{path.name} line {number}"
            match = _FLICKR8K_LINE.fullmatch(line.rstrip("\n"))
            if match is None:
                yield CaptionRow("", where=where, problem="no 'name#number<tab>caption'")
            else:
                yield CaptionRow(match["image"], match["caption"], where=where)


def _read_karpathy(path: Path) -> Iterator[CaptionRow]:
    for index, item in enumerate(_list_of(path, "images", ("filename", "sentences"))):
        where = f"{path.name} image {index}"
        if not isinstance(item.get("filename"), str):
            yield CaptionRow("", where=where, problem="no image name")
            continue
        folder = item.get("filepath")
        image = f"{folder}/{item['filename']}" if folder else item["filename"]
        # restval: the part of COCO's validation set that everyone trains on.
        split = "train" if item.get("split") == "restval" else item.get("split")
        sentences = item.get("sentences")
        sentences = sentences if isinstance(sentences, list) else []
        captions = [_get(sentence, "raw") for sentence in sentences]
        yield from _rows(captions, image, split, item.get("cocoid", item.get("imgid")), where)


def _read_coco(path: Path) -> Iterator[CaptionRow]:
    names: dict[Any, str] = {}
    for index, item in enumerate(_list_of(path, "images", ("id", "file_name"))):
        name = item.get("file_name")
        where = f"{path.name} image {index}"
        if not isinstance(name, str):
            yield CaptionRow("", where=where, problem="no image name")
        elif not isinstance(item.get("id"), _IDS):
            yield CaptionRow(name, where=where, problem="no image id")
        else:
            names[item["id"]] = name
    captioned = set()
    for index, item in enumerate(_list_of(path, "annotations", ("image_id", "caption"))):
        image_id = item.get("image_id")
        where = f"{path.name} annotation {index}"
        if not isinstance(image_id, _IDS) or image_id not in names:
            yield CaptionRow("", where=f"{where}: {image_id!r}", problem="unknown image id")
            continue
        captioned.add(image_id)
        yield from _rows([item.get("caption")], names[image_id], None, image_id, where)
    for image_id, name in names.items():
        if image_id not in captioned:
            yield CaptionRow(name, where=name, problem="no caption")


def _rows(
    captions: object, image: str, split: object, id: object, where: str
) -> Iterator[CaptionRow]:
    """Rows of one image's caption or list of captions."""
    split = split if isinstance(split, str) and split else None
    id = id if isinstance(id, (str, int)) else None
    captions = captions if isinstance(captions, list) else [captions]
    texts = [text if isinstance(text, str) else "" for text in captions]
    if isinstance(id, str) and not _is_unicode(id):
        yield CaptionRow(image, where=f"{where}: id {id!r}", problem="not valid Unicode")
        return
    if not texts:
        yield CaptionRow(image, where=where, problem="no caption")
    for text in texts:
        yield CaptionRow(image, text, split, id, where)


def _is_unicode(text: str) -> bool:
    """Whether it can be written: half of a surrogate pair (``"\\ud800"``) cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _list_of(path: Path, name: str, fields: tuple[str, ...]) -> list[dict[str, Any]]:
    """The list ``name`` of a JSON file, checked by the fields of its first item."""
    found = _get(_load_json(path), name)
    if not isinstance(found, list) or not all(isinstance(item, dict) for item in found):
        raise ValueError(f"{path} has no list of objects {name!r}: check the file or the format")
    missing = [field for field in fields if found and field not in found[0]]
    if missing:
        raise ValueError(
            f"{path}: {name}[0] has the fields {sorted(found[0])}, not {missing}: "
            f"check that it is a captions file and its format"
        )
    return found


def _get(found: object, name: str) -> object:
    return found.get(name) if isinstance(found, dict) else None


def _load_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError:
        raise
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}; mend it or give format") from error


READERS: dict[str, Callable[[Path], Iterator[CaptionRow]]] = {
    "csv": _read_csv,
    "json": _read_json,
    "flickr8k": _read_flickr8k,
    "karpathy": _read_karpathy,
    "coco": _read_coco,
}
