"""One sample of a shard: its raw members decoded to a picture (or features) and captions."""

from __future__ import annotations

import io
import json
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from bridges.images import ImageError, open_image

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
EXTENSIONS = frozenset((*IMAGE_EXTENSIONS, "npy", "txt", "json"))
"""The members that are read. ``cls`` is passed over; any other is refused, unopened."""


class SampleError(ValueError):
    """One sample that cannot be used. ``kind`` is what such samples are counted by."""

    # One argument suffices: a DataLoader worker's exception is rebuilt from its message alone.
    def __init__(self, message: str, *, kind: str = "unreadable sample") -> None:
        super().__init__(message)
        self.kind = kind


def decode_caption_sample(
    raw: Mapping[str, Any],
    *,
    transform: Callable[[Image.Image], Any] | None = None,
    rng: random.Random | None = None,
) -> dict[str, Any]:
    """Turns a raw sample into a picture (or its cached features) and its captions.

    Args:
        raw: Extension → bytes, as ``ShardStream`` gives it.
        transform: Applied to the RGB picture.
        rng: When given, the captions come in random order, so that the first is a random one.

    Returns:
        ``key``; ``features`` (a tensor, from ``npy``) or else ``image``; ``captions``, from the
        JSON's ``captions``, else its ``caption``, else ``txt``; ``meta``, the JSON itself.

    Raises:
        SampleError: Neither picture nor features, no caption, or a member that cannot be
            decoded; names the shard and the key.
    """
    meta = _read_meta(raw)
    captions = _read_captions(raw, meta)
    if rng is not None:
        rng.shuffle(captions)
    sample = {"key": raw["__key__"], "captions": captions, "meta": meta}
    if "npy" in raw:
        try:
            features = np.lib.format.read_array(io.BytesIO(raw["npy"]), allow_pickle=False)
            return {**sample, "features": torch.from_numpy(features)}
        except (ValueError, TypeError, MemoryError) as error:
            raise _sample_error(raw, "unreadable features", f"npy: {error}") from error
    extension = image_extension(raw, instead=("npy",))
    try:
        image = open_image(raw[extension])
    except ImageError as error:
        raise _sample_error(raw, "unreadable image", f"{extension}: {error}") from error
    return {**sample, "image": transform(image) if transform else image}


def image_extension(raw: Mapping[str, Any], *, instead: Sequence[str] = ()) -> str:
    """Which member of a raw sample is its picture.

    Args:
        raw: Extension → bytes, as ``ShardStream`` gives it.
        instead: Members that the caller takes in the picture's place; named in the error.

    Raises:
        SampleError: There is no picture; names the shard, the key and the members.
    """
    extension = next((name for name in IMAGE_EXTENSIONS if name in raw), None)
    if extension is None:
        wanted = f"expected one of {', '.join((*IMAGE_EXTENSIONS, *instead))}"
        raise _sample_error(raw, "missing image", f"no picture; {wanted}")
    return extension


def _read_meta(raw: Mapping[str, Any]) -> dict[str, Any]:
    try:
        meta = json.loads(raw.get("json", b"{}"))
    except ValueError as error:
        raise _sample_error(raw, "unreadable json", f"json: {error}") from error
    if not isinstance(meta, dict):
        found = type(meta).__name__
        raise _sample_error(raw, "unreadable json", f"json holds a {found}; expected an object")
    return meta


def _read_captions(raw: Mapping[str, Any], meta: dict[str, Any]) -> list[str]:
    try:
        text = raw.get("txt", b"").decode("utf-8")
    except UnicodeDecodeError as error:
        raise _sample_error(raw, "unreadable caption", f"txt is not UTF-8: {error}") from error
    listed = meta.get("captions")
    for candidates in (listed if isinstance(listed, list) else [], [meta.get("caption")], [text]):
        captions = [one.strip() for one in candidates if isinstance(one, str) and one.strip()]
        if captions:
            return captions
    wanted = "expected a txt, or a json with 'caption' or 'captions'"
    raise _sample_error(raw, "missing caption", f"no caption; {wanted}")


def _sample_error(raw: Mapping[str, Any], kind: str, problem: str) -> SampleError:
    members = sorted(name for name in raw if not name.startswith("__"))
    return SampleError(
        f"{raw['__shard__']}: sample {raw['__key__']!r} (members {members}): {problem}; mend or "
        f"remove the sample, or read with on_error='skip'",
        kind=kind,
    )
