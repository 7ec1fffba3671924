"""Few-shot within a document: its last text given its own picture, and ever more before it.

A document is read as in training (see `recipes.documents_window`), so that a run on interleaved
data needs no template here.
"""

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from torch import Tensor

from bridges import PromptEncoder, VisionEncoder
from bridges.prompts import END_OF_CHUNK
from recipes.documents import Document, decode_picture, read_document
from recipes.documents_window import Window, excerpt
from recipes.fewshot_pool import digest_of
from recipes.fewshot_runner import Prompt
from recipes.gallery import name_of, thumbnail, with_pictures
from recipes.stream import ShardStream

WHOLE = Window(max_tokens=2**30, max_images=2**30)

TOGETHER = 32
"""Pictures of a document that are encoded together."""


@dataclass(frozen=True)
class Chunk:
    """Pictures of a document and the text that follows them.

    Attributes:
        head: ids of the pictures' placeholders.
        answer: ids of the text and its end.
        pictures: the document's images, by their places; in a pool, rows of patches.
    """

    head: list[int]
    answer: list[int]
    pictures: list[int]


@dataclass(frozen=True)
class DocumentPool:
    """The last chunks of some documents, each with a picture at least.

    Attributes:
        names: of the documents, see `name_of`.
        documents: chunks of each, equally many.
        patches: (n, p, d), on the CPU, of all pictures in them, equal ones once.
        places: (n), the document that each picture is first in, and its place among the images of
            that.
        bos: what a document begins with.
        skipped: documents left out, by reason.
    """

    names: list[str]
    documents: list[list[Chunk]]
    patches: Tensor
    places: list[tuple[int, int]]
    bos: list[int]
    skipped: dict[str, int]

    @classmethod
    def collect(
        cls,
        shards: Sequence[Path],
        vision: VisionEncoder,
        encode: PromptEncoder,
        limit: int,
        *,
        shots: int,
        max_length: int | None,
    ) -> "DocumentPool":
        """The first documents that have so many pairs of pictures and text before the last one.

        Only of those are pictures decoded, each once however often the document shows it.

        Args:
            shards: of documents, or of their features.
            vision: the encoder.
            encode: of the model.
            limit: most documents.
            shots: pairs before the last.
            max_length: the LM's context, which a document's last chunks must fit.

        Raises:
            ValueError: no such document.
        """
        left_out: Counter[str] = Counter()
        names: list[str] = []
        documents: list[list[Chunk]] = []
        patches: list[Tensor] = []
        places: list[tuple[int, int]] = []
        rows: dict[str, int] = {}
        bos = encode.bos()

        def read(raw: Mapping[str, Any]) -> dict[str, Any]:
            document = read_document(raw)
            chunks = chunks_of(document, encode)[-shots - 1 :]
            sample = {"name": name_of(raw, shards), "chunks": chunks}
            length = len(bos) + sum(len(chunk.head) + len(chunk.answer) for chunk in chunks)
            if len(chunks) <= shots:
                return {**sample, "out": f"fewer than {shots + 1} pairs of pictures and text"}
            if max_length is not None and length > max_length:
                return {**sample, "out": f"longer than the LM's context of {max_length}"}
            images = {image for chunk in chunks for image in chunk.pictures}
            contents = {image: _content(raw, document, image, vision) for image in sorted(images)}
            return {**sample, "contents": contents}

        stream = ShardStream(
            list(shards), read, seed=0, shuffle=False, on_error="skip", max_bad_fraction=1.0
        )
        for sample in track(
            stream.iterate(), "encoding documents", stream.total_samples, transient=True
        ):
            if "out" in sample:
                left_out[sample["out"]] += 1
                continue
            digests = {image: digest_of(one) for image, one in sample["contents"].items()}
            new: list[Tensor] = []
            for image, content in sample["contents"].items():
                if digests[image] not in rows:
                    rows[digests[image]] = len(places)
                    places.append((len(names), image))
                    new.append(content)
            patches += _patches(new, vision)
            names.append(sample["name"])
            documents.append(
                [
                    replace(c, pictures=[rows[digests[k]] for k in c.pictures])
                    for c in sample["chunks"]
                ]
            )
            if len(documents) == limit:
                break
        skipped = dict(left_out + stream.skipped)
        if not documents:
            raise ValueError(
                f"found no document in {len(shards)} shards, e.g. {shards[0]}, to ask for {shots} "
                f"shots (left out: {skipped}); expected some: ask for fewer"
            )
        return cls(names, documents, torch.stack(patches), places, bos, skipped)

    def prompts(self, shots: int) -> tuple[list[Prompt], list[list[int]]]:
        """What stands before the last text of each document, and the text.

        Without the pictures before the last (see `Prompt`) it is their texts alone.
        """
        prompts, answers = [], []
        for chunks in self.documents:
            *before, last = chunks[-shots - 1 :]
            ids = self.bos + [i for chunk in before for i in (*chunk.head, *chunk.answer)]
            pictures = [row for chunk in (*before, last) for row in chunk.pictures]
            texts = self.bos + [i for chunk in before for i in chunk.answer]
            text_only = texts + last.head if before else None
            prompts.append(
                Prompt(ids + last.head, pictures, text_only=text_only, own=len(last.pictures))
            )
            answers.append(last.answer)
        return prompts, answers

    def thumbnails(self, shards: Sequence[Path], shown: int, side: int) -> dict[int, str]:
        """Small pictures of the first documents as data URIs, by their rows.

        Args:
            shards: with the pictures; without any there are no thumbnails.
            shown: how many documents.
            side: pixels of the longer side.
        """
        wanted: dict[str, dict[int, int]] = {name: {} for name in self.names[:shown]}
        for row, (document, image) in enumerate(self.places):
            if document < shown:
                wanted[self.names[document]][row] = image
        return {
            row: thumbnail(decode_picture(raw, document, image), side)
            for name, raw in with_pictures(shards, wanted)
            for document in [read_document(raw)]
            for row, image in wanted[name].items()
        }


def chunks_of(document: Document, encode: PromptEncoder) -> list[Chunk]:
    """The pictures and texts of a whole document, as training has them; none without a picture."""
    whole = excerpt(document, encode, WHOLE)
    if whole is None:
        return []
    image = encode.tokenizer.convert_tokens_to_ids(encode.image_token)
    (end,) = encode.document([END_OF_CHUNK])[0]  # text is data: it is nowhere else
    images = iter(whole.images)
    chunks: list[Chunk] = []
    ids: list[int] = []
    for token in whole.input_ids[len(encode.bos()) :]:
        ids.append(token)
        if token == end:
            heads = ids.count(image)
            pictures = list(itertools.islice(images, heads // encode.num_tokens))
            chunks.append(Chunk(ids[:heads], ids[heads:], pictures))
            ids = []
    return [chunk for chunk in chunks if chunk.pictures]


def _content(
    raw: Mapping[str, Any], document: Document, image: int, vision: VisionEncoder
) -> Tensor:
    """Features of a picture if they are cached, else its pixels as the encoder takes them."""
    found = document.images[image]
    if isinstance(found, Tensor):
        return found
    return decode_picture(raw, document, image, vision.image_decoder().pixels)


def _patches(contents: Sequence[Tensor], vision: VisionEncoder) -> list[Tensor]:
    """(p, d) of each."""
    if not contents or contents[0].ndim == 2:  # features
        return list(contents)
    pixels = torch.stack(list(contents)).split(TOGETHER)
    return [one for part in pixels for one in vision.encode(part[None]).patches[0].cpu()]
