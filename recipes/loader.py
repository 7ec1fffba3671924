"""Batches of an epoch, from any place in it on."""

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader

from recipes.bad_samples import BadSample
from recipes.batch import Batch
from recipes.stream import Read, ShardStream


class SizedLoader:
    """One rank's batches of an epoch: a DataLoader that knows its length and its place.

    A step's batches on all ranks together are the next ``ranks × batch_size`` samples of the
    epoch, whichever worker makes them. So every rank has as many steps, a run that is resumed
    goes on with the very next sample, and one that is resumed on another number of ranks, too.
    Lightning saves and restores the state of a loader that has one.

    Args:
        stream: the samples, its epoch set.
        batch_size: per rank.
        collate_fn: decoded samples -> a batch; in a worker, if there are any.
        num_workers: processes that read and decode.
        drop_last: leave out what would be no whole batch on every rank; else the last batches are
            smaller, and only what is less than a sample for every rank is left out.
        pin_memory: put batches into page-locked memory.
    """

    def __init__(
        self,
        stream: ShardStream[Any],
        batch_size: int,
        collate_fn: Callable[[Sequence[Any]], Batch],
        *,
        num_workers: int = 0,
        drop_last: bool = True,
        pin_memory: bool = False,
    ) -> None:
        self.stream = stream
        self.batch_size = batch_size
        self.drop_last = drop_last
        self.rank, self.world_size = distributed_ranks()
        self._options: dict[str, Any] = {
            "collate_fn": _Reads(collate_fn),
            "num_workers": num_workers,
            "pin_memory": pin_memory,
        }
        self.epoch = stream.epoch
        self._begin(0, 0)

    def __len__(self) -> int:
        return self._batches_before + self._left()

    def __iter__(self) -> Iterator[Batch]:
        if self._begun:
            self.go_to(0)
        self._begun = True
        places = (self._places(step) for step in range(self._left()))
        # Of its own: the loader draws its workers' seeds, and would else draw them from the
        # numbers that the model's dropout is to have.
        generator = torch.Generator().manual_seed(self.epoch)
        loader: DataLoader[Any] = DataLoader(
            self.stream,
            batch_sampler=places,  # pyright: ignore[reportArgumentType]
            generator=generator,
            **self._options,
        )
        before, first = self._batches_before, self._samples_before
        for step, (batch, bad) in enumerate(loader):
            self.stream.note(bad, len(batch))
            self.batches = before + step + 1
            self.samples = min(first + (step + 1) * self._stride(), self.stream.total_samples)
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """The epoch, the batches and samples of it (of all ranks) handed out, and its order."""
        done = {"batches": self.batches, "samples": self.samples}
        return {"epoch": self.epoch, **done, **self.stream.shape()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Starts the epoch after the samples that are done; another epoch starts at its start.

        Raises:
            ValueError: the checkpoint belongs to a mixture, to other shards or to another order:
                places in it mean nothing here.
        """
        if "sources" in state:
            raise ValueError(
                f"found a checkpoint of a mixture of {list(state['sources'])}; expected one of a "
                "single source: resume with the data_class that the run began with"
            )
        shape = self.stream.shape()
        other = {k: state.get(k) for k in shape if state.get(k) != shape[k]}
        if other:
            expected = {k: shape[k] for k in other}
            raise ValueError(
                f"found a checkpoint of data with {other}; expected {expected}: resume with the "
                "shards, unchanged, and with the data.seed and data.shuffle_buffer that the run "
                "began with; in another order its place in the epoch means nothing"
            )
        if state["epoch"] == self.epoch:
            self._begin(state["batches"], state["samples"])

    def go_to(self, batches: int) -> None:
        """Starts the epoch after so many of this loader's batches."""
        self._begin(batches, batches * self._stride())

    def _begin(self, batches: int, samples: int) -> None:
        self._batches_before, self._samples_before = batches, samples
        self.batches, self.samples = batches, samples
        self._begun = False

    def _stride(self) -> int:
        return self.batch_size * self.world_size

    def _left(self) -> int:
        left = self.stream.total_samples - self._samples_before
        if self.drop_last:
            return left // self._stride()
        return -(-(left // self.world_size) // self.batch_size)

    def _places(self, step: int) -> range:
        """Positions of this rank's samples in the step, counted from where the loader began."""
        start = self._samples_before + step * self._stride()
        left = self.stream.total_samples - start
        size = min(self.batch_size, left // self.world_size)
        return range(start + self.rank * size, start + (self.rank + 1) * size)


@dataclass(frozen=True)
class _Reads:
    """Collates what a stream read, and hands on what it passed over."""

    collate: Callable[[Sequence[Any]], Batch]

    def __call__(self, reads: Sequence[Read[Any]]) -> tuple[Batch, list[BadSample]]:
        bad = [bad for read in reads for bad in read.bad]
        return self.collate([read.item for read in reads]), bad


def distributed_ranks() -> tuple[int, int]:
    """(rank, world size) of this process; (0, 1) when it is on its own."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    if world_size > 1 and "RANK" not in os.environ:
        raise ValueError(
            f"WORLD_SIZE is {world_size} but RANK is not set: start the process group, or set "
            "both, before reading, or every rank would read the same samples"
        )
    return int(os.environ.get("RANK", 0)) if world_size > 1 else 0, world_size
