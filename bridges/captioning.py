"""Captions of pictures."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from bridges.contract import VisionFeatures
from bridges.images import open_image, upright_rgb
from bridges.model import VisionLanguageModel


def caption(
    model: VisionLanguageModel,
    images: Sequence[str | Path | bytes | Image.Image],
    *,
    prompt: str | None = None,
    batch_size: int = 16,
    **options: Any,
) -> list[str]:
    """Captions of any number of images, in their order.

    Args:
        model: from `bridges.load` or assembled by hand.
        images: files, encoded bytes, or PIL images; any size and mode.
        prompt: instead of the one that the model was trained with.
        batch_size: images that go through the LM together.
        **options: of HF's ``generate``: ``max_new_tokens`` (40 by default), ``num_beams``,
            ``do_sample``, ``temperature``, ``top_p``, …. Greedy by default.
    """
    captions: list[str] = []
    for start in range(0, len(images), batch_size):
        opened = map(_open, images[start : start + batch_size])
        pixels = torch.stack([model.vision.preprocess(image) for image in opened])
        features = model.vision.encode(pixels[:, None])
        captions += caption_features(model, features, prompt=prompt, **options)
    return captions


def caption_features(
    model: VisionLanguageModel,
    features: VisionFeatures,
    *,
    prompt: str | None = None,
    **options: Any,
) -> list[str]:
    """Captions from features that are computed already; the same options as `caption`."""
    prompts = [prompt or model.prompt] * len(features.patches)
    text = model.prompt_encoder()(prompts, padding_side="left")
    ids = model.generate(
        text.input_ids.to(model.lm.device),
        text.attention_mask.to(model.lm.device),
        features,
        **({"max_new_tokens": 40, "do_sample": False} | options),
    )
    return [t.strip() for t in model.lm.tokenizer.batch_decode(ids, skip_special_tokens=True)]


def _open(image: str | Path | bytes | Image.Image) -> Image.Image:
    if isinstance(image, Image.Image):
        return upright_rgb(image)
    return open_image(image if isinstance(image, bytes) else Path(image))
