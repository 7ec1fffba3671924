"""Members of a few bytes that state far more, and what was cut short."""

from __future__ import annotations

import io
import random
import struct
import zlib

from PIL import Image

_SIDE = 60_000


def png_bomb(rng: random.Random) -> bytes:
    """A PNG whose header states 60,000 × 60,000 pixels."""
    header = struct.pack(">IIBBBBB", _SIDE, _SIDE, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(bytes(100_000))), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in chunks
    )


def gif_bomb(rng: random.Random) -> bytes:
    """A GIF whose header states 60,000 × 60,000 pixels."""
    data = bytearray(_encoded(Image.new("P", (4, 4)), "GIF"))
    data[6:10] = struct.pack("<HH", _SIDE, _SIDE)
    return bytes(data)


def jpeg_bomb(rng: random.Random) -> bytes:
    """A JPEG whose frame header states 60,000 × 60,000 pixels."""
    data = bytearray(_encoded(Image.new("RGB", (8, 8)), "JPEG"))
    at = data.index(b"\xff\xc0") + 5
    data[at : at + 4] = struct.pack(">HH", _SIDE, _SIDE)
    return bytes(data)


def half_png(rng: random.Random) -> bytes:
    """A PNG cut at a random byte of what is needed for its pixels."""
    whole = _encoded(Image.effect_noise((20, 20), 60), "PNG")
    return whole[: rng.randrange(1, len(whole) - 20)]


def deep_json() -> bytes:
    """A JSON of 20,000 lists in each other."""
    return b'{"caption": ' + b"[" * 20_000 + b"]" * 20_000 + b"}"


def _encoded(picture: Image.Image, format: str) -> bytes:
    data = io.BytesIO()
    picture.save(data, format)
    return data.getvalue()
