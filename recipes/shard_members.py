"""The members of a tar file in one pass forward, past whatever is damaged.

The headers are read by the standard library; what is added is going on after a bad one, where
`tarfile` stops as if the archive ended there.
"""

from __future__ import annotations

import hashlib
import io
import re
import tarfile
from dataclasses import dataclass
from typing import IO

import xxhash

BLOCK = tarfile.BLOCKSIZE
_CHUNK = 1 << 20
# A crafted shard could declare a name of gigabytes, or a thousand headers before one file.
_MAX_EXTENSIONS = 8
_MAX_EXTENSION_BYTES = 1 << 20
_LONG_NAMES = (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.GNUTYPE_LONGNAME)
_EXTENSIONS = (*_LONG_NAMES, tarfile.GNUTYPE_LONGLINK, tarfile.XGLTYPE)
# Octal, as every tar writes it: passing over a picture's bytes, this tells nearly all at once.
_CHECKSUM = re.compile(rb"[ 0-7]{6,7}[\0 ]")


@dataclass(frozen=True)
class Member:
    """A member whose header was read; its payload follows.

    Attributes:
        name: of the file; bytes that are not UTF-8 are escaped as surrogates.
        offset: of its first header.
        head: its headers.
        start: of its payload.
        size: bytes of its payload.
        plain: a file with nothing but its bytes.
        passed_over: a folder.
        what: what it is, where it is neither.
    """

    name: str
    offset: int
    head: bytes
    start: int
    size: int
    plain: bool
    passed_over: bool
    what: str

    @property
    def end(self) -> int:
        """Byte after the payload's padding."""
        return self.start + _padded(self.size)


@dataclass(frozen=True)
class Damage:
    """A place where there should be a header, and is none.

    Attributes:
        kind: ``damaged header`` or ``truncated shard``.
        offset: of the place.
        block: what stands there.
        name: what can still be read of the member's name; empty if nothing, None where no member
            can have been.
        problem: for the message.
    """

    kind: str
    offset: int
    block: bytes
    name: bytes | None
    problem: str


class TarReader:
    """Goes forward through a tar file, of whose bytes it keeps the SHA-256."""

    def __init__(self, file: IO[bytes]) -> None:
        self.position = 0
        self.sha256 = hashlib.sha256()
        self.found_header = False
        self._file = file
        self._held: list[bytes] = []
        self._ended = False

    def next(self) -> Member | Damage | None:
        """The next member, whose payload is then to be read by `read_member`; None at the end."""
        if self._ended:
            return None
        block = self._block()
        offset = self.position - len(block)
        if len(block) < BLOCK:
            return self._truncated(offset, block)
        if not any(block):
            return self._at_end(offset)
        info = _header(block)
        if info is None:
            return self._resynchronise(offset, block, "the header's checksum is wrong")
        self.found_header = True
        if info.type in _EXTENSIONS:
            return self._extended(offset, block, info)
        return self._member(offset, block, info)

    def read_member(self, member: Member, hasher: xxhash.xxh3_64) -> bool:
        """Adds a member's headers and payload to a checksum; False if the file ends within."""
        hasher.update(member.head)
        left = member.end - member.start
        while left and (chunk := self._read(min(left, _CHUNK))):
            hasher.update(chunk)
            left -= len(chunk)
        self._ended = left > 0
        return not left

    def _read(self, size: int) -> bytes:
        data = self._file.read(size)
        self.sha256.update(data)
        self.position += len(data)
        return data

    def _block(self) -> bytes:
        return self._held.pop() if self._held else self._read(BLOCK)

    def _truncated(self, offset: int, block: bytes) -> Damage:
        self._ended = True
        # A name never begins with zero: what is cut is the mark of the end itself.
        name = None if block and not any(block) else _name(block)
        problem = f"the file ends at byte {self.position:,} without an end-of-archive mark"
        return Damage("truncated shard", offset, block, name, problem)

    def _at_end(self, offset: int) -> Damage | None:
        """Tells the end of an archive from a header that was overwritten by zeros."""
        block = self._read(BLOCK)
        if len(block) < BLOCK:
            return self._truncated(offset, bytes(1))
        lone = any(block)
        zeros = True
        while len(block) == BLOCK:
            if _header(block):
                self._held.append(block)
                break
            zeros = zeros and not any(block)
            block = self._read(BLOCK)
        self._ended = not self._held
        if self._ended and not lone:
            return None
        problem = f"zeros at byte {offset:,} in the place of a header, yet more follows"
        if zeros and not lone:
            problem = f"the archive ends at byte {offset:,}, yet a second archive follows"
        return Damage("damaged header", offset, bytes(BLOCK), b"", problem)

    def _resynchronise(self, offset: int, damaged: bytes, problem: str) -> Damage:
        """Passes over everything up to the next header."""
        zeros = True
        while len(block := self._read(BLOCK)) == BLOCK:
            info = _header(block)
            if info is not None:
                self.found_header = True
                break
            zeros = zeros and not any(block)
        else:
            self._ended = True
            if zeros and not any(block) and BLOCK - damaged.count(0) < 16:
                problem = f"the end-of-archive mark at byte {offset:,} is damaged"
                return Damage("damaged header", offset, damaged, None, problem)
            return self._damage(offset, damaged, problem)
        self._held.append(block)
        if _is_long_name(damaged) and info.type not in _EXTENSIONS:
            # The name in what follows is cut short, which would make another sample of it.
            return self._pass_over(offset, self._block(), info, problem)
        return self._damage(offset, damaged, problem)

    def _pass_over(self, offset: int, block: bytes, info: tarfile.TarInfo, problem: str) -> Damage:
        member = self._member(offset, block, info)
        if isinstance(member, Member) and not self.read_member(member, xxhash.xxh3_64()):
            return self._truncated(offset, block)
        return self._damage(offset, block, problem)

    def _damage(self, offset: int, block: bytes, problem: str) -> Damage:
        return Damage(
            "damaged header", offset, block, _name(block), f"{problem} at byte {offset:,}"
        )

    def _member(self, offset: int, head: bytes, info: tarfile.TarInfo) -> Member | Damage:
        if info.size < 0:
            return self._resynchronise(offset, head[-BLOCK:], "a negative size in the header")
        if info.type == tarfile.GNUTYPE_SPARSE:
            block = head[-BLOCK:]
            more = block[482]
            while more:  # the rest of its map, which the size does not count
                block = self._read(BLOCK)
                head += block
                if len(block) < BLOCK:
                    return self._truncated(offset, head[:BLOCK])
                if len(head) > _MAX_EXTENSION_BYTES:
                    return self._resynchronise(offset, block, "too large a map of a sparse file")
                more = block[504]
        plain = info.type in (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE)
        plain = plain and not any(key.startswith("GNU.") for key in info.pax_headers)
        # What a link or a folder states as its size does not follow it; see tarfile.
        has_payload = info.isreg() or info.type not in tarfile.SUPPORTED_TYPES
        return Member(
            info.name,
            offset,
            head,
            self.position,
            info.size if has_payload else 0,
            plain,
            info.isdir(),
            "a sparse file" if info.isreg() else "a link or device",
        )

    def _extended(self, offset: int, block: bytes, info: tarfile.TarInfo) -> Member | Damage:
        """A member with headers before its own, for a long name or one that is not ASCII."""
        head = b""
        fields: dict[bytes, bytes] = {}
        for _ in range(_MAX_EXTENSIONS):
            if not 0 <= info.size <= _MAX_EXTENSION_BYTES - len(head):
                break
            payload = self._read(_padded(info.size))
            if len(payload) < _padded(info.size):
                return self._truncated(offset, block)
            head += block + payload
            records = payload[: info.size]
            if info.type == tarfile.GNUTYPE_LONGNAME:
                found = {b"path": records.split(b"\0")[0]}
            else:
                found = {} if info.type == tarfile.GNUTYPE_LONGLINK else _pax(records)
            broken = found is None
            fields |= found or {}
            block = self._read(BLOCK)
            if len(block) < BLOCK:
                return self._truncated(offset, block)
            following = _header(block)
            if following is None:
                return self._resynchronise(offset, block, "the header's checksum is wrong")
            if broken:
                return self._pass_over(offset, block, following, "a damaged extended header")
            info = following
            if info.type not in _EXTENSIONS:
                return self._joined(offset, head, block, info, fields)
        return self._resynchronise(offset, block, "too many or too large extended headers")

    def _joined(
        self,
        offset: int,
        head: bytes,
        block: bytes,
        info: tarfile.TarInfo,
        fields: dict[bytes, bytes],
    ) -> Member | Damage:
        sparse = any(name.startswith(b"GNU.sparse.") for name in fields)
        if info.type == tarfile.GNUTYPE_SPARSE or sparse:  # tarfile would read on for its map
            name = fields.get(b"GNU.sparse.name") or fields.get(b"path")
            if name:
                info.name = name.decode("utf-8", "surrogateescape")
            if re.fullmatch(rb"\d{1,18}", fields.get(b"size", b"")):
                info.size = int(fields[b"size"])
            info.pax_headers = {"GNU.sparse": ""} if sparse else {}
            return self._member(offset, head + block, info)
        try:
            with tarfile.open(
                fileobj=io.BytesIO(head + block),
                mode="r:",
                encoding="utf-8",
                errors="surrogateescape",
            ) as tar:
                joined = tar.next()
        except (tarfile.TarError, ValueError, OverflowError, EOFError):
            joined = None
        if joined is None:
            return self._pass_over(offset, block, info, "a damaged extended header")
        return self._member(offset, head + block, joined)


def checksum_holds(block: bytes) -> bool:
    """Whether a block is a tar header."""
    return _header(block) is not None


def _header(block: bytes) -> tarfile.TarInfo | None:
    if not _CHECKSUM.match(block, 148):
        return None
    try:
        return tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except (tarfile.TarError, ValueError):
        return None


def _name(block: bytes) -> bytes:
    name = block[:100].split(b"\0")[0]
    if block[257:263] == b"ustar\0" and block[345:346].strip(b"\0"):
        name = block[345:500].split(b"\0")[0] + b"/" + name
    return name


def _is_long_name(block: bytes) -> bool:
    return block[156:157] in _LONG_NAMES or block.startswith(b"././@") or b"PaxHeader" in block


def _pax(records: bytes) -> dict[bytes, bytes] | None:
    """The records by name; None if there is more: tarfile would drop that and what follows."""
    at, found = 0, {}
    while match := re.compile(rb"(\d{1,7}) ([^=\n]+)=").match(records, at):
        end = at + int(match[1])
        if end < match.end() + 1 or records[end - 1 : end] != b"\n":
            return None
        found[match[2]] = records[match.end() : end - 1]
        at = end
    return found if at == len(records) else None


def _padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK
