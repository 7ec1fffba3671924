"""What is trained while it is killed: tiny random models, and pictures in shards."""

import io
import string
from pathlib import Path
from typing import Any

import torch
import yaml
from PIL import Image
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from bridges.files import write_text
from recipes.shard_writer import write_shards

SIZE = 16
"""Height and width of what the encoder sees."""

PAIRS, DOCUMENTS = 41, 23
"""Samples: no multiples of a batch, so that each epoch leaves others over."""

EVEN_PAIRS = 40
"""Of the source for changed ranks: every number of them makes whole batches of it."""

SPECIALS = ("<pad>", "<s>", "</s>", "<unk>")


def write_all(folder: Path) -> None:
    """Models, shards, and one config of `bridges train` for each kind of data, into a folder."""
    torch.manual_seed(0)
    _save_vision(folder / "vision")
    _save_lm(folder / "lm")
    write_shards(map(_pair, range(PAIRS)), folder / "pairs", "train", samples_per_shard=12)
    write_shards(map(_pair, range(PAIRS, PAIRS + 4)), folder / "pairs", "val")
    write_shards(map(_pair, range(EVEN_PAIRS)), folder / "even", "train", samples_per_shard=12)
    documents = map(_document, range(DOCUMENTS))
    write_shards(documents, folder / "documents", "train", samples_per_shard=9)
    pairs: dict[str, Any] = {"shards": str(folder / "pairs")}
    interleaved = {"shards": str(folder / "documents"), "task": "interleaved", "max_tokens": 48}
    mixture = {
        "pairs": pairs | {"weight": 0.5, "shuffle_buffer": 7},
        "documents": interleaved | {"weight": 1.0, "loss_before_image": True, "shuffle_buffer": 7},
    }
    write_config(folder / "single.yaml", folder, pairs | {"shuffle_buffer": 7})
    even = {"shards": str(folder / "even"), "shuffle_buffer": 7}
    write_config(folder / "even.yaml", folder, even)
    write_config(folder / "mixture.yaml", folder, {"sources": mixture})


def write_config(path: Path, folder: Path, data: dict[str, Any]) -> None:
    """A config of `bridges train`: gated cross-attention, as all data can be read by it."""
    sizes = {"num_heads": 2, "head_dim": 8}
    resampler = {
        "class_path": "recipes.reliability_kills_log.NoisyResampler",
        "init_args": {"num_latents": 3, "depth": 1, "dim": 16, **sizes},
    }
    config: dict[str, Any] = {
        "model": {
            "vision": {"name": str(folder / "vision"), "dtype": "fp32"},
            "lm": {"name": str(folder / "lm"), "dtype": "fp32", "end_of_chunk": "<end>"},
            "bridge": {
                "class_path": "gated_xattn.GatedXAttn",
                "init_args": {"resampler": resampler, "every": 1, "ff_mult": 1, **sizes},
            },
            "optimizer": {"lr": 1.0e-2, "warmup_steps": 2},
        },
        "data": data,
        "trainer": {
            "accelerator": "cpu",
            "precision": "32-true",
            "gradient_clip_val": 1.0,
            "log_every_n_steps": 1,
            # Validation in mid-epoch must leave no trace in training, resumed or not.
            "check_val_every_n_epoch": None,
            "val_check_interval": 4,
            "enable_progress_bar": False,
        },
    }
    if "sources" in data:
        config["data_class"] = "recipes.mixture.MixtureData"
    write_text(path, yaml.safe_dump(config, sort_keys=False))


def _save_vision(folder: Path) -> None:
    config = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=SIZE,
        patch_size=8,
    )
    CLIPVisionModel(config).save_pretrained(folder)
    size = {"height": SIZE, "width": SIZE}
    CLIPImageProcessorPil(size=size, crop_size=size).save_pretrained(folder)


def _save_lm(folder: Path) -> None:
    tokens = [*SPECIALS, *sorted(set(string.printable) - set(string.whitespace)), " "]
    config = LlamaConfig(
        vocab_size=len(tokens) + 4,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    core = Tokenizer(models.WordLevel({t: i for i, t in enumerate(tokens)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    core.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
    ).save_pretrained(folder)


def _picture(index: int) -> bytes:
    jpg = io.BytesIO()
    colour = (37 * index % 256, 90 + index, 255 - 23 * index % 256)
    Image.new("RGB", (32, 32), colour).save(jpg, "JPEG")
    return jpg.getvalue()


def _pair(index: int) -> dict[str, Any]:
    """Several captions, of which one is drawn each time: what is drawn shows in the loss."""
    captions = [f"{word} {index}" for word in ("card", "a paper", "colour number")]
    return {"__key__": f"pair{index:03d}", "jpg": _picture(index), "json": {"captions": captions}}


def _document(index: int) -> dict[str, Any]:
    """Longer than a window, so that one of several is drawn; every third one is text alone."""
    key, words = f"document{index:03d}", f"page {index} of many pages"
    if index % 3 == 2:
        return {"__key__": key, "json": {"parts": [words]}}
    parts = ["first", {"image": 0}, words, {"image": 1}, "then the end of it all"]
    return {
        "__key__": key,
        "0.jpg": _picture(index),
        "1.jpg": _picture(index + 50),
        "json": {"parts": parts},
    }
