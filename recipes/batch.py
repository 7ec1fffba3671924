"""Batches of pictures with text, and their collators."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeVar

import torch
from einops import rearrange
from torch import Tensor

from bridges import (
    Instruction,
    PromptEncoder,
    TextBatch,
    VisionEncoder,
    VisionFeatures,
    VisionLanguageModel,
)
from bridges.decode import ImageDecoder
from bridges.prompts import CAPTION_INSTRUCTION, encode_instruction, instruction_tokenizer
from recipes.samples import CaptionDecoder
from recipes.video import ClipDecoder, Clips

TENSORS = ("images", "image_mask", "frame_mask")
"""Of a `Batch`."""

BatchT = TypeVar("BatchT", bound="Batch")


@dataclass(frozen=True)
class Batch:
    """Pictures or clips, or their cached features: what the batches of all modules have in common.

    Attributes:
        images: (b, i, 3, h, w) preprocessed pixels, or (b, i, f, 3, h, w) of clips; with `grid`
            cached features (b, i, p, d_vision), or (b, i, f, p, d_vision). There is always an
            image axis of at least 1, so that every parameter gets a gradient on every rank.
        grid: rows and columns of cached features; None for pixels.
        samples: key, captions and json of each sample.
        image_mask: bool (b, i), False for padding; None where there is none.
        frame_mask: bool (b, i, f), False for padding frames; None for pictures.
    """

    images: Tensor
    grid: tuple[int, int] | None
    samples: list[dict[str, Any]]
    image_mask: Tensor | None = None
    frame_mask: Tensor | None = None

    def to(self: BatchT, device: torch.device | str, **_: Any) -> BatchT:
        """The same batch on another device; Lightning calls this."""
        return self.each(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self: BatchT) -> BatchT:
        """In page-locked memory, from which a GPU copies while it computes."""
        return self.each(Tensor.pin_memory)

    def __len__(self) -> int:
        return len(self.samples)

    def features(self, encoder: VisionEncoder, chunk_size: int | None = None) -> VisionFeatures:
        """The features of the pictures, computed now unless they come from a cache.

        Args:
            encoder: frozen.
            chunk_size: samples encoded together; all by default.
        """
        real, frames = self.image_mask, self.frame_mask
        if self.grid is None:
            size = len(self.images) if chunk_size is None else chunk_size
            cuts = range(0, len(self.images), size)
            parts = [
                encoder.encode(
                    self.images[at : at + size],
                    None if real is None else real[at : at + size],
                    None if frames is None else frames[at : at + size],
                )
                for at in cuts
            ]
            return parts[0] if len(parts) == 1 else _joined(parts)
        if real is None:
            real = torch.ones(self.images.shape[:2], dtype=torch.bool, device=self.images.device)
        if frames is None:
            return VisionFeatures(self.images, real, self.grid)
        patches = rearrange(self.images, "b i f p d -> b i (f p) d")
        return VisionFeatures(patches, real, self.grid, frames)

    def each(self: BatchT, change: Callable[[Tensor], Tensor]) -> BatchT:
        """The same batch with its pictures and their masks changed."""
        tensors = {name: getattr(self, name) for name in TENSORS}
        return replace(self, **{n: change(t) for n, t in tensors.items() if t is not None})


def _joined(parts: Sequence[VisionFeatures]) -> VisionFeatures:
    frames = [part.frame_mask for part in parts if part.frame_mask is not None]
    return VisionFeatures(
        torch.cat([part.patches for part in parts]),
        torch.cat([part.image_mask for part in parts]),
        parts[0].grid,
        torch.cat(frames) if frames else None,
    )


Decode = Callable[[Mapping[str, Any]], dict[str, Any]]
"""A raw sample of a `ShardStream` -> what a collator takes."""


class Collate(Protocol):
    """Makes batches, and knows the decoder whose samples it takes; can be pickled, for workers."""

    def __call__(self, samples: Sequence[dict[str, Any]]) -> Batch:
        """Decoded samples, at least one, -> a batch."""
        ...

    def decoder(self, preprocess: ImageDecoder, *, training: bool) -> Decode:
        """What decodes the samples.

        Args:
            preprocess: of the encoder.
            training: draw anew each epoch what there is a choice of; else always choose the same.
        """
        ...


def pictures(samples: Sequence[dict[str, Any]], grid: tuple[int, int]) -> Batch:
    """The pictures, one each, of decoded samples; or the clips.

    Args:
        samples: at least one.
        grid: of the encoder, for samples with cached features.
    """
    cached = "features" in samples[0]
    images = torch.stack([s["features" if cached else "image"] for s in samples])[:, None]
    frames = None
    if "frame_mask" in samples[0]:
        frames = torch.stack([s["frame_mask"] for s in samples])[:, None]
    return Batch(images, grid if cached else None, described(samples), frame_mask=frames)


def described(samples: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """What a batch keeps of its samples beside tensors."""
    return [{k: s[k] for k in ("key", "captions", "meta")} for s in samples]


@dataclass(frozen=True, kw_only=True)
class CaptionBatch(Batch):
    """Pictures with tokenised prompts and captions, questions and answers, or documents.

    Attributes:
        text: prompt, placeholders and completion.
        instruction: what the resampler reads beside each picture; None if it reads no text.
        segments: long (b', t), the sample of each column of packed rows of text, see
            `recipes.packing.pack`; None where a row is a sample.
        truncated_questions: number of questions that were cut to fit.
    """

    text: TextBatch
    instruction: Instruction | None = None
    segments: Tensor | None = None
    truncated_questions: int = 0

    @property
    def fill(self) -> Tensor:
        """Share of the text's positions that are no padding."""
        return self.text.attention_mask.float().mean()

    def to(self, device: torch.device | str, **_: Any) -> "CaptionBatch":
        segments = self.segments
        if segments is not None:
            segments = segments.to(device, non_blocking=True)
        return replace(
            super().to(device),
            text=self.text.to(device),
            instruction=moved(self.instruction, device),
            segments=segments,
        )

    def pin_memory(self) -> "CaptionBatch":
        segments = None if self.segments is None else self.segments.pin_memory()
        pinned = replace(super().pin_memory(), text=self.text.pin_memory(), segments=segments)
        if self.instruction is None:
            return pinned
        ids, mask = self.instruction.input_ids, self.instruction.attention_mask
        return replace(pinned, instruction=Instruction(ids.pin_memory(), mask.pin_memory()))


def moved(instruction: Instruction | None, device: torch.device | str) -> Instruction | None:
    """An instruction on another device."""
    if instruction is None:
        return None
    move = {"device": device, "non_blocking": True}
    return Instruction(instruction.input_ids.to(**move), instruction.attention_mask.to(**move))


@dataclass(frozen=True)
class CaptionCollator:
    """Stacks decoded samples and tokenises their texts together; see `of`.

    Attributes:
        encode: of the model, see `VisionLanguageModel.prompt_encoder`.
        prompt: what stands before each completion.
        grid: rows and columns of cached features.
        instruction_tokenizer: of the resampler, where it reads an instruction.
        questions: read questions and answers, see `CaptionDecoder`.
        clips: how frames are chosen, for samples that are clips; None for pictures.
    """

    encode: PromptEncoder
    prompt: str
    grid: tuple[int, int]
    instruction_tokenizer: Any = None
    questions: bool = False
    clips: Clips | None = None

    @classmethod
    def of(
        cls,
        model: VisionLanguageModel,
        max_tokens: int = 64,
        *,
        questions: bool = False,
        clips: Clips | None = None,
    ) -> "CaptionCollator":
        """The collator for a model; longer captions, questions and answers are cut."""
        encode, grid = model.prompt_encoder(max_tokens), model.vision.shape.grid
        reads = instruction_tokenizer(model.bridge)
        return cls(encode, model.prompt, grid, reads, questions, clips)

    def decoder(self, preprocess: ImageDecoder, *, training: bool) -> Decode:
        if self.clips is not None:
            return ClipDecoder(preprocess, self.clips, training=training)
        return CaptionDecoder(preprocess, random_caption=training, questions=self.questions)

    def __call__(self, samples: Sequence[dict[str, Any]]) -> CaptionBatch:
        asked = [s.get("question") for s in samples]
        questions = [None if q is None else self.encode.shortened(q) for q in asked]
        answers = [s.get("answer", s["captions"][0]) for s in samples]
        text, instruction = self.texts(questions, answers)
        shortened = sum(q != a for q, a in zip(questions, asked, strict=True))
        batch = pictures(samples, self.grid)
        return CaptionBatch(**vars(batch), text=text, instruction=instruction,
                            truncated_questions=shortened)  # fmt: skip

    def texts(
        self, questions: Sequence[str | None], answers: Sequence[str]
    ) -> tuple[TextBatch, Instruction | None]:
        """Tokens for the LM, and for the resampler; None asks for a caption."""
        asked = [CAPTION_INSTRUCTION if q is None else q for q in questions]
        completions = [self.encode.caption(self.prompt, answer) for answer in answers]
        text = self.encode([self.prompt] * len(asked), completions, questions=asked)
        if self.instruction_tokenizer is None:
            return text, None
        return text, encode_instruction(self.instruction_tokenizer, asked)
