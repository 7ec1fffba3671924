"""Attention over a picture: the picture as the encoder sees it, and a map on top."""

from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from bridges.vision import Preprocess


def as_seen(preprocess: Preprocess, image: Image.Image) -> Image.Image:
    """The picture as the encoder sees it: resized and cropped, its normalisation undone.

    What black and white of the same size become tells scale and shift of each channel, so that
    no preprocessing needs to be known by name.

    Raises:
        ValueError: the preprocessing makes the same of black and of white.
    """
    seen = preprocess(image).float()
    black, white = (
        preprocess(Image.new("RGB", image.size, colour)).float().flatten(1)
        for colour in ("black", "white")
    )
    span, place = (white - black).abs().max(dim=1)
    if not span.all():
        raise ValueError(
            "found a preprocessing that tells no black from white; expected one of pictures"
        )
    # Padding is the same in both: the place where they differ most is none.
    low, high = (x.gather(1, place[:, None])[:, :, None] for x in (black, white))
    pixels = ((seen - low) / (high - low)).clamp(0, 1).mul(255).round().byte()
    return Image.fromarray(pixels.permute(1, 2, 0).numpy())


def overlay(seen: Image.Image, attention: Tensor) -> Image.Image:
    """A map over a grey picture: nothing over its lowest patch, brightest over its highest.

    Args:
        seen: what the encoder sees.
        attention: (rows, columns), which cover all of it.
    """
    low, high = attention.min(), attention.max()
    small = Image.fromarray(((attention - low) / (high - low).clamp(min=1e-12)).numpy())
    heat = np.asarray(small.resize(seen.size, Image.Resampling.BILINEAR))
    colours = colour_map()(heat)[..., :3]
    grey = np.asarray(seen.convert("L"), dtype=np.float32)[..., None] / 255
    opacity = 0.75 * heat[..., None]
    mixed = grey * (1 - opacity) + colours * opacity
    return Image.fromarray((mixed * 255).round().astype(np.uint8))


def colour_map() -> Any:
    """The colours of a map, from dark to bright.

    Raises:
        ImportError: matplotlib is not there (extra ``demo``).
    """
    try:
        from matplotlib import colormaps
    except ImportError as error:
        raise ImportError(
            "drawing attention needs matplotlib: pip install 'bridges[demo]'"
        ) from error
    return colormaps["inferno"]
