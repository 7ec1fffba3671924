"""Tiny Q-Formers with a text branch, stage 1 on them, and batches of pairs."""

from collections.abc import Sequence
from typing import Any

import tiny
import torch
from torch import Tensor

from bridges import Instruction, VisionFeatures, VisionShape
from qformer import QFormer, Stage1

QUERIES, WIDTH, HEADS, DEPTH = 3, 16, 2, 3
PATCHES, VISION_DIM = 5, 8
WORDS = 30
PAD, CLS, SEP, DEC = 0, 2, 3, WORDS - 1
LENGTHS = (7, 4, 2, 6)
"""Of captions, [CLS] and [SEP] included."""


def qformer_of(seed: int = 0, **options: Any) -> QFormer:
    """A Q-Former that reads the image in layers 0 and 2."""
    sizes: dict[str, Any] = {
        "num_queries": QUERIES,
        "dim": WIDTH,
        "depth": DEPTH,
        "num_heads": HEADS,
    }
    text: dict[str, Any] = {"vocab_size": WORDS, "max_text": 12}
    shape = VisionShape(VISION_DIM, PATCHES, (1, PATCHES))
    qformer = QFormer(vision=shape, **(sizes | text | options))
    tiny.randomise(qformer, seed)
    return qformer


def stage1_of(
    seed: int = 0, *, label_smoothing: float = 0.1, temperature: float = 0.3, **options: Any
) -> Stage1:
    """Stage 1 with weights that are far from their start."""
    with torch.random.fork_rng(devices=[]):
        # Biases of plain linear layers keep part of their start.
        torch.manual_seed(seed)
        stage1 = Stage1(qformer_of(**options), embed_dim=6, label_smoothing=label_smoothing)
    tiny.randomise(stage1, seed)
    with torch.no_grad():
        stage1.temperature.fill_(temperature)
    return stage1.train()


def texts_of(lengths: Sequence[int] = LENGTHS, seed: int = 0, columns: int = 0) -> Instruction:
    """[CLS] … [SEP] of the given lengths, padded on the right, to more columns if wanted."""
    generator = torch.Generator().manual_seed(seed)
    columns = max(columns, *lengths)
    ids = torch.randint(SEP + 1, DEC, (len(lengths), columns), generator=generator)
    mask = torch.arange(columns) < torch.tensor(lengths)[:, None]
    ids[:, 0] = CLS
    ids[torch.arange(len(lengths)), torch.tensor(lengths) - 1] = SEP
    return Instruction(ids.masked_fill(~mask, PAD), mask)


def images_of(b: int = len(LENGTHS), seed: int = 0, images: int = 1) -> VisionFeatures:
    """Random features."""
    generator = torch.Generator().manual_seed(seed)
    patches = torch.randn(b, images, PATCHES, VISION_DIM, generator=generator)
    return VisionFeatures(patches, torch.ones(b, images, dtype=torch.bool), (1, PATCHES))


def pick(batch: VisionFeatures | Instruction, rows: Sequence[int] | Tensor):
    """Some rows of a batch, in any order."""
    rows = torch.as_tensor(rows)
    if isinstance(batch, Instruction):
        return Instruction(batch.input_ids[rows], batch.attention_mask[rows])
    return VisionFeatures(batch.patches[rows], batch.image_mask[rows], batch.grid)


def gradients(stage1: Stage1, losses: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of the sum of losses, unequally weighted, for every parameter; zeros where there is none."""
    names, parameters = zip(*stage1.named_parameters(), strict=True)
    total = torch.stack([(1 + k) * losses[name] for k, name in enumerate(sorted(losses))]).sum()
    found = torch.autograd.grad(total, parameters, retain_graph=True, materialize_grads=True)
    return dict(zip(names, found, strict=True))


def assert_same_gradients(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Equal up to fp32's rounding, some of them not zero.

    Gradients of the temperature and of the keys' biases are sums that cancel: what is left has
    the rounding errors of terms of size 1, so that 1e-5 of their own size would ask too much.
    """
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        error = (found[name] - gradient).abs().max().item()
        scale = min(1.0, gradient.abs().max().item())
        assert error < 2e-6 + 8e-6 * scale, f"{name}: error {error:.2e} at scale {scale:.2e}"
    assert sum(bool(g.abs().max() > 1e-3) for g in expected.values()) > len(expected) / 4
