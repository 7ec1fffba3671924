"""One sample: every way in which it can be bad has a name, and none ends anything else."""

import io
import json
import random
import struct
import zlib
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from bridges.images import (
    MAX_ASPECT,
    ImageError,
    TooManyPixelsError,
    TooNarrowError,
    UnsupportedModeError,
    open_image,
)
from recipes.samples import (
    EXTENSIONS,
    MAX_CHARACTERS,
    CaptionDecoder,
    SampleError,
    decode_caption_sample,
    is_member,
    read_features,
    size_limit,
)
from recipes.samples_json import MAX_DIGITS, MAX_VALUES, parse_json

SEED = 3


def encode(image: Image.Image, format: str = "PNG", **options: Any) -> bytes:
    data = io.BytesIO()
    image.save(data, format, **options)
    return data.getvalue()


def raw_of(**members: Any) -> dict[str, Any]:
    given = {"png": encode(Image.new("RGB", (4, 4), "red")), "txt": b"a cat", **members}
    kept = {name: data for name, data in given.items() if data is not None}
    return {"__key__": "k", "__shard__": "s.tar", "__seed__": "0", **kept}


def png_of(width: int, height: int) -> bytes:
    """A PNG that states a size and holds no pixel of it."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(b"")), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in chunks
    )


def deep(levels: int) -> bytes:
    return b'{"caption": "x", "a": ' + b"[" * levels + b"]" * levels + b"}"


# fmt: off
BAD = [
    (raw_of(txt=None), "missing caption", "no caption"),
    (raw_of(txt=b" \n"), "missing caption", "no caption"),
    (raw_of(png=None), "missing image", "no picture"),
    (raw_of(png=b""), "empty image", "png has no bytes"),
    (raw_of(png=b"nothing"), "unreadable image", "begins with b'nothing'"),
    (raw_of(png=raw_of()["png"][:-30]), "unreadable image", "cannot be decoded"),
    (raw_of(png=png_of(60_000, 60_000)), "too many pixels", "DecompressionBomb"),
    (raw_of(png=png_of(9000, 9000)), "too many pixels", "9000×9000 = 81,000,000 pixels"),
    (raw_of(png=encode(Image.new("RGB", (MAX_ASPECT + 1, 1)))), "too narrow", "is 101×1"),
    (raw_of(png=encode(Image.new("I", (2, 2)), "TIFF")), "unsupported mode", "32-bit samples"),
    (raw_of(txt=b"\xff"), "unreadable caption", "not UTF-8"),
    (raw_of(txt=b"\xed\xa0\x80"), "unreadable caption", "not UTF-8"),  # half a surrogate pair
    (raw_of(txt="a cat".encode("utf-16-le")), "unreadable caption", "NUL in the text"),
    (raw_of(json=b'{"captions": ["a", "b\\u0000"]}'), "unreadable caption", "NUL in the text"),
    (raw_of(txt=b"x" * (MAX_CHARACTERS + 1)), "text too long", "200,001 characters"),
    (raw_of(json=b"{"), "unreadable json", "json: "),
    (raw_of(json=b"\xff{}"), "unreadable json", "json: "),
    (raw_of(json=b"[1]"), "unreadable json", "holds a list"),
    (raw_of(json=deep(200)), "unreadable json", "nested deeper than 100"),
    (raw_of(json=deep(100_000)), "unreadable json", "nested deeper than 100"),
    (raw_of(json=b'{"a": %s}' % (b"9" * 1_000_000)), "unreadable json", "of 1,000,000 digits"),
    (raw_of(json=b'{"a": [%s[]]}' % (b"[]," * MAX_VALUES)), "unreadable json", "brackets"),
    (raw_of(json=b'{"a": "\\ud800"}'), "unreadable json", "surrogates not allowed"),
]
# fmt: on


@pytest.mark.parametrize(("raw", "kind", "expected"), BAD, ids=lambda value: str(value)[:30])
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_every_way_to_be_bad_has_a_kind(raw, kind, expected):
    with pytest.raises(SampleError, match=rf"s.tar: sample 'k'.*{expected}") as error:
        decode_caption_sample(raw)
    assert error.value.kind == kind


def test_what_is_as_far_as_it_may_be_is_read():
    words = "x" * MAX_CHARACTERS
    assert decode_caption_sample(raw_of(txt=words.encode()))["captions"] == [words]
    wide = encode(Image.new("RGB", (MAX_ASPECT, 1)))
    assert decode_caption_sample(raw_of(png=wide))["image"].size == (MAX_ASPECT, 1)
    assert parse_json(b"[" * 101 + b"]" * 101)
    assert parse_json(b"9" * MAX_DIGITS) == int("9" * MAX_DIGITS)
    assert len(parse_json(b"[0" + b",0" * (MAX_VALUES - 1) + b"]")) == MAX_VALUES


def test_numbers_that_python_writes_are_taken():
    meta = decode_caption_sample(raw_of(json=b'{"a": [NaN, -Infinity, 1e999999, -0]}'))["meta"]
    assert str(meta["a"]) == "[nan, -inf, inf, 0]"


def test_a_picture_within_another_member_is_named(monkeypatch):
    from recipes.samples import decode_image

    data = encode(Image.new("RGB", (3, 2)))
    assert decode_image(raw_of(), "picture 7", data).size == (3, 2)
    with pytest.raises(SampleError, match="picture 7 has no bytes") as error:
        decode_image(raw_of(), "picture 7", b"")
    assert error.value.kind == "empty image"


@pytest.mark.parametrize("qa", [[{"question": "q"}], ["q"], [{"question": "q", "answer": "\0"}]])
def test_a_question_that_cannot_be_used_has_a_kind(qa):
    decode = CaptionDecoder(lambda image: torch.zeros(1), random_caption=False, questions=True)
    with pytest.raises(SampleError, match=r"s.tar: sample 'k'") as error:
        decode(raw_of(json=json.dumps({"qa": qa}).encode()))
    assert error.value.kind in ("unreadable question", "unreadable caption")


def test_a_picture_is_refused_before_it_is_decoded(monkeypatch):
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    for size in ((9000, 9000), (60_000, 60_000)):
        with pytest.raises(TooManyPixelsError):
            open_image(png_of(*size))


def test_kinds_of_pictures_are_image_errors():
    for kind in (TooManyPixelsError, TooNarrowError, UnsupportedModeError):
        assert issubclass(kind, ImageError)


def test_every_member_that_is_read_has_a_limit():
    for extension in (*EXTENSIONS, "0.jpg", "17.webp"):
        assert is_member(extension)
        assert 0 < size_limit(extension) <= 1 << 30
    assert size_limit("txt") == 1 << 20
    assert size_limit("json") == 64 << 20
    assert size_limit("0.jpg") == size_limit("jpg") >= 64_000_000 * 4


# --- random bytes


def npy(array: np.ndarray) -> bytes:
    data = io.BytesIO()
    np.save(data, array, allow_pickle=False)
    return data.getvalue()


def damaged(data: bytes, rng: random.Random) -> bytes:
    """Some bytes changed, most of them near the front where headers are, or an end cut off."""
    changed = bytearray(data)
    for _ in range(rng.randint(1, 8)):
        changed[min(int(rng.expovariate(0.02)), len(changed) - 1)] = rng.randrange(256)
    return bytes(changed[: rng.randrange(len(changed))] if rng.random() < 0.3 else changed)


STARTS = {
    "jpg": [encode(Image.new("RGB", (16, 16), "red"), "JPEG")],
    "png": [
        encode(Image.effect_noise((16, 16), 50), "PNG"),
        encode(Image.new("P", (16, 16)), "GIF"),
        encode(Image.new("I;16", (16, 16)), "TIFF", compression="tiff_lzw"),
        encode(Image.new("RGB", (16, 16)), "BMP"),
    ],
    "webp": [encode(Image.effect_noise((16, 16), 50), "WEBP")],
    "txt": ["a cat on a máť".encode()],
    "json": [b'{"captions": ["a cat", "b"], "caption": "x", "n": [1, 2.5e3, null, {"a": true}]}'],
}


@pytest.mark.parametrize("extension", sorted(STARTS))
@pytest.mark.filterwarnings("ignore")  # of Pillow, about corrupt EXIF and TIFF data
def test_damaged_members_end_in_sample_errors(extension):
    rng = random.Random(f"{SEED}/{extension}")
    bad = 0
    for turn in range(400):
        start = STARTS[extension][turn % len(STARTS[extension])]
        data = damaged(start, rng) if turn % 8 else rng.randbytes(rng.randrange(60))
        members = {"png": data} if extension in ("jpg", "webp") else {extension: data}
        try:
            decode_caption_sample(raw_of(**members))
        except SampleError:
            bad += 1
    assert bad > 50


def test_damaged_features_end_in_sample_errors():
    rng = random.Random(SEED)
    data = npy(np.zeros((3, 5), np.float16))
    shapes = (b"9" * 30, b"-3", b"2**3", b"9999999999", b"(" * 60, b"", b"'", b"3, 5, 3")
    headers = [data.replace(b"3, 5", shape) for shape in shapes]
    headers += [data.replace(b"<f2", kind) for kind in (b"|O8", b"M8[", b">f2", b"|V2", b"\xff")]
    bad = 0
    for damage in (*headers, *(damaged(data, rng) for _ in range(400))):
        try:
            read_features(raw_of(npy=damage), 2)
        except SampleError as error:
            bad += 1
            assert error.kind == "unreadable features"
    assert bad > 200
