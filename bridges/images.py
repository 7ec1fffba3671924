"""Opening one picture as upright, opaque, 8-bit RGB.

Pillow's ``convert("RGB")`` alone leaves phone photographs lying on their side, turns what is
transparent into whatever colour lies beneath, and saturates 16-bit greys to white. Everything
that reads a picture goes through `open_image` instead.
"""

from __future__ import annotations

import io
import re
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError
from PIL.TiffImagePlugin import TiffImageFile

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
"""Only these decoders see the bytes: Pillow has forty more, some of which start programs."""

MAX_PIXELS = 64_000_000
"""Width × height of the largest picture that is decoded."""

MAX_ASPECT = 100
"""Longer to shorter side. An encoder that scales the shorter side to 224 makes three billion
pixels of 60,000 × 1."""

MAX_SCANS = 100
"""Of a JPEG, as libtiff has it of one within a TIFF. Encoders make a dozen. Each takes 200 bytes
and a pass over all pixels: half a megabyte of them could hold a core for half a minute."""

MAX_TILE = 4096**2
"""Pixels of a TIFF's tile that reaches beyond the picture. All of a tile is decoded."""

_TILE_SIDES = (322, 323)
# Between the segments of a JPEG stand their marks. Entropy-coded data hold no others than these.
_MARK = re.compile(rb"\xff[^\x00\x01\xd0-\xd8\xff]")
_SCAN = b"\xff\xda"
_END = b"\xff\xd9"

_ORIENTATION_TAG = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class ImageError(ValueError):
    """A picture that cannot, or should not, be decoded. ``kind`` is what such are counted by."""

    kind = "unreadable image"


class TooManyPixelsError(ImageError):
    """A picture whose header states more pixels than are decoded."""

    kind = "too many pixels"


class TooNarrowError(ImageError):
    """A picture whose header states that one side is a great many times the other."""

    kind = "too narrow"


class UnsupportedModeError(ImageError):
    """A picture of samples whose white is not known."""

    kind = "unsupported mode"


def open_image(source: bytes | Path, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decodes a picture to upright RGB, or says why not.

    EXIF orientation is applied, transparency is composited on white, 16-bit greys are scaled
    to 8 bits, CMYK and greyscale become RGB, an animation gives its first frame. The pixel
    count is read from the header, before anything is decoded; so are a JPEG's scans and a TIFF's
    tiles counted.

    Args:
        source: The encoded bytes, or the path of a file that holds them.
        max_pixels: The most pixels (width × height) that are decoded.

    Raises:
        ImageError: Unreadable file, format not in ``FORMATS``, too many pixels, one side more
            than `MAX_ASPECT` times the other, more than `MAX_SCANS`, truncated or corrupt data,
            32-bit samples.
    """
    name = "the image" if isinstance(source, bytes) else str(source)
    try:
        data = source if isinstance(source, bytes) else source.read_bytes()
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            check_size(image.width, image.height, name, max_pixels)
            if image.format in ("JPEG", "MPO"):
                check_scans(data, name)
            if isinstance(image, TiffImageFile):
                _check_tiles(image, name)
            rgb = upright_rgb(image, name)
    except ImageError:
        raise
    # Pillow's own limit, at which it opens nothing, lies above that of `max_pixels`.
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise TooManyPixelsError(
            f"{name} has too many pixels: {type(error).__name__}: {error}; expected at most "
            f"{max_pixels:,}: scale it down first"
        ) from error
    except UnidentifiedImageError as error:
        raise ImageError(
            f"{name} is no image that can be read: it begins with {_head(source)!r}; expected "
            f"one of {', '.join(FORMATS)}: convert it or leave it out"
        ) from error
    # Pillow's decoders raise nearly anything on corrupt bytes: OSError, SyntaxError,
    # struct.error, zlib.error, IndexError, and a warning or an error of its own for bombs.
    except Exception as error:
        raise ImageError(
            f"{name} cannot be decoded: {type(error).__name__}: {error}; expected a complete "
            f"file in one of {', '.join(FORMATS)}: fetch it again or leave it out"
        ) from error
    return rgb


def check_size(
    width: int, height: int, name: str = "the image", max_pixels: int = MAX_PIXELS
) -> None:
    """Refuses a picture by what its header states, before anything is decoded.

    Raises:
        TooManyPixelsError: more than ``max_pixels``.
        TooNarrowError: one side more than `MAX_ASPECT` times the other.
    """
    if width * height > max_pixels:
        raise TooManyPixelsError(
            f"{name} is {width}×{height} = {width * height:,} pixels; expected at most "
            f"{max_pixels:,}: scale it down first or raise max_pixels"
        )
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise TooNarrowError(
            f"{name} is {width}×{height}; expected one side at most {MAX_ASPECT} times the other: "
            "cut it or leave it out"
        )


def check_scans(data: bytes, name: str = "the image") -> None:
    """Refuses a JPEG of more scans than an encoder makes, before anything is decoded.

    Raises:
        ImageError: more than `MAX_SCANS`.
    """
    # Pairs of bytes may look like a scan where there is none: the walk is for such pictures alone.
    if data.count(_SCAN) > MAX_SCANS and _has_many_scans(data):
        raise ImageError(
            f"{name} is a JPEG of more than {MAX_SCANS} scans; expected a dozen at most: save it "
            "anew, or leave it out"
        )


def _has_many_scans(data: bytes) -> bool:
    """Follows a JPEG's segments to its end; a phone's photo may have a film behind it."""
    at = scans = 0
    while (mark := _MARK.search(data, at)) and mark[0] != _END:
        scans += mark[0] == _SCAN
        if scans > MAX_SCANS:
            return True
        at = mark.end() + int.from_bytes(data[mark.end() : mark.end() + 2], "big")
    return False


def _check_tiles(image: TiffImageFile, name: str) -> None:
    width, height = (int(image.tag_v2.get(tag, 0)) for tag in _TILE_SIDES)
    most = max(MAX_TILE, image.width * image.height)
    if width * height > most:
        raise TooManyPixelsError(
            f"{name} has tiles of {width}×{height} = {width * height:,} pixels for a picture of "
            f"{image.width}×{image.height}; expected at most {most:,}: save it with smaller tiles, "
            "or leave it out"
        )


def upright_rgb(image: Image.Image, name: str = "the image") -> Image.Image:
    """An opened picture as upright RGB, by the rules of `open_image`.

    Raises:
        ImageError: 32-bit samples.
    """
    image.load()
    rgb = _to_rgb(image, name)
    # Read after load(): Pillow turns a TIFF upright by itself and drops the tag.
    upright = _UPRIGHT.get(orientation_of(image))
    rgb = rgb.transpose(upright) if upright is not None else rgb.copy()
    # What was applied must not be found, and applied a second time, further on.
    rgb.info.clear()
    return rgb


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    # Older Pillow opens a 16-bit PNG as "I"; in any other format "I" holds 32 bits.
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):
        return _scale_16_bit(image)
    if image.mode in ("I", "F"):
        raise UnsupportedModeError(
            f"{name} has 32-bit samples (mode {image.mode}), whose white is not known; "
            f"expected 8 or 16 bits: rescale it first"
        )
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, "white")
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")


def _scale_16_bit(image: Image.Image) -> Image.Image:
    samples = np.asarray(image).astype(np.uint32)
    grey = ((samples * 255 + 32767) // 65535).astype(np.uint8)
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        grey[samples == transparent] = 255
    return Image.fromarray(grey).convert("RGB")


def orientation_of(image: Image.Image) -> int:
    """The EXIF orientation of an opened picture, 1 (upright) where none can be read."""
    try:
        return int(image.getexif().get(_ORIENTATION_TAG, 1))
    except Exception:  # an EXIF block that cannot be parsed states no orientation
        return 1


def _head(source: bytes | Path, length: int = 16) -> bytes:
    if isinstance(source, bytes):
        return source[:length]
    with source.open("rb") as stream:
        return stream.read(length)
