"""How much a bridge tells the LM of a picture: losses and captions, right, shuffled and blind."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from rich.progress import track
from torch import Tensor

from bridges import VisionEncoder, VisionFeatures, VisionLanguageModel, caption_features
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
    def collect(
        cls, loader: Iterable[Batch], model: VisionLanguageModel | VisionEncoder
    ) -> "HeldOut":
        """Encodes every held-out picture once."""
        vision = model if isinstance(model, VisionEncoder) else model.vision
        patches, samples = [], []
        for batch in loader:
            patches.append(batch.features(vision).patches[:, 0].float().cpu())
            samples += batch.samples
        return cls(torch.cat(patches), vision.shape.grid, samples)

    def first(self, n: int) -> "HeldOut":
        """The first n pictures, or all there are."""
        return replace(self, features=self.features[:n], samples=self.samples[:n])

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

    def vision(self, rows: Sequence[int]) -> VisionFeatures:
        """Some of the pictures, one a sample."""
        patches = self.features[list(rows)][:, None]
        mask = torch.ones(patches.shape[:2], dtype=torch.bool)
        return VisionFeatures(patches, mask, self.grid)

    def __len__(self) -> int:
        return len(self.samples)


def caption_nll(
    model: VisionLanguageModel, held_out: HeldOut, *, batch_size: int = 32, title: str = "scoring"
) -> float:
    """Loss per caption token in nats, over all captions of every picture."""
    total, count = caption_sums(model, held_out, batch_size=batch_size, title=title).sum(dim=0)
    return float(total / count)


@torch.no_grad()
def caption_sums(
    model: VisionLanguageModel, held_out: HeldOut, *, batch_size: int = 32, title: str = "scoring"
) -> Tensor:
    """Loss in nats and number of tokens of all captions of each picture: (n, 2), fp64."""
    collate = CaptionCollator.of(model)
    pairs = [
        (row, text) for row, sample in enumerate(held_out.samples) for text in sample["captions"]
    ]
    pairs.sort(key=lambda pair: len(pair[1]))  # little padding in each batch
    sums = torch.zeros(len(held_out), 2, dtype=torch.float64)
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
                held_out.vision(rows),
                instruction,
            )
        counts = output.label_counts.cpu()
        for row, losses in zip(rows, output.token_losses.cpu().split(counts.tolist()), strict=True):
            sums[row] += torch.tensor([losses.double().sum(), len(losses)], dtype=torch.float64)
    return sums


def captions(
    model: VisionLanguageModel,
    held_out: HeldOut,
    *,
    batch_size: int = 32,
    max_new_tokens: int = 32,
    title: str = "captioning",
) -> list[str]:
    """Greedy captions of every picture."""
    written: list[str] = []
    for rows in track(list(_chunks(range(len(held_out)), batch_size)), title, transient=True):
        with autocast(model):
            features = held_out.vision(rows)
            written += caption_features(model, features, max_new_tokens=max_new_tokens)
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


def _chunks(items: Sequence[Any], size: int) -> Iterable[Sequence[Any]]:
    return (items[start : start + size] for start in range(0, len(items), size))
