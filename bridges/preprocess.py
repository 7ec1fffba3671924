"""An encoder's own preparation of pictures, and the fast one that is derived from it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from einops import rearrange
from PIL import Image
from torch import Tensor

from bridges.decode import FastPreprocess, Resample, Resize
from bridges.images import open_image

Preprocess = Callable[[Image.Image], Tensor]
"""A PIL image (RGB, any size) -> (3, h, w), float or uint8, as the encoder wants it."""

MAX_DIFFERENCE, MAX_MEAN_DIFFERENCE = 3.0, 0.5
"""Of fast pixels to the processor's, both made of grey noise, in levels of 255. Both round to
whole levels between rows and columns, and from 13.0 on Pillow does not always take the columns
first: up to 2 and 0.3 are found. One pixel's shift, or another filter, is more than 10."""

_Size = tuple[int, int]
_FILTERS: dict[Any, Resample] = {
    Image.Resampling.BILINEAR: "bilinear",
    Image.Resampling.BICUBIC: "bicubic",
}
_PROBES = ((130, 97), (61, 200), (300, 420), (40, 30))


# Classes, not closures: data-loading workers that are spawned must be able to receive them.
@dataclass(frozen=True)
class HFPreprocess:
    """An HF image processor for one image."""

    processor: Any

    def __call__(self, image: Image.Image) -> Tensor:
        return self.processor(image, return_tensors="pt")["pixel_values"][0]


@dataclass(frozen=True)
class Rescale:
    """Squashes an image to a square and maps 0…255 to (x - mean) / scale."""

    size: int
    mean: float
    scale: float

    def __call__(self, image: Image.Image) -> Tensor:
        resized = image.resize((self.size, self.size), Image.Resampling.BICUBIC)
        pixels = torch.from_numpy(np.array(resized, dtype=np.float32))
        return (rearrange(pixels, "h w c -> c h w") - self.mean) / self.scale


@dataclass(frozen=True)
class ExactDecoder:
    """An `ImageDecoder` whose pixels are the encoder's own.

    Attributes:
        preprocess: of the encoder.
    """

    preprocess: Preprocess

    def __call__(self, image: Image.Image) -> Tensor:
        return self.preprocess(image)

    def pixels(self, data: bytes) -> Tensor:
        return self.preprocess(open_image(data))


def derive_fast(preprocess: Preprocess) -> FastPreprocess:
    """What a preprocessing does, as `FastPreprocess`; compared with it on four pictures.

    Raises:
        ValueError: it does something that cannot be expressed so.
    """
    if isinstance(preprocess, HFPreprocess):
        try:
            fast = _of_processor(preprocess.processor)
        except (AttributeError, KeyError, TypeError) as error:
            problem = f"its options are not the usual ones ({type(error).__name__}: {error})"
            raise _inexpressible(preprocess, problem) from error
    elif isinstance(preprocess, Rescale):
        size, mean, std = preprocess.size, _three(preprocess.mean), _three(preprocess.scale)
        fast = FastPreprocess("squash", (size, size), None, "bicubic", mean, std, 1.0)
    else:
        raise _inexpressible(preprocess, "its steps are not known")
    _check(fast, preprocess)
    return fast


def look(preprocess: Preprocess) -> str:
    """A digest of what a preprocessing does, coarse enough to hold across library versions."""
    ramp = torch.linspace(0, 255, 96 * 64).reshape(64, 96).byte().numpy()
    picture = Image.merge("RGB", [Image.fromarray(channel) for channel in (ramp, ramp[::-1], ramp)])
    pixels = preprocess(picture).float()
    coarse = torch.nn.functional.adaptive_avg_pool2d(pixels[None], 2).flatten()
    seen = (tuple(pixels.shape), [round(float(x), 1) + 0.0 for x in coarse])
    return hashlib.sha256(repr(seen).encode()).hexdigest()[:8]


def _of_processor(processor: Any) -> FastPreprocess:
    options: dict[str, Any] = processor.to_dict()
    if options.get("do_pad") or not options.get("do_resize"):
        raise _inexpressible(processor, "it pads, or does not resize")
    resample = _FILTERS.get(options.get("resample"))
    if resample is None:
        raise _inexpressible(processor, f"it resizes with the filter {options.get('resample')!r}")
    resize, size, crop = _geometry(processor, options)
    if resize == "shortest" and crop is None:
        raise _inexpressible(processor, "its pictures are of different sizes")
    if crop is not None and any(a > b for a, b in zip(crop, size, strict=True)):
        raise _inexpressible(processor, f"it crops {crop} of {size}")
    normalises = options.get("do_normalize")
    return FastPreprocess(
        resize,
        size,
        crop,
        resample,
        _three(options["image_mean"] if normalises else 0.0),
        _three(options["image_std"] if normalises else 1.0),
        float(options["rescale_factor"]) if options.get("do_rescale") else 1.0,
    )


def _geometry(processor: Any, options: Mapping[str, Any]) -> tuple[Resize, _Size, _Size | None]:
    sizes = {name: side for name, side in options["size"].items() if side is not None}
    crop = None
    if options.get("do_center_crop"):
        crop = (options["crop_size"]["height"], options["crop_size"]["width"])
    if sizes.keys() == {"height", "width"}:
        return "squash", (sizes["height"], sizes["width"]), crop
    if sizes.keys() != {"shortest_edge"}:
        raise _inexpressible(processor, f"its size is {sizes}")
    edge = sizes["shortest_edge"]
    kept = options.get("crop_pct")
    if kept is None:
        return "shortest", (edge, edge), crop
    # ConvNeXT's own: a larger picture of which the middle is kept; or, from 384 on, neither.
    if edge < 384:
        return "shortest", (int(edge / kept), int(edge / kept)), (edge, edge)
    return "squash", (edge, edge), crop


def _three(values: Any) -> tuple[float, float, float]:
    red, green, blue = (values,) * 3 if isinstance(values, int | float) else values
    return float(red), float(green), float(blue)


def _check(fast: FastPreprocess, preprocess: Preprocess) -> None:
    """Refuses what its options do not tell of a processor."""
    levels = np.random.default_rng(0)
    std = torch.tensor(fast.std)[:, None, None] / fast.rescale
    for height, width in _PROBES:
        picture = Image.fromarray(levels.integers(64, 192, (height, width, 3), np.uint8))
        found, expected = fast.normalise(fast(picture)), preprocess(picture).float()
        if found.shape != expected.shape:
            problem = f"it makes {tuple(expected.shape)} of a picture of {width}×{height}"
            raise _inexpressible(preprocess, f"{problem}, not {tuple(found.shape)}")
        difference = ((found - expected) * std).abs()
        largest, mean = difference.max().item(), difference.mean().item()
        if not (largest <= MAX_DIFFERENCE and mean <= MAX_MEAN_DIFFERENCE):
            problem = f"its pixels are others (by up to {largest:.1f} of 255, {mean:.2f} on average"
            raise _inexpressible(preprocess, f"{problem}, for a picture of {width}×{height})")


def _inexpressible(preprocess: Any, problem: str) -> ValueError:
    named = getattr(preprocess, "processor", preprocess)
    name = getattr(named, "__name__", type(named).__name__)
    return ValueError(
        f"found {name}, which cannot be done fast: {problem}; expected a resize, at most a centre "
        "crop, and a normalisation: set decode: exact"
    )
