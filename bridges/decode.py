"""Encoded pictures straight to the encoder's uint8 pixels, on one core several times as fast as its
own processor.

A JPEG that is much larger than what the encoder reads is decoded to a half, a quarter or an eighth
of its size by dropping DCT coefficients; one resize by torch's uint8 kernels follows; bytes stay
bytes until they are on the encoder's device, where they are normalised. What differs from the
official processor is bounded (`FastPreprocess`).
"""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import simplejpeg
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from bridges.images import check_scans, check_size, open_image, orientation_of

DecodeMode = Literal["exact", "fast"]
"""``exact`` is the encoder's official processor to the bit; ``fast`` is `FastPreprocess`."""

Resize = Literal["shortest", "squash"]
Resample = Literal["bilinear", "bicubic"]

MARGIN = 1.05
"""A JPEG is decoded to no less than this many times the size it is then resized to.

What DCT scaling leaves of the highest frequencies is not what one resize leaves of them, least of
all where it leaves nothing to resize. A photo of 640×480 for 224 pixels, at half its size, is off
by 1.6 of 255 levels on average, and EfficientNet-Lite's features of it by as much as those of the
photo saved at quality 95 instead of 90. At 1.5, it would not be scaled, and take a third longer.
"""

PIXELS_VERSION = 1
"""Raised when the fast pixels of a picture change: features that are cached from them are stale."""

_SCALES = (8, 4, 2)  # the only ones for which libjpeg-turbo has vector code
_JPEG = b"\xff\xd8\xff"

_COLOURS = ("YCbCr", "RGB", "Gray")  # of CMYK libjpeg makes no RGB

_TURNED = (5, 6, 7, 8)
_UPRIGHT: dict[int, Callable[[Tensor], Tensor]] = {  # of (3, h, w), by EXIF orientation
    2: lambda stored: stored.flip(2),
    3: lambda stored: stored.flip(1, 2),
    4: lambda stored: stored.flip(1),
    5: lambda stored: stored.transpose(1, 2),
    6: lambda stored: stored.flip(1).transpose(1, 2),
    7: lambda stored: stored.flip(1, 2).transpose(1, 2),
    8: lambda stored: stored.flip(2).transpose(1, 2),
}


class ImageDecoder(Protocol):
    """Makes pixels for an encoder; can be pickled, for workers that are spawned."""

    def __call__(self, image: Image.Image) -> Tensor:
        """An RGB picture of any size -> (3, h, w), float (exact) or uint8 (fast)."""
        ...

    def pixels(self, data: bytes) -> Tensor:
        """A picture in any of `bridges.images.FORMATS` -> (3, h, w), as `__call__` makes it.

        Raises:
            ImageError: as `bridges.images.open_image`.
        """
        ...


@dataclass(frozen=True)
class FastPreprocess:
    """What an encoder's processor does, in few enough words to do it on bytes.

    Pixels are uint8; `normalise` is for the encoder's device. In levels of 255, those of photos
    differ from the official processor's by at most 6 and by 0.5 on average; where the DCT is
    scaled, by 32 and 3.5 (from 640×480 to 224: 28 and 1.6; from 1600×1200: 12 and 0.8). For dots
    and chessboards of a few pixels, which no photo is, it is 80 and 15.

    Attributes:
        resize: ``squash`` to `size`, or the ``shortest`` edge to ``size[0]`` and crop.
        size: height and width, in pixels.
        crop: height and width of the middle that is kept; None for all of it.
        resample: filter, with antialiasing.
        mean: of each channel, after `rescale`.
        std: of each channel, after `rescale`.
        rescale: factor of the levels 0…255.
    """

    resize: Resize
    size: tuple[int, int]
    crop: tuple[int, int] | None
    resample: Resample
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    rescale: float

    def __call__(self, image: Image.Image) -> Tensor:
        """An RGB picture of any size -> uint8 (3, h, w)."""
        array = np.array(image)
        return self._fitted(array, array.shape[:2])

    def pixels(self, data: bytes) -> Tensor:
        """A picture in any of `bridges.images.FORMATS` -> uint8 (3, h, w).

        Raises:
            ImageError: as `bridges.images.open_image`.
        """
        found = self._jpeg(data) if data.startswith(_JPEG) else None
        return self(open_image(data)) if found is None else found

    def normalise(self, pixels: Tensor) -> Tensor:
        """uint8 (..., 3, h, w) -> fp32 (..., 3, h, w) as the encoder reads it, on their device."""
        to = {"dtype": torch.float32, "device": pixels.device}
        mean, std = (torch.tensor(values, **to)[:, None, None] for values in (self.mean, self.std))
        # (x · rescale - mean) / std, in as few passes over the pixels as there can be.
        return pixels.float().sub_(mean / self.rescale).mul_(self.rescale / std)

    def resized(self, height: float, width: float) -> tuple[int, int]:
        """Height and width of a picture after the resize, before the crop."""
        if self.resize == "squash":
            return self.size
        short, long = self.size[0], max(height, width)
        long = int(short * long / min(height, width))
        return (long, short) if width <= height else (short, long)

    def _jpeg(self, data: bytes) -> Tensor | None:
        """Pixels of a JPEG; None for whatever `open_image` must look at, or refuse."""
        try:
            *sides, colours, _ = simplejpeg.decode_jpeg_header(data)
            rows, columns = map(int, sides)
            check_size(columns, rows)
            check_scans(data)
            # Pillow reads the header as well, for the orientation, and must agree on the size.
            with Image.open(io.BytesIO(data), formats=("JPEG",)) as header:
                if header.size != (columns, rows) or colours not in _COLOURS:
                    return None
                orientation = orientation_of(header)
            turned = orientation in _TURNED
            scale = self._scale(columns, rows) if turned else self._scale(rows, columns)
            least = [-(-side // scale) if scale > 1 else 0 for side in (rows, columns)]
            array = simplejpeg.decode_jpeg(data, "RGB", min_height=least[0], min_width=least[1])
        except Exception:  # nearly any, on corrupt bytes
            return None
        return self._fitted(array, (rows / scale, columns / scale), orientation)

    def _scale(self, height: int, width: int) -> int:
        """By how much a JPEG may be scaled down in its DCT."""
        least = [MARGIN * side for side in self.resized(height, width)]
        sides = height, width
        fits = (s for s in _SCALES if all(a / s >= b for a, b in zip(sides, least, strict=True)))
        return next(fits, 1)

    def _fitted(
        self, array: NDArray[np.uint8], size: tuple[float, float], orientation: int = 1
    ) -> Tensor:
        """(h, w, 3) as stored, which shows ``size`` whole pixels and parts of one -> resized,
        upright, cropped.

        A JPEG of 641 columns has 321 at half its size, of which the last shows a half. To take
        the 321 for the whole would move everything, up to a pixel at the right; and so would
        turning it before it is resized, which puts the half one first.
        """
        turned = orientation in _TURNED
        wanted = self.resized(*size[::-1])[::-1] if turned else self.resized(*size)
        pixels = torch.from_numpy(array).permute(2, 0, 1)[None]
        how = {"mode": self.resample, "antialias": True}
        if size == array.shape[:2]:
            pixels = interpolate(pixels, wanted, **how)
        else:
            # torch takes the floor of size times factor, which must not fall below the whole.
            factors = [(a / b) * (1 + 1e-9) for a, b in zip(wanted, size, strict=True)]
            pixels = interpolate(pixels, scale_factor=factors, **how)
        upright = _UPRIGHT[orientation](pixels[0]) if orientation in _UPRIGHT else pixels[0]
        height, width = upright.shape[1:]
        rows, columns = self.crop or (height, width)
        top, left = (height - rows) // 2, (width - columns) // 2
        return upright[:, top : top + rows, left : left + columns].contiguous()
