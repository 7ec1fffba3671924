"""A grid of tiny models, for tests of `bridges ablate`."""

import io
from pathlib import Path
from typing import Any

from PIL import Image

from recipes.shard_writer import write_shards

PERCEIVER = {
    "class_path": "perceiver.PerceiverResampler",
    "init_args": {"num_latents": 3, "depth": 1, "dim": 16, "num_heads": 2, "head_dim": 8},
}
MLP = {"class_path": "bridges.Projector", "init_args": {"layers": 2, "dim": 16}}
GATED = {
    "class_path": "gated_xattn.GatedXAttn",
    "init_args": {"every": 2, "num_heads": 2, "head_dim": 8, "ff_mult": 1},
}
PREFIX = {"class_path": "bridges.SoftPrefix", "init_args": {"match_embedding_scale": True}}
RESAMPLER = "model.bridge.init_args.resampler"


def scene(index: int) -> dict[str, Any]:
    """A picture that no other index has, with the JSON of an emoji scene."""
    jpg = io.BytesIO()
    colour = ("red", "green", "blue")[index % 3]
    ground = tuple((index * 5 % 256 if place != index % 3 else 200) for place in range(3))
    Image.new("RGB", (24, 24), ground).save(jpg, "PNG")
    text = f"a cat on a {colour} background"
    meta = {"captions": [text], "objects": ["cat"], "relation": None, "colour": colour}
    return {"__key__": f"scene-{index:04d}", "png": jpg.getvalue(), "txt": text, "json": meta}


def write_scenes(shards: Path, *, leak: bool = False) -> None:
    """30 pictures to train on, 6 held out; with a leak one more, of those trained on."""
    write_shards((scene(i) for i in range(30)), shards, "train", samples_per_shard=10)
    held_out = [scene(i) for i in range(30, 36)]
    if leak:
        held_out.append(scene(3) | {"__key__": "other-name"})
    write_shards(iter(held_out), shards, "val")


def tiny_grid(on_disk: Any, shards: Path, **changes: Any) -> dict[str, Any]:
    """Resamplers × readers of a few steps; keys may be changed.

    Args:
        on_disk: where the frozen models are.
        shards: from `write_scenes`; features are kept beside them.
        **changes: keys of the grid.
    """
    grid: dict[str, Any] = {
        "base": "perceiver_small",
        "title": "tiny bridges",
        "data": str(shards),
        "overrides": {
            "model.vision": {"name": str(on_disk.vision), "dtype": "fp32"},
            "model.lm": {"name": str(on_disk.lm), "dtype": "fp32"},
            "model.optimizer.warmup_steps": 2,
            "data.batch_size": 4,
            "data.feature_cache": str(shards / "features"),
            "trainer.precision": "32-true",
            "trainer.max_steps": 4,
            "trainer.log_every_n_steps": 1,
            "trainer.val_check_interval": 2,
            "trainer.accelerator": "cpu",
        },
        "axes": {
            "reader": {
                "soft_prefix": {"model.bridge": PREFIX},
                "gated_xattn": {"model.bridge": GATED},
            },
            "resampler": {"mlp": {RESAMPLER: MLP}, "perceiver": {RESAMPLER: PERCEIVER}},
        },
        "seeds": [0, 1],
        "evaluate": {"pictures": 6, "max_new_tokens": 4, "attention": 1},
    }
    return grid | changes
