"""A mixture of three tiny sources on disk, and a module that writes down what it is given."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from recipes.module import CaptionModule
from recipes.shard_writer import write_shards

WEIGHTS = {"pairs": 0.2, "documents": 1.0, "clips": 0.03}
SIZES = {"pairs": 21, "documents": 10, "clips": 5}
"""Training samples; in batches of 2 the clips run dry first, the pairs last."""


def picture(index: int) -> bytes:
    """A flat picture."""
    jpg = io.BytesIO()
    Image.new("RGB", (16, 16), (40 * index % 256, 90, 255 - 30 * index % 256)).save(jpg, "JPEG")
    return jpg.getvalue()


def pair(key: str, index: int) -> dict[str, Any]:
    return {"__key__": key, "jpg": picture(index), "txt": f"colour {index}"}


def document(key: str, index: int) -> dict[str, Any]:
    """Text alone if the index is odd, else text with two pictures in it."""
    if index % 2:
        return {"__key__": key, "json": {"parts": [f"page {index}"]}}
    parts = ["first", {"image": 0}, f"page {index}", {"image": 1}, "end"]
    return {
        "__key__": key,
        "0.jpg": picture(index),
        "1.jpg": picture(index + 1),
        "json": {"parts": parts},
    }


def clip(key: str, index: int) -> dict[str, Any]:
    """Two or three frames."""
    frames = {f"{k}.jpg": picture(index + k) for k in range(2 + index % 2)}
    return {"__key__": key, **frames, "txt": f"clip {index}"}


SAMPLES = {"pairs": pair, "documents": document, "clips": clip}


def write_sources(folder: Path) -> None:
    """A folder of shards for each source, with two held-out samples each but of the clips."""
    for name, sample in SAMPLES.items():
        keys = [f"{name}-{k:02d}" for k in range(SIZES[name])]
        samples = (sample(key, k) for k, key in enumerate(keys))
        write_shards(samples, folder / name, "train", samples_per_shard=8)
        if name != "clips":
            held_out = (sample(f"{name}-val-{k}", 2 * k) for k in range(2))
            write_shards(held_out, folder / name, "val")


def config(vision: Path, lm: Path, shards: Path) -> dict[str, Any]:
    """Of `bridges train`: gated cross-attention on tiny models, from all sources."""
    resampler = {"num_latents": 3, "depth": 1, "num_heads": 2, "head_dim": 8, "num_frames": 2}
    bridge: dict[str, Any] = {"every": 2, "num_heads": 2, "head_dim": 8, "ff_mult": 1}
    bridge["resampler"] = {"class_path": "perceiver.PerceiverResampler", "init_args": resampler}
    sources: dict[str, dict[str, Any]] = {
        "pairs": {"task": "caption"},
        "documents": {"task": "interleaved", "max_tokens": 40, "loss_before_image": True},
        "clips": {"task": "video", "num_frames": 2, "fps": None},
    }
    for name, source in sources.items():
        source |= {"shards": str(shards / name), "weight": WEIGHTS[name], "batch_size": 2}
    return {
        "module": "tiny_mixture.Recorder",
        "data_class": "recipes.mixture.MixtureData",
        "model": {
            "vision": {"name": str(vision), "dtype": "fp32"},
            "lm": {"name": str(lm), "dtype": "fp32", "end_of_chunk": "<|endofchunk|>"},
            "bridge": {"class_path": "gated_xattn.GatedXAttn", "init_args": bridge},
            "optimizer": {"lr": 1.0e-2, "schedule": "constant"},
        },
        "data": {"sources": sources},
        "trainer": {
            "max_steps": 3,
            "precision": "32-true",
            "accelerator": "cpu",
            "log_every_n_steps": 1,
            "check_val_every_n_epoch": None,
            "val_check_interval": 3,
            "enable_progress_bar": False,
        },
    }


def arguments(folder: Path, run: Path, *more: str) -> list[str]:
    """Of `bridges train`, by the ``config.yaml`` in a folder."""
    return [f"--config={folder / 'config.yaml'}", f"--run={run}", *more]


class Recorder(CaptionModule):
    """Writes down every training batch, and the gradients of every step.

    Args:
        out: file for what was seen and for the weights, ``{rank}`` filled in.
    """

    def __init__(self, *args: Any, out: str = "", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.out = out
        self.seen: list[dict[str, Any]] = []
        self.batches: list[Any] = []
        self.gradients: list[dict[str, Tensor]] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        keys = [sample["key"] for sample in batch.samples]
        images = batch.image_mask is None or bool(batch.image_mask.any())
        draw = float(torch.rand(()))
        self.batches.append(batch)
        self.seen.append({"step": self.global_step, "keys": keys, "images": images, "draw": draw})
        return loss

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        trained = [(n, p) for n, p in self.named_parameters() if p.requires_grad]
        self.gradients.append({n: p.grad.clone() for n, p in trained if p.grad is not None})
        self.seen[-1]["without_gradient"] = [n for n, p in trained if p.grad is None]

    def on_train_end(self) -> None:
        if self.out:
            weights = {n: t.clone() for n, t in self.state_dict().items()}
            found = {"seen": self.seen, "weights": weights, "gradients": self.gradients}
            torch.save(found, self.out.format(rank=self.global_rank))


def sources(seen: Sequence[Mapping[str, Any]]) -> list[str]:
    """The source of each batch, by its keys."""
    return [batch["keys"][0].partition("-")[0] for batch in seen]
