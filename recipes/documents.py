"""Text with pictures in it, read from shards in three forms.

Which form a sample has shows in its JSON:

- ``parts``, our own: ``{"parts": ["text", {"image": 0}, "text", …]}``, where ``{"image": k}`` is
  the member ``key.k.jpg`` (or png, webp), counted from 0. A picture may have a ``"similarity"``
  to its text. Whatever else the JSON holds is the document's `Document.meta`.
- ``text_list`` and ``image_info``, as MMC4 has it: sentences, and pictures that belong to one each
  by ``matched_text_index``, before which they stand; ``matched_sim`` is the similarity. A picture
  is in its entry as ``image_base64`` (OpenFlamingo's form); without that, entry k of
  ``image_info``, counted from 0, is the member ``key.k.jpg``.
- ``texts`` and ``images``, as OBELICS has it: two lists of equal length, at each place a text or a
  picture (a name or URL, never followed) and null in the other. Pictures are counted from 0 as
  they come, nulls left out: the k-th of them is the member ``key.k.jpg``. For a picture that could
  not be fetched write null in both lists.

Of features cached by `recipes.cache` (beside our own JSON), row k stands for picture k. A picture
that is named and not there is a bad sample; it is never left out silently.

Source: MMC4 (arXiv 2304.06939), OBELICS (arXiv 2306.16527), open_flamingo's data documentation.
"""

import base64
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from torch import Tensor

from bridges.decode import ImageDecoder
from bridges.images import open_image
from recipes.cache import CacheForm
from recipes.features import has_features
from recipes.samples import decode_image, numbered_images, read_features, read_meta, sample_error

T = TypeVar("T")

MAX_CACHED = 256
"""Pictures of one document whose features are cached: they are in memory together."""


@dataclass(frozen=True)
class Document:
    """Texts and pictures in reading order.

    Attributes:
        key: of its sample.
        parts: texts, and indexes into `images`; texts side by side are one text.
        images: each encoded, as its file's bytes, or as its cached features (p, d).
        similarities: of each image to its text, None where nothing is known of it.
        meta: what else the JSON holds.
    """

    key: str
    parts: tuple[str | int, ...]
    images: tuple[bytes | Tensor, ...]
    similarities: tuple[float | None, ...] = ()
    meta: dict[str, Any] = field(default_factory=dict)

    def matching(self, min_similarity: float | None) -> "Document":
        """The document without the pictures that are known to match their text less."""
        if min_similarity is None or not self.similarities:
            return self
        known = enumerate(self.similarities)
        out = {
            k for k, similarity in known if similarity is not None and similarity < min_similarity
        }
        return replace(self, parts=tuple(part for part in self.parts if part not in out))


@dataclass(frozen=True)
class _Picture:
    """A picture in the text: its number among the members, or its bytes."""

    source: int | bytes
    similarity: float | None = None


class _FormError(ValueError):
    """What is wrong with a document's JSON."""


def read_document(raw: Mapping[str, Any]) -> Document:
    """The document in a raw sample, in whichever of the three forms; no picture is decoded.

    Args:
        raw: as `recipes.stream.ShardStream` gives it.

    Raises:
        SampleError: not one of the forms, or a picture that is not there; names shard and key.
    """
    meta = read_meta(raw)
    keys = next((keys for keys in _FORMS if all(key in meta for key in keys)), None)
    if keys is None:
        wanted = ", or ".join(" and ".join(keys) for keys in _FORMS)
        problem = f"json with the keys {sorted(meta)[:20]}; expected {wanted}"
        raise sample_error(raw, "unreadable document", problem)
    try:
        read = _FORMS[keys](meta)
    except _FormError as error:
        raise sample_error(raw, "unreadable document", f"json: {error}") from error
    members = numbered_images(raw)
    features = read_features(raw, 3) if has_features(raw) else []
    places: dict[int | bytes, int] = {}
    parts: list[str | int] = []
    images: list[bytes | Tensor] = []
    similarities: list[float | None] = []
    for part in read:
        if isinstance(part, str):
            parts.append(part)
            continue
        source = part.source
        if source not in places:
            if isinstance(source, bytes):
                images.append(source)
            elif source < len(features):
                images.append(features[source])
            elif source in members:
                images.append(raw[members[source]])
            else:
                problem = f"no picture {source} (a member {source}.jpg, png or webp)"
                raise sample_error(raw, "missing image", f"{problem}, which its json names")
            similarities.append(part.similarity)
            places[source] = len(places)
        parts.append(places[source])
    own = {name: meta[name] for name in meta if name != "parts"} if keys == ("parts",) else {}
    return Document(raw["__key__"], tuple(parts), tuple(images), tuple(similarities), own)


def decode_picture(
    raw: Mapping[str, Any], document: Document, image: int, into: Callable[[bytes], T] = open_image
) -> T:
    """One of the pictures of a document that was read from a raw sample, as `decode_image`.

    Raises:
        SampleError: it cannot be decoded.
    """
    data = document.images[image]
    assert isinstance(data, bytes)
    return decode_image(raw, f"picture {image}", data, into=into)


def all_pictures(
    raw: Mapping[str, Any], preprocess: ImageDecoder
) -> tuple[list[Tensor], dict[str, Any]]:
    """Every picture of a document, for the feature cache, and the rest in our own form.

    Raises:
        SampleError: as `read_document`, or more pictures than `MAX_CACHED`.
    """
    document = read_document(raw)
    if (count := len(document.images)) > MAX_CACHED:
        wanted = f"expected at most {MAX_CACHED} to cache: split it, or give no data.feature_cache"
        raise sample_error(raw, "too many images", f"{count} pictures; {wanted}")
    parts: list[Any] = []
    for part in document.parts:
        if isinstance(part, str):
            parts.append(part)
            continue
        similarity = document.similarities[part]
        known = {} if similarity is None else {"similarity": similarity}
        parts.append({"image": part, **known})
    into, images = preprocess.pixels, range(len(document.images))
    pixels = [decode_picture(raw, document, k, into) for k in images]
    return pixels, {"json": {**document.meta, "parts": parts}}


DOCUMENTS = CacheForm("documents", all_pictures)


def _read_own(meta: Mapping[str, Any]) -> list[str | _Picture]:
    parts: list[str | _Picture] = []
    for part in _list(meta, "parts"):
        if isinstance(part, str):
            parts.append(part)
        elif isinstance(part, dict) and "image" in part:
            parts.append(_Picture(_index(part["image"]), _similarity(part.get("similarity"))))
        else:
            raise _FormError(f'found {_short(part)} in parts; expected a text or {{"image": 0}}')
    return parts


def _read_mmc4(meta: Mapping[str, Any]) -> list[str | _Picture]:
    sentences, entries = _list(meta, "text_list"), _list(meta, "image_info")
    before: list[list[_Picture]] = [[] for _ in sentences]
    for number, entry in enumerate(entries):
        if not isinstance(entry, dict):
            raise _FormError(f"found {_short(entry)} in image_info; expected an object")
        sentence = _index(entry.get("matched_text_index"))
        if sentence >= len(sentences):
            raise _FormError(
                f"found matched_text_index {sentence} of image {number}; expected one of the "
                f"{len(sentences)} texts, counted from 0"
            )
        encoded = entry.get("image_base64")
        source = number if encoded is None else _bytes(encoded, number)
        before[sentence].append(_Picture(source, _similarity(entry.get("matched_sim"))))
    pairs = zip(before, sentences, strict=True)
    return _glued([part for pictures, text in pairs for part in (*pictures, text)], " ")


def _read_obelics(meta: Mapping[str, Any]) -> list[str | _Picture]:
    texts, images = _list(meta, "texts"), _list(meta, "images")
    if len(texts) != len(images):
        raise _FormError(
            f"found {len(texts)} texts and {len(images)} images; expected lists of equal length, "
            "with null in one wherever the other has something"
        )
    parts: list[Any] = []
    number = 0
    for place, (text, image) in enumerate(zip(texts, images, strict=True)):
        if text is not None and image is not None:
            raise _FormError(
                f"found both a text and an image at place {place}; expected null in one of them"
            )
        if image is not None:
            parts.append(_Picture(number))
            number += 1
        elif text is not None:
            parts.append(text)
    return _glued(parts, "\n\n")


_FORMS: dict[tuple[str, ...], Callable[[Mapping[str, Any]], list[str | _Picture]]] = {
    ("parts",): _read_own,
    ("text_list", "image_info"): _read_mmc4,
    ("texts", "images"): _read_obelics,
}
"""By the keys of the JSON."""


def _glued(parts: Sequence[Any], glue: str) -> list[str | _Picture]:
    """Each text but the first begins with ``glue``, whatever becomes of pictures before it."""
    glued: list[str | _Picture] = []
    texts = 0
    for part in parts:
        if not isinstance(part, str | _Picture):
            raise _FormError(f"found {_short(part)} as a text; expected a string")
        if isinstance(part, str):
            part = glue + part if texts else part
            texts += 1
        glued.append(part)
    return glued


def _list(meta: Mapping[str, Any], name: str) -> list[Any]:
    if not isinstance(meta[name], list):
        raise _FormError(f"found {_short(meta[name])} as {name}; expected a list")
    return meta[name]


def _index(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise _FormError(f"found {_short(value)} as an index; expected 0 or more")
    return value


def _similarity(value: Any) -> float | None:
    if value is None or (isinstance(value, int | float) and not isinstance(value, bool)):
        return value
    raise _FormError(f"found {_short(value)} as a similarity; expected a number")


def _bytes(encoded: Any, number: int) -> bytes:
    try:
        return base64.b64decode(encoded, validate=True)
    except (ValueError, TypeError) as error:
        raise _FormError(f"image_base64 of image {number} is damaged ({error})") from error


def _short(value: Any) -> str:
    return repr(value)[:60]
