"""How many samples an mp4 states that it has, before anything makes room for them.

A demuxer makes an index of as many entries as the tables of the file state. A table of samples
that are all of one size states their number without listing them, so that two kilobytes can ask
for gigabytes.

Source: ISO/IEC 14496-12, sections 4.2 (boxes), 8.7.3 (``stsz``, ``stz2``), 8.7.4 (``stsc``), 8.8.8
(``trun``).
"""

import struct
from collections.abc import Iterator

MAX_SAMPLES = 10_000_000
"""Of all tracks together, about half a gigabyte of index: hours of video and of encoded sound."""

_COUNTED = {b"stsz": 8, b"stz2": 8, b"trun": 4}
"""Tables of samples, and where the number stands in each, in bytes behind its name
and size."""


def table_problem(data: bytes) -> str | None:
    """What is wrong with the tables of an mp4; None if nothing is.

    Args:
        data: the encoded file.
    """
    samples = least = listed = in_chunk = 0
    for begin, end in _described(data):
        if data.find(b"cmov", begin, end) >= 0:
            return "its header is compressed; expected a plain one: write it anew"
        for name, at in _COUNTED.items():
            for table in _tables(data, name, begin, end):
                count = _number(data, table + at)
                samples += count
                # An empty sample, too, takes some room: in a table.
                least += count * max(1, _number(data, table + 4) if name == b"stsz" else 1)
        for table in _tables(data, b"stsc", begin, end):
            entries = _number(data, table + 4)
            listed += 12 * entries
            if listed > len(data) or table + 8 + 12 * entries > len(data):
                continue  # no such table: it would be longer than the file
            # Number of a chunk, how many samples it and those after it have, their description.
            chunks = struct.iter_unpack(">III", data[table + 8 : table + 8 + 12 * entries])
            in_chunk = max(in_chunk, *(count for _, count, _ in chunks), 0)
    least = max(least, listed, in_chunk)
    if samples > MAX_SAMPLES or least > len(data):
        return (
            f"its tables state {max(samples, in_chunk):,} samples of at least {least:,} bytes, in "
            f"{len(data):,} bytes; expected what these have room for, and at most {MAX_SAMPLES:,}: "
            "fetch it again, or cut it first"
        )
    return None


def _described(data: bytes) -> Iterator[tuple[int, int]]:
    """Stretches of the file around its ``mdat``, which holds the pictures themselves."""
    at = 0
    while at + 8 <= len(data):
        size, name = struct.unpack_from(">I4s", data, at)
        if size == 1 and at + 16 <= len(data):
            (size,) = struct.unpack_from(">Q", data, at + 8)
        # What has no sensible size is looked through to the end.
        end = at + size if 8 <= size <= len(data) - at else len(data)
        if name != b"mdat":
            yield at, end
        at = end


def _tables(data: bytes, name: bytes, begin: int, end: int) -> Iterator[int]:
    """Where each table's content begins; in whatever box it stands, a demuxer may read it."""
    place = data.find(name, begin + 4, end)
    while place >= 0:
        # Where its own size is 1, that stands in the eight bytes behind the name.
        yield place + (12 if data[place - 4 : place] == b"\0\0\0\1" else 4)
        place = data.find(name, place + 4, end)


def _number(data: bytes, at: int) -> int:
    return int.from_bytes(data[at : at + 4], "big") if at + 4 <= len(data) else 0
