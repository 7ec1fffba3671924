"""What `bridges bench data` measures beside: shards as webdataset reads them, or mapped."""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from webdataset.compat import WebDataset

from recipes.shard_index import shard_indexes

T = TypeVar("T")


def webdataset(shards: Sequence[Path]) -> Any:
    """webdataset's own pipeline over shards, in order."""
    return WebDataset([str(shard) for shard in shards], shardshuffle=False, empty_check=False)


def endless(epoch: Callable[[int], Iterable[T]]) -> Iterator[T]:
    """Epoch after epoch."""
    return itertools.chain.from_iterable(map(epoch, itertools.count()))


def raw_batches(shards: Sequence[Path], batch: int) -> Iterator[list[Any]]:
    """Lists of samples as their members' bytes; nothing is decoded."""
    return endless(lambda _: webdataset(shards).batched(batch, partial=False, collation_fn=list))


def photo_batches(
    shards: Sequence[Path],
    batch: int,
    tokenizer: Any,
    size: int,
    mean: Sequence[float],
    std: Sequence[float],
) -> Iterator[tuple[Tensor, Tensor, list[str]]]:
    """Pixels (b, 3, h, w), normalised one by one, and ids (b, 64), tokenised one by one; and keys.

    Pillow decodes, scales the shorter side to ``size`` and crops the middle, as CLIP does it, but
    leaner than Hugging Face's processor, which converts between numpy and Pillow on the way.
    """
    shift, scale = (torch.tensor(values)[:, None, None] for values in (mean, std))

    def prepared(sample: tuple[Image.Image, str, str]) -> tuple[Tensor, Tensor, str]:
        image, text, key = sample
        short = min(image.size)
        wide, high = (size * side // short for side in image.size)
        image = image.resize((wide, high), Image.Resampling.BICUBIC)
        left, top = (wide - size) // 2, (high - size) // 2
        image = image.crop((left, top, left + size, top + size))
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
        ids = tokenizer(
            text, max_length=64, padding="max_length", truncation=True, return_tensors="pt"
        )
        return (pixels - shift) / scale, ids["input_ids"][0], key

    def epoch(_: int) -> Iterable[tuple[Tensor, Tensor, list[str]]]:
        decoded = webdataset(shards).decode("pil").to_tuple("jpg", "txt", "__key__")
        return decoded.map(prepared).batched(batch, partial=False, collation_fn=_stacked)

    return endless(epoch)


def feature_batches(shards: Sequence[Path], batch: int) -> Iterator[Tensor]:
    """Features (b, p, d), of npy members as webdataset decodes them."""

    def epoch(_: int) -> Iterable[Tensor]:
        decoded = webdataset(shards).decode().to_tuple("npy")
        return decoded.batched(batch, partial=False, collation_fn=_stacked_arrays)

    return endless(epoch)


def mapped_batches(shards: Sequence[Path], batch: int, shape: tuple[int, int]) -> Iterator[Tensor]:
    """fp16 features (b, p, d), straight from mapped files: one copy each, and nothing checked."""
    values = shape[0] * shape[1]
    places = []
    for shard, index in zip(shards, shard_indexes(shards), strict=True):
        mapped = np.memmap(shard, np.uint8, "r")
        for sample in range(len(index)):
            start, size = index.members_of(sample)["npy"]
            places.append((mapped, start + size - 2 * values, start + size))

    def epoch(number: int) -> Iterable[Tensor]:
        order = np.random.default_rng(number).permutation(len(places))
        for start in range(0, len(places) - batch + 1, batch):
            stacked = np.empty((batch, *shape), np.float16)
            for row, place in enumerate(order[start : start + batch]):
                mapped, begin, end = places[place]
                stacked[row] = mapped[begin:end].view(np.float16).reshape(shape)
            yield torch.from_numpy(stacked)

    return endless(epoch)


def reread_from(shards: Sequence[Path], start: int, batch: int) -> list[str]:
    """Keys of the batch that begins at a sample, found as webdataset does: by reading up to it."""
    keys = webdataset(shards).slice(start, start + batch).to_tuple("__key__", "txt")
    return [key for key, _ in keys]


def _stacked(samples: Sequence[tuple[Tensor, Tensor, str]]) -> tuple[Tensor, Tensor, list[str]]:
    pixels, ids, keys = zip(*samples, strict=True)
    return torch.stack(pixels), torch.stack(ids), list(keys)


def _stacked_arrays(samples: Sequence[tuple[Any]]) -> Tensor:
    return torch.stack([torch.from_numpy(array) for (array,) in samples])
