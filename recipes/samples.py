"""One sample of a shard: its raw members decoded to a picture (or features) and captions."""

from __future__ import annotations

import io
import json
import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image

from bridges.images import ImageError, open_image
from bridges.vision import Preprocess

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
EXTENSIONS = frozenset((*IMAGE_EXTENSIONS, "mp4", "npy", "txt", "json"))
"""The members that are read, beside numbered pictures (`is_member`). ``cls`` is passed over; any
other is refused, unopened."""

MAX_DEPTH = 100
"""Levels of a sample's JSON. What is deeper can still be read, but not sent by a loader's worker,
whose loss the run would wait out for ever."""

MEMBERS = f"{', '.join(sorted(EXTENSIONS))}, and numbered pictures such as 0.jpg"
"""For messages."""

# One spelling for each number: "00.jpg" beside "0.jpg" would leave open which is the first.
_NUMBERED = re.compile(rf"(0|[1-9][0-9]{{0,5}})\.(?:{'|'.join(IMAGE_EXTENSIONS)})")


class SampleError(ValueError):
    """One sample that cannot be used. ``kind`` is what such samples are counted by."""

    # One argument suffices: a DataLoader worker's exception is rebuilt from its message alone.
    def __init__(self, message: str, *, kind: str = "unreadable sample") -> None:
        super().__init__(message)
        self.kind = kind


def is_member(extension: str) -> bool:
    """Whether a member is read: one of `EXTENSIONS`, or a numbered picture (``0.jpg``)."""
    return extension in EXTENSIONS or _NUMBERED.fullmatch(extension) is not None


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
    sample = read_caption(raw, rng)
    if "npy" in raw:
        return {**sample, "features": read_features(raw, 2)}
    image = decode_image(raw, image_extension(raw, instead=("npy",)))
    return {**sample, "image": transform(image) if transform else image}


def read_caption(raw: Mapping[str, Any], rng: random.Random | None = None) -> dict[str, Any]:
    """``key``, ``captions`` and ``meta`` of a raw sample, as `decode_caption_sample` has them."""
    meta = read_meta(raw)
    captions = _read_captions(raw, meta)
    if rng is not None:
        rng.shuffle(captions)
    return {"key": raw["__key__"], "captions": captions, "meta": meta}


def read_features(raw: Mapping[str, Any], ndim: int) -> torch.Tensor:
    """Cached features of a raw sample: (p, d) of a picture, (n, p, d) of several or of a clip.

    Raises:
        SampleError: no such array.
    """
    try:
        array = np.lib.format.read_array(io.BytesIO(raw["npy"]), allow_pickle=False)
        features = torch.from_numpy(array)
    except (ValueError, TypeError, MemoryError) as error:
        raise sample_error(raw, "unreadable features", f"npy: {error}") from error
    if features.ndim != ndim:
        found = f"npy of shape {tuple(features.shape)}"
        wanted = f"expected {ndim} axes: the features were cached for another data.task"
        raise sample_error(raw, "unreadable features", f"{found}; {wanted}")
    return features


def decode_image(raw: Mapping[str, Any], member: str) -> Image.Image:
    """A picture among the members, upright and RGB.

    Raises:
        SampleError: it cannot be decoded.
    """
    try:
        return open_image(raw[member])
    except ImageError as error:
        raise sample_error(raw, "unreadable image", f"{member}: {error}") from error


@dataclass(frozen=True)
class CaptionDecoder:
    """Turns a raw sample into a picture, one of its captions and maybe one of its questions.

    Attributes:
        preprocess: of the encoder.
        random_caption: draw one of several captions (and questions) anew every epoch; else take
            the first.
        questions: give one of the pairs in the JSON's ``qa`` as ``question`` and ``answer``. A
            sample without any is given its caption as the answer and no question.
    """

    preprocess: Preprocess
    random_caption: bool
    questions: bool = False

    def __call__(self, raw: Mapping[str, Any]) -> dict[str, Any]:
        rng = random.Random(raw["__seed__"]) if self.random_caption else None
        pairs = read_questions(raw) if self.questions else []
        if pairs:  # such a sample needs no caption of its own
            raw = {"txt": pairs[0][1].encode(), **raw}
        sample = decode_caption_sample(raw, transform=self.preprocess, rng=rng)
        if not self.questions:
            return sample
        if not pairs:
            return {**sample, "question": None, "answer": sample["captions"][0]}
        question, answer = rng.choice(pairs) if rng else pairs[0]
        return {**sample, "question": question, "answer": answer}


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
        if "mp4" in raw or numbered_images(raw):
            wanted += " (data.task: video reads mp4 and frames, interleaved reads documents)"
        raise sample_error(raw, "missing image", f"no picture; {wanted}")
    return extension


def numbered_images(raw: Mapping[str, Any]) -> dict[int, str]:
    """Number → member of the pictures ``0.jpg``, ``1.png``, … of a raw sample, in order.

    Raises:
        SampleError: two members have the same number.
    """
    found: dict[int, str] = {}
    for member in raw:
        if match := _NUMBERED.fullmatch(member):
            number = int(match[1])
            if number in found:
                twice = f"both {found[number]} and {member}; expected one picture of each number"
                raise sample_error(raw, "ambiguous image", twice)
            found[number] = member
    return dict(sorted(found.items()))


def read_meta(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The JSON of a raw sample; empty if it has none.

    Raises:
        SampleError: it is no JSON object, is nested deeper than `MAX_DEPTH`, or has half a
            surrogate pair (``"\\ud800"``) in it, which no tokenizer and no file takes.
    """
    try:
        meta = json.loads(raw.get("json", b"{}"))
        _check_content(meta)
    except (ValueError, RecursionError) as error:
        raise sample_error(raw, "unreadable json", f"json: {error}") from error
    if not isinstance(meta, dict):
        found = type(meta).__name__
        raise sample_error(raw, "unreadable json", f"json holds a {found}; expected an object")
    return meta


def _check_content(value: Any, depth: int = 0) -> None:
    if depth > MAX_DEPTH:
        raise ValueError(f"it is nested deeper than {MAX_DEPTH} levels")
    if isinstance(value, str):
        value.encode()
    elif isinstance(value, dict):
        for key, content in value.items():
            key.encode()
            _check_content(content, depth + 1)
    elif isinstance(value, list):
        for content in value:
            _check_content(content, depth + 1)


def read_text(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The members txt and json of a raw sample, as far as it has them, decoded.

    Raises:
        SampleError: one of them cannot be.
    """
    text = {"txt": _read_txt(raw)} if "txt" in raw else {}
    return {**text, "json": read_meta(raw)} if "json" in raw else text


def read_questions(raw: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Questions and answers, stripped, in the JSON of a raw sample; empty if it has none.

    Raises:
        ValueError: as `read_meta`; ``qa`` is no list of objects (or one object) with a question
            and an answer.
    """
    listed = read_meta(raw).get("qa") or []
    pairs = []
    for pair in listed if isinstance(listed, list) else [listed]:
        texts = [pair.get("question"), pair.get("answer")] if isinstance(pair, dict) else []
        stripped = [text.strip() for text in texts if isinstance(text, str) and text.strip()]
        if len(stripped) != 2:
            raise ValueError(
                f"found {str(pair)[:100]} in qa; expected "
                '{"question": "…", "answer": "…"}: mend the sample\'s JSON'
            )
        pairs.append((stripped[0], stripped[1]))
    return pairs


def _read_txt(raw: Mapping[str, Any]) -> str:
    try:
        return raw.get("txt", b"").decode("utf-8")
    except UnicodeDecodeError as error:
        raise sample_error(raw, "unreadable caption", f"txt is not UTF-8: {error}") from error


def _read_captions(raw: Mapping[str, Any], meta: dict[str, Any]) -> list[str]:
    text = _read_txt(raw)
    listed = meta.get("captions")
    for candidates in (listed if isinstance(listed, list) else [], [meta.get("caption")], [text]):
        captions = [one.strip() for one in candidates if isinstance(one, str) and one.strip()]
        if captions:
            return captions
    wanted = "expected a txt, or a json with 'caption' or 'captions'"
    raise sample_error(raw, "missing caption", f"no caption; {wanted}")


def sample_error(raw: Mapping[str, Any], kind: str, problem: str) -> SampleError:
    """The error that names a raw sample by shard, key and members."""
    members = sorted(name for name in raw if not name.startswith("__"))
    return SampleError(
        f"{raw['__shard__']}: sample {raw['__key__']!r} (members {members}): {problem}; mend or "
        f"remove the sample, or read with on_error='skip'",
        kind=kind,
    )
