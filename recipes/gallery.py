"""Encoded pictures with their texts, and how alike each picture and each text are."""

import base64
import io
import itertools
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from bridges import VisionEncoder, VisionFeatures
from bridges.images import open_image
from recipes.cache import is_cached
from recipes.samples import decode_caption_sample, image_extension
from recipes.stream import ShardStream


@dataclass(frozen=True)
class Gallery:
    """Encoded pictures and their texts.

    Attributes:
        patches: (N, p, d), on the CPU, as the encoder or the cache gives them.
        grid: rows and columns of the patches.
        texts: M of them.
        owners: long (M,), the picture that each text describes.
        names: of the N pictures, see `name_of`.
    """

    patches: Tensor
    grid: tuple[int, int]
    texts: list[str]
    owners: Tensor
    names: list[str]

    @classmethod
    def collect(
        cls, samples: Iterable[Mapping[str, Any]], vision: VisionEncoder, batch_size: int
    ) -> "Gallery":
        """Encodes pictures, unless they come as features.

        Args:
            samples: each with "captions", and "image" (preprocessed) or "features" (p, d).
            vision: the encoder.
            batch_size: pictures encoded together.

        Raises:
            ValueError: fewer than two pictures.
        """
        patches: list[Tensor] = []
        texts: list[str] = []
        owners: list[int] = []
        names: list[str] = []
        samples = iter(samples)
        while batch := list(itertools.islice(samples, batch_size)):
            for sample in batch:
                texts += sample["captions"]
                owners += [len(names)] * len(sample["captions"])
                names.append(sample.get("name", ""))
            if "features" in batch[0]:
                patches.append(torch.stack([sample["features"] for sample in batch]))
            else:
                pixels = torch.stack([sample["image"] for sample in batch])
                patches.append(vision.encode(pixels[:, None]).patches[:, 0].cpu())
        if len(names) < 2:
            raise ValueError(
                f"found {len(names)} pictures; expected at least 2: there is nothing to rank"
            )
        return cls(torch.cat(patches), vision.shape.grid, texts, torch.tensor(owners), names)

    def features(self, rows: slice, device: torch.device) -> VisionFeatures:
        """Some of the pictures, one a sample."""
        patches = self.patches[rows, None].to(device).float()
        mask = torch.ones(patches.shape[:2], dtype=torch.bool, device=device)
        return VisionFeatures(patches, mask, self.grid)


@dataclass(frozen=True)
class Scores:
    """Every picture against every text; a higher score ranks first.

    Attributes:
        itc: (N, M).
        itm_texts: (N, M), texts for a picture after re-ranking by ITM.
        itm_images: (M, N), pictures for a text after re-ranking.
    """

    itc: Tensor
    itm_texts: Tensor
    itm_images: Tensor


def picture_stream(shards: Sequence[Path], vision: VisionEncoder) -> ShardStream[dict[str, Any]]:
    """Samples for `Gallery.collect`, in order; bad ones are counted and left out."""

    def decode(raw: Mapping[str, Any]) -> dict[str, Any]:
        name = name_of(raw, shards)
        return decode_caption_sample(raw, transform=vision.image_decoder()) | {"name": name}

    return ShardStream(
        list(shards), decode, seed=0, shuffle=False, on_error="skip", max_bad_fraction=1.0
    )


def name_of(raw: Mapping[str, Any], shards: Sequence[Path]) -> str:
    """A picture's name, the same in the shards and in their feature cache.

    A key alone is unique in its shard only.
    """
    return f"{[str(shard) for shard in shards].index(raw['__shard__']):05d}-{raw['__key__']}"


def thumbnails(shards: Sequence[Path], wanted: Mapping[str, int], side: int) -> dict[int, str]:
    """Small JPEGs as data URIs; none where the shards hold features only.

    Args:
        shards: of the pictures.
        wanted: names, and what the URIs are called by.
        side: pixels of the longer side.
    """
    return {
        wanted[name]: thumbnail(open_image(raw[image_extension(raw)]), side)
        for name, raw in with_pictures(shards, wanted)
    }


def with_pictures(
    shards: Sequence[Path], names: Collection[str]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Raw samples of some names, once each; none where the shards hold features only."""
    if any(is_cached(shard) for shard in shards):
        return
    missing = set(names)
    for raw in ShardStream(
        list(shards), dict, seed=0, shuffle=False, on_error="skip", max_bad_fraction=1.0
    ).iterate():
        if not missing:
            return
        name = name_of(raw, shards)
        if name in missing:
            missing.remove(name)
            yield name, raw


def thumbnail(image: Image.Image, side: int) -> str:
    """A picture as data URI, made small in place.

    Args:
        image: RGB.
        side: pixels of the longer side.
    """
    image.thumbnail((side, side))
    return uri(image)


def uri(image: Image.Image) -> str:
    """A picture as data URI."""
    jpg = io.BytesIO()
    image.save(jpg, "JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(jpg.getvalue()).decode()}"
