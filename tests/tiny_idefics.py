"""Tiny HF Idefics models with random weights, and interleaved rows for them."""

from typing import Any

import tiny
import torch
import transformers as hf
from torch import Tensor, nn

FAKE = "<fake_token_around_image>"
IMAGE = "<image>"
UTTERANCE = "<end_of_utterance>"

DIM = 32
VISION_DIM = 16
TOWER = {
    "embed_dim": VISION_DIM,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": tiny.IMAGE_SIZE,
    "patch_size": 4,
    "intermediate_size": 24,
}


def tokenizer() -> Any:
    """IDEFICS' added tokens behind the vocabulary, in its order; BOS by itself."""
    made = tiny.make_tokenizer(image_token=False, bos=True)
    made.add_tokens([FAKE, IMAGE, UTTERANCE], special_tokens=True)
    return made


def idefics(seed: int = 0, **changes: Any) -> Any:
    """``IdeficsForVisionText2Text`` with open gates; changes are those of its config."""
    text = tokenizer()
    rows = changes.pop("additional_vocab_size", 3)
    options: dict[str, Any] = {
        "vocab_size": len(text) - 3,
        "additional_vocab_size": rows,
        "hidden_size": DIM,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "max_position_embeddings": 128,
        "cross_layer_interval": 2,
        "rms_norm_eps": 1e-6,
        "vision_config": TOWER,
        "use_resampler": True,
        "perceiver_config": {
            "use_resampler": True,
            "resampler_n_latents": 3,
            "resampler_depth": 2,
            "resampler_n_heads": 2,
            "resampler_head_dim": 8,
        },
    }
    config = hf.IdeficsConfig(**(options | changes))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return randomised(hf.IdeficsForVisionText2Text(config), seed)


def randomised(model: Any, seed: int) -> Any:
    """Random weights, gates well away from 0."""
    tiny.randomise(model, seed, std=0.12)  # whole models add up the rounding of many layers
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "alpha" in name:
                parameter.copy_(0.5 + torch.rand(parameter.shape, generator=generator))
    return model


def rows(num_images: list[int], seed: int = 0) -> dict[str, Tensor]:
    """HF's inputs: left-padded interleaved rows, text before the first image, padding images."""
    import transformers.models.idefics.processing_idefics as processing

    text = tokenizer()
    text.padding_side = "left"
    words = ["ab", "c", "defg", "hi"]
    prompts = []
    for row, count in enumerate(num_images):
        parts = [f"{text.bos_token}{words[row % 4]}"]
        parts += [f"{FAKE}{IMAGE}{FAKE}{words[(row + n) % 4]}" for n in range(count)]
        prompts.append("".join(parts))
    batch = text(prompts, add_special_tokens=False, padding=True, return_tensors="pt")
    most = max(1, *num_images)
    latest, _ = processing.image_attention_mask_for_packed_input_ids(batch["input_ids"], text, "pt")
    mask = processing.incremental_to_binary_attention_mask(latest, "pt", num_classes=most)
    generator = torch.Generator().manual_seed(seed)
    side = tiny.IMAGE_SIZE
    pixels = torch.randn(len(num_images), most, 3, side, side, generator=generator)
    return {
        "input_ids": batch["input_ids"],
        "attention_mask": batch["attention_mask"],
        "pixel_values": pixels,
        "image_attention_mask": mask,
    }


def image_mask(inputs: dict[str, Tensor]) -> Tensor:
    """Which images of HF's inputs are real: bool (b, i)."""
    counts = (inputs["input_ids"] == tokenizer().convert_tokens_to_ids(IMAGE)).sum(dim=1)
    return torch.arange(inputs["pixel_values"].shape[1]) < counts[:, None]


def save(model: Any, folder: Any) -> Any:
    """An HF folder with tokenizer and image processor; returns it."""
    model.save_pretrained(folder)
    processor = hf.IdeficsImageProcessor(image_size=tiny.IMAGE_SIZE)
    hf.IdeficsProcessor(processor, tokenizer(), image_size=tiny.IMAGE_SIZE).save_pretrained(folder)
    return folder


def parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    return dict(model.named_parameters(remove_duplicate=False))
