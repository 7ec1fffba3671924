"""One sample of a shard: its raw members decoded to a picture (or features) and captions."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from bridges.decode import ImageDecoder
from bridges.images import ImageError, open_image
from recipes.features import MEMBER, decode_features, has_features
from recipes.samples_json import parse_json

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
EXTENSIONS = frozenset((*IMAGE_EXTENSIONS, "mp4", "npy", "safetensors", "txt", "json"))
"""The members that are read, beside numbered pictures (`is_member`). ``cls`` is passed over; any
other is refused, unopened."""

MAX_CHARACTERS = 200_000
"""Of one caption, question or answer: a novel's half. All of it is tokenized before it is cut."""

# The most that a whole sample needs, so that a worker's memory is bounded before it reads: an hour
# of film; the features of 256 pictures of 1024 tokens × 2048 in 16 bits; `MAX_CHARACTERS` of four
# bytes; a document's pictures in base64; of a picture the pixels `open_image` takes, with alpha.
_MAX_MIB = {"mp4": 1024, "npy": 1024, "safetensors": 1024, "txt": 1, "json": 64}
_MAX_IMAGE_MIB = 256

MAX_SAMPLE_BYTES = 1536 << 20
"""Of all members of a sample, those that are refused included: its checksum is of them all. A read
of 2 GiB comes back short."""

MEMBERS = f"{', '.join(sorted(EXTENSIONS))}, and numbered pictures such as 0.jpg"
"""For messages."""

# One spelling for each number: "00.jpg" beside "0.jpg" would leave open which is the first.
_NUMBERED = re.compile(rf"(0|[1-9][0-9]{{0,5}})\.(?:{'|'.join(IMAGE_EXTENSIONS)})")

T = TypeVar("T")


class SampleError(ValueError):
    """One sample that cannot be used. ``kind`` is what such samples are counted by."""

    # One argument suffices: a DataLoader worker's exception is rebuilt from its message alone.
    def __init__(self, message: str, *, kind: str = "unreadable sample") -> None:
        super().__init__(message)
        self.kind = kind


def is_member(extension: str) -> bool:
    """Whether a member is read: one of `EXTENSIONS`, or a numbered picture (``0.jpg``)."""
    return extension in EXTENSIONS or _NUMBERED.fullmatch(extension) is not None


def size_limit(extension: str) -> int:
    """The most bytes that a member which `is_member` may have; more are not read."""
    return _MAX_MIB.get(extension, _MAX_IMAGE_MIB) << 20


def decode_caption_sample(
    raw: Mapping[str, Any],
    *,
    transform: ImageDecoder | None = None,
    rng: random.Random | None = None,
) -> dict[str, Any]:
    """Turns a raw sample into a picture (or its cached features) and its captions.

    Args:
        raw: Extension → bytes, as ``ShardStream`` gives it.
        transform: Makes pixels of the picture; None leaves it an RGB picture.
        rng: When given, the captions come in random order, so that the first is a random one.

    Returns:
        ``key``; ``features`` (a tensor) or else ``image``; ``captions``, from the
        JSON's ``captions``, else its ``caption``, else ``txt``; ``meta``, the JSON itself.

    Raises:
        SampleError: Neither picture nor features, no caption, or a member that cannot be
            decoded; names the shard and the key.
    """
    sample = read_caption(raw, rng)
    if has_features(raw):
        return {**sample, "features": read_features(raw, 2)}
    member = image_extension(raw, instead=tuple(sorted(set(MEMBER.values()))))
    into = open_image if transform is None else transform.pixels
    return {**sample, "image": decode_image(raw, member, into=into)}


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
        features = decode_features(raw)
    except ValueError as error:
        raise sample_error(raw, "unreadable features", str(error)) from error
    if features.ndim != ndim:
        member = next(name for name in MEMBER.values() if name in raw)
        found = f"{member} of shape {tuple(features.shape)}"
        wanted = f"expected {ndim} axes: the features were cached for another data.task"
        raise sample_error(raw, "unreadable features", f"{found}; {wanted}")
    return features


def decode_image(
    raw: Mapping[str, Any],
    name: str,
    data: bytes | None = None,
    *,
    into: Callable[[bytes], T] = open_image,
) -> T:
    """A picture of a raw sample; upright and RGB, if it is not to be made into something else.

    Args:
        raw: the sample.
        name: of the member; for the message only, where there are `data`.
        data: the encoded picture, where it stands within another member.
        into: what is made of the bytes, such as the `pixels` of an `ImageDecoder`.

    Raises:
        SampleError: it cannot be decoded; the kind says why.
    """
    data = raw[name] if data is None else data
    if not data:
        raise sample_error(raw, "empty image", f"{name} has no bytes; expected a picture")
    try:
        return into(data)
    except ImageError as error:
        raise sample_error(raw, error.kind, f"{name}: {error}") from error


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

    preprocess: ImageDecoder
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
        SampleError: it is no JSON object, or not as `parse_json` takes it.
    """
    try:
        meta = parse_json(raw.get("json", b"{}"))
    except ValueError as error:
        raise sample_error(raw, "unreadable json", f"json: {error}") from error
    if not isinstance(meta, dict):
        found = type(meta).__name__
        raise sample_error(raw, "unreadable json", f"json holds a {found}; expected an object")
    return meta


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
        SampleError: as `read_meta`; ``qa`` is no list of objects (or one object) with a question
            and an answer; one that is no text for a tokenizer.
    """
    listed = read_meta(raw).get("qa") or []
    pairs = []
    for pair in listed if isinstance(listed, list) else [listed]:
        texts = [pair.get("question"), pair.get("answer")] if isinstance(pair, dict) else []
        stripped = [text.strip() for text in texts if isinstance(text, str) and text.strip()]
        if len(stripped) != 2:
            wanted = 'expected {"question": "…", "answer": "…"}'
            raise sample_error(raw, "unreadable question", f"{str(pair)[:100]} in qa; {wanted}")
        _check_texts(raw, stripped)
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
            _check_texts(raw, captions)
            return captions
    wanted = "expected a txt, or a json with 'caption' or 'captions'"
    raise sample_error(raw, "missing caption", f"no caption; {wanted}")


def text_problem(text: str) -> tuple[str, str] | None:
    """Kind and problem of a text that is not read; None for one that is."""
    if (count := len(text)) > MAX_CHARACTERS:
        most = f"expected at most {MAX_CHARACTERS:,}"
        return "text too long", f"a text of {count:,} characters; {most}"
    if "\0" in text:  # UTF-16 read as UTF-8: valid, every second character NUL
        return "unreadable caption", f"NUL in the text {text[:40]!r}; expected UTF-8"
    return None


def _check_texts(raw: Mapping[str, Any], texts: Sequence[str]) -> None:
    for found in filter(None, map(text_problem, texts)):
        raise sample_error(raw, *found)


def sample_error(raw: Mapping[str, Any], kind: str, problem: str) -> SampleError:
    """The error that names a raw sample by shard, key and members."""
    members = sorted(name for name in raw if not name.startswith("__"))
    return SampleError(
        f"{raw['__shard__']}: sample {raw['__key__']!r} (members {members}): {problem}; mend or "
        f"remove the sample, or read with on_error='skip'",
        kind=kind,
    )
