"""Shards with one known fault each, for `recipes.reliability_faults`."""

from __future__ import annotations

import io
import json
import random
import tarfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from PIL import Image

from bridges.images import MAX_ASPECT
from recipes.reliability_faults_bombs import deep_json, gif_bomb, half_png, jpeg_bomb, png_bomb
from recipes.samples import MAX_CHARACTERS, size_limit

SAMPLES = 5
"""Samples of a shard; the fault is in one of them, or begins there."""

_FOREIGN = ("pkl", "pyd", "pth", "pt", "npz", "jpg.gz", "html")


@dataclass(frozen=True)
class Damaged:
    """A shard with a fault.

    Attributes:
        data: of the file.
        kinds: of the records that the fault must leave, one for each sample that it harms.
        keys: that they may name.
        lost: keys of samples that the fault takes away; all others must be read.
        known: what the project's writer made beside the shard and the damage left there.
    """

    data: bytes
    kinds: tuple[str, ...]
    keys: tuple[str | None, ...]
    lost: frozenset[str]
    known: tuple[str, ...] = ()


Samples = dict[str, dict[str, bytes]]
Plant = Callable[[Samples, str, random.Random, bytes], Damaged]
"""Samples by key, the key to harm, a source of chance, the shard as the writer made it."""


def good_samples(number: int) -> Samples:
    """Small pictures with their captions, each another: PNG, so that pixels must be equal."""
    rng = np.random.default_rng(number)
    samples: Samples = {}
    for place in range(SAMPLES):
        key = f"s{number:04d}-{place}"
        picture = Image.fromarray(rng.integers(0, 256, (6, 7, 3), np.uint8))
        meta = json.dumps({"caption": f"picture {key}"}).encode()
        samples[key] = {"png": _encoded(picture, "PNG"), "txt": key.encode(), "json": meta}
    return samples


def plants() -> dict[str, Plant]:
    """Every plant, by what it does."""
    tiff = _encoded(Image.new("I", (4, 4), 70_000), "TIFF")
    line = _encoded(Image.new("RGB", (MAX_ASPECT + 50, 1)), "PNG")
    huge = b"x" * (size_limit("txt") + 1)
    long = json.dumps({"caption": "x" * (MAX_CHARACTERS + 1)}).encode()
    indexed, listed = ("index", "manifest"), ("manifest",)
    return {
        "cut at a random byte": _truncated("anywhere"),
        "cut at a member's border": _truncated("border"),
        "cut within the name of a member": _truncated("name"),
        "cut at a random byte, after indexing": _truncated("anywhere", known=indexed),
        "cut at a member's border, after indexing": _truncated("border", known=indexed),
        "cut at a random byte, listed in a manifest": _truncated("anywhere", known=listed),
        "cut at a member's border, listed in a manifest": _truncated("border", known=listed),
        "byte flipped in a header": _flipped_header,
        "byte flipped in a header, after indexing": _flipped_later(0),
        "byte flipped in a payload, after indexing": _flipped_later(1),
        "no picture": _content("missing image", "png", lambda rng: None),
        "no text": _no_caption,
        "member twice": _member_twice,
        "key twice, side by side": _key_twice(apart=False),
        "key twice, far apart": _key_twice(apart=True),
        "picture of no bytes": _content("empty image", "png", lambda rng: b""),
        "picture of noise": _content("unreadable image", "png", lambda rng: rng.randbytes(90)),
        "picture cut short": _content("unreadable image", "png", half_png),
        "picture of 32-bit samples": _content("unsupported mode", "png", lambda rng: tiff),
        "PNG that states 60,000 × 60,000": _content("too many pixels", "png", png_bomb),
        "GIF that states 60,000 × 60,000": _content("too many pixels", "png", gif_bomb),
        "JPEG that states 60,000 × 60,000": _content("too many pixels", "png", jpeg_bomb),
        "picture of one line": _content("too narrow", "png", lambda rng: line),
        "text of over a mebibyte": _content("member too large", "txt", lambda rng: huge),
        "caption of 200,001 characters": _content("text too long", "json", lambda rng: long),
        "text that is no UTF-8": _content("unreadable caption", "txt", lambda rng: b"caf\xe9 noir"),
        "JSON cut short": _content("unreadable json", "json", lambda rng: b'{"caption": "a'),
        "JSON of 20,000 levels": _content("unreadable json", "json", lambda rng: deep_json()),
        "symbolic link": _link(tarfile.SYMTYPE),
        "hard link": _link(tarfile.LNKTYPE),
        "device": _link(tarfile.CHRTYPE),
        "name that leaves its folder": _unsafe_name,
        "member of another kind": _foreign_member,
    }


@dataclass(frozen=True)
class _Member:
    """One member of a tar file: a file, or a link to ``target``."""

    name: str
    data: bytes = b""
    type: bytes = tarfile.REGTYPE
    target: str = ""


def _encoded(picture: Image.Image, format: str) -> bytes:
    data = io.BytesIO()
    picture.save(data, format)
    return data.getvalue()


def _members(samples: Samples) -> list[_Member]:
    return [
        _Member(f"{key}.{extension}", data)
        for key, members in samples.items()
        for extension, data in members.items()
    ]


def _tar(members: list[_Member]) -> bytes:
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for member in members:
            info = tarfile.TarInfo(member.name)
            info.type, info.linkname, info.size = member.type, member.target, len(member.data)
            tar.addfile(info, io.BytesIO(member.data))
    return data.getvalue()


def _places(data: bytes, key: str) -> list[tuple[int, int, int]]:
    """Of each member of a sample: byte of its header, of its payload, and after its padding."""
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        own = [member for member in tar if member.name.startswith(f"{key}.")]
    return [(m.offset, m.offset_data, m.offset_data + -(-m.size // 512) * 512) for m in own]


def _one(data: bytes, kind: str, key: str, known: tuple[str, ...] = ()) -> Damaged:
    return Damaged(data, (kind,), (key,), frozenset((key,)), known)


def _content(kind: str, extension: str, make: Callable[[random.Random], bytes | None]) -> Plant:
    """One member has other bytes, or is not there."""

    def plant(samples: Samples, key: str, rng: random.Random, whole: bytes) -> Damaged:
        data = make(rng)
        others = {name: kept for name, kept in samples[key].items() if name != extension}
        own = others if data is None else {**samples[key], extension: data}
        return _one(_tar(_members({**samples, key: own})), kind, key)

    return plant


def _no_caption(samples: Samples, key: str, rng: random.Random, whole: bytes) -> Damaged:
    own = {"png": samples[key]["png"]}
    return _one(_tar(_members({**samples, key: own})), "missing caption", key)


def _foreign_member(samples: Samples, key: str, rng: random.Random, whole: bytes) -> Damaged:
    """The sample itself stays good: what is refused is left out."""
    own = {**samples[key], rng.choice(_FOREIGN): rng.randbytes(40)}
    found = _one(_tar(_members({**samples, key: own})), "refused member", key)
    return replace(found, lost=frozenset())


def _member_twice(samples: Samples, key: str, rng: random.Random, whole: bytes) -> Damaged:
    """Two samples come of it, by webdataset's rule: a lone picture, and one of a known key."""
    members = _members(samples)
    at = next(i for i, member in enumerate(members) if member.name == f"{key}.png")
    members.insert(at, members[at])
    found = _one(_tar(members), "duplicate key", key)
    return replace(found, kinds=("duplicate key", "missing caption"))


def _key_twice(apart: bool) -> Plant:
    """The first of the two samples stays good."""

    def plant(samples: Samples, key: str, rng: random.Random, whole: bytes) -> Damaged:
        members = _members(samples)
        again = _members({key: samples[key]})
        last = max(i for i, member in enumerate(members) if member.name.startswith(f"{key}."))
        at = len(members) if apart else last + 1
        found = _one(_tar([*members[:at], *again, *members[at:]]), "duplicate key", key)
        return replace(found, lost=frozenset())

    return plant


def _link(type: bytes) -> Plant:
    def plant(samples: Samples, key: str, rng: random.Random, whole: bytes) -> Damaged:
        members = _members(samples)
        target = rng.choice(("/etc/passwd", "../x.png", members[0].name))
        link = _Member(f"{key}.png", b"", type, target)
        linked = [link if member.name == link.name else member for member in members]
        return _one(_tar(linked), "link or device", key)

    return plant


def _unsafe_name(samples: Samples, key: str, rng: random.Random, whole: bytes) -> Damaged:
    folder = rng.choice(("../", "/", "a/../../", "./../"))
    renamed = {folder + key if name == key else name: own for name, own in samples.items()}
    found = _one(_tar(_members(renamed)), "unsafe name", folder + key)
    return replace(found, lost=frozenset((key,)))


def _flipped_header(samples: Samples, key: str, rng: random.Random, whole: bytes) -> Damaged:
    """Found by the header's own checksum, when the shard is indexed."""
    # All but the blank after the checksum, which no tar reader looks at, and which means nothing.
    at = rng.choice(_places(whole, key))[0] + rng.choice([*range(155), *range(156, 512)])
    return replace(_one(_flip(whole, at, rng), "damaged header", key), keys=(key, None))


def _flipped_later(part: int) -> Plant:
    """Found by the index's checksum, when the sample is read."""

    def plant(samples: Samples, key: str, rng: random.Random, whole: bytes) -> Damaged:
        place = rng.choice(_places(whole, key))
        at = rng.randrange(place[part], place[part + 1])
        return _one(_flip(whole, at, rng), "damaged bytes", key, ("index", "manifest"))

    return plant


def _flip(data: bytes, at: int, rng: random.Random) -> bytes:
    changed = bytearray(data)
    changed[at] ^= 1 << rng.randrange(8)
    return bytes(changed)


def _truncated(where: Literal["anywhere", "border", "name"], known: tuple[str, ...] = ()) -> Plant:
    """Cut in the sample, before one of its members, or in its name; it and all after are gone."""

    def plant(samples: Samples, key: str, rng: random.Random, whole: bytes) -> Damaged:
        keys = list(samples)
        if where != "anywhere" and "index" not in known:
            # That a sample lacks members shows by comparison with one that stands before it.
            key = keys[max(1, keys.index(key))]
        own = _places(whole, key)
        cut = {
            "anywhere": rng.randrange(own[0][0] + 1, own[-1][2]),
            "border": rng.choice(own)[0],
            # So little of it that it could be the name of the sample before.
            "name": own[0][0] + rng.randrange(1, len(key)),
        }[where]
        lost = keys[keys.index(key) :]
        # What stood after the cut is known to nobody, where nothing was written down before.
        kinds = ("truncated shard",) * (len(lost) if known else 1)
        named = tuple(lost) if "index" in known else (*lost, None)
        return Damaged(whole[:cut], kinds, named, frozenset(lost), known)

    return plant
