"""Every sample of a shard decoded, to find those that a run would stumble over."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from recipes.samples import (
    IMAGE_EXTENSIONS,
    MEMBERS,
    SampleError,
    decode_image,
    image_extension,
    is_member,
    numbered_images,
    read_caption,
    read_questions,
    read_text,
    sample_error,
    size_limit,
)
from recipes.shard_scan import ShardIndex

_PASSED_OVER = frozenset(("cls",))


def undecodable(shard: Path, index: ShardIndex) -> Iterator[tuple[str, str, str]]:
    """(kind, problem, key) of each sample with a member that cannot be read.

    Args:
        shard: that `index` describes.
        index: of its samples.
    """
    members = [index.members_of(sample) for sample in range(len(index))]
    forms = Counter(frozenset(found) for found in members)
    usual = max(forms, key=lambda form: forms[form], default=frozenset())
    with shard.open("rb") as file:
        for key, found in zip(index.keys, members, strict=True):
            named: dict[str, Any] = {"__key__": key, "__shard__": str(shard)}
            try:
                raw = dict(named)
                for name, (start, size) in found.items():
                    if name in _PASSED_OVER:
                        continue
                    _check_member({**named, **dict.fromkeys(found)}, name, size)
                    file.seek(start)
                    raw[name] = file.read(size)
                _decode(raw, usual)
            except SampleError as error:
                yield error.kind, str(error), key


def _check_member(raw: dict[str, Any], name: str, size: int) -> None:
    if not is_member(name):
        raise sample_error(raw, "refused member", f"{name}; only {MEMBERS} are read")
    if size > size_limit(name):
        problem = f"{name} has {size:,} bytes; expected at most {size_limit(name):,}"
        raise sample_error(raw, "member too large", problem)


def _decode(raw: dict[str, Any], usual: frozenset[str]) -> None:
    read_text(raw)
    asked = read_questions(raw)
    pictures = [name for name in raw if name.rsplit(".", 1)[-1] in IMAGE_EXTENSIONS]
    for name in pictures:
        decode_image(raw, name)
    # Which members a sample needs depends on the task; those around it tell.
    if usual.intersection(IMAGE_EXTENSIONS):
        image_extension(raw)
    if not (asked or numbered_images(raw) or "mp4" in raw) and (
        usual & {"txt", "json"} or "txt" in raw
    ):
        read_caption(raw)
