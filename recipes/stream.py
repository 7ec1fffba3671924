"""Shards read back as samples, in an order that is a function of (seed, epoch) alone.

The shards, permuted by (seed, epoch), are laid end to end as one line of ``total_samples``
samples. ``C`` consumers (ranks × loader workers) cut it into ``C`` stretches of equal length, so
that no rank ever waits for another and none finds no data, however few shards there are; the
fewer than ``C`` samples left over differ from epoch to epoch. Whole shards per consumer would
leave over up to a shard each, and none at all when shards are fewer than consumers.
"""

from __future__ import annotations

import itertools
import logging
import os
import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
import webdataset as wds
from torch.utils.data import IterableDataset, get_worker_info

from recipes.samples import MEMBERS, SampleError, is_member
from recipes.shard_files import ShardError, expand_shards, read_samples, sample_offsets

_PASSED_OVER = frozenset(("cls",))

logger = logging.getLogger(__name__)
T = TypeVar("T")


class ShardStream(IterableDataset[T]):
    """Samples of shards, split over ranks and workers, decoded by ``decode``.

    What a consumer yields depends on (seed, epoch, ranks, workers) and nothing else; call
    `set_epoch` before each epoch. ``len()`` is not defined, for it would depend on the
    loader's workers: see `samples_per_consumer` and `num_batches`.

    Args:
        shards: As for `expand_shards`.
        decode: Turns a raw sample into an item. A raw sample maps each extension to the member's
            bytes, and ``__key__``, ``__shard__`` and ``__seed__`` (a string of seed, epoch, shard
            and key: the seed for augmentation that survives a resume) to strings. A ValueError
            it raises is a bad sample; any other exception a bug.
        seed: Of the order.
        shuffle: False gives the samples in the order of the shards, the same every epoch.
        shuffle_buffer: Raw samples held per consumer for shuffling; its memory is this times the
            size of a sample.
        on_error: ``raise`` stops at a bad sample; ``skip`` counts it in ``skipped`` (of this
            process), logs it, and fills the epoch up with the consumer's own first samples.

    Raises:
        ShardError: As `expand_shards`; a shard that is truncated, has a key twice; no
            samples at all.
    """

    def __init__(
        self,
        shards: str | Path | Sequence[str | Path],
        decode: Callable[[dict[str, Any]], T],
        *,
        seed: int,
        shuffle: bool,
        shuffle_buffer: int = 1000,
        on_error: Literal["skip", "raise"] = "raise",
    ) -> None:
        super().__init__()
        if on_error not in ("skip", "raise"):
            raise ValueError(f"on_error is {on_error!r}; expected 'skip' or 'raise'")
        if shuffle_buffer < 1:
            raise ValueError(f"shuffle_buffer is {shuffle_buffer}; expected at least 1")
        self.shards = expand_shards(shards)
        self.decode = decode
        self.seed = seed
        self.shuffle = shuffle
        self.shuffle_buffer = shuffle_buffer
        self.on_error = on_error
        self.epoch = 0
        self.skipped: Counter[str] = Counter()
        self._noted: set[tuple[str, str, str]] = set()
        self._skip = 0
        self._ranks: tuple[int, int] | None = None
        self._offsets = [sample_offsets(shard) for shard in self.shards]
        self.total_samples = sum(len(offsets) for offsets in self._offsets)
        if not self.total_samples:
            raise ShardError(f"no samples in {len(self.shards)} shards, e.g. {self.shards[0]}")

    def set_epoch(self, epoch: int) -> None:
        """Chooses the epoch's order, and takes back `skip` if it is another epoch."""
        if epoch != self.epoch:
            self._skip = 0
        self.epoch = epoch

    def skip(self, items: int) -> None:
        """Starts this epoch after its first ``items`` items, for every consumer.

        They are not decoded, unless ``on_error`` is ``skip``: which of them count is then only
        known by decoding.
        """
        if items < 0:
            raise ValueError(f"cannot skip {items} items; expected 0 or more")
        self._skip = items

    def samples_per_consumer(self, world_size: int = 1, num_workers: int = 0) -> int:
        """How many items each consumer yields in an epoch; the same for all of them.

        Raises:
            ShardError: There are fewer samples than consumers.
        """
        consumers = world_size * max(num_workers, 1)
        if self.total_samples < consumers:
            raise ShardError(
                f"{self.total_samples} samples for {consumers} consumers ({world_size} ranks × "
                f"{max(num_workers, 1)} workers); expected at least one each: use fewer workers"
            )
        return self.total_samples // consumers

    def num_batches(
        self,
        batch_size: int,
        *,
        world_size: int = 1,
        num_workers: int = 0,
        drop_last: bool = False,
    ) -> int:
        """Batches a DataLoader yields per rank and epoch; every worker ends with its own rest."""
        samples = self.samples_per_consumer(world_size, num_workers)
        whole, rest = divmod(samples, batch_size)
        return (whole + (rest > 0 and not drop_last)) * max(num_workers, 1)

    def __iter__(self) -> Iterator[T]:
        rank, world_size = self._ranks or _distributed_ranks()
        info = get_worker_info()
        worker, num_workers = (info.id, info.num_workers) if info else (0, 0)
        return self.iterate(rank, world_size, worker, num_workers)

    def __getstate__(self) -> dict[str, Any]:
        # A spawned worker has no process group of its own to ask.
        ranks = _distributed_ranks() if _in_process_group() else self._ranks
        return {**self.__dict__, "_ranks": ranks}

    def iterate(
        self, rank: int = 0, world_size: int = 1, worker: int = 0, num_workers: int = 0
    ) -> Iterator[T]:
        """The items of one consumer; ``iter()`` fills in which one this process is."""
        length = self.samples_per_consumer(world_size, num_workers)
        if self._skip > length:
            raise ValueError(f"skip({self._skip}) in an epoch of {length} items per consumer")
        consumer = rank * max(num_workers, 1) + worker
        left_over = self.total_samples - length * world_size * max(num_workers, 1)
        if left_over and not consumer:
            logger.info("epoch %d: %d samples left over, %d each", self.epoch, left_over, length)
        if self.on_error == "skip":
            return self._iterate_good(consumer, length)
        raw = itertools.islice(self._raw_samples(consumer, length), self._skip, None)
        # Not map(): a StopIteration within decode would end it, the rest silently lost.
        return (self._decode(sample) for sample in raw)

    def _iterate_good(self, consumer: int, length: int) -> Iterator[T]:
        done = 0
        while True:
            before = done
            for raw in self._raw_samples(consumer, length):
                try:
                    item = self._decode(raw)
                except SampleError as error:
                    self._note(error, raw)
                    continue
                done += 1
                if done > self._skip:
                    yield item
                if done == length:
                    return
            if done == before:
                raise ShardError(
                    f"none of the {length} samples of consumer {consumer} could be decoded: "
                    f"{dict(self.skipped)}; run with on_error='raise' to see the first"
                )
            logger.warning(
                "epoch %d, consumer %d: %d of %d samples were skipped; its first ones come again",
                *(self.epoch, consumer, length - done, length),
            )

    def _raw_samples(self, consumer: int, length: int) -> Iterator[dict[str, Any]]:
        """The consumer's stretch of the line, through its shuffle buffer."""
        start, order = consumer * length, list(range(len(self.shards)))
        if not self.shuffle:
            return self._stretch(start, length, order)
        rng = random.Random(f"{self.seed}/{self.epoch}")
        rng.shuffle(order)
        # Without this turn, a consumer would see the same part of a single shard for ever.
        start += rng.randrange(self.total_samples)
        buffer_rng = random.Random(f"{self.seed}/{self.epoch}/{consumer}")
        size = self.shuffle_buffer
        shuffle = wds.filters.shuffle(size, initial=size, rng=buffer_rng)
        return shuffle(self._stretch(start, length, order))

    def _stretch(self, start: int, length: int, order: list[int]) -> Iterator[dict[str, Any]]:
        """``length`` samples from position ``start`` of the line, which closes to a ring."""
        position = start % self.total_samples
        for index in itertools.cycle(order):
            offsets = self._offsets[index]
            if position >= len(offsets):
                position -= len(offsets)
                continue
            take = min(length, len(offsets) - position)
            samples = read_samples(self.shards[index], offsets[position])
            for _ in range(take):
                sample = next(samples, None)
                if sample is None:
                    raise ShardError(f"{self.shards[index]} has changed while in use; start again")
                yield sample
            length -= take
            position = 0
            if not length:
                return

    def _decode(self, sample: dict[str, Any]) -> T:
        shard, key = Path(sample["__url__"]), sample["__key__"]
        raw = {name: data for name, data in sample.items() if is_member(name)}
        refused = [
            name
            for name in sample
            if name not in raw and name not in _PASSED_OVER and not name.startswith("__")
        ]
        if refused:
            error = SampleError(
                f"{shard}: sample {key!r} has members {refused}; only {MEMBERS} are read (nothing "
                "is unpickled; keys have no dots): rewrite the shard without them",
                kind="refused member",
            )
            if self.on_error == "raise":
                raise error
            self._note(error, sample)
        seed = f"{self.seed}/{self.epoch}/{shard.name}/{key}"
        raw |= {"__key__": key, "__shard__": str(shard), "__seed__": seed}
        try:
            return self.decode(raw)
        except SampleError:
            raise
        except ValueError as error:
            raise SampleError(f"{shard}: sample {key!r}: {error}") from error

    def _note(self, error: SampleError, sample: Mapping[str, Any]) -> None:
        """Counts and logs a bad sample, once however often it comes round."""
        note = (sample["__url__"], sample["__key__"], error.kind)
        if note not in self._noted:
            self._noted.add(note)
            self.skipped[error.kind] += 1
            logger.warning("skipped: %s: %s", error.kind, error)


def _in_process_group() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _distributed_ranks() -> tuple[int, int]:
    """(rank, world size) of this process; (0, 1) when it is on its own."""
    if _in_process_group():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    if world_size > 1 and "RANK" not in os.environ:
        raise ValueError(
            f"WORLD_SIZE is {world_size} but RANK is not set: start the process group, or set "
            f"both, before reading, or every rank would read the same samples"
        )
    return int(os.environ.get("RANK", 0)) if world_size > 1 else 0, world_size
