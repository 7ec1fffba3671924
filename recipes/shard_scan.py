"""Where everything in a shard stands, found in one pass over its bytes."""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash
from numpy.typing import NDArray
from webdataset.tariterators import base_plus_ext

from recipes.shard_faults import Fault, read_name
from recipes.shard_files import ShardError
from recipes.shard_groups import Break, Group, owns
from recipes.shard_members import BLOCK, Damage, Member, TarReader

_COMPRESSED = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ\0": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"\x04\x22\x4d\x18": "lz4",
}
# A crafted shard may have one every 512 bytes.
MAX_FAULTS = 10_000
"""Faults listed of one shard."""

_MAX_MEMBERS = 10_000


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


def scan_shard(shard: Path) -> ShardIndex:
    """Reads a shard once: what its samples are, by webdataset's rule, and what is wrong with it.

    Memory is bounded by the samples' number, whatever their sizes.

    Raises:
        ShardError: no such file, not a tar file, or a compressed one. Damage within the file is
            never an error; it is among the index's faults.
    """
    try:
        with shard.open("rb", buffering=1 << 20) as file:
            start = file.read(BLOCK)
            for magic, name in _COMPRESSED.items():
                if start.startswith(magic):
                    raise ShardError(
                        f"{shard}: found a {name} file; expected an uncompressed tar, in which "
                        f"samples can be found: decompress it first"
                    )
            file.seek(0)
            reader = TarReader(file)
            samples = _Samples()
            while (found := reader.next()) is not None:
                samples.add(found, reader)
    except OSError as error:
        raise ShardError(f"{shard}: found no readable file ({error}); check the path") from error
    if (
        len(start) == BLOCK
        and any(start)
        and not reader.found_header
        and start[257:262] != b"ustar"
    ):
        raise ShardError(
            f"{shard}: found no tar header in it; expected an uncompressed tar file: make shards "
            f"with 'bridges shards'"
        )
    return samples.index(reader)


class _Samples:
    def __init__(self) -> None:
        self._open: Group | None = None
        self._hasher = xxhash.xxh3_64()
        self._breaks: list[Break] = []
        self._waiting: list[Break] = []
        self._faults: list[tuple[int, Fault]] = []
        self._more_faults = 0
        self._seen: set[str] = set()
        self._keys: list[str] = []
        self._checksums = array("Q")
        self._places = array("q")  # offset, end and number of members of each sample
        self._members = array("q")  # start, size and extension of each member
        self._names: dict[str, int] = {}
        self._forms: Counter[frozenset[str]] = Counter()

    def add(self, found: Member | Damage, reader: TarReader) -> None:
        if isinstance(found, Damage):
            place = Break(found, self._open)
            if len(self._breaks) < MAX_FAULTS:
                self._breaks.append(place)
                self._waiting.append(place)
            else:
                self._more_faults += 1
            return
        key, extension, fault = read_name(found)
        if key is None:
            if fault:
                self._fault(found.offset, fault)
            group = None
        else:
            group = self._group(key, extension, found, fault)
        if not reader.read_member(found, self._hasher):
            name = found.name.encode("utf-8", "backslashreplace").decode()
            problem = f"the file ends at byte {reader.position:,}, within the member {name!r}"
            cut = Fault("truncated shard", group.key if group else None, problem)
            if group is None:
                self._fault(found.offset, cut)
            else:
                group.fault = group.fault or cut
        elif group:
            group.end = found.end
            group.checksum = self._hasher.intdigest()

    def _group(self, key: str, extension: str, member: Member, fault: Fault | None) -> Group:
        group = before = self._open
        if group is None or key != group.key or extension in group.members:
            self._close()
            group = self._open = Group(key, member.offset)
            self._hasher.reset()
            if key in self._seen:
                problem = f"the key comes again at byte {member.offset:,}; its first sample stays"
                if before is None or before.key != key:
                    problem += (
                        ": a sample's members must stand side by side: write with tar --sort=name"
                    )
                group.fault = Fault("duplicate key", key, problem)
            self._seen.add(key)
        for place in self._waiting:
            if place.before is group and group.fault is None:
                group.fault = Fault(place.damage.kind, key, place.damage.problem)
            place.after = group
        self._waiting.clear()
        group.fault = group.fault or fault
        if len(group.members) < _MAX_MEMBERS:
            group.members[extension] = (member.start, member.size)
        elif group.fault is None:
            problem = f"it has more than {_MAX_MEMBERS:,} members"
            group.fault = Fault("refused member", key, problem)
        return group

    def _close(self) -> None:
        group, self._open = self._open, None
        if group is None:
            return
        if group.fault:
            self._fault(group.offset, group.fault)
            return
        group.row = len(self._keys)
        self._keys.append(group.key)
        self._checksums.append(group.checksum)
        self._places.extend((group.offset, group.end, len(group.members)))
        for extension, (start, size) in group.members.items():
            number = self._names.setdefault(extension, len(self._names))
            self._members.extend((start, size, number))
        self._forms[group.form] += 1

    def _fault(self, offset: int, fault: Fault) -> None:
        if len(self._faults) < MAX_FAULTS:
            self._faults.append((offset, fault))
        else:
            self._more_faults += 1

    def index(self, reader: TarReader) -> ShardIndex:
        self._close()
        lost: set[int] = set()
        usual = max(self._forms, key=lambda form: self._forms[form], default=None)
        for place in self._breaks:
            lost |= self._resolve(place, usual)
        if self._more_faults:
            problem = f"{self._more_faults:,} more faults, not listed"
            self._faults.append((reader.position, Fault("damaged header", None, problem)))
        places = np.array(self._places, np.int64).reshape(-1, 3)
        members = np.array(self._members, np.int64).reshape(-1, 3)
        kept = np.ones(len(places), bool)
        kept[sorted(lost)] = False
        members = members[np.repeat(kept, places[:, 2])]
        places = places[kept]
        return ShardIndex(
            size=reader.position,
            sha256=reader.sha256.hexdigest(),
            offsets=places[:, 0].copy(),
            ends=places[:, 1].copy(),
            checksums=np.array(self._checksums, np.uint64)[kept],
            members=np.concatenate([[0], np.cumsum(places[:, 2])]).astype(np.int64),
            starts=members[:, 0].copy(),
            sizes=members[:, 1].copy(),
            extensions=members[:, 2].copy(),
            names=tuple(self._names),
            keys=tuple(key for row, key in enumerate(self._keys) if row not in lost),
            faults=tuple(fault for _, fault in sorted(self._faults, key=lambda found: found[0])),
        )

    def _resolve(self, place: Break, usual: frozenset[str] | None) -> set[int]:
        """Names the sample that lost a member to damage; its row, if it counted as good."""
        damage = place.damage
        sides = [side for side in (place.before, place.after) if side is not None]
        if place.before is place.after and place.before is not None:
            return set()  # in its midst: known when the next member came
        victims = []
        if damage.name is not None:
            named = [side for side in sides if owns(side, damage)]
            # Where nothing says whose it was, a sample that has what the others have is whole.
            lacking = [side for side in sides if side.form != usual]
            mended = [side for side in sides if owns(side, damage, mended=True)]
            both = [side for side in mended if side in lacking]
            victims = named or both or lacking or mended
        lost = set()
        for victim in victims:
            if victim.row is not None:
                lost.add(victim.row)
                self._fault(damage.offset, Fault(damage.kind, victim.key, damage.problem))
        if not victims:
            name = damage.name or b""
            key = base_plus_ext(name.decode("utf-8", "backslashreplace"))[0]
            # Cut short or written in other letters, or the damage made it another sample's.
            key = None if key in self._seen or len(name) == 100 or b"?" in name else key
            self._fault(damage.offset, Fault(damage.kind, key, damage.problem))
        return lost
