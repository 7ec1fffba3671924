"""Shards as a map from positions of an epoch to decoded samples.

The order is a function of (seed, epoch) alone (`recipes.order`), and where a sample stands is in
its shard's index (`recipes.shard_index`): any position is one seek away, whichever rank or worker
asks for it, and nothing before it is read. webdataset, whose reader can only begin at the
beginning, gives the format: see docs/decisions/0014.
"""

from __future__ import annotations

import errno
import io
import os
import random
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, Generic, Literal, NamedTuple, TypeVar, cast

import xxhash
from torch.utils.data import Dataset

from recipes.bad_samples import BadSample, BadSamples
from recipes.order import EpochOrder
from recipes.remote import fetch_indexes
from recipes.remote_cache import open_shard, prefetch, url_of
from recipes.samples import MAX_SAMPLE_BYTES, MEMBERS, SampleError, is_member, size_limit
from recipes.shard_files import ShardError, expand_shards
from recipes.shard_index import ShardIndex, each_index, missing_shards, shard_indexes

_PASSED_OVER = frozenset(("cls",))
_OPEN_FILES = 32
_INDEXES = 16
_AHEAD = 2
_KEPT_BUFFER = 64 << 20
_UNREADABLE = (errno.EIO, errno.ESTALE)
_TRIES = 100
_WIDEST = 1_000_000
_BETWEEN = 4 << 20  # headers, long names, and members that are no sample's

T = TypeVar("T")


class Read(NamedTuple, Generic[T]):
    """What was read for a position.

    Attributes:
        item: of the sample that stands there, or of the one that stands in for a bad one.
        bad: samples that were passed over.
    """

    item: T
    bad: tuple[BadSample, ...] = ()


class ShardStream(Dataset[Read[T]]):
    """Samples of shards, decoded by ``decode``, by their position in the epoch.

    A position's sample depends on the shards, the seed and the epoch, and on nothing else: not on
    ranks, workers or what was read before. Call `set_epoch` before each epoch.

    Args:
        shards: As for `expand_shards`.
        decode: Turns a raw sample into an item. A raw sample maps each extension to the member's
            bytes, and ``__key__``, ``__shard__`` and ``__seed__`` (a string of seed, epoch, shard
            and key: the seed for augmentation that survives a resume) to strings. A ValueError
            it raises is a bad sample; any other exception a bug.
        seed: Of the order.
        shuffle: False gives the samples in the order of the shards, the same every epoch.
        shuffle_buffer: Samples mixed with each other, at most a million: none of them is held in
            memory, but the wider it is, the farther apart are the places that are read together.
        on_error: ``raise`` stops at a bad sample; ``skip`` counts it in `bad`, logs it, and lets
            another sample of the epoch, drawn by seed, epoch and position, stand in for it.
        max_bad_fraction: With ``skip``, what stops all the same: more bad samples than this, of
            those seen.
        progress: Show how far the making of missing indexes is.

    Raises:
        ShardError: As `expand_shards` and `shard_indexes`; no samples at all; with ``raise``, a
            shard that is truncated, damaged or has a key twice.
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
        max_bad_fraction: float = 0.05,
        progress: bool = False,
    ) -> None:
        super().__init__()
        if on_error not in ("skip", "raise"):
            raise ValueError(f"on_error is {on_error!r}; expected 'skip' or 'raise'")
        if not 1 <= shuffle_buffer <= _WIDEST:
            raise ValueError(
                f"found shuffle_buffer: {shuffle_buffer:,}; expected 1 to {_WIDEST:,}: each worker "
                "draws the order of so many samples at a time"
            )
        self.shards = expand_shards(shards)
        self.decode = decode
        self.seed = seed
        self.on_error = on_error
        self._block = shuffle_buffer if shuffle else 0
        if gone := missing_shards(self.shards):
            raise ShardError(
                f"found no {', '.join(gone[:10])}, which the manifest beside "
                f"{self.shards[0]} lists; expected all {len(gone)} that are missing: copy them "
                "again, or if they are not wanted, run 'bridges shards index FOLDER --overwrite "
                "true'"
            )
        fetch_indexes(self.shards, progress=progress)
        self._counts: list[int] = []
        contents: list[str] = []
        faults: list[BadSample] = []
        self._indexes: OrderedDict[int, ShardIndex] = OrderedDict()
        for shard, index in enumerate(each_index(self.shards, progress=progress)):
            self._counts.append(len(index))
            contents.append(index.sha256)
            faults += _faults(self.shards[shard], index)
            if shard < _INDEXES:
                self._indexes[shard] = index
        self.contents = tuple(contents)
        self.total_samples = sum(self._counts)
        self.bad = BadSamples(self.total_samples + len(faults), max_bad_fraction)
        self._take_faults(faults)
        if not self.total_samples:
            raise ShardError(f"no samples in {len(self.shards)} shards, e.g. {self.shards[0]}")
        self._most_open = self._open_at_most()
        self._files: OrderedDict[int, IO[bytes]] = OrderedDict()
        self._buffer = bytearray()
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Chooses the epoch's order."""
        self.epoch = epoch
        self._order = EpochOrder(self._counts, self.seed, epoch, self._block)

    @property
    def skipped(self) -> Counter[str]:
        """Bad samples by kind; those that workers found are among them once `note` was called."""
        return self.bad.kinds

    def shape(self) -> dict[str, Any]:
        """What positions mean: a place in an epoch is of use where this is the same."""
        contents = xxhash.xxh3_64_hexdigest("\n".join(self.contents).encode())
        return {"seed": self.seed, "shuffle_buffer": self._block, "contents": contents}

    def __len__(self) -> int:
        return self.total_samples

    def __getitem__(self, position: int) -> Read[T]:
        """The sample at a position of the epoch, or with ``skip`` another for a bad one.

        Raises:
            SampleError: a bad sample, where they are not skipped.
            ShardError: of a hundred others drawn for a bad sample, not one is good.
        """
        bad: list[BadSample] = []
        rng, place = None, position
        for _ in range(_TRIES):
            try:
                return Read(self._item(*self._order[place], bad), tuple(bad))
            except SampleError as error:
                if self.on_error == "raise":
                    raise
                bad.append(self._named(error, *self._order[place]))
            rng = rng or random.Random(f"{self.seed}/{self.epoch}/{position}/instead")
            place = rng.randrange(self.total_samples)
        kinds = dict(Counter(one.kind for one in bad))
        raise ShardError(
            f"found {_TRIES} bad samples in a row while one was to stand in for another: {kinds}; "
            "expected good ones: read with on_error='raise' to see the first"
        )

    def __getitems__(self, positions: Sequence[int]) -> list[Read[T]]:
        return [self[position] for position in positions]

    def note(self, reads: Sequence[BadSample], seen: int) -> None:
        """Counts what was passed over among so many samples that a loader handed out.

        Raises:
            ShardError: more than ``max_bad_fraction`` are bad.
        """
        self.bad.add(reads, seen)

    def __iter__(self) -> Iterator[T]:
        return self.iterate()

    def iterate(self) -> Iterator[T]:
        """Every good sample of the epoch, in order and once; bad ones are counted and left out.

        Raises:
            SampleError: a bad sample, where they are not skipped.
        """
        for position in range(self.total_samples):
            bad: list[BadSample] = []
            try:
                item = self._item(*self._order[position], bad)
            except SampleError as error:
                if self.on_error == "raise":
                    raise
                self.note([*bad, self._named(error, *self._order[position])], 1)
                continue
            self.note(bad, 1)
            yield item

    def __getstate__(self) -> dict[str, Any]:
        # A spawned worker opens files of its own, and loads the indexes that it needs.
        own = {"_files": OrderedDict(), "_indexes": OrderedDict(), "_buffer": bytearray()}
        return self.__dict__ | own | {"_order": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.set_epoch(self.epoch)

    def _open_at_most(self) -> int:
        """Files kept open. A remote shard stays in the cache as long, whose room is bounded."""
        if not any(map(url_of, self.shards)):
            return _OPEN_FILES
        per_shard = max(1, self.total_samples // len(self.shards))
        return min(_OPEN_FILES, self._block // per_shard + 2)

    def _take_faults(self, found: list[BadSample]) -> None:
        if found and self.on_error == "raise":
            named = "; ".join(f"{bad.kind}: {bad.problem}" for bad in found[:5])
            more = f"; and {len(found) - 5} more" if len(found) > 5 else ""
            raise ShardError(
                f"found {len(found)} faults in {len(self.shards)} shards: {named}{more}; expected "
                "none: copy or write the shards again, or read what is whole with on_error='skip'"
            )
        self.bad.add_faults(found)

    def _item(self, shard: int, sample: int, passed: list[BadSample]) -> T:
        raw = self._raw(shard, sample)
        path, key = raw["__shard__"], raw["__key__"]
        refused = [name for name in raw if not name.startswith("__") and not is_member(name)]
        for name in refused:
            del raw[name]
        refused = [name for name in refused if name not in _PASSED_OVER]
        if refused:
            error = SampleError(
                f"{path}: sample {key!r} has members {refused}; only {MEMBERS} are read (nothing "
                "is unpickled; keys have no dots): rewrite the shard without them",
                kind="refused member",
            )
            if self.on_error == "raise":
                raise error
            passed.append(BadSample(path, key, error.kind, str(error)))
        try:
            return self.decode(raw)
        except SampleError:
            raise
        except ValueError as error:
            raise SampleError(f"{path}: sample {key!r}: {error}") from error
        except StopIteration as error:  # would end the loader's epoch, the rest silently lost
            raise RuntimeError(f"{path}: sample {key!r}: StopIteration in its decoder") from error

    def _raw(self, shard: int, sample: int) -> dict[str, Any]:
        """The members of a sample as they were when the shard was indexed."""
        index, path = self._index(shard), self.shards[shard]
        key, where = index.keys[sample], index.members_of(sample)
        for name, (_, size) in where.items():
            if is_member(name) and size > size_limit(name):
                raise SampleError(
                    f"{path}: sample {key!r}: member {name} has {size:,} bytes; expected at most "
                    f"{size_limit(name):,}: take the sample out, or make it smaller",
                    kind="member too large",
                )
        start, end = int(index.offsets[sample]), int(index.ends[sample])
        room = min(sum(size for _, size in where.values()) + _BETWEEN, MAX_SAMPLE_BYTES)
        if end - start > room:
            raise SampleError(
                f"{path}: sample {key!r} takes {end - start:,} bytes; expected at most "
                f"{room:,}: rewrite it with smaller members, and without what lies between them",
                kind="member too large",
            )
        try:
            data = self._read(shard, start, end - start)
        except OSError as error:
            if error.errno not in _UNREADABLE:
                raise
            if (file := self._files.pop(shard, None)) is not None:
                file.close()
            raise SampleError(
                f"{path}: sample {key!r} at byte {start:,} cannot be read ({error}); expected a "
                "sound disk: copy the shard elsewhere",
                kind="unreadable bytes",
            ) from error
        if xxhash.xxh3_64_intdigest(data) != int(index.checksums[sample]):
            raise SampleError(
                f"{path}: sample {key!r}: its {end - start:,} bytes from byte {start:,} on are not "
                "those that were indexed; expected them unchanged: copy the shard again, or if it "
                "was rewritten, run 'bridges shards index' with --overwrite true",
                kind="damaged bytes",
            )
        raw: dict[str, Any] = {
            # An array becomes a tensor of these very bytes, so that they must be writable.
            name: (bytearray if name == "npy" else bytes)(data[at - start : at - start + size])
            for name, (at, size) in where.items()
        }
        seed = f"{self.seed}/{self.epoch}/{path.name}/{key}"
        return raw | {"__key__": key, "__shard__": str(path), "__seed__": seed}

    def _index(self, shard: int) -> ShardIndex:
        index = self._indexes.pop(shard, None)
        if index is None:
            index = shard_indexes([self.shards[shard]])[0]
            if (len(index), index.sha256) != (self._counts[shard], self.contents[shard]):
                raise ShardError(f"{self.shards[shard]} has changed while in use; start again")
        self._indexes[shard] = index
        if len(self._indexes) > _INDEXES:
            self._indexes.popitem(last=False)
        return index

    def _read(self, shard: int, start: int, length: int) -> memoryview:
        """Bytes of a shard, good until the next call: memory that is new each time costs time."""
        file = self._files.pop(shard, None)
        if file is None:
            file = open_shard(self.shards[shard])
            ahead = self._order.following(shard, _AHEAD)
            prefetch([self.shards[index] for index in ahead])
        self._files[shard] = file
        if len(self._files) > self._most_open:
            self._files.popitem(last=False)[1].close()
        buffer = self._buffer if len(self._buffer) >= length else bytearray(length)
        if length <= _KEPT_BUFFER:  # one huge sample is no reason to hold so much ever after
            self._buffer = buffer
        data = memoryview(buffer)[:length]
        # No mapping: a file that is cut off while it is mapped would end the process.
        found = 0
        while found < length:  # network file systems give less than was asked for
            if hasattr(os, "preadv"):
                # A forked worker shares the file's position with its parent, so none is moved.
                more = os.preadv(file.fileno(), [data[found:]], start + found)
            else:
                file.seek(start + found)
                more = cast(io.RawIOBase, file).readinto(data[found:])
            if not more:
                break
            found += more
        return data[:found]

    def _named(self, error: SampleError, shard: int, sample: int) -> BadSample:
        key = self._index(shard).keys[sample]
        return BadSample(str(self.shards[shard]), key, error.kind, str(error))

    def __del__(self) -> None:
        for file in self.__dict__.get("_files", {}).values():
            file.close()


def _faults(shard: Path, index: ShardIndex) -> list[BadSample]:
    found = []
    for number, fault in enumerate(index.faults):
        sample = "" if fault.key is None else f" sample {fault.key!r}:"
        problem = f"{shard}:{sample} {fault.problem}"
        found.append(BadSample(str(shard), fault.key, fault.kind, problem, str(number)))
    return found
