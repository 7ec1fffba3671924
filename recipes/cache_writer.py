"""A frozen encoder's features written as shards, shard by shard, on any number of ranks."""

from __future__ import annotations

import itertools
import logging
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from rich.progress import Progress, TextColumn
from torch import Tensor
from webdataset.writer import TarWriter

from bridges import VisionEncoder
from bridges.decode import DecodeMode
from bridges.files import remove_orphans, staged
from recipes.bad_samples import BadSample
from recipes.cache_form import CacheForm
from recipes.cache_set import FeatureSet
from recipes.features import Storage, encode_features
from recipes.samples import SampleError
from recipes.shard_index import shard_indexes
from recipes.shard_store import drop_index
from recipes.shard_writer import encode_sample
from recipes.stream import ShardStream

MAX_THREADS = 8
"""That decode pictures ahead of the encoder. Each may hold the frames of a whole clip."""

logger = logging.getLogger(__name__)
In = TypeVar("In")
Out = TypeVar("Out")


@dataclass(frozen=True)
class Encoding:
    """How the pictures of samples become features.

    Attributes:
        encoder: frozen.
        form: of the samples. Single pictures give features (p, d); documents and clips give those
            of all their pictures or frames, (n, p, d).
        dtype: how features are kept.
        decode: how pixels are made.
        batch_size: pictures encoded together.
        on_error: stop at a sample that cannot be read, or log it with shard and key and leave it
            out.
        max_bad_fraction: what stops all the same: more bad samples than this, of those seen.
    """

    encoder: VisionEncoder
    form: CacheForm
    dtype: Storage = "fp16"
    decode: DecodeMode = "exact"
    batch_size: int = 32
    on_error: Literal["raise", "skip"] = "raise"
    max_bad_fraction: float = 1.0


@dataclass(frozen=True)
class Written:
    """What a rank has done: shards, pictures or frames, and the seconds it took."""

    shards: int = 0
    pictures: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class _Sample:
    """A sample that was read: what is encoded, and the members that stand beside the features."""

    shard: str
    key: str
    pixels: list[Tensor]
    members: dict[str, Any]


def write_features(
    features: FeatureSet, encoding: Encoding, rank: int = 0, world_size: int = 1
) -> Written:
    """Writes the shards of a rank's share that are not there yet; each whole, or not at all.

    A shard's bytes depend on its source alone: batches end where it does. So any number of ranks
    writes the same set, and what was finished before a kill is kept.

    Args:
        features: begun, see `FeatureSet.begin`.
        encoding: how.
        rank: shard i belongs to rank ``i % world_size``.
        world_size: number of ranks.

    Raises:
        ValueError: a bad sample, where they are not skipped; too many, where they are.
    """
    remove_orphans(features.folder)
    share = itertools.islice(features.sources.items(), rank, None, world_size)
    todo = {name: path for name, path in share if not (features.folder / name).is_file()}
    total = faults = 0
    for path in todo.values():
        (index,) = shard_indexes([path])
        total, faults = total + len(index), faults + len(index.faults)
    pictures, started = 0, time.perf_counter()
    columns = (*Progress.get_default_columns(), TextColumn("{task.fields[rate]}"))
    with Progress(*columns, transient=True, disable=rank != 0) as progress:
        task = progress.add_task("encoding pictures", total=total, rate="")

        def shown(samples: Iterable[_Sample]) -> Iterator[_Sample]:
            nonlocal pictures
            for sample in samples:
                pictures += len(sample.pixels)
                rate = pictures / (time.perf_counter() - started)
                progress.update(task, advance=1, rate=f"{rate:,.0f} pictures/s")
                yield sample

        # Without a good sample there is no stream, but one that raises.
        raised = faults and encoding.on_error == "raise"
        work = _Work(list(todo.values()), encoding) if total or raised else None
        pending = iter(todo.items())
        read = itertools.groupby(shown(work.read()) if work else (), key=lambda s: s.shard)
        for shard, own in read:
            # A shard none of whose samples was kept has features of none.
            for name, path in pending:
                found = own if str(path) == shard else ()
                _write_shard(features.folder / name, work.encode(found) if work else ())
                if str(path) == shard:
                    break
        for name, _ in pending:
            _write_shard(features.folder / name, ())
    return Written(len(todo), pictures, time.perf_counter() - started)


class _Work:
    """Samples of some shards, read by threads and encoded in order.

    Args:
        shards: of pictures.
        encoding: how.
    """

    def __init__(self, shards: Sequence[Path], encoding: Encoding) -> None:
        self.encoding = encoding
        self._decoder = encoding.encoder.image_decoder(encoding.decode)
        self.stream: ShardStream[dict[str, Any]] = ShardStream(
            list(shards),
            dict,
            seed=0,
            shuffle=False,
            on_error=encoding.on_error,
            max_bad_fraction=encoding.max_bad_fraction,
        )

    def read(self) -> Iterator[_Sample]:
        """The good samples, in order."""
        most, cut = self.encoding.form.most, 0
        for found in _ahead(self._decode, self.stream.iterate()):
            if isinstance(found, BadSample):
                self._leave_out(found)
                continue
            if most is not None and len(found.pixels) > most:
                found, cut = replace(found, pixels=found.pixels[:most]), cut + 1
            yield found
        if cut:
            logger.warning(
                "%d of %d samples have more than %d pictures or frames; only the first are cached",
                *(cut, self.stream.total_samples, most),
            )

    def encode(self, samples: Iterable[_Sample]) -> Iterator[dict[str, Any]]:
        """Samples as they are written, features in the place of pictures."""
        encoder, size = self.encoding.encoder, self.encoding.batch_size
        for group in _groups(samples, size):
            pixels = [picture for sample in group for picture in sample.pixels]
            patches = _patches(pixels, encoder, size)
            for sample in group:
                own = [next(patches) for _ in sample.pixels]
                shape = encoder.shape
                stacked = torch.stack(own) if own else torch.zeros(0, shape.num_patches, shape.dim)
                found = stacked if self.encoding.form.name else own[0]
                try:
                    member, data = encode_features(found, self.encoding.dtype)
                except ValueError as error:
                    problem = f"{sample.shard}: sample {sample.key!r}: {error}"
                    self._leave_out(
                        BadSample(sample.shard, sample.key, "features not finite", problem)
                    )
                    continue
                yield {"__key__": sample.key, member: data, **sample.members}

    def _decode(self, raw: Mapping[str, Any]) -> _Sample | BadSample:
        shard, key = raw["__shard__"], raw["__key__"]
        try:
            pixels, members = self.encoding.form.read(raw, self._decoder)
            # What cannot be written is a bad sample, too: later it would end its whole shard.
            encode_sample({"__key__": key, "npy": b"", **members})
        except SampleError as error:
            return BadSample(shard, key, error.kind, str(error))
        except (ValueError, RecursionError) as error:
            problem = f"{shard}: sample {key!r}: {error}"
            return BadSample(shard, key, "unreadable sample", problem)
        return _Sample(shard, key, pixels, members)

    def _leave_out(self, bad: BadSample) -> None:
        if self.encoding.on_error == "raise":
            raise SampleError(bad.problem, kind=bad.kind)
        self.stream.note([bad], 0)


def _ahead(function: Callable[[In], Out], items: Iterable[In]) -> Iterator[Out]:
    """Results in the order of the items, a few of them computed ahead by threads."""
    threads = min(MAX_THREADS, os.cpu_count() or 1)
    waiting: deque[Future[Out]] = deque()
    pool = ThreadPoolExecutor(threads)
    try:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > 2 * threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _write_shard(target: Path, samples: Iterable[Mapping[str, Any]]) -> None:
    """One shard and its index, as `recipes.shard_writer` writes them."""
    drop_index(target)  # of a shard that was deleted because it is damaged
    with staged(target) as path, path.open("wb") as file:
        # Time and owner fixed, or the same samples would give other bytes; encoder=False, or
        # webdataset would pickle some types; pax, for names above 100 bytes.
        tar = TarWriter(file, encoder=False, mtime=0, format="PAX_FORMAT")
        for sample in samples:
            tar.write(encode_sample(sample))
        tar.close()
    shard_indexes([target])


def _groups(samples: Iterable[_Sample], size: int) -> Iterator[list[_Sample]]:
    """Samples together that have about ``size`` pictures; one that has more stands alone."""
    group: list[_Sample] = []
    count = 0
    for sample in samples:
        if group and count + len(sample.pixels) > size:
            yield group
            group, count = [], 0
        group.append(sample)
        count += max(1, len(sample.pixels))
    if group:
        yield group


def _patches(pixels: Sequence[Tensor], encoder: VisionEncoder, size: int) -> Iterator[Tensor]:
    """Features (p, d) of each picture, on the CPU, encoded ``size`` at a time."""
    for at in range(0, len(pixels), size):
        patches = encoder.encode(torch.stack(list(pixels[at : at + size]))[:, None]).patches
        yield from patches[:, 0].cpu()
