"""Few-shot within a document: its last text given its own picture, and ever more before it.

A document is read as in training (see `recipes.documents_window`), so that a run on interleaved
data needs no template here.
"""

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from rich.progress import track
from torch import Tensor

from bridges import PromptEncoder, VisionEncoder
from bridges.prompts import END_OF_CHUNK
from recipes.documents import Document, decode_picture, read_document
from recipes.documents_window import Window, excerpt
from recipes.fewshot_runner import Prompt
from recipes.gallery import name_of, once, thumbnail, with_pictures
from recipes.stream import ShardStream

WHOLE = Window(max_tokens=2**30, max_images=2**30)


@dataclass(frozen=True)
class Chunk:
    """Pictures of a document and the text that follows them.

    Attributes:
        head: ids of the pictures' placeholders.
        answer: ids of the text and its end.
        pictures: the document's images, by their places; among all documents, rows of patches.
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
        patches: (n, p, d), on the CPU, of all pictures in them.
        places: (n), of each picture among the images of its document.
        bos: what a document begins with.
        skipped: documents left out, by reason.
    """

    names: list[str]
    documents: list[list[Chunk]]
    patches: Tensor
    places: list[int]
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
        places: list[int] = []
        bos = encode.bos()

        def read(raw: Mapping[str, Any]) -> dict[str, Any]:
            document = read_document(raw)
            chunks = chunks_of(document, encode)[-shots - 1 :]
            images = [image for chunk in chunks for image in chunk.pictures]
            return {
                "name": name_of(raw, shards),
                "chunks": chunks,
                "places": images,
                "images": [_picture(raw, document, image) for image in images],
            }

        stream = ShardStream(list(shards), read, seed=0, shuffle=False, on_error="skip")
        for sample in track(
            once(stream), "encoding documents", stream.total_samples, transient=True
        ):
            chunks = sample["chunks"]
            length = len(bos) + sum(len(chunk.head) + len(chunk.answer) for chunk in chunks)
            if len(chunks) <= shots:
                left_out[f"fewer than {shots + 1} pairs of pictures and text"] += 1
                continue
            if max_length is not None and length > max_length:
                left_out[f"longer than the LM's context of {max_length}"] += 1
                continue
            rows = itertools.count(len(places))
            patches.append(_patches(sample["images"], vision))
            names.append(sample["name"])
            places += sample["places"]
            documents.append(
                [Chunk(c.head, c.answer, [next(rows) for _ in c.pictures]) for c in chunks]
            )
            if len(documents) == limit:
                break
        skipped = dict(left_out + stream.skipped)
        if not documents:
            raise ValueError(
                f"found no document in {len(shards)} shards, e.g. {shards[0]}, to ask for {shots} "
                f"shots (left out: {skipped}); expected some: ask for fewer"
            )
        return cls(names, documents, torch.cat(patches), places, bos, skipped)

    def prompts(self, shots: int) -> tuple[list[Prompt], list[list[int]]]:
        """What stands before the last text of each document, and the text."""
        prompts, answers = [], []
        for chunks in self.documents:
            *before, last = chunks[-shots - 1 :]
            ids = self.bos + [i for chunk in before for i in (*chunk.head, *chunk.answer)]
            pictures = [row for chunk in (*before, last) for row in chunk.pictures]
            prompts.append(Prompt(ids + last.head, pictures))
            answers.append(last.answer)
        return prompts, answers

    def thumbnails(self, shards: Sequence[Path], shown: int, side: int) -> dict[int, str]:
        """Small pictures of the first documents as data URIs, by their rows.

        Args:
            shards: with the pictures; without any there are no thumbnails.
            shown: how many documents.
            side: pixels of the longer side.
        """
        wanted = {
            name: [row for chunk in chunks for row in chunk.pictures]
            for name, chunks in zip(self.names[:shown], self.documents, strict=False)
        }
        return {
            row: thumbnail(decode_picture(raw, document, self.places[row]), side)
            for name, raw in with_pictures(shards, wanted)
            for document in [read_document(raw)]
            for row in wanted[name]
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


def _picture(raw: Mapping[str, Any], document: Document, image: int) -> Image.Image | Tensor:
    found = document.images[image]
    return found if isinstance(found, Tensor) else decode_picture(raw, document, image)


def _patches(images: Sequence[Image.Image | Tensor], vision: VisionEncoder) -> Tensor:
    """(n, p, d)."""
    features = [image for image in images if isinstance(image, Tensor)]
    if features:
        return torch.stack(features)
    pixels = [vision.preprocess(i) for i in images if isinstance(i, Image.Image)]
    return vision.encode(torch.stack(pixels)[None]).patches[0].cpu()
