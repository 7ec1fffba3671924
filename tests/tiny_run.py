"""A tiny stage-1 run on disk, with random weights and a tokenizer that reads words."""

import string
from pathlib import Path

import tiny
import torch
import transformers as hf

from bridges import VisionEncoder
from bridges.run import VisionSource
from qformer.runs import Stage1Spec, save_stage1
from qformer.stage1 import Stage1

WORDS = ["a", "cat", "dog", "on", "red", "green", "blue", "background", "scene"]


def save_tokenizer(folder: Path) -> None:
    """A BERT tokenizer of some words, and of every letter where there is no word."""
    letters = [*string.ascii_lowercase, *string.digits]
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    tokens += [t for letter in letters for t in (letter, f"##{letter}") if t not in tokens]
    hf.BertTokenizer(vocab={t: i for i, t in enumerate(tokens)}).save_pretrained(folder)


def save_stage1_run(folder: Path, vision: Path) -> tuple[VisionEncoder, Stage1]:
    """Saves a run that belongs to the encoder in a folder; returns what is in it."""
    save_tokenizer(folder / "tokenizer")
    spec = Stage1Spec(
        VisionSource(str(vision), dtype="fp32"),
        {
            "num_queries": 3,
            "dim": 16,
            "depth": 3,
            "num_heads": 2,
            "max_text": 40,
            "tokenizer": str(folder / "tokenizer"),
        },
        {"embed_dim": 8},
    )
    encoder = VisionEncoder.load(str(vision), dtype="fp32")
    torch.manual_seed(0)
    stage1 = spec.build(encoder)
    tiny.randomise(stage1)
    save_stage1(folder, stage1, spec, encoder)
    return encoder, stage1
