"""Shards with one known fault each, for `recipes.reliability_faults`."""

from __future__ import annotations

import io
import json
import random
import struct
import tarfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from PIL import Image

from bridges.images import MAX_ASPECT
from recipes.samples import MAX_CHARACTERS, size_limit

SAMPLES = 5
"""Samples of a shard; the fault is in one of them, or begins there."""


@dataclass
class Member:
    """One member of a tar file: a file, or a link to ``target``."""

    name: str
    data: bytes = b""
    type: bytes = tarfile.REGTYPE
    target: str = ""


@dataclass
class Damaged:
    """A shard with a fault.

    Attributes:
        data: of the file.
        kind: that the fault must be counted by.
        keys: that its record may name.
        lost: keys of samples that the fault takes away; all others must be read.
        before: the file as it was when it was indexed, if the fault came later.
        records: how many there must be: one for each sample that is known of and lost.
    """

    data: bytes
    kind: str
    keys: tuple[str | None, ...]
    lost: frozenset[str] = field(default_factory=frozenset)
    before: bytes | None = None
    records: int = 1


Samples = dict[str, dict[str, bytes]]
Plant = Callable[[Samples, str, random.Random], Damaged]
"""Samples by key, the key to harm, a source of chance -> a shard."""


def good_samples(number: int) -> Samples:
    """Small pictures with their captions, each another: PNG, so that pixels must be equal."""
    rng = np.random.default_rng(number)
    samples: Samples = {}
    for place in range(SAMPLES):
        key = f"s{number:04d}-{place}"
        picture = Image.fromarray(rng.integers(0, 256, (6, 7, 3), np.uint8))
        text = f"picture {key}"
        meta = json.dumps({"caption": text}).encode()
        samples[key] = {"png": encoded(picture, "PNG"), "txt": text.encode(), "json": meta}
    return samples


def encoded(picture: Image.Image, format: str) -> bytes:
    data = io.BytesIO()
    picture.save(data, format)
    return data.getvalue()


def members_of(samples: Samples) -> list[Member]:
    return [
        Member(f"{key}.{extension}", data)
        for key, members in samples.items()
        for extension, data in members.items()
    ]


def tar_of(members: list[Member]) -> bytes:
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for member in members:
            info = tarfile.TarInfo(member.name)
            info.type, info.linkname, info.size = member.type, member.target, len(member.data)
            tar.addfile(info, io.BytesIO(member.data))
    return data.getvalue()


def places_of(data: bytes) -> list[tuple[str, int, int, int]]:
    """Of each member: name, byte of its header, of its payload, and after its padding."""
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        found = [(m.name, m.offset, m.offset_data, m.size) for m in tar]
    return [(name, at, start, start + -(-size // 512) * 512) for name, at, start, size in found]


# --- plants: content


def content(kind: str, extension: str, make: Callable[[random.Random], bytes | None]) -> Plant:
    """One member has other bytes, or none."""

    def plant(samples: Samples, key: str, rng: random.Random) -> Damaged:
        data = make(rng)
        if data is None:
            del samples[key][extension]
        else:
            samples[key][extension] = data
        return Damaged(tar_of(members_of(samples)), kind, (key,), frozenset((key,)))

    return plant


def no_caption(samples: Samples, key: str, rng: random.Random) -> Damaged:
    del samples[key]["txt"], samples[key]["json"]
    return Damaged(tar_of(members_of(samples)), "missing caption", (key,), frozenset((key,)))


def foreign_member(samples: Samples, key: str, rng: random.Random) -> Damaged:
    """The sample is still good: what is refused is left out."""
    extension = rng.choice(("pkl", "pyd", "pth", "pt", "npz", "jpg.gz", "html"))
    samples[key][extension] = rng.randbytes(40)
    return Damaged(tar_of(members_of(samples)), "refused member", (key,))


# --- plants: structure


def adjacent_duplicate(samples: Samples, key: str, rng: random.Random) -> Damaged:
    members = members_of(samples)
    at = next(i for i, m in enumerate(members) if m.name == f"{key}.png")
    members.insert(at + 1, Member(f"{key}.png", members[at].data))
    return Damaged(tar_of(members), "duplicate key", (key,), frozenset((key,)))


def far_duplicate(samples: Samples, key: str, rng: random.Random) -> Damaged:
    members = members_of(samples)
    again = [Member(f"{key}.{name}", data) for name, data in samples[key].items()]
    return Damaged(tar_of([*members, *again]), "duplicate key", (key,), frozenset((key,)))


def link(type: bytes) -> Plant:
    def plant(samples: Samples, key: str, rng: random.Random) -> Damaged:
        members = members_of(samples)
        at = next(i for i, m in enumerate(members) if m.name == f"{key}.png")
        target = rng.choice(("/etc/passwd", "../x.png", members[0].name))
        members[at] = Member(f"{key}.png", b"", type, target)
        return Damaged(tar_of(members), "link or device", (key,), frozenset((key,)))

    return plant


def unsafe_name(samples: Samples, key: str, rng: random.Random) -> Damaged:
    folder = rng.choice(("../", "/", "a/../../", "./../"))
    members = members_of(samples)
    for member in members:
        if member.name.startswith(f"{key}."):
            member.name = folder + member.name
    named = tuple({key, folder + key, folder.strip("/") + key})
    return Damaged(tar_of(members), "unsafe name", (*named, None), frozenset((key,)))


def flipped_header(samples: Samples, key: str, rng: random.Random) -> Damaged:
    """Found by the header's own checksum, when the shard is indexed."""
    data = tar_of(members_of(samples))
    name, at, _, _ = next(place for place in places_of(data) if place[0] == f"{key}.png")
    return Damaged(
        flip(data, at + rng.randrange(100), rng), "damaged header", (key, None), frozenset((key,))
    )


def flipped_later(part: str) -> Plant:
    """Found by the index's checksum, when the sample is read."""

    def plant(samples: Samples, key: str, rng: random.Random) -> Damaged:
        before = tar_of(members_of(samples))
        place = rng.choice([p for p in places_of(before) if p[0].startswith(f"{key}.")])
        first, last = (place[1], place[2]) if part == "header" else (place[2], place[3])
        after = flip(before, rng.randrange(first, last), rng)
        return Damaged(after, "damaged bytes", (key,), frozenset((key,)), before)

    return plant


def truncated(border: bool, later: bool) -> Plant:
    """Cut within the sample, or before one of its members; it and all after it are gone."""

    def plant(samples: Samples, key: str, rng: random.Random) -> Damaged:
        before = tar_of(members_of(samples))
        own = [place for place in places_of(before) if place[0].startswith(f"{key}.")]
        cut = rng.choice(own)[1] if border else rng.randrange(own[0][1], own[-1][3])
        keys = list(samples)
        lost = keys[keys.index(key) :]
        if later:
            kind, keys = "truncated shard", tuple(lost)
            return Damaged(before[:cut], kind, keys, frozenset(lost), before, len(lost))
        # What stood after the cut is known to nobody.
        return Damaged(before[:cut], "truncated shard", (key, None), frozenset(lost))

    return plant


def flip(data: bytes, at: int, rng: random.Random) -> bytes:
    changed = bytearray(data)
    changed[at] ^= rng.randrange(1, 256)
    return bytes(changed)


# --- pictures that state a size, and text


def png_bomb(rng: random.Random) -> bytes:
    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(bytes(100_000))), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in chunks
    )


def gif_bomb(rng: random.Random) -> bytes:
    data = bytearray(encoded(Image.new("P", (4, 4)), "GIF"))
    data[6:10] = struct.pack("<HH", 60_000, 60_000)
    return bytes(data)


def jpeg_bomb(rng: random.Random) -> bytes:
    data = bytearray(encoded(Image.new("RGB", (8, 8)), "JPEG"))
    at = data.index(b"\xff\xc0") + 5
    data[at : at + 4] = struct.pack(">HH", 60_000, 60_000)
    return bytes(data)


def deep_json(rng: random.Random) -> bytes:
    return b'{"caption": ' + b"[" * 20_000 + b"]" * 20_000 + b"}"


def half_png(rng: random.Random) -> bytes:
    whole = encoded(Image.effect_noise((20, 20), 60), "PNG")
    return whole[: rng.randrange(1, len(whole) - 20)]


def _const(data: bytes) -> Callable[[random.Random], bytes]:
    return lambda rng: data


def plants() -> dict[str, Plant]:
    """Every plant, by what it does."""
    tiff = encoded(Image.new("I", (4, 4), 70_000), "TIFF")
    line = encoded(Image.new("RGB", (MAX_ASPECT + 50, 1)), "PNG")
    huge = b"x" * (size_limit("txt") + 1)
    long = json.dumps({"caption": "x" * (MAX_CHARACTERS + 1)}).encode()
    return {
        "cut at a random byte": truncated(border=False, later=False),
        "cut at a member border": truncated(border=True, later=False),
        "cut at a random byte, after indexing": truncated(border=False, later=True),
        "cut at a member border, after indexing": truncated(border=True, later=True),
        "byte flipped in a header": flipped_header,
        "byte flipped in a header, after indexing": flipped_later("header"),
        "byte flipped in a payload, after indexing": flipped_later("payload"),
        "no picture": content("missing image", "png", lambda rng: None),
        "no text": no_caption,
        "member twice, side by side": adjacent_duplicate,
        "key again, far away": far_duplicate,
        "picture of no bytes": content("empty image", "png", _const(b"")),
        "picture of random bytes": content(
            "unreadable image", "png", lambda rng: rng.randbytes(90)
        ),
        "picture cut short": content("unreadable image", "png", half_png),
        "picture of 32-bit samples": content("unsupported mode", "png", _const(tiff)),
        "PNG that states 60,000 × 60,000": content("too many pixels", "png", png_bomb),
        "GIF that states 60,000 × 60,000": content("too many pixels", "png", gif_bomb),
        "JPEG that states 60,000 × 60,000": content("too many pixels", "png", jpeg_bomb),
        "picture of one line": content("too narrow", "png", _const(line)),
        "text of more than a mebibyte": content("member too large", "txt", _const(huge)),
        "caption of 200,001 characters": content("text too long", "json", _const(long)),
        "text that is no UTF-8": content(
            "unreadable caption", "txt", lambda rng: b"caf\xe9" + rng.randbytes(3)
        ),
        "JSON cut short": content("unreadable json", "json", _const(b'{"caption": "a')),
        "JSON of 20,000 levels": content("unreadable json", "json", deep_json),
        "symbolic link": link(tarfile.SYMTYPE),
        "hard link": link(tarfile.LNKTYPE),
        "device": link(tarfile.CHRTYPE),
        "name with .. or a leading slash": unsafe_name,
        "member of no allowed kind": foreign_member,
    }
