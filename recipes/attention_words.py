"""What the words of a text look at, drawn over the pictures between them."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor

from bridges import Instruction, VisionFeatures, VisionLanguageModel, caption_features
from bridges.images import open_image
from bridges.prompts import (
    CAPTION_INSTRUCTION,
    QUESTION,
    encode_instruction,
    instruction_tokenizer,
)
from recipes.attention_maps import Layer, text_maps
from recipes.attention_picture import as_seen, overlay
from recipes.attention_tokens import Word, words_of
from recipes.gallery import uri

At = Literal["word", "before"]


@dataclass(frozen=True)
class Reading:
    """A text with its pictures.

    Attributes:
        names: of the pictures, in the order of the text.
        images: the pictures.
        text: what is shown of it: a caption, or all with ``<image>`` in it.
        input_ids: long (1, t), prompt and all.
        words: of the caption, or of the whole text.
        vision: features of the pictures.
        instruction: what the resampler reads, if it reads one.
    """

    names: list[str]
    images: list[Image.Image]
    text: str
    input_ids: Tensor
    words: list[Word]
    vision: VisionFeatures
    instruction: Instruction | None


def readings(
    model: VisionLanguageModel, paths: Sequence[Path], text: str | None, question: str | None
) -> list[Reading]:
    """The texts to look at: one for each picture, or one for all.

    Args:
        model: the model.
        paths: of the pictures.
        text: with ``<image>`` in it a text of all pictures, in their order; without, the caption
            of each; None for what the model writes of each.
        question: for a model that reads one.

    Raises:
        ValueError: a text with another number of ``<image>`` than there are pictures, or a
            question that nobody would read.
    """
    if text is None or model.lm.image_token not in text:
        return [_captioned(model, path, text, question) for path in paths]
    found = text.count(model.lm.image_token)
    if found != len(paths):
        raise ValueError(
            f"found {found} × {model.lm.image_token} in the text for {len(paths)} pictures; "
            "expected one for each: they stand in the order of the pictures"
        )
    _check_question(model, question, text)
    encoded = model.prompt_encoder()([text], questions=[question or CAPTION_INSTRUCTION])
    return [_reading(model, paths, text, encoded.input_ids, 0, question)]


def choose(found: Sequence[Reading], wanted: Collection[str]) -> list[Reading]:
    """The same readings with the wanted words only, in any case; all words without any wanted.

    Raises:
        ValueError: a wanted word is in none of the texts, or there is no word at all.
    """
    there = {word.text.casefold() for reading in found for word in reading.words}
    missing = [word for word in wanted if word.casefold() not in there]
    if missing or not there:
        texts = "; ".join(repr(reading.text) for reading in found)
        what = f"no word {missing[0]!r}" if missing else "no word"
        raise ValueError(
            f"found {what} in the text {texts}; expected words that are in it: give others, or "
            "the text itself by --text"
        )
    kept = {word.casefold() for word in wanted} or there
    return [
        replace(reading, words=[w for w in reading.words if w.text.casefold() in kept])
        for reading in found
    ]


def drawn(model: VisionLanguageModel, reading: Reading, layer: Layer, at: At) -> dict[str, Any]:
    """A reading's part of the page: each word over each picture that it reads."""
    maps = text_maps(model, reading.input_ids, reading.vision, reading.instruction, layer)
    if at == "before":  # nothing predicts the first token
        maps = torch.cat([torch.zeros_like(maps[:1]), maps[:-1]])
    of_words = [(word.text, maps[word.positions].mean(dim=0)) for word in reading.words]
    pictures = [
        _picture(model, reading, place, [(text, shares[place]) for text, shares in of_words])
        for place in range(len(reading.images))
    ]
    blind = [text for text, shares in of_words if not bool(shares.any())]
    return {"text": reading.text, "pictures": pictures, "blind": blind}


def _captioned(
    model: VisionLanguageModel, path: Path, caption: str | None, question: str | None
) -> Reading:
    _check_question(model, question, model.prompt)
    if caption is None:
        vision = _encoded(model, [open_image(path)])
        (caption,) = caption_features(model, vision, question=question)
    encoder = model.prompt_encoder(max_completion=2**20)
    questions = [question or CAPTION_INSTRUCTION]
    begin = encoder([model.prompt], questions=questions).input_ids.shape[1]
    written = encoder.caption(model.prompt, caption)
    encoded = encoder([model.prompt], [written], questions=questions)
    return _reading(model, [path], caption, encoded.input_ids, begin, question)


def _reading(
    model: VisionLanguageModel,
    paths: Sequence[Path],
    text: str,
    input_ids: Tensor,
    begin: int,
    question: str | None,
) -> Reading:
    images = [open_image(path) for path in paths]
    tokenizer = model.lm.tokenizer
    silent = {model.lm.image_token_id, model.lm.end_id, *tokenizer.all_special_ids}
    words = words_of(tokenizer, input_ids[0].tolist(), silent, begin)
    instruction = None
    reader = instruction_tokenizer(model.bridge)
    if reader is not None:
        asked = encode_instruction(reader, [question or CAPTION_INSTRUCTION])
        device = model.lm.device
        ids, mask = asked.input_ids.to(device), asked.attention_mask.to(device)
        # All pictures of a sample are read with its one instruction.
        instruction = Instruction(ids, mask)
    names = [path.name for path in paths]
    vision = _encoded(model, images)
    return Reading(names, images, text, input_ids.to(model.lm.device), words, vision, instruction)


def _encoded(model: VisionLanguageModel, images: Sequence[Image.Image]) -> VisionFeatures:
    pixels = torch.stack([model.vision.preprocess(image) for image in images])
    return model.vision.encode(pixels[None])


def _check_question(model: VisionLanguageModel, question: str | None, prompt: str) -> None:
    if question is None or QUESTION in prompt or instruction_tokenizer(model.bridge) is not None:
        return
    raise ValueError(
        f"found question {question!r} for prompt {prompt!r}, which has no {QUESTION!r} in it; "
        "expected none: leave --question out"
    )


def _picture(
    model: VisionLanguageModel, reading: Reading, place: int, shares: list[tuple[str, Tensor]]
) -> dict[str, Any]:
    """One picture and the words that read it; shares (p,) of each word's attention."""
    image = reading.images[place]
    rows, columns = reading.vision.grid
    seen = as_seen(model.vision.preprocess, image)
    on_patches = [
        (word, one, one[-rows * columns :].unflatten(0, (rows, columns)))
        for word, one in shares
        if bool(one.any())
    ]
    mean = torch.stack([grid for _, _, grid in on_patches]).mean(dim=0) if on_patches else None
    return {
        "name": reading.names[place],
        "size": image.size,
        "seen_size": seen.size,
        "grid": (rows, columns),
        "seen": uri(seen),
        "mean": None if mean is None else uri(overlay(seen, mean)),
        "has_prefix": reading.vision.patches.shape[2] > rows * columns,
        # Gated cross-attention to one picture gives it everything: nothing to say.
        "has_shares": any(float(one.sum()) < 0.995 for _, one, _ in on_patches),
        "words": [
            {
                "text": word,
                "uri": uri(overlay(seen, grid)),
                "share": float(one.sum()),
                # Of the attention to this picture, as the maps of a Q-Former are.
                "lowest": float(grid.min() / one.sum()),
                "peak": float(grid.max() / one.sum()),
                "prefix": 1 - float(grid.sum() / one.sum()),
            }
            for word, one, grid in on_patches
        ],
    }
