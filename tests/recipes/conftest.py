"""Tiny models and shards on disk, for tests that go through the command line."""

import io
from dataclasses import dataclass
from pathlib import Path

import pytest
import tiny
import transformers as hf
from PIL import Image

from recipes.shard_writer import write_shards

GROUNDS = {"red": (200, 30, 30), "green": (30, 160, 60), "blue": (40, 70, 200)}


@dataclass(frozen=True)
class OnDisk:
    """Folders: a vision encoder, an LM, and captioned pictures in shards."""

    vision: Path
    lm: Path
    shards: Path

    def arguments(self, run: Path, *more: str) -> list[str]:
        """Of `bridges train`, on these models and shards."""
        return [
            "--config=perceiver_small",
            f"--data={self.shards}",
            f"--run={run}",
            f"--model.vision.name={self.vision}",
            f"--model.lm.name={self.lm}",
            "--model.vision.dtype=fp32",
            "--model.lm.dtype=fp32",
            "--model.bridge.init_args.resampler.init_args.dim=16",
            "--model.bridge.init_args.resampler.init_args.num_latents=3",
            "--model.optimizer.warmup_steps=2",
            "--data.batch_size=4",
            "--trainer.precision=32-true",
            "--trainer.max_steps=4",
            "--trainer.log_every_n_steps=1",
            "--trainer.val_check_interval=2",
            "--trainer.enable_progress_bar=false",
            "--trainer.accelerator=cpu",
            *more,
        ]


def scene(index: int) -> dict[str, object]:
    """A flat picture with the metadata of an emoji scene."""
    colour = list(GROUNDS)[index % 3]
    jpg = io.BytesIO()
    Image.new("RGB", (24, 24), GROUNDS[colour]).save(jpg, "JPEG")
    text = f"a cat on a {colour} background"
    meta = {"captions": [text], "objects": ["cat"], "relation": None, "colour": colour}
    return {"__key__": f"scene-{index:04d}", "jpg": jpg.getvalue(), "txt": text, "json": meta}


@pytest.fixture(scope="session")
def on_disk(tmp_path_factory: pytest.TempPathFactory) -> OnDisk:
    """Tiny CLIP, tiny Llama, 30 training and 6 held-out pictures."""
    folder = tmp_path_factory.mktemp("on_disk")
    tiny.vision_model("clip").save_pretrained(folder / "vision")
    size = {"height": tiny.IMAGE_SIZE, "width": tiny.IMAGE_SIZE}
    processor = hf.CLIPImageProcessorPil(size=size, crop_size=size)
    processor.save_pretrained(folder / "vision")
    tiny.causal_lm("llama").save_pretrained(folder / "lm")
    tiny.make_tokenizer(image_token=False).save_pretrained(folder / "lm")
    shards = folder / "shards"
    write_shards((scene(i) for i in range(30)), shards, "train", samples_per_shard=10)
    write_shards((scene(i) for i in range(30, 36)), shards, "val")
    return OnDisk(folder / "vision", folder / "lm", shards)
