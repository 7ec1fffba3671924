"""Shards of made samples for `bridges bench data`, in a folder that goes when they do."""

import io
import shutil
import tempfile
import weakref
from collections.abc import Iterable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from recipes.features import encode_features
from recipes.shard_writer import write_shards

_WORDS = ("a", "the", "small", "old", "two", "on", "near", "with", "dog", "house", "sea", "window")
_SHARDS = 4


class MadeShards:
    """Shards that are written when they are first asked for; the same at every call."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="bridges-bench-"))
        weakref.finalize(self, partial(shutil.rmtree, self.folder, ignore_errors=True))
        self.photos = cache(self._photos)
        self.texts = cache(self._texts)

    def features(self, name: str, features: Iterable[Tensor]) -> list[Path]:
        """Captioned fp16 features (p, d)."""
        samples = []
        for number, one in enumerate(features):
            member, data = encode_features(one, "fp16")
            samples.append({"__key__": f"{number:07d}", member: data, "txt": caption(number)})
        return self._write(name, samples, len(samples))

    def _photos(self, height: int, width: int, samples: int, distinct: int) -> list[Path]:
        made = [jpeg(photo(height, width, seed)) for seed in range(distinct)]
        captioned = (
            {"__key__": f"{number:07d}", "jpg": made[number % distinct], "txt": caption(number)}
            for number in range(samples)
        )
        return self._write(f"photos-{width}x{height}", captioned, samples)

    def _texts(self, samples: int) -> list[Path]:
        texts = ({"__key__": f"{number:07d}", "txt": f"{number}"} for number in range(samples))
        return self._write("texts", texts, samples)

    def _write(self, name: str, samples: Iterable[dict[str, Any]], count: int) -> list[Path]:
        return write_shards(
            samples, self.folder / name, "train", samples_per_shard=-(-count // _SHARDS)
        )


def photo(height: int, width: int, seed: int) -> Image.Image:
    """A picture with the spectrum and the edges of a photo, and so with the JPEG bytes of one.

    Noise whose amplitude falls as 1/f, the same in all channels but for a third, and twelve
    half-transparent ellipses. The same seed gives the same picture.
    """
    generator = torch.Generator().manual_seed(seed)
    rows, columns = torch.fft.fftfreq(height)[:, None], torch.fft.rfftfreq(width)[None]
    frequency = (rows**2 + columns**2).sqrt().clamp(min=1 / max(height, width))
    white = torch.randn(3, height, width, generator=generator)
    noise = torch.fft.irfft2(torch.fft.rfft2(white) / frequency**1.1, s=(height, width))
    pixels = noise[:1] + noise / 3
    pixels = (pixels - pixels.mean()) / pixels.std(correction=0).clamp(min=1e-6) * 45 + 120
    down, across = torch.arange(height)[:, None] / height, torch.arange(width)[None] / width
    for _ in range(12):
        y, x, tall, wide, *colour = torch.rand(7, generator=generator).tolist()
        inside = ((down - y) / (tall * 0.3 + 0.05)) ** 2 + ((across - x) / (wide * 0.3 + 0.05)) ** 2
        paint = 255 * torch.tensor(colour)[:, None, None]
        pixels = torch.where(inside < 1, 0.4 * pixels + 0.6 * paint, pixels)
    return Image.fromarray(pixels.clamp(0, 255).byte().permute(1, 2, 0).contiguous().numpy())


def jpeg(image: Image.Image, quality: int = 90) -> bytes:
    """A JPEG with colours at half the size, as cameras and web sites write them."""
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=quality)
    return stream.getvalue()


def caption(number: int) -> str:
    """Eight to sixteen words."""
    draw = np.random.default_rng(number)
    return " ".join(draw.choice(_WORDS, size=draw.integers(8, 17)))


def captions(count: int) -> Iterator[str]:
    """Of the first samples."""
    return map(caption, range(count))


def bytes_per_sample(shards: Iterable[Path], samples: int) -> int:
    """Of the shards, headers and padding included."""
    return sum(shard.stat().st_size for shard in shards) // samples
