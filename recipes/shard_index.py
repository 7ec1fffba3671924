"""Where everything in a shard stands: an index that is made once and makes every read a seek."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Fault:
    """What is wrong with a part of a shard, so that a sample cannot be had, or not as it was.

    Attributes:
        kind: what such faults are counted by, e.g. ``duplicate key``.
        key: of the sample, where it is known.
        problem: what was found.
    """

    kind: str
    key: str | None
    problem: str


@dataclass(frozen=True)
class ShardIndex:
    """The samples of one shard: n samples with m members in all, and the faults found.

    Attributes:
        size: bytes of the shard when it was indexed.
        sha256: of the shard, in hexadecimal.
        offsets: int64 (n,), first header of each sample.
        ends: int64 (n,), byte after each sample's last member, its padding included.
        checksums: uint64 (n,), xxh3_64 of the bytes from `offsets` to `ends`.
        members: int64 (n + 1,), sample i has the members from ``members[i]`` to ``members[i + 1]``.
        starts: int64 (m,), first payload byte of each member.
        sizes: int64 (m,), payload bytes of each member.
        extensions: int64 (m,), index into `names`.
        names: extensions that occur, in lower case.
        keys: of the samples.
        faults: samples that are not among the n, and parts that belong to none.
    """

    size: int
    sha256: str
    offsets: NDArray[np.int64]
    ends: NDArray[np.int64]
    checksums: NDArray[np.uint64]
    members: NDArray[np.int64]
    starts: NDArray[np.int64]
    sizes: NDArray[np.int64]
    extensions: NDArray[np.int64]
    names: tuple[str, ...]
    keys: tuple[str, ...]
    faults: tuple[Fault, ...] = ()

    def __len__(self) -> int:
        return len(self.offsets)

    def members_of(self, sample: int) -> dict[str, tuple[int, int]]:
        """Extension -> (first payload byte, payload bytes) of one sample."""
        span = range(int(self.members[sample]), int(self.members[sample + 1]))
        return {
            self.names[self.extensions[m]]: (int(self.starts[m]), int(self.sizes[m])) for m in span
        }

    @property
    def keys_sha256(self) -> str:
        """Digest of all keys in order, each followed by a newline."""
        return hashlib.sha256("".join(f"{key}\n" for key in self.keys).encode()).hexdigest()
