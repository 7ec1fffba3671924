"""An mp4 opened safely, and single frames of it."""

import io
from collections.abc import Iterator, Sequence
from typing import Any

from PIL import Image

from recipes.video_tables import table_problem

MAX_PIXELS = 9_000_000
"""Width × height of a frame: a little above 4096 × 2160."""

MAX_DECODED = 20_000
"""Frames decoded of one clip, those between the wanted ones included."""

CODECS = ("h264", "hevc", "av1", "vp8", "vp9", "mpeg4", "mpeg2video", "mjpeg")
"""Only these decoders see the bytes: FFmpeg has two hundred more."""

_SEEK_AHEAD = 4.0  # seconds; up to there, decoding on is cheaper than going to a key frame
_SEEK_MARGIN = 0.5  # seconds; the index counts in decoding order, a few frames off
_EARLY = 1e-3  # seconds that a frame may be late and still be the one at a moment
_UPRIGHT = {
    90: Image.Transpose.ROTATE_90,
    180: Image.Transpose.ROTATE_180,
    270: Image.Transpose.ROTATE_270,
}


class VideoError(ValueError):
    """A video that cannot, or should not, be decoded."""


class VideoFile:
    """The first video stream of an mp4; a context manager.

    Only what stands in the bytes is read: no other demuxer is tried, and no reference to another
    file is followed. The size of a frame, and the number of samples, are read from the header,
    before anything is decoded.

    Args:
        data: the encoded file.

    Attributes:
        seconds: its length.
        num_frames: number of frames by the header; None if it states none.

    Raises:
        VideoError: no mp4, no video in it, a codec not in `CODECS`, too many pixels, tables of
            more samples than the file holds.
        ImportError: PyAV is not installed.
    """

    def __init__(self, data: bytes) -> None:
        av = _pyav()
        if problem := table_problem(data):
            raise VideoError(problem)
        try:
            self._container = av.open(
                io.BytesIO(data), format="mp4", io_open=_refuse, metadata_errors="ignore"
            )
        except Exception as error:
            raise _unreadable(error) from error
        try:
            self._stream: Any = self._checked_stream()
        except BaseException:
            self._container.close()
            raise
        stream, whole = self._stream, self._container.duration
        self._start = float((stream.start_time or 0) * stream.time_base)
        length = stream.duration * stream.time_base if stream.duration else (whole or 0) / 1e6
        self.seconds = float(length)
        self.num_frames: int | None = stream.frames or None

    def __enter__(self) -> "VideoFile":
        return self

    def __exit__(self, *_: object) -> None:
        self._container.close()

    def frames(self, moments: Sequence[float]) -> Iterator[Image.Image]:
        """The frame that is shown at each moment, upright RGB, decoded when it is asked for.

        Args:
            moments: seconds from the start, in ascending order.

        Raises:
            VideoError: damaged data, data that end before a moment, or more than `MAX_DECODED`
                frames to decode.
        """
        decoded = self._decode(moments[0])
        shown, coming, seeks = next(decoded), next(decoded, None), True
        for moment in moments:
            if seeks and moment - self._time(shown) > _SEEK_AHEAD:
                before, decoded = shown, self._decode(moment)
                shown, coming = next(decoded), next(decoded, None)
                # Without a key frame in between, going back would come round again and again.
                seeks = self._time(shown) > self._time(before)
            while coming is not None and self._time(coming) <= moment + _EARLY:
                shown, coming = coming, next(decoded, None)
            if coming is None and moment > self._end(shown):
                raise VideoError(
                    f"its frames end at {self._end(shown):.2f} of {self.seconds:.2f} seconds; "
                    "expected a complete file: fetch it again or leave it out"
                )
            yield self._picture(shown)

    def _checked_stream(self) -> Any:
        streams: Any = self._container.streams.video
        if not streams:
            raise VideoError("it holds no video; expected an mp4 with a video stream")
        context = streams[0].codec_context
        name = context.codec.canonical_name if context else "unknown"
        if name not in CODECS:
            raise VideoError(f"its codec is {name}; expected one of {', '.join(CODECS)}")
        pixels = context.width * context.height
        if not 0 < pixels <= MAX_PIXELS:
            raise VideoError(
                f"its frames are {context.width}×{context.height} = {pixels:,} pixels; expected "
                f"at most {MAX_PIXELS:,}: scale it down first"
            )
        # The data may say more than the header. Decoders count rounded sizes: hence the slack.
        context.options = {"max_pixels": str(2 * MAX_PIXELS)}
        context.thread_count = 1  # of many loader workers, each is one thread
        return streams[0]

    def _decode(self, moment: float) -> Iterator[Any]:
        """Frames from a key frame before a moment on; at least one."""
        count = 0
        try:
            if moment > _SEEK_AHEAD:
                seconds = self._start + moment - _SEEK_MARGIN
                self._container.seek(int(seconds / self._stream.time_base), stream=self._stream)
            for frame in self._container.decode(self._stream):
                if frame.time is None:
                    raise VideoError("it has a frame without a time")
                yield frame
                count += 1
                if count > MAX_DECODED:
                    raise VideoError(f"more than {MAX_DECODED:,} frames to decode: cut it first")
        except VideoError:
            raise
        except Exception as error:
            raise _unreadable(error) from error
        if not count:
            raise VideoError(f"it holds no frame at {moment:.2f} seconds: fetch it again")

    def _time(self, frame: Any) -> float:
        return frame.time - self._start

    def _end(self, frame: Any) -> float:
        """Until when a frame is shown, and half a frame more for rounded durations."""
        usual = 1 / float(self._stream.average_rate or 25)
        stated = float((frame.duration or 0) * frame.time_base)
        return self._time(frame) + max(stated, usual) + usual / 2

    def _picture(self, frame: Any) -> Image.Image:
        if frame.is_corrupt:
            raise VideoError(f"its frame at {self._time(frame):.2f} seconds is damaged")
        try:
            image = frame.to_image()
        except Exception as error:
            raise _unreadable(error) from error
        # Degrees anticlockwise, in steps of 90 where a camera was turned.
        turn = _UPRIGHT.get(round(frame.rotation) % 360)
        return image if turn is None else image.transpose(turn)


def _pyav() -> Any:
    try:
        import av
    except ImportError as error:
        raise ImportError(
            "reading mp4 files needs the package av (PyAV): pip install 'bridges[video]'"
        ) from error
    return av


def _refuse(url: str, *_: object) -> None:
    raise VideoError(f"it refers to another file, {url[:100]!r}")


# FFmpeg's bindings raise nearly anything on damaged bytes, ValueErrors or not.
def _unreadable(error: Exception) -> VideoError:
    return VideoError(
        f"cannot be decoded: {type(error).__name__}: {error}; expected a complete mp4: fetch it "
        "again or leave it out"
    )
