"""Batches of pictures, each with a caption in a Q-Former's own vocabulary."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from bridges import Instruction
from bridges.decode import ImageDecoder
from bridges.prompts import encode_text
from recipes.batch import Batch, moved, pictures
from recipes.samples import CaptionDecoder

UNLIMITED = 2**20
"""Tokens that no caption has."""


@dataclass(frozen=True, kw_only=True)
class PairBatch(Batch):
    """Pictures, each with a caption in the Q-Former's own vocabulary.

    Attributes:
        text: the captions.
        image_ids: long (b), equal where the pictures are.
        truncated: number of captions that were cut to fit.
    """

    text: Instruction
    image_ids: Tensor
    truncated: int = 0

    def to(self, device: torch.device | str, **_: Any) -> "PairBatch":
        text = moved(self.text, device)
        assert text is not None
        ids = self.image_ids.to(device, non_blocking=True)
        return replace(super().to(device), text=text, image_ids=ids)

    def pin_memory(self) -> "PairBatch":
        ids, mask = self.text.input_ids.pin_memory(), self.text.attention_mask.pin_memory()
        image_ids = self.image_ids.pin_memory()
        return replace(super().pin_memory(), text=Instruction(ids, mask), image_ids=image_ids)


@dataclass(frozen=True)
class PairCollator:
    """Stacks decoded samples and tokenises their captions.

    Attributes:
        tokenizer: of the Q-Former.
        max_tokens: longer captions are cut, [CLS] and [SEP] included.
        grid: rows and columns of cached features.
    """

    tokenizer: Any
    max_tokens: int
    grid: tuple[int, int]

    def decoder(self, preprocess: ImageDecoder, *, training: bool) -> CaptionDecoder:
        return CaptionDecoder(preprocess, random_caption=training)

    def __call__(self, samples: Sequence[dict[str, Any]]) -> PairBatch:
        batch = pictures(samples, self.grid)
        captions = [s["captions"][0] for s in samples]
        lengths = encode_text(self.tokenizer, captions, UNLIMITED).attention_mask.sum(dim=1)
        truncated = int((lengths > self.max_tokens).sum())
        text = encode_text(self.tokenizer, captions, self.max_tokens)
        ids = torch.tensor([_digest(image) for image in batch.images])
        return PairBatch(**vars(batch), text=text, image_ids=ids, truncated=truncated)


def _digest(image: Tensor) -> int:
    """A number that equal pictures share."""
    content = image.contiguous().view(torch.uint8).numpy().tobytes()
    digest = hashlib.blake2b(content, digest_size=8).digest()
    return int.from_bytes(digest, "big", signed=True)
