"""The workloads of `bridges bench data`: samples on their way from shards to a training step.

All on one core. The shards are made, and read from the system's file cache on both sides.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property, partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bridges import VisionLanguageModel
from bridges.decode import DecodeMode
from recipes.batch import CaptionBatch, CaptionCollator
from recipes.bench_data_model import small_model
from recipes.bench_data_reference import (
    endless,
    feature_batches,
    mapped_batches,
    photo_batches,
    raw_batches,
    reread_from,
)
from recipes.bench_data_shards import MadeShards, bytes_per_sample
from recipes.loader import SizedLoader
from recipes.samples import CaptionDecoder, read_features
from recipes.stream import ShardStream
from recipes.workload import Side, Workload


@dataclass(frozen=True)
class Sizes:
    """Of the samples, and of the model that is trained on some.

    Attributes:
        photos: heights and widths.
        batch: samples of a step that reads.
        samples: in each set of shards.
        distinct: photos that differ.
        pixels: side of what the encoder reads.
        patches: of features that are read.
        dim: their width.
        epoch: samples of the epoch that is resumed.
        train_batch: samples of a training step.
        width: of the ViT (ViT-Ti/16 as it stands) and of the LM.
        layers: of the ViT; the LM has 2.
    """

    photos: tuple[tuple[int, int], ...] = ((480, 640), (1200, 1600))
    batch: int = 32
    samples: int = 256
    distinct: int = 8
    pixels: int = 224
    patches: int = 257
    dim: int = 1024
    epoch: int = 100_000
    train_batch: int = 16
    width: int = 192
    layers: int = 12


def data_workloads(
    device: torch.device, sizes: Sizes = Sizes()
) -> dict[str, Callable[[], Workload]]:
    """All workloads by name; pixels are normalised, and the model trained, on the device."""
    bench = _Bench(sizes, device)
    modes: tuple[DecodeMode, ...] = ("fast", "exact")
    photos = {
        f"photos-{width}x{height}-{decode}": partial(bench.photos, (height, width), decode)
        for height, width in sizes.photos
        for decode in modes
    }
    return photos | {
        "photos-raw-tar": bench.raw_tar,
        "features-webdataset": partial(bench.features, "webdataset"),
        "features-mapped": partial(bench.features, "mapped"),
        "train-features-online": bench.training,
        "resume": bench.resuming,
    }


class _Bench:
    def __init__(self, sizes: Sizes, device: torch.device) -> None:
        self.sizes, self.device = sizes, device
        self.shards = MadeShards()
        self.stored = cache(self._stored)

    @cached_property
    def model(self) -> VisionLanguageModel:
        sizes = self.sizes
        return small_model(sizes.pixels, sizes.width, sizes.layers).to(self.device)

    def photos(self, size: tuple[int, int], decode: DecodeMode) -> Workload:
        """A batch of photos with tokens, normalised on the device; beside plain webdataset."""
        made = self._photos(size)
        fast = self.model.vision.fast_preprocess
        assert fast is not None
        tokenizer = self.model.lm.tokenizer
        ours = partial(self._batches, made, decode)
        plain = partial(photo_batches, made, self.sizes.batch, tokenizer, self.sizes.pixels)

        def normalised(batch: CaptionBatch) -> Tensor:
            pixels = batch.images.to(self.device)
            return fast.normalise(pixels) if pixels.dtype == torch.uint8 else pixels

        def checks(_: Mapping[str, int]) -> dict[str, float | None]:
            batch = next(ours(shuffle=False))
            theirs, _ids, keys = next(plain(fast.mean, fast.std))
            assert [sample["key"] for sample in batch.samples] == keys
            scale = torch.tensor(fast.std)[:, None, None] / fast.rescale
            levels = (normalised(batch)[:, 0].cpu() - theirs).mul(scale).abs()
            return {
                "max_abs_loss_diff": levels.mean().item() / 255,
                "max_rel_grad_diff": None,
                "max_pixel_diff_of_255": levels.max().item(),
                "mean_pixel_diff_of_255": levels.mean().item(),
            }

        mine, theirs = ours(), plain(fast.mean, fast.std)
        return self._workload(
            f"photos-{size[1]}x{size[0]}-{decode}",
            self._shapes(made, pixels=self.sizes.pixels, decode=decode),
            lambda: normalised(next(mine)),
            lambda: next(theirs)[0].to(self.device),
            checks,
        )

    def raw_tar(self) -> Workload:
        """The first of them, fast, beside webdataset's reader alone, which decodes nothing."""
        size = self.sizes.photos[0]
        theirs = raw_batches(self._photos(size), self.sizes.batch)
        fast = self.photos(size, "fast")
        return self._workload(
            "photos-raw-tar", fast.shapes, fast.ours.step, lambda: next(theirs), _nothing
        )

    def features(self, beside: str) -> Workload:
        """A batch of features, every byte of it checked; beside others, which check nothing."""
        shape = (self.sizes.patches, self.sizes.dim)
        made = self.stored(shape)
        ours = partial(self._feature_batches, made)
        ways = {
            "webdataset": partial(feature_batches, made, self.sizes.batch),
            "mapped": partial(mapped_batches, made, self.sizes.batch, shape),
        }

        def checks(_: Mapping[str, int]) -> dict[str, float | None]:
            mine, stored = next(ours(shuffle=False)), next(feature_batches(made, self.sizes.batch))
            found = (mine.float() - stored.float()).abs().max().item()
            return {"max_abs_loss_diff": found, "max_rel_grad_diff": None}

        mine, theirs = ours(), ways[beside]()
        shapes = self._shapes(made, patches=shape[0], dim=shape[1])
        name = f"features-{beside}"
        return self._workload(name, shapes, lambda: next(mine), lambda: next(theirs), checks)

    def training(self) -> Workload:
        """Forward and backward of a bridge, from stored features and from photos."""
        made, size = self._photos(self.sizes.photos[0]), self.sizes.train_batch
        stored = self.shards.features("encoded", self._encoded(made))

        def step(batches: Iterator[CaptionBatch]) -> Tensor:
            batch = next(batches).to(self.device)
            text, vision = batch.text, batch.features(self.model.vision)
            loss = self.model(text.input_ids, text.attention_mask, text.labels, vision).loss
            loss.backward()
            return loss.detach()

        def checks(_: Mapping[str, int]) -> dict[str, float | None]:
            losses, gradients = [], []
            for shards in (stored, made):
                self.model.zero_grad()
                losses.append(step(self._batches(shards, "fast", size, shuffle=False)).item())
                grads = [p.grad for p in self.model.bridge.parameters() if p.grad is not None]
                gradients.append(torch.cat([grad.flatten() for grad in grads]))
            off = (gradients[0] - gradients[1]).abs().max() / gradients[1].abs().max()
            return {
                "max_abs_loss_diff": abs(losses[0] - losses[1]),
                "max_rel_grad_diff": off.item(),
            }

        mine, theirs = (self._batches(shards, "fast", size) for shards in (stored, made))
        shapes = self._shapes(made, samples=size, width=self.sizes.width, layers=self.sizes.layers)
        return self._workload(
            "train-features-online",
            shapes,
            lambda: step(mine),
            lambda: step(theirs),
            checks,
            before=self.model.zero_grad,
        )

    def resuming(self) -> Workload:
        """From the state at the end of an epoch to its last batch; beside reading up to it."""
        total, size = self.sizes.epoch, self.sizes.batch
        made = self.shards.texts(total)
        before = (total // size - 1) * size

        def resumed() -> list[str]:
            stream = ShardStream(made, _key, seed=0, shuffle=True)
            stream.set_epoch(3)
            loader: Any = SizedLoader(stream, size, _as_it_is)
            state = {"batches": before // size, "samples": before}
            loader.load_state_dict(loader.state_dict() | state)
            return next(iter(loader))

        def checks(_: Mapping[str, int]) -> dict[str, float | None]:
            stream = ShardStream(made, _key, seed=0, shuffle=True)
            stream.set_epoch(3)
            expected = list(islice(stream.iterate(), before, before + size))
            return {
                "max_abs_loss_diff": float(resumed() != expected),
                "max_rel_grad_diff": None,
            }

        shapes = self._shapes(made, count=total, samples=total)
        reread = partial(reread_from, made, before, size)
        return self._workload("resume", shapes, resumed, reread, checks)

    def _photos(self, size: tuple[int, int]) -> list[Path]:
        return self.shards.photos(*size, self.sizes.samples, self.sizes.distinct)

    def _stored(self, shape: tuple[int, int]) -> list[Path]:
        random = torch.Generator().manual_seed(0)
        features = (torch.randn(shape, generator=random) for _ in range(self.sizes.samples))
        return self.shards.features("features", features)

    @torch.no_grad()
    def _encoded(self, made: Sequence[Path]) -> Iterator[Tensor]:
        decode = CaptionDecoder(self.model.vision.image_decoder("fast"), random_caption=False)
        for sample in ShardStream(made, decode, seed=0, shuffle=False).iterate():
            yield self.model.vision.encode(sample["image"][None, None]).patches[0, 0].cpu()

    def _batches(
        self,
        made: Sequence[Path],
        decode: DecodeMode,
        size: int | None = None,
        *,
        shuffle: bool = True,
    ) -> Iterator[Any]:
        collate = CaptionCollator.of(self.model)
        decoder = collate.decoder(self.model.vision.image_decoder(decode), training=shuffle)
        stream = ShardStream(made, decoder, seed=0, shuffle=shuffle)
        return endless(partial(_epoch, stream, size or self.sizes.batch, collate))

    def _feature_batches(self, made: Sequence[Path], *, shuffle: bool = True) -> Iterator[Tensor]:
        stream = ShardStream(made, partial(read_features, ndim=2), seed=0, shuffle=shuffle)
        return endless(partial(_epoch, stream, self.sizes.batch, torch.stack))

    def _shapes(
        self, made: Sequence[Path], count: int | None = None, **more: Any
    ) -> dict[str, Any]:
        size = bytes_per_sample(made, count or self.sizes.samples)
        return {"samples": self.sizes.batch, "threads": 1, "bytes_per_sample": size, **more}

    def _workload(
        self,
        name: str,
        shapes: dict[str, Any],
        ours: Callable[[], object],
        reference: Callable[[], object],
        checks: Callable[[Mapping[str, int]], Mapping[str, float | None]],
        before: Callable[[], object] = lambda: None,
    ) -> Workload:
        mine, theirs = (Side(partial(_on_one_core, side), before) for side in (ours, reference))
        return Workload(name, shapes, "fp32", mine, theirs, checks)


def _epoch(stream: ShardStream[Any], size: int, collate: Any, number: int) -> Any:
    stream.set_epoch(number)
    return SizedLoader(stream, size, collate)


def _on_one_core(step: Callable[[], object]) -> object:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return step()
    finally:
        torch.set_num_threads(threads)


def _nothing(_: Mapping[str, int]) -> dict[str, float | None]:
    """For a reference that makes nothing to compare."""
    return {"max_abs_loss_diff": 0.0, "max_rel_grad_diff": None}


def _key(raw: Mapping[str, Any]) -> str:
    return raw["__key__"]


def _as_it_is(keys: Sequence[str]) -> Any:
    return list(keys)
