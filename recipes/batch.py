"""A batch of pictures with captions, and the collator that makes one."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from bridges import PromptEncoder, TextBatch, VisionEncoder, VisionFeatures
from bridges.vision import Preprocess
from recipes.samples import decode_caption_sample


@dataclass(frozen=True)
class CaptionBatch:
    """Pictures (or their cached features) and tokenised captions.

    Attributes:
        text: prompt, placeholders and caption.
        images: (b, 1, 3, h, w) preprocessed pixels, or (b, 1, p, d_vision) cached features.
        grid: rows and columns of cached features; None for pixels.
        samples: key, captions and json of each sample.
    """

    text: TextBatch
    images: Tensor
    grid: tuple[int, int] | None
    samples: list[dict[str, Any]]

    def to(self, device: torch.device | str, **_: Any) -> "CaptionBatch":
        """The same batch on another device; Lightning calls this."""
        images = self.images.to(device, non_blocking=True)
        return replace(self, text=self.text.to(device), images=images)

    def pin_memory(self) -> "CaptionBatch":
        """In page-locked memory, from which a GPU copies while it computes."""
        return replace(self, images=self.images.pin_memory(), text=self.text.pin_memory())

    def __len__(self) -> int:
        return len(self.samples)

    def features(self, encoder: VisionEncoder) -> VisionFeatures:
        """The features of the pictures, computed now unless they come from a cache."""
        if self.grid is None:
            return encoder.encode(self.images)
        mask = torch.ones(self.images.shape[:2], dtype=torch.bool, device=self.images.device)
        return VisionFeatures(self.images, mask, self.grid)


@dataclass(frozen=True)
class CaptionDecoder:
    """Turns a raw sample into a picture and one of its captions.

    Attributes:
        preprocess: of the encoder.
        random_caption: draw one of several captions anew every epoch; else take the first.
    """

    preprocess: Preprocess
    random_caption: bool

    def __call__(self, raw: Mapping[str, Any]) -> dict[str, Any]:
        rng = random.Random(raw["__seed__"]) if self.random_caption else None
        return decode_caption_sample(raw, transform=self.preprocess, rng=rng)


@dataclass(frozen=True)
class CaptionCollator:
    """Stacks decoded samples and tokenises their captions together.

    Attributes:
        encode: of the model, see `VisionLanguageModel.prompt_encoder`.
        prompt: what stands before each caption.
        grid: rows and columns of cached features.
    """

    encode: PromptEncoder
    prompt: str
    grid: tuple[int, int]

    def __call__(self, samples: Sequence[dict[str, Any]]) -> CaptionBatch:
        captions = [self.encode.caption(self.prompt, s["captions"][0]) for s in samples]
        text = self.encode([self.prompt] * len(samples), captions)
        cached = "features" in samples[0]
        images = torch.stack([s["features" if cached else "image"] for s in samples])[:, None]
        described = [{k: s[k] for k in ("key", "captions", "meta")} for s in samples]
        return CaptionBatch(text, images, self.grid if cached else None, described)
