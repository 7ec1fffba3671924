"""Windows of documents as token ids, and batches of them.

A window is ``BOS``, then chunk by chunk the placeholders of the pictures, the text that follows
them, and the end-of-chunk token: ``BOS <image> text EOC <image> text EOC``.

Source: Flamingo (arXiv 2204.14198), section 2.4: 256 tokens and up to 5 pictures of a web page.
There a window begins at any token; ours at the pictures of a chunk (or at the document's start),
so that no text is cut off from its picture. It ends where it is full; a text that is cut there has
no end-of-chunk token.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from bridges import PromptEncoder, VisionLanguageModel
from bridges.decode import ImageDecoder
from bridges.loss import IGNORE
from bridges.prompts import END_OF_CHUNK
from recipes.batch import CaptionBatch, described
from recipes.documents import Document, decode_picture, read_document
from recipes.samples import sample_error


@dataclass(frozen=True)
class Window:
    """How much of a document is read, and what of it is learned.

    Attributes:
        max_tokens: longest window, BOS and placeholders included.
        max_images: most pictures.
        min_similarity: leave out pictures that are known to match their text less.
        loss_before_image: learn text before the window's first picture, and read windows without
            a picture; else such text has no loss, and a document without a picture before some
            text is a bad sample.
    """

    max_tokens: int = 256
    max_images: int = 5
    min_similarity: float | None = None
    loss_before_image: bool = False


@dataclass(frozen=True)
class Excerpt:
    """A window of a document.

    Attributes:
        input_ids: with placeholders of every picture in `images`, in their order.
        labels: the ids that are learned, IGNORE elsewhere.
        images: indexes into the document's images.
    """

    input_ids: list[int]
    labels: list[int]
    images: list[int]


def excerpt(
    document: Document, encode: PromptEncoder, window: Window, rng: random.Random | None = None
) -> Excerpt | None:
    """A window of a document; the same of the same ``rng``.

    It begins at a chunk that is drawn with equal chances: any from the first to the earliest from
    which the rest of the document fits, for later ones would only see less of it. The first is
    left out if it is text that has no loss and leaves the first picture no room. The window takes
    chunk after chunk until the next one's pictures, and a token of its text, do not fit.

    Of the pictures before one text, those beyond ``max_images``, or beyond what leaves room for a
    token of the text, are left out of every window: the last ones, next to the text, stay.

    Args:
        document: any.
        encode: of the model.
        window: its limits.
        rng: draws where the window begins; None takes the earliest place.

    Returns:
        None if the document has no text, or none that could be learned (see `Window`).
    """
    bos = encode.bos()
    room = window.max_tokens - len(bos)
    most = min(window.max_images, (room - 1) // encode.num_tokens)
    chunks = [(images[-most:], text) for images, text in _chunks(document)]
    if not chunks or not (window.loss_before_image or any(images for images, _ in chunks)):
        return None

    @cache  # a long document is tokenised around the window only
    def tokens(index: int) -> tuple[list[int], list[bool]]:
        images, text = chunks[index]
        return encode.document([*[None] * len(images), text, END_OF_CHUNK])

    # How near the end a window may begin and still be full.
    last = len(chunks) - 1
    length, pictures = len(tokens(last)[0]), len(chunks[last][0])
    while last > 0:
        length += len(tokens(last - 1)[0])
        pictures += len(chunks[last - 1][0])
        if length > room or pictures > window.max_images:
            break
        last -= 1
    first = 0
    if not window.loss_before_image and not chunks[0][0]:
        # Text before the first picture is read if it leaves that picture, and a token, room.
        needed = len(tokens(0)[0]) + len(chunks[1][0]) * encode.num_tokens + 1
        first = int(needed > room)
    start = rng.randint(first, max(first, last)) if rng else first

    ids, labels, images = list(bos), [IGNORE] * len(bos), []
    for index in range(start, len(chunks)):
        new, left = chunks[index][0], window.max_tokens - len(ids)
        if len(images) + len(new) > window.max_images or left <= len(new) * encode.num_tokens:
            break
        images += new
        learned = bool(images) or window.loss_before_image
        chunk, lossy = tokens(index)
        ids += chunk[:left]
        labels += [
            token if learned and may else IGNORE
            for token, may in zip(chunk[:left], lossy[:left], strict=True)
        ]
    return Excerpt(ids, labels, images)


def _chunks(document: Document) -> list[tuple[tuple[int, ...], str]]:
    """Pictures side by side with the text after them; pictures at the end have none and go."""
    chunks: list[tuple[tuple[int, ...], str]] = []
    images: list[int] = []
    text = ""
    for part in (*document.parts, -1):
        if isinstance(part, str):
            text += part
            continue
        if text.strip():
            chunks.append((tuple(images), text.strip()))
            images = []
        text = ""
        images.append(part)
    return chunks


@dataclass(frozen=True)
class DocumentDecoder:
    """Turns a raw sample into a window of its document; only the window's pictures are decoded.

    A decoded sample has ``excerpt`` and, for each of its images, (3, h, w) in ``images`` or cached
    features (p, d) in ``features``.

    Attributes:
        preprocess: of the vision encoder.
        encode: of the model.
        window: its limits.
        random_start: draw another window each epoch; else take the first.
    """

    preprocess: ImageDecoder
    encode: PromptEncoder
    window: Window
    random_start: bool

    def __call__(self, raw: Mapping[str, Any]) -> dict[str, Any]:
        document = read_document(raw).matching(self.window.min_similarity)
        rng = random.Random(raw["__seed__"]) if self.random_start else None
        found = excerpt(document, self.encode, self.window, rng)
        if found is None:
            wanted = "expected some; data.loss_before_image: true reads texts without a picture"
            before = "" if self.window.loss_before_image else " after a picture"
            raise sample_error(raw, f"no text{before}", f"no text{before}; {wanted}")
        sample = {"key": document.key, "captions": [], "meta": document.meta, "excerpt": found}
        chosen = [document.images[image] for image in found.images]
        if chosen and isinstance(chosen[0], Tensor):
            return {**sample, "features": chosen}
        # A picture may stand in several places.
        pixels = {
            image: decode_picture(raw, document, image, self.preprocess.pixels)
            for image in dict.fromkeys(found.images)
        }
        return {**sample, "images": [pixels[image] for image in found.images]}


@dataclass(frozen=True)
class DocumentCollator:
    """Pads windows of documents, and their pictures, to the longest of the batch; see `of`.

    Attributes:
        encode: of the model.
        window: limits of a window.
        grid: rows and columns of cached features.
        image_size: height and width of the pictures.
    """

    encode: PromptEncoder
    window: Window
    grid: tuple[int, int]
    image_size: tuple[int, int]

    @classmethod
    def of(cls, model: VisionLanguageModel, window: Window) -> "DocumentCollator":
        """The collator for a model.

        Raises:
            ValueError: no room for a picture and a token of text, or more tokens than the LM has
                positions.
        """
        encode, vision = model.prompt_encoder(), model.vision
        least = len(encode.bos()) + encode.num_tokens + 1
        if window.max_images < 1 or window.max_tokens < least:
            raise ValueError(
                f"found max_images={window.max_images} and max_tokens={window.max_tokens}; "
                f"expected at least 1 and {least}, a picture's {encode.num_tokens} placeholders "
                "with a token of text: raise data.max_images or data.max_tokens"
            )
        model.check_length(window.max_tokens)
        return cls(encode, window, vision.shape.grid, vision.image_size)

    def decoder(self, preprocess: ImageDecoder, *, training: bool) -> DocumentDecoder:
        return DocumentDecoder(preprocess, self.encode, self.window, random_start=training)

    def __call__(self, samples: Sequence[dict[str, Any]]) -> CaptionBatch:
        excerpts: list[Excerpt] = [sample["excerpt"] for sample in samples]
        text = self.encode.pad([(found.input_ids, found.labels) for found in excerpts])
        counts = torch.tensor([len(found.images) for found in excerpts])
        mask = torch.arange(max(1, int(counts.max()))) < counts[:, None]
        cached = any("features" in sample for sample in samples)
        rows = [sample.get("features") or sample.get("images", []) for sample in samples]
        # A batch without a picture stands on one padding picture.
        shown = next((row[0] for row in rows if row), torch.zeros(3, *self.image_size))
        images = shown.new_zeros(*mask.shape, *shown.shape)
        if counts.any():
            images[mask] = torch.stack([image for row in rows for image in row])
        return CaptionBatch(
            images=images,
            grid=self.grid if cached else None,
            samples=described(samples),
            image_mask=mask,
            text=text,
        )
