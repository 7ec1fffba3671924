"""Batches of pictures with text, the decoder of a sample and the collator of a batch."""

import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from bridges import (
    Instruction,
    PromptEncoder,
    TextBatch,
    VisionEncoder,
    VisionFeatures,
    VisionLanguageModel,
)
from bridges.prompts import CAPTION_INSTRUCTION, encode_instruction, instruction_tokenizer
from bridges.vision import Preprocess
from recipes.samples import decode_caption_sample

NAMES = ("patches", "image_mask")
"""Of the tensors in `VisionFeatures`."""

BatchT = TypeVar("BatchT", bound="Batch")


@dataclass(frozen=True)
class Batch:
    """Pictures, or their cached features: what the batches of all modules have in common.

    Attributes:
        images: (b, 1, 3, h, w) preprocessed pixels, or (b, 1, p, d_vision) cached features.
        grid: rows and columns of cached features; None for pixels.
        samples: key, captions and json of each sample.
    """

    images: Tensor
    grid: tuple[int, int] | None
    samples: list[dict[str, Any]]

    def to(self: BatchT, device: torch.device | str, **_: Any) -> BatchT:
        """The same batch on another device; Lightning calls this."""
        return replace(self, images=self.images.to(device, non_blocking=True))

    def pin_memory(self: BatchT) -> BatchT:
        """In page-locked memory, from which a GPU copies while it computes."""
        return replace(self, images=self.images.pin_memory())

    def __len__(self) -> int:
        return len(self.samples)

    def features(self, encoder: VisionEncoder, chunk_size: int | None = None) -> VisionFeatures:
        """The features of the pictures, computed now unless they come from a cache.

        Args:
            encoder: frozen.
            chunk_size: pictures encoded together; all by default.
        """
        if self.grid is None and chunk_size is not None:
            parts = [encoder.encode(part) for part in self.images.split(chunk_size)]
            patches, masks = (torch.cat([getattr(p, n) for p in parts]) for n in NAMES)
            return VisionFeatures(patches, masks, parts[0].grid)
        if self.grid is None:
            return encoder.encode(self.images)
        mask = torch.ones(self.images.shape[:2], dtype=torch.bool, device=self.images.device)
        return VisionFeatures(self.images, mask, self.grid)


Collate = Callable[[Sequence[dict[str, Any]]], Batch]
"""Decoded samples, see `CaptionDecoder`, -> a batch."""


def pictures(samples: Sequence[dict[str, Any]], grid: tuple[int, int]) -> Batch:
    """The pictures of decoded samples.

    Args:
        samples: at least one.
        grid: of the encoder, for samples with cached features.
    """
    cached = "features" in samples[0]
    images = torch.stack([s["features" if cached else "image"] for s in samples])[:, None]
    described = [{k: s[k] for k in ("key", "captions", "meta")} for s in samples]
    return Batch(images, grid if cached else None, described)


@dataclass(frozen=True)
class CaptionBatch(Batch):
    """Pictures with tokenised prompts and captions, or questions and answers.

    Attributes:
        text: prompt, placeholders and completion.
        instruction: what the resampler reads beside each picture; None if it reads no text.
        truncated_questions: number of questions that were cut to fit.
    """

    text: TextBatch
    instruction: Instruction | None = None
    truncated_questions: int = 0

    def to(self, device: torch.device | str, **_: Any) -> "CaptionBatch":
        return replace(
            super().to(device),
            text=self.text.to(device),
            instruction=moved(self.instruction, device),
        )

    def pin_memory(self) -> "CaptionBatch":
        pinned = replace(super().pin_memory(), text=self.text.pin_memory())
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
        pairs = _questions(raw) if self.questions else []
        if pairs:  # such a sample needs no caption of its own
            raw = {"txt": pairs[0][1].encode(), **raw}
        sample = decode_caption_sample(raw, transform=self.preprocess, rng=rng)
        if not self.questions:
            return sample
        if not pairs:
            return {**sample, "question": None, "answer": sample["captions"][0]}
        question, answer = rng.choice(pairs) if rng else pairs[0]
        return {**sample, "question": question, "answer": answer}


@dataclass(frozen=True)
class CaptionCollator:
    """Stacks decoded samples and tokenises their texts together; see `of`.

    Attributes:
        encode: of the model, see `VisionLanguageModel.prompt_encoder`.
        prompt: what stands before each completion.
        grid: rows and columns of cached features.
        instruction_tokenizer: of the resampler, where it reads an instruction.
    """

    encode: PromptEncoder
    prompt: str
    grid: tuple[int, int]
    instruction_tokenizer: Any = None

    @classmethod
    def of(cls, model: VisionLanguageModel, max_tokens: int = 64) -> "CaptionCollator":
        """The collator for a model; longer captions, questions and answers are cut."""
        encode, grid = model.prompt_encoder(max_tokens), model.vision.shape.grid
        return cls(encode, model.prompt, grid, instruction_tokenizer(model.bridge))

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


def _questions(raw: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Questions and answers in a sample's JSON.

    Raises:
        ValueError: ``qa`` is no list of objects with a question and an answer.
    """
    meta = json.loads(raw.get("json", b"{}"))
    listed = (meta.get("qa") or []) if isinstance(meta, dict) else []
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
