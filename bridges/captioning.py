"""Captions of pictures."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from bridges.contract import Instruction, VisionFeatures
from bridges.images import open_image, upright_rgb
from bridges.model import VisionLanguageModel
from bridges.prompts import (
    CAPTION_INSTRUCTION,
    QUESTION,
    encode_instruction,
    instruction_tokenizer,
)


def caption(
    model: VisionLanguageModel,
    images: Sequence[str | Path | bytes | Image.Image],
    *,
    prompt: str | None = None,
    question: str | None = None,
    batch_size: int = 16,
    **options: Any,
) -> list[str]:
    """Captions of any number of images, in their order.

    Args:
        model: from `bridges.load` or assembled by hand.
        images: files, encoded bytes, or PIL images; any size and mode.
        prompt: instead of the one that the model was trained with.
        question: for a model that reads one, in its prompt (``{question}``) or in its resampler
            (InstructBLIP); `CAPTION_INSTRUCTION` by default.
        batch_size: images that go through the LM together.
        **options: of HF's ``generate``: ``max_new_tokens`` (40 by default), ``num_beams``,
            ``do_sample``, ``temperature``, ``top_p``, …. Greedy by default.

    Raises:
        ValueError: a question for a model that would not read it.
    """
    captions: list[str] = []
    for start in range(0, len(images), batch_size):
        opened = map(_open, images[start : start + batch_size])
        pixels = torch.stack([model.vision.preprocess(image) for image in opened])
        features = model.vision.encode(pixels[:, None])
        captions += caption_features(model, features, prompt=prompt, question=question, **options)
    return captions


def caption_features(
    model: VisionLanguageModel,
    features: VisionFeatures,
    *,
    prompt: str | None = None,
    question: str | None = None,
    **options: Any,
) -> list[str]:
    """Captions from features that are computed already; the same options as `caption`."""
    prompt = prompt or model.prompt
    tokenizer = instruction_tokenizer(model.bridge)
    if question is not None and QUESTION not in prompt and tokenizer is None:
        raise ValueError(
            f"found question {question!r} for prompt {prompt!r}; expected {QUESTION!r} in it, "
            "where the question goes: this model reads its prompt only"
        )
    rows = len(features.patches)
    asked = [CAPTION_INSTRUCTION if question is None else question] * rows
    text = model.prompt_encoder()([prompt] * rows, questions=asked, padding_side="left")
    instruction = None
    if tokenizer is not None:
        read = encode_instruction(tokenizer, asked)
        device = model.lm.device
        instruction = Instruction(read.input_ids.to(device), read.attention_mask.to(device))
    ids = model.generate(
        text.input_ids.to(model.lm.device),
        text.attention_mask.to(model.lm.device),
        features,
        instruction,
        **({"max_new_tokens": 40, "do_sample": False} | options),
    )
    return [t.strip() for t in model.lm.tokenizer.batch_decode(ids, skip_special_tokens=True)]


def _open(image: str | Path | bytes | Image.Image) -> Image.Image:
    if isinstance(image, Image.Image):
        return upright_rgb(image)
    if not isinstance(image, (str, Path, bytes)):
        raise ValueError(
            f"found a {type(image).__name__} among the images; expected a file, encoded bytes or a "
            "PIL image, each captioned by itself: for several images in one text, or a clip, "
            "encode them (model.vision.encode) and call model.generate"
        )
    return open_image(image if isinstance(image, bytes) else Path(image))
