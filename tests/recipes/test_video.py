"""Clips: which frames are taken of an mp4 or of stored frames, and what damage is answered with."""

import io
import json
import random
import struct
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import tiny
import torch
from PIL import Image

from bridges import VisionLanguageModel
from recipes import video_file
from recipes.batch import CaptionBatch
from recipes.cache import PICTURES, cache_features
from recipes.data import CaptionData
from recipes.samples import SampleError, read_features
from recipes.shard_writer import write_shards
from recipes.stream import ShardStream
from recipes.train import train
from recipes.video import ClipDecoder, Clips, clip_form
from recipes.video_file import VideoError, VideoFile
from recipes.video_tables import table_problem

RATE = 10
"""Frames a second of the videos here; frame k is grey k."""


def encode(frames: int, *, codec: str = "mpeg4", rotation: int = 0, **options: Any) -> bytes:
    """A video of grey frames, each darker than the next, with a white left half."""
    file = options.pop("file", None) or io.BytesIO()
    with av.open(file, "w", format="mp4", options=options) as container:
        stream: Any = container.add_stream(codec, rate=RATE)
        stream.width, stream.height, stream.pix_fmt, stream.gop_size = 64, 32, "yuv420p", 12
        stream.bit_rate = 4_000_000
        if rotation:
            stream.set_display_rotation(rotation)
        for k in range(frames):
            grey = np.full((32, 64, 3), 20 + k % 200, np.uint8)
            grey[:, :32] = 255
            for packet in stream.encode(av.VideoFrame.from_ndarray(grey, format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    return file.read_bytes() if isinstance(file, Path) else file.getvalue()


def shown(image: Image.Image) -> int:
    """The number of the frame."""
    return round(float(np.asarray(image)[8:24, 40:56].mean())) - 20


def shown_at(data: bytes, moments: list[float]) -> list[int]:
    with VideoFile(data) as video:
        return [shown(image) for image in video.frames(moments)]


# --- the file


@pytest.mark.parametrize("codec", ["mpeg4", "libx264"])
def test_the_frame_shown_at_a_moment(codec, monkeypatch):
    data = encode(180, codec=codec)
    with VideoFile(data) as video:
        assert (video.seconds, video.num_frames) == (18.0, 180)
    moments = [0.0, 0.3, 0.35, 0.35, 3.99, 9.0, 9.1, 17.25, 17.95]
    expected = [0, 3, 3, 3, 39, 90, 91, 172, 179]
    found = shown_at(data, moments)
    with av.open(io.BytesIO(data)) as container:
        every = [shown(frame.to_image()) for frame in container.decode(video=0)]
    assert every == pytest.approx(list(range(180)), abs=1)  # as exact as the codec is
    assert found == [every[k] for k in expected]
    monkeypatch.setattr(video_file, "_SEEK_AHEAD", 1e9)
    assert shown_at(data, moments) == found


def test_only_frames_near_the_wanted_ones_are_decoded(monkeypatch):
    data, seen = encode(180), []
    monkeypatch.setattr(
        video_file.VideoFile, "_time", lambda _, frame: seen.append(frame) or frame.time
    )
    assert shown_at(data, [16.0])
    assert len(set(map(id, seen))) < 40


@pytest.mark.parametrize("rotation", [90, 180, -90])
def test_frames_stand_upright(rotation):
    with VideoFile(encode(2, rotation=rotation)) as video:
        (frame,) = video.frames([0.0])
    white = np.asarray(frame)[..., 0] > 200
    height, width = white.shape
    assert (width, height) == ((64, 32) if rotation == 180 else (32, 64))
    # Turned anticlockwise, the left half comes to lie below; clockwise, on top.
    halves = {180: white[:, width // 2 + 4 :], 90: white[height // 2 + 4 :], -90: white[:28]}
    assert halves[rotation].mean() > 0.95
    assert white.mean() < 0.6


@pytest.mark.parametrize("data", [b"", b"no video", b"#EXTM3U\nfile:///etc/hostname\n", b"GIF89a"])
def test_what_is_no_mp4_is_refused(data):
    with pytest.raises(VideoError, match="cannot be decoded"):
        VideoFile(data)


def test_a_video_that_is_cut_short_is_refused_where_frames_are_missing(tmp_path):
    whole = encode(80, file=tmp_path / "a.mp4", movflags="faststart")
    with pytest.raises(VideoError, match="cannot be decoded"):
        VideoFile(encode(80)[:900])
    half = whole[: len(whole) * 2 // 3]
    assert shown_at(half, [1.0]) == shown_at(whole, [1.0])
    with pytest.raises(VideoError, match=r"its frames end at \d.\d+ of 8\.00 seconds"):
        shown_at(half, [3.0, 6.9])
    with pytest.raises(VideoError, match="holds no frame"):
        shown_at(half, [7.9])


def test_damaged_data_are_refused(tmp_path):
    data = bytearray(encode(80, file=tmp_path / "a.mp4", movflags="faststart"))
    data[len(data) // 2 : len(data) // 2 + 400] = bytes(400)
    with pytest.raises(VideoError):
        shown_at(bytes(data), [k / RATE for k in range(80)])


def stated(data: bytes, table: bytes, at: int, *numbers: int) -> bytes:
    """The file with other numbers in its last table of a name, so many bytes behind that."""
    place = data.rfind(table) + at
    packed = struct.pack(f">{len(numbers)}I", *numbers)
    return data[:place] + packed + data[place + len(packed) :]


@pytest.mark.parametrize(
    ("table", "at", "numbers"),
    [
        (b"stsz", 8, (0, 80_000_000)),
        (b"stsz", 8, (1, 5_000)),
        (b"stsz", 8, (4_000_000, 30)),
        (b"stsc", 16, (1 << 26,)),
    ],
)
def test_more_samples_than_there_is_room_for_are_refused_unopened(table, at, numbers, monkeypatch):
    data = stated(encode(5), table, at, *numbers)
    monkeypatch.setattr(av, "open", None)
    with pytest.raises(VideoError, match=rf"bytes, in {len(data):,} bytes; expected"):
        VideoFile(data)


def test_fragments_are_counted_and_pictures_are_not():
    fragmented = encode(5, movflags="frag_keyframe+empty_moov")
    with VideoFile(fragmented) as video:
        assert len(list(video.frames([0.0]))) == 1
    with pytest.raises(VideoError, match=r"80,000,00\d samples"):
        VideoFile(stated(fragmented, b"trun", 8, 80_000_000))
    with pytest.raises(VideoError, match="compressed"):
        VideoFile(encode(5).replace(b"udta", b"cmov"))
    # The same letters within the pictures are no table.
    mdat = struct.pack(">I4s", 40, b"mdat") + b"stsz" + b"\xff" * 28
    assert table_problem(mdat + encode(5)) is None


def test_absurd_sizes_are_refused_before_decoding(monkeypatch):
    data = encode(5)
    monkeypatch.setattr(video_file, "MAX_PIXELS", 64 * 32 - 1)
    with pytest.raises(VideoError, match="64×32 = 2,048 pixels; expected at most 2,047"):
        VideoFile(data)
    monkeypatch.undo()
    monkeypatch.setattr(video_file, "MAX_DECODED", 3)
    with pytest.raises(VideoError, match="more than 3 frames"):
        shown_at(data, [0.0, 0.4])


def test_other_codecs_and_files_without_video_are_refused(monkeypatch):
    monkeypatch.setattr(video_file, "CODECS", ("h264",))
    with pytest.raises(VideoError, match="its codec is mpeg4; expected one of h264"):
        VideoFile(encode(2))
    audio = io.BytesIO()
    with av.open(audio, "w", format="mp4") as container:
        stream: Any = container.add_stream("aac", rate=8000)
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        silence.sample_rate = 8000
        for packet in (*stream.encode(silence), *stream.encode()):
            container.mux(packet)
    with pytest.raises(VideoError, match="holds no video"):
        VideoFile(audio.getvalue())


def test_without_pyav_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "av", None)
    with pytest.raises(ImportError, match=r"pip install 'bridges\[video\]'"):
        VideoFile(b"")


# --- which frames


def rates(seconds: float, clips: Clips, rng=None) -> list[float]:
    return [round(moment, 6) for moment in clips.moments(seconds, None, rng)]


def test_a_stretch_at_a_rate_or_frames_spread():
    assert rates(20.0, Clips(4, 1.0)) == [8, 9, 10, 11]
    assert rates(3.0, Clips(4, 1.0)) == [0, 1, 2]
    assert rates(0.0, Clips(4, 1.0)) == [0]
    assert rates(1.0, Clips(4, 8.0)) == [0.25, 0.375, 0.5, 0.625]
    assert rates(20.0, Clips(4, None)) == [2.5, 7.5, 12.5, 17.5]
    assert Clips(4, None).moments(20.0, 2) == [5.0, 15.0]
    starts = {rates(20.0, Clips(4, 1.0), random.Random(seed))[0] for seed in range(200)}
    assert starts == set(range(17))
    for options in ((0, 1.0), (4, 0.0), (4, 5000.0)):
        with pytest.raises(ValueError, match="found num_frames"):
            Clips(*options)


def test_a_header_that_promises_years_costs_nothing():
    assert len(Clips(4, 1000.0).moments(1e12, None)) == 4


def raw_of(seed: str = "0", meta: Any = None, **members: bytes) -> dict[str, Any]:
    named = {"__key__": "k", "__shard__": "s.tar", "__seed__": seed}
    pictures = {name.replace("_", ".").lstrip("."): data for name, data in members.items()}
    text = {"json": json.dumps({"caption": "c"} | (meta or {})).encode()}
    return {**pictures, **text, **named}


def grey(k: int) -> bytes:
    png = io.BytesIO()
    Image.new("RGB", (9, 9), (20 + k,) * 3).save(png, "PNG")
    return png.getvalue()


def levels(sample: dict[str, Any]) -> list[int | None]:
    """Numbers of the frames in a decoded sample; None for padding."""
    real = sample["frame_mask"].tolist()
    means = (sample["image"][..., 9:] * 255).mean(dim=(1, 2, 3)).tolist()
    return [
        round(mean) - 20 if is_real else None for mean, is_real in zip(means, real, strict=True)
    ]


def frames_of(clips: Clips, raw: dict[str, Any], training: bool = False) -> list[int | None]:
    return levels(ClipDecoder(tiny.DECODER, clips, training)(raw))


def test_frames_of_an_mp4_are_taken_and_padded():
    raw = raw_of(mp4=encode(60))
    assert frames_of(Clips(4, 2.0), raw) == pytest.approx([20, 25, 30, 35], abs=1)
    assert frames_of(Clips(3, None), raw) == pytest.approx([10, 30, 50], abs=1)
    found = frames_of(Clips(8, 1.0), raw)
    assert found[:6] == pytest.approx([0, 10, 20, 30, 40, 50], abs=1)
    assert found[6:] == [None, None]
    assert frames_of(Clips(4, None), raw_of(mp4=encode(2)))[2:] == [None, None]


def test_the_seed_of_the_sample_draws_the_stretch():
    data = encode(60)

    def first(seed: int, training: bool) -> int:
        found = frames_of(Clips(2, 1.0), raw_of(str(seed), mp4=data), training)[0]
        assert found is not None
        return round(found / 10)

    assert {first(seed, True) for seed in range(40)} == {0, 1, 2, 3, 4}
    assert [first(seed, True) for seed in range(5)] == [first(seed, True) for seed in range(5)]
    assert {first(seed, False) for seed in range(5)} == {2}


def test_stored_frames_are_taken_by_their_own_rate():
    members = {f"_{k}_png": grey(k) for k in range(12)}
    assert frames_of(Clips(4, 1.0), raw_of(**members)) == [4, 5, 6, 7]
    assert frames_of(Clips(3, None), raw_of(**members)) == [2, 6, 10]
    assert frames_of(Clips(8, 1.0), raw_of(meta={"fps": 3}, **members))[:5] == [0, 3, 6, 9, None]
    assert frames_of(Clips(4, 6.0), raw_of(meta={"fps": 3}, **members)) == [5, 5, 6, 6]
    assert frames_of(Clips(3, None), raw_of(meta={"fps": 3}, **members)) == [2, 6, 10]


@pytest.mark.parametrize(
    ("raw", "kind", "expected"),
    [
        (raw_of(), "missing video", "no video; expected an mp4, or frames"),
        (raw_of(mp4=b"", _0_png=b""), "missing video", "both an mp4 and numbered"),
        (raw_of(mp4=b"nothing"), "unreadable video", "mp4: cannot be decoded"),
        (raw_of(_0_png=grey(0), _2_png=grey(1)), "missing image", "no frame 1"),
        (raw_of(_0_png=b"nothing"), "unreadable image", r"0\.png: .*begins with"),
        (raw_of(_0_png=grey(0), meta={"fps": 0}), "unreadable json", "fps: 0; expected"),
        (raw_of(_0_png=grey(0), meta={"fps": 1e-310}), "unreadable json", "fps: 1e-310; expected"),
        (raw_of(_0_png=grey(0), meta={"fps": "x"}), "unreadable json", "fps: x; expected"),
        (raw_of(_0_png=grey(0), meta={"caption": ""}), "missing caption", "no caption"),
        (raw_of(npy=b"nothing"), "unreadable features", "npy: "),
    ],
)
def test_a_damaged_clip_is_named(raw, kind, expected):
    decode = ClipDecoder(tiny.DECODER, Clips(), training=False)
    with pytest.raises(SampleError, match=rf"s.tar: sample 'k' \(members.*{expected}") as error:
        decode(raw)
    assert error.value.kind == kind


# --- batches


@pytest.fixture(scope="module")
def model() -> VisionLanguageModel:
    torch.manual_seed(0)
    model = VisionLanguageModel.connect(
        tiny.vision_encoder(), tiny.language_model(), tiny.factory("perceiver_gated")
    )
    tiny.randomise(model.bridge)
    tiny.open_gates(model.bridge)
    return model


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Videos and stored frames, of 2 to 6 seconds."""
    folder = tmp_path_factory.mktemp("clips")

    def sample(k: int) -> dict[str, Any]:
        text = {"__key__": f"{k}", "txt": f"caption {k}"}
        if k % 2:
            return {**text, "mp4": encode(10 * (k % 5 + 2))}
        return {**text, **{f"{j}.png": grey(9 * j + k) for j in range(k % 5 + 2)}}

    write_shards(map(sample, range(12)), folder, "train")
    write_shards(map(sample, range(5)), folder, "val")
    return folder


def data_of(shards: Path, model: VisionLanguageModel, **options: Any) -> CaptionData:
    data = CaptionData(str(shards), task="video", batch_size=3, num_frames=4, **options)
    data.connect(model.vision, data.collator(model))
    return data


@pytest.mark.parametrize("fps", [1.0, None])
def test_clips_are_captioned_and_cached_features_are_theirs(shards, model, tmp_path, fps):
    online = data_of(shards, model, fps=fps)
    cached = data_of(shards, model, fps=fps, feature_cache=str(tmp_path))
    for batch, found in zip(online.val_dataloader(), cached.val_dataloader(), strict=True):
        assert isinstance(batch, CaptionBatch)
        assert isinstance(found, CaptionBatch)
        assert batch.images.shape[1:] == (1, 4, 3, tiny.IMAGE_SIZE, tiny.IMAGE_SIZE)
        assert found.images.shape[1:] == (1, 4, 9, 16)
        assert torch.equal(batch.frame_mask, found.frame_mask)
        features, kept = batch.features(model.vision), found.features(model.vision)
        assert features.num_frames == kept.num_frames == 4
        real = batch.frame_mask[..., None].expand(-1, -1, -1, 9).flatten(2)
        torch.testing.assert_close(
            kept.patches[real].float(), features.patches[real], rtol=2e-3, atol=2e-3
        )
        text = batch.text
        loss = model(text.input_ids, text.attention_mask, text.labels, features).loss
        loss.backward()
        assert torch.isfinite(loss)
    assert sorted(len(d) for d in (list(tmp_path.glob("*/features.json")),)) == [2]


def test_a_cached_clip_keeps_every_frame_at_the_rate(encoder, shards, tmp_path):
    at_one = cache_features(shards, encoder, tmp_path, form=clip_form(Clips(2, 1.0)))
    at_two = cache_features(shards, encoder, tmp_path, form=clip_form(Clips(2, 2.0)))
    assert at_one[0].parent != at_two[0].parent
    again = cache_features(shards, encoder, tmp_path, form=clip_form(Clips(7, 1.0)))
    assert again == at_one  # how many are taken of them is a matter of reading
    with pytest.raises(ValueError, match=r"data\.task: video"):
        cache_features(shards, encoder, tmp_path, form=PICTURES)
    with pytest.raises(ValueError, match=r"clips, 1\.0 a second .* those of clips, 2\.0 a second"):
        cache_features(at_one, encoder, tmp_path, form=clip_form(Clips(2, 2.0)))


@pytest.mark.parametrize(("fps", "most"), [(1.0, 4), (None, 6)])
def test_clips_that_are_cut_in_the_cache_are_counted(
    encoder, shards, tmp_path, monkeypatch, caplog, fps, most
):
    monkeypatch.setattr("recipes.video.MAX_CACHED", 4)
    cached = cache_features(shards, encoder, tmp_path, form=clip_form(Clips(6, fps)))
    stream = ShardStream(cached, lambda raw: len(read_features(raw, 3)), seed=0, shuffle=False)
    assert max(stream) == most
    cut = [text for text in caplog.messages if "are cached" in text]
    assert len(cut) == (fps is not None)
    assert all("6 of 17 samples have more than 4" in text for text in cut)


def test_clips_are_trained_on_from_the_command_line(on_disk, shards, tmp_path):
    kept = [a for a in on_disk.arguments(tmp_path / "run") if not a.startswith("--data=")]
    clips = ["--data.task=video", "--data.num_frames=3", "--data.fps=2"]
    run = train([*kept, f"--data={shards}", *clips])
    assert "val_loss" in (run / "csv-0" / "metrics.csv").read_text()
