"""How much a bridge tells the LM of a picture: losses and captions, right, shuffled and blind."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from rich.progress import track
from torch import Tensor

from bridges import VisionFeatures, VisionLanguageModel, caption_features
from recipes.batch import Batch, CaptionCollator, moved
from recipes.scene_captions import score


@dataclass(frozen=True)
class HeldOut:
    """Held-out samples with their features, in the order of the shards.

    Attributes:
        features: (n, p, d), fp32.
        grid: rows and columns of the patches.
        samples: key, captions and json of each.
    """

    features: Tensor
    grid: tuple[int, int]
    samples: list[dict[str, Any]]

    @classmethod
    def collect(cls, loader: Iterable[Batch], model: VisionLanguageModel) -> "HeldOut":
        """Encodes every held-out picture once."""
        patches, samples = [], []
        for batch in loader:
            patches.append(batch.features(model.vision).patches[:, 0].float().cpu())
            samples += batch.samples
        return cls(torch.cat(patches), model.vision.shape.grid, samples)

    def shuffled(self) -> "HeldOut":
        """Every caption with the picture of the next sample: no picture keeps its caption.

        Raises:
            ValueError: fewer than two samples.
        """
        if len(self.samples) < 2:
            raise ValueError(
                f"found {len(self.samples)} held-out samples; expected at least 2 to exchange "
                "pictures: make more held-out shards"
            )
        return replace(self, features=self.features.roll(1, dims=0))

    def blind(self, mean: Tensor) -> "HeldOut":
        """Every caption with the mean picture of the training set: (p, d)."""
        return replace(self, features=mean.expand_as(self.features))

    def __len__(self) -> int:
        return len(self.samples)


@torch.no_grad()
def caption_nll(
    model: VisionLanguageModel, held_out: HeldOut, *, batch_size: int = 32, title: str = "scoring"
) -> float:
    """Loss per caption token in nats, over all captions of every picture."""
    collate = CaptionCollator.of(model)
    pairs = [
        (row, text) for row, sample in enumerate(held_out.samples) for text in sample["captions"]
    ]
    total, count = 0.0, 0
    for chunk in track(list(_chunks(pairs, batch_size)), title, transient=True):
        rows = [row for row, _ in chunk]
        text, instruction = collate.texts([None] * len(chunk), [caption for _, caption in chunk])
        device = model.lm.device
        text, instruction = text.to(device), moved(instruction, device)
        with autocast(model):
            output = model(
                text.input_ids,
                text.attention_mask,
                text.labels,
                _features(held_out, rows),
                instruction,
            )
        total += float(output.token_losses.double().sum())
        count += len(output.token_losses)
    return total / count


def captions(
    model: VisionLanguageModel,
    held_out: HeldOut,
    *,
    batch_size: int = 32,
    title: str = "captioning",
) -> list[str]:
    """Greedy captions of every picture."""
    written: list[str] = []
    for rows in track(list(_chunks(range(len(held_out)), batch_size)), title, transient=True):
        with autocast(model):
            written += caption_features(model, _features(held_out, list(rows)), max_new_tokens=32)
    return written


def scene_accuracy(written: Sequence[str], held_out: HeldOut) -> dict[str, float | None]:
    """Shares of scenes with objects, relation and ground colour right.

    None where no sample has such a truth (photographs, or no scene with two objects).
    """
    if not all("objects" in sample["meta"] for sample in held_out.samples):
        return dict.fromkeys(("object", "relation", "colour"))
    scores = [score(t, s["meta"]) for t, s in zip(written, held_out.samples, strict=True)]
    return {
        part: _share([s[part] for s in scores if s[part] is not None])
        for part in ("object", "relation", "colour")
    }


def autocast(model: VisionLanguageModel) -> torch.autocast:
    """The precision of training: a bf16 LM beside an fp32 bridge computes in bf16."""
    low = model.lm.dtype != torch.float32
    return torch.autocast(model.lm.device.type, model.lm.dtype if low else None, enabled=low)


def _share(values: Sequence[bool | None]) -> float | None:
    return sum(map(bool, values)) / len(values) if values else None


def _features(held_out: HeldOut, rows: Sequence[int]) -> VisionFeatures:
    patches = held_out.features[list(rows)][:, None]
    mask = torch.ones(patches.shape[:2], dtype=torch.bool)
    return VisionFeatures(patches, mask, held_out.grid)


def _chunks(items: Sequence[Any], size: int) -> Iterable[Sequence[Any]]:
    return (items[start : start + size] for start in range(0, len(items), size))
