"""Where payloads are tried, and what reads them there; light, for workers that are spawned."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from bridges.preprocess import ExactDecoder
from recipes.cache_form import PICTURES
from recipes.documents import DOCUMENTS
from recipes.reliability_payloads_made import payload_shard
from recipes.samples import CaptionDecoder, SampleError
from recipes.stream import ShardStream
from recipes.video import Clips, clip_form


@dataclass(frozen=True)
class Place:
    """Where payloads are made and tried at one door.

    Attributes:
        folder: for files.
        markers: where a payload that is executed makes a file.
        url: of a server that makes a file in a folder of markers, when it is asked for it.
    """

    folder: Path
    markers: Path
    url: str

    def shard(self, name: str = "evil-000000.tar", leave: tuple[str, ...] = ()) -> tuple[Path, int]:
        """A shard of the members that are payloads, some left out, and their number."""
        path = self.folder / name
        return path, payload_shard(path, self.markers, self.url, leave)


Door = Callable[[Place], int]
"""Tries payloads; returns how many."""


def attempt(action: Callable[[], Any]) -> int:
    """Does what a payload may make fail in any way; one payload tried."""
    # Whatever a refusal is made of, and the exit of a command line.
    with contextlib.suppress(Exception, SystemExit):
        action()
    return 1


class Decode:
    """Reads a sample as every task does: captions, questions, documents, clips."""

    def __init__(self) -> None:
        self.pixels = ExactDecoder(preprocess)

    def __call__(self, raw: dict[str, Any]) -> str:
        for questions in (False, True):
            decode = CaptionDecoder(self.pixels, random_caption=True, questions=questions)
            _tried(decode, raw)
        for form in (PICTURES, DOCUMENTS, clip_form(Clips())):
            _tried(form.read, raw, self.pixels)
        return raw["__key__"]


def _tried(read: Callable[..., Any], *arguments: Any) -> None:
    with contextlib.suppress(SampleError):
        read(*arguments)


def preprocess(image: Image.Image) -> Tensor:
    """Any picture -> (3, 16, 16)."""
    return torch.from_numpy(np.array(image.resize((16, 16)))).permute(2, 0, 1).float()


def stream_of(shards: Any) -> ShardStream[str]:
    """Shards as a run reads them that skips what is bad."""
    options: dict[str, Any] = {"on_error": "skip", "max_bad_fraction": 1.0}
    return ShardStream(shards, Decode(), seed=0, shuffle=False, **options)
