"""Clips: an mp4, or its frames as numbered pictures, as a few preprocessed frames.

A sample is ``key.mp4``, or ``key.0.jpg``, ``key.1.jpg``, … in order of time, beside a caption
(``key.txt`` or ``key.json``). The JSON's ``fps`` says how many of the numbered frames make a
second; without it they are taken as they come, one after the other.
"""

import math
import random
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bridges.decode import ImageDecoder
from recipes.cache import CacheForm
from recipes.features import has_features
from recipes.samples import (
    decode_image,
    numbered_images,
    read_caption,
    read_features,
    read_meta,
    read_text,
    sample_error,
)
from recipes.video_file import VideoError, VideoFile

MAX_CACHED = 256
"""Frames of one clip whose features are cached; of a longer clip, the first."""

MIN_RATE, MAX_RATE = 1e-3, 1000
"""Frames a second that a JSON may state."""


@dataclass(frozen=True)
class Clips:
    """Which frames of a clip are taken.

    Attributes:
        num_frames: at most so many.
        fps: a stretch of frames, so many a second: of a clip that has more of them than
            `num_frames`, a random stretch in training and the middle one else. None spreads
            `num_frames` evenly over the clip.
    """

    num_frames: int = 8
    fps: float | None = 1.0

    def __post_init__(self) -> None:
        if self.num_frames < 1 or (self.fps is not None and not 0 < self.fps <= 1000):
            raise ValueError(
                f"found num_frames={self.num_frames} and fps={self.fps}; expected at least one "
                "frame, and between 0 and 1000 a second or null: change data.num_frames, data.fps"
            )

    def moments(
        self,
        seconds: float,
        stored: int | None,
        rng: random.Random | None = None,
        first: int | None = None,
    ) -> list[float]:
        """When the frames that are taken stand, in seconds; at least one.

        Args:
            seconds: length of the clip.
            stored: number of frames that it has, where that is known.
            rng: see `stretch`.
            first: see `stretch`.
        """
        if self.fps is None:
            count = max(1, min(self.num_frames, stored or self.num_frames))
            return [(k + 0.5) * seconds / count for k in range(count)]
        count = max(1, math.ceil(seconds * self.fps - 1e-6))
        return [k / self.fps for k in range(count)[self.stretch(count, rng, first)]]

    def stretch(
        self, count: int, rng: random.Random | None = None, first: int | None = None
    ) -> slice:
        """Which of ``count`` frames in a row are taken.

        Args:
            count: how many there are.
            rng: draws the stretch; None takes the middle one.
            first: take this many from the start instead.
        """
        if first is not None:
            return slice(first)
        spare = max(0, count - self.num_frames)
        start = rng.randint(0, spare) if rng else spare // 2
        return slice(start, start + self.num_frames)


@dataclass(frozen=True)
class ClipDecoder:
    """Turns a raw sample into the frames of a clip, or their cached features, and a caption.

    Beside what `recipes.samples.read_caption` gives, a decoded sample has ``image``
    (f, 3, h, w), or ``features`` (f, p, d), with `Clips.num_frames` frames of which the last are
    zeros where the clip has fewer; and ``frame_mask``, bool (f), False for those.

    Attributes:
        preprocess: of the encoder, for each frame.
        clips: which frames are taken.
        training: draw the stretch, and one of several captions, anew every epoch.
    """

    preprocess: ImageDecoder
    clips: Clips
    training: bool

    def __call__(self, raw: Mapping[str, Any]) -> dict[str, Any]:
        rng = random.Random(raw["__seed__"]) if self.training else None
        sample = read_caption(raw, rng)
        if has_features(raw):
            found, name = read_features(raw, 3), "features"
            if not len(found):
                raise sample_error(raw, "unreadable features", "features without a frame")
            found = found[self.clips.stretch(len(found), rng)]
        else:
            found, name = torch.stack(_frames(raw, self.preprocess, self.clips, rng)), "image"
        frames = found.new_zeros(self.clips.num_frames, *found.shape[1:])
        frames[: len(found)] = found
        return {**sample, name: frames, "frame_mask": torch.arange(len(frames)) < len(found)}


def clip_form(clips: Clips) -> CacheForm:
    """How clips are cached: every frame that `ClipDecoder` may take, up to `MAX_CACHED`."""
    spread = f"{clips.num_frames} spread" if clips.fps is None else f"{clips.fps} a second"
    most = None if clips.fps is None else MAX_CACHED
    return CacheForm(f"clips, {spread}", partial(_all_frames, clips=clips), most)


def _all_frames(
    raw: Mapping[str, Any], preprocess: ImageDecoder, *, clips: Clips
) -> tuple[list[Tensor], dict[str, Any]]:
    """The frames of a clip and its text, for the feature cache; one too many shows a cut."""
    return _frames(raw, preprocess, clips, None, MAX_CACHED + 1), read_text(raw)


def _frames(
    raw: Mapping[str, Any],
    preprocess: ImageDecoder,
    clips: Clips,
    rng: random.Random | None,
    first: int | None = None,
) -> list[Tensor]:
    """The frames that are taken, see `Clips.stretch`, preprocessed."""
    numbered = numbered_images(raw)
    if ("mp4" in raw) == bool(numbered):
        found = "both an mp4 and numbered frames" if numbered else "no video"
        wanted = "expected an mp4, or frames 0.jpg, 1.jpg, …"
        raise sample_error(raw, "missing video", f"{found}; {wanted}")
    if numbered:
        members = _stored(raw, numbered, clips, rng, first)
        return [decode_image(raw, member, into=preprocess.pixels) for member in members]
    try:
        with VideoFile(raw["mp4"]) as video:
            moments = clips.moments(video.seconds, video.num_frames, rng, first)
            return [preprocess(frame) for frame in video.frames(moments)]
    except VideoError as error:
        raise sample_error(raw, "unreadable video", f"mp4: {error}") from error


def _stored(
    raw: Mapping[str, Any],
    numbered: dict[int, str],
    clips: Clips,
    rng: random.Random | None,
    first: int | None,
) -> list[str]:
    """Which of the numbered frames are taken."""
    members = list(numbered.values())
    missing = next((k for k in range(len(members)) if k not in numbered), None)
    if missing is not None:
        wanted = "expected 0.jpg, 1.jpg, … without a gap"
        raise sample_error(raw, "missing image", f"no frame {missing}; {wanted}")
    rate = read_meta(raw).get("fps")
    if rate is None and clips.fps is not None:
        return members[clips.stretch(len(members), rng, first)]
    rate = 1.0 if rate is None else rate  # to spread them, any will do
    number = isinstance(rate, int | float) and not isinstance(rate, bool)
    if not number or not MIN_RATE <= rate <= MAX_RATE:
        problem = f"fps: {str(rate)[:50]}; expected frames a second, {MIN_RATE} to {MAX_RATE}"
        raise sample_error(raw, "unreadable json", problem)
    moments = clips.moments(len(members) / rate, len(members), rng, first)
    return [members[min(int(moment * rate + 1e-6), len(members) - 1)] for moment in moments]
