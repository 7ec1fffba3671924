"""Figures of a trained model on held-out pictures, as sums of each picture: what an interval needs.

One row for each picture, in their order, so that runs which saw the same pictures can be compared
picture by picture (`recipes.bootstrap`).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from bridges import Instruction, VisionEncoder, VisionFeatures, VisionLanguageModel
from bridges.prompts import encode_text
from qformer.retrieval import KS, first, itc_similarity
from qformer.stage1 import Stage1
from recipes.bootstrap import Sums
from recipes.evaluate import HeldOut, caption_sums
from recipes.evaluate import captions as write_captions
from recipes.metric_captions import Bleu, CiderD, ExactMatch, RougeL
from recipes.scene_captions import score

Better = Literal["higher", "lower"]

PARTS = {"object": "objects", "relation": "relation", "colour": "ground colour"}
"""Of an emoji scene's caption."""

TOP = (1, 5)
"""Classes that are guessed."""

TITLES: Mapping[str, str] = {
    "nll": "loss per token (nats)",
    "nll_shuffled": "loss per token, another's picture",
    "nll_blind": "loss per token, mean picture",
    "nll_exchanged": "loss per token, query's picture exchanged",
    "nll_demos_exchanged": "loss per token, demonstrations' pictures exchanged",
    "nll_text_only": "loss per token, demonstrations without pictures",
    "cider_d": "CIDEr-D",
    "bleu_4": "BLEU-4",
    "rouge_l": "ROUGE-L",
    "exact_match": "exact match",
    **{part: f"{title} right" for part, title in PARTS.items()},
    "vqa_accuracy": "VQA accuracy",
    "vqa_exact_match": "exact match",
    **{
        f"{kind}accuracy@{k}": f"class {'right' if k == 1 else f'among the first {k}'}{how}"
        for kind, how in (("", ""), ("normalised_", ", normalised"))
        for k in TOP
    },
    **{f"text_to_image_recall@{k}": f"text → picture, recall@{k}" for k in KS},
    **{f"image_to_text_recall@{k}": f"picture → text, recall@{k}" for k in KS},
}
"""What the figures are, for people."""

BETTER: Mapping[str, Better] = {
    name: "lower" if name.startswith("nll") else "higher" for name in TITLES
}
"""Which way a figure is better."""


def most_of(name: str) -> float:
    """The highest value that a figure can have."""
    return math.inf if name.startswith("nll") else 10.0 if name.startswith("cider") else 1.0


@dataclass(frozen=True)
class Scored:
    """What became of a run on held-out pictures.

    Attributes:
        images: names of the pictures, in order.
        figures: by name, see `TITLES`; a row for each of `images`.
        written: what the model wrote of each; empty if it wrote nothing.
    """

    images: list[str]
    figures: dict[str, Sums]
    written: list[str]

    def to_json(self) -> dict[str, Any]:
        """For `json.dump`; `from_json` restores it to the bit."""
        figures = {name: sums.to_json() for name, sums in self.figures.items()}
        return {"images": self.images, "figures": figures, "written": self.written}

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> "Scored":
        """Restores what `to_json` gave."""
        figures = {name: Sums.from_json(sums) for name, sums in found["figures"].items()}
        return cls(list(found["images"]), figures, list(found["written"]))


def score_model(
    model: VisionLanguageModel,
    held_out: HeldOut,
    mean: Tensor | None,
    *,
    captions: bool = True,
    likelihood: bool = True,
    batch_size: int = 32,
    max_new_tokens: int = 32,
) -> Scored:
    """Figures of a bridge: greedy captions, and the loss of the true ones.

    Args:
        model: in evaluation mode.
        held_out: at least two pictures.
        mean: the picture of a blind model, (p, d); None leaves ``nll_blind`` out.
        captions: write captions and compare them with the true ones.
        likelihood: loss per token with the right picture, another one's and the mean one.
        batch_size: pictures, or captions, that go through the LM together.
        max_new_tokens: longest caption.
    """
    figures: dict[str, Sums] = {}
    written: list[str] = []
    if likelihood:
        shown = {"nll": held_out, "nll_shuffled": held_out.shuffled()}
        if mean is not None:
            shown["nll_blind"] = held_out.blind(mean)
        for name, pictures in shown.items():
            sums = caption_sums(model, pictures, batch_size=batch_size, title=TITLES[name])
            figures[name] = Sums("ratio", sums.numpy())
    if captions:
        written = write_captions(
            model, held_out, batch_size=batch_size, max_new_tokens=max_new_tokens
        )
        figures |= caption_figures(written, held_out.samples)
    return Scored(names_of(held_out), figures, written)


def caption_figures(
    written: Sequence[str], samples: Sequence[Mapping[str, Any]]
) -> dict[str, Sums]:
    """Figures of one caption for each picture against all its true ones.

    Of emoji scenes also the shares with the right objects, relation and ground colour; no figure
    for a relation where no scene has one.
    """
    truths = [sample["captions"] for sample in samples]
    figures: dict[str, Sums] = {}
    bleu = Bleu()
    bleu.update(written, truths)
    for name, metric in {
        "cider_d": CiderD(),
        "bleu_4": bleu,
        "rouge_l": RougeL(),
        "exact_match": ExactMatch(),
    }.items():
        if metric is bleu:
            figures[name] = Sums(name, bleu.per_image_sums().numpy())
        else:
            metric.update(written, truths)
            figures[name] = Sums.mean_of(metric.per_image().tolist())
    if all("objects" in sample["meta"] for sample in samples):
        judged = [score(t, s["meta"]) for t, s in zip(written, samples, strict=True)]
        for part in PARTS:
            rows = [(bool(one[part]), one[part] is not None) for one in judged]
            if any(asked for _, asked in rows):
                figures[part] = Sums("ratio", torch.tensor(rows).double().numpy())
    return figures


def score_stage1(
    stage1: Stage1, vision: VisionEncoder, held_out: HeldOut, *, batch_size: int = 32
) -> Scored:
    """Figures of a stage-1 run: recall at 1, 5 and 10 by ITC, in both directions.

    Args:
        stage1: in evaluation mode.
        vision: the encoder that it was trained with.
        held_out: at least two pictures.
        batch_size: pictures, or texts, at a time.

    Raises:
        ValueError: features of another width than the encoder's.
    """
    if (width := held_out.features.shape[-1]) != vision.shape.dim:
        raise ValueError(
            f"found features of width {width}; expected {vision.shape.dim}, the encoder's: collect "
            "the pictures with the encoder of this run"
        )
    texts, owners = captions_of(held_out)
    itc = itc_similarity(
        embed_pictures(stage1, held_out, batch_size), embed_texts(stage1, texts, batch_size)
    )
    return Scored(names_of(held_out), recall_figures(itc.T, itc, owners), [])


@torch.no_grad()
def embed_pictures(stage1: Stage1, held_out: HeldOut, batch_size: int) -> Tensor:
    """Pictures as ITC compares them: (n, queries, e), on the CPU."""

    def embed(rows: range) -> Tensor:
        pictures, device = held_out.vision(rows), stage1.temperature.device
        patches, mask = pictures.patches.to(device), pictures.image_mask.to(device)
        return stage1.image_embeddings(VisionFeatures(patches, mask, pictures.grid)).cpu()

    return _in_batches(embed, len(held_out), batch_size)


@torch.no_grad()
def embed_texts(
    stage1: Stage1, texts: Sequence[str], batch_size: int, max_text_tokens: int = 32
) -> Tensor:
    """Texts as ITC compares them, cut to so many tokens: (m, e), on the CPU."""

    def embed(rows: range) -> Tensor:
        tokenizer, device = stage1.qformer.tokenizer, stage1.temperature.device
        text = encode_text(tokenizer, [texts[row] for row in rows], max_text_tokens)
        return stage1.text_embeddings(
            Instruction(text.input_ids.to(device), text.attention_mask.to(device))
        ).cpu()

    return _in_batches(embed, len(texts), batch_size)


def recall_figures(to_images: Tensor, to_texts: Tensor, owners: Tensor) -> dict[str, Sums]:
    """Recall at 1, 5 and 10 in both directions.

    A picture's part in text → picture is that of its own texts.

    Args:
        to_images: (m, n), scores of all pictures for each text.
        to_texts: (n, m), scores of all texts for each picture.
        owners: long (m), the picture of each text.
    """
    pictures = torch.arange(len(to_texts))
    figures = {}
    for direction, scores, rows, columns in (
        ("text_to_image", to_images, owners, pictures),
        ("image_to_text", to_texts, pictures, owners),
    ):
        right = columns[first(scores, max(KS))] == rows[:, None]
        for k in KS:
            hits = right[:, :k].any(dim=1)
            figures[f"{direction}_recall@{k}"] = of_rows(hits, rows, len(pictures))
    return figures


def captions_of(held_out: HeldOut) -> tuple[list[str], Tensor]:
    """All captions, and the picture of each: long (m)."""
    texts = [text for sample in held_out.samples for text in sample["captions"]]
    owners = [row for row, sample in enumerate(held_out.samples) for _ in sample["captions"]]
    return texts, torch.tensor(owners)


def of_rows(values: Tensor, owners: Tensor, images: int) -> Sums:
    """The mean of some values, of which several may belong to one picture.

    Args:
        values: (m,).
        owners: long (m,), the picture of each.
        images: how many there are.
    """
    sums = torch.zeros(images, 2, dtype=torch.float64)
    pairs = torch.stack([values.double(), torch.ones_like(values, dtype=torch.float64)], dim=1)
    return Sums("ratio", sums.index_add(0, owners, pairs).numpy())


def names_of(held_out: HeldOut) -> list[str]:
    """Names of the pictures: unique where whoever collected them gave a name, else the keys."""
    return [sample.get("name", sample["key"]) for sample in held_out.samples]


def _in_batches(embed: Callable[[range], Tensor], total: int, size: int) -> Tensor:
    starts = range(0, total, size)
    return torch.cat([embed(range(start, min(start + size, total))) for start in starts])
