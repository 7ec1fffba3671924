"""What of a sample a feature cache encodes, and what it keeps beside the features."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from bridges.decode import ImageDecoder
from recipes.samples import decode_image, image_extension, read_text


@dataclass(frozen=True)
class CacheForm:
    """What of a sample is encoded, and what is kept beside the features.

    Attributes:
        name: is written in the cache; empty for single pictures. Names all that the features
            depend on.
        read: raw sample -> pixels of its pictures or frames, and its members txt and json.
            A ValueError is a bad sample. Called in several threads at once.
        most: of a sample with more pictures, only the first so many are kept; None keeps all.
    """

    name: str
    read: Callable[[Mapping[str, Any], ImageDecoder], tuple[list[torch.Tensor], dict[str, Any]]]
    most: int | None = None

    @property
    def described(self) -> str:
        """For the cache's description, and for messages."""
        return self.name or "single pictures"


def read_picture(
    raw: Mapping[str, Any], preprocess: ImageDecoder
) -> tuple[list[torch.Tensor], dict[str, Any]]:
    """The one picture of a sample, and its text."""
    return [decode_image(raw, image_extension(raw), into=preprocess.pixels)], read_text(raw)


PICTURES = CacheForm("", read_picture)
