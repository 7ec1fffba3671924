"""Fast pixels: as the official processors make them, within what is stated, for every file."""

import functools
import io
import pickle
import tracemalloc
from typing import Any

import numpy as np
import pytest
import simplejpeg
import torch
import transformers as hf
from PIL import Image

from bridges import decode
from bridges.decode import FastPreprocess
from bridges.images import ImageError, TooManyPixelsError, TooNarrowError, open_image
from bridges.preprocess import ExactDecoder, HFPreprocess, Preprocess, Rescale, derive_fast
from recipes.bench_data_shards import jpeg, photo

UNSCALED = (6.0, 0.5)
"""Largest and mean difference, in levels of 255, where the DCT scales nothing."""

SCALED = (32.0, 3.5)
"""Where it does, for photos."""

HARSH = (80.0, 15.0)
"""Where it does, for dots and chessboards of single pixels, which no photo is."""

SIDE = 64
_CROP = {"size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}}
_SQUASH = {"size": {"height": SIDE, "width": SIDE}}

PREPROCESS: dict[str, Preprocess] = {
    "clip": HFPreprocess(hf.CLIPImageProcessor(**_CROP)),
    "clip_224": HFPreprocess(hf.CLIPImageProcessor()),
    "clip_squashed": HFPreprocess(hf.CLIPImageProcessor(**_SQUASH, do_center_crop=False)),
    "clip_oblong": HFPreprocess(
        hf.CLIPImageProcessor(
            size={"shortest_edge": 70}, crop_size={"height": 50, "width": 63}, do_normalize=False
        )
    ),
    "siglip": HFPreprocess(hf.SiglipImageProcessor(**_SQUASH)),
    "vit": HFPreprocess(hf.ViTImageProcessor(**_SQUASH)),
    "dinov2": HFPreprocess(
        hf.BitImageProcessor(size={"shortest_edge": 73}, crop_size={"height": SIDE, "width": SIDE})
    ),
    "blip2": HFPreprocess(hf.BlipImageProcessor(size={"height": SIDE, "width": 90})),
    "convnext": HFPreprocess(hf.ConvNextImageProcessor(size={"shortest_edge": SIDE})),
    "convnext_384": HFPreprocess(hf.ConvNextImageProcessor()),
    "rescale": Rescale(SIDE, 127.0, 128.0),
}

# Larger and smaller than what is wanted, high, wide, odd; a half, quarter or eighth of some has
# columns or rows of which the last shows a part only.
SIZES = ((138, 184), (272, 363), (541, 760), (775, 775), (700, 333), (50, 40), (1, 90), (7, 1))


derived = functools.cache(derive_fast)


def png(image: Image.Image, format: str = "PNG", **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format, **options)
    return stream.getvalue()


def difference(preprocess: Preprocess, data: bytes) -> tuple[float, float]:
    """Largest and mean, in levels of 255, of fast to exact pixels."""
    fast = derived(preprocess)
    pixels = fast.pixels(data)
    assert pixels.dtype == torch.uint8 and pixels.is_contiguous()
    found, expected = fast.normalise(pixels), ExactDecoder(preprocess).pixels(data).float()
    assert found.shape == expected.shape
    levels = ((found - expected) * torch.tensor(fast.std)[:, None, None] / fast.rescale).abs()
    return levels.max().item(), levels.mean().item()


def is_within(found: tuple[float, float], bound: tuple[float, float]) -> bool:
    return found[0] <= bound[0] and found[1] <= bound[1]


def scale_of(fast: FastPreprocess, data: bytes) -> int:
    image = open_image(data)
    return fast._scale(image.height, image.width)


@pytest.mark.parametrize("name", PREPROCESS)
def test_photos_differ_within_the_bound(name: str):
    preprocess = PREPROCESS[name]
    fast = derived(preprocess)
    scales = set()
    for seed, (height, width) in enumerate(SIZES):
        data = jpeg(photo(height, width, seed))
        scale = scale_of(fast, data)
        scales.add(scale)
        found = difference(preprocess, data)
        assert is_within(found, UNSCALED if scale == 1 else SCALED), (height, width, scale, found)
    # At 384 pixels, none of them can be scaled.
    assert scales == ({1} if name == "convnext_384" else scales | {1, 2})


@pytest.mark.parametrize("name", ["clip", "siglip", "vit", "rescale"])
@pytest.mark.parametrize("make", ["dots", "chessboard", "noise"])
def test_harsh_pictures_differ_within_the_bound(name: str, make: str):
    for height, width in SIZES[:4]:
        draw = np.random.default_rng(0)
        pixels = np.full((height, width, 3), 255, np.uint8)
        if make == "dots":
            pixels[draw.random((height, width)) < 0.15] = 0
        elif make == "noise":
            pixels = draw.integers(0, 256, (height, width, 3), np.uint8)
        else:
            rows, columns = np.mgrid[:height, :width]
            pixels[(rows // 16 + columns // 16) % 2 == 0] = (255, 0, 40)
        found = difference(PREPROCESS[name], jpeg(Image.fromarray(pixels)))
        assert is_within(found, HARSH), (height, width, found)


def test_a_decoded_picture_is_as_large_as_the_margin_asks():
    fast, least = derived(PREPROCESS["clip"]), SIDE * decode.MARGIN
    scales = {side: fast._scale(side, 2 * side) for side in range(1, 1000)}
    assert all(scale == 1 or side / scale >= least for side, scale in scales.items())
    assert all(scale == 8 or side / (2 * scale) < least for side, scale in scales.items())
    assert set(scales.values()) == {1, 2, 4, 8}
    # A squash to 64×90 needs more columns than rows.
    assert derived(PREPROCESS["blip2"])._scale(150, 150) == 1
    assert derived(PREPROCESS["blip2"])._scale(150, 200) == 2


# --- files of every kind


def files() -> dict[str, bytes]:
    picture = photo(203, 311, 5)
    red, *_ = picture.split()
    palette = picture.quantize(64)
    deep = Image.fromarray(np.asarray(red).astype(np.uint16) * 257)
    frames = [picture, photo(203, 311, 6)]
    soft = picture.copy()
    soft.putalpha(red)
    animated = {"save_all": True, "append_images": frames[1:]}
    return {
        "grey jpeg": jpeg(red),
        "cmyk jpeg": jpeg(picture.convert("CMYK")),
        "progressive jpeg": png(picture, "JPEG", progressive=True, quality=90),
        "optimised 4:4:4 jpeg": png(picture, "JPEG", optimize=True, subsampling=0, quality=95),
        "rgb jpeg": png(picture, "JPEG", keep_rgb=True, quality=90),
        "jpeg with restarts": png(picture, "JPEG", restart_marker_rows=1),
        "jpeg with a tail": jpeg(picture) + b"more",
        "mpo": png(picture, "MPO", **animated),
        "png": png(picture),
        "palette": png(palette),
        "transparent palette": png(palette, transparency=3),
        "alpha": png(soft),
        "16 bits": png(deep),
        "black and white": png(picture.convert("1")),
        "animated gif": png(frames[0], "GIF", **animated),
        "animated webp": png(frames[0], "WEBP", lossless=True, **animated),
        "tiff": png(picture, "TIFF"),
        "bmp": png(picture, "BMP"),
    }


FILES = files()


@pytest.mark.parametrize("kind", FILES)
@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_files_of_every_kind(kind: str, name: str):
    found = difference(PREPROCESS[name], FILES[kind])
    is_scaled = "jpeg" in kind or kind == "mpo"
    assert is_within(found, SCALED if is_scaled and kind != "cmyk jpeg" else UNSCALED), found


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("size", [(203, 331), (151, 201), (90, 71)])
@pytest.mark.parametrize("name", ["clip_oblong", "blip2"])
def test_exif_orientation(orientation: int, size: tuple[int, int], name: str):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = png(photo(*size, 7), "JPEG", exif=exif.tobytes(), quality=90)
    bound = SCALED if scale_of(derived(PREPROCESS[name]), data) > 1 else UNSCALED
    assert is_within(difference(PREPROCESS[name], data), bound)


@pytest.mark.parametrize("channel", range(3))
def test_channels_keep_their_order(channel: int):
    colour = tuple(255 * (c == channel) for c in range(3))
    for data in (jpeg(Image.new("RGB", (300, 200), colour)), png(Image.new("RGB", (9, 9), colour))):
        means = derived(PREPROCESS["clip"]).pixels(data).float().mean(dim=(1, 2))
        assert means.argmax() == channel and means.max() > 250


def test_jpegs_take_the_fast_way(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(decode, "open_image", lambda data: pytest.fail("decoded by Pillow"))
    fast = derived(PREPROCESS["clip"])
    for kind, data in FILES.items():
        if "jpeg" in kind and kind != "cmyk jpeg":
            assert fast.pixels(data).shape == (3, SIDE, SIDE), kind


# --- files that are damaged, or too large


def verdict(pixels: Any, data: bytes) -> Any:
    try:
        return pixels(data)
    except ImageError as error:
        return type(error)


@pytest.mark.parametrize("progressive", [False, True])
def test_truncated_jpegs_are_errors(progressive: bool):
    data = png(photo(203, 311, 8), "JPEG", progressive=progressive)
    for end in (0, 2, 3, 20, len(data) // 3, len(data) // 2, len(data) - 200):
        with pytest.raises(ImageError):
            derived(PREPROCESS["clip"]).pixels(data[:end])


def test_damaged_jpegs_are_judged_as_exact_mode_judges_them():
    """What both accept is the same picture, whatever the damage did to it (and nothing is scaled:
    damage makes blocks that are harsher than any picture's)."""
    preprocess = PREPROCESS["clip"]
    fast, exact = derived(preprocess), ExactDecoder(preprocess)
    whole = jpeg(photo(90, 120, 9))
    draw = np.random.default_rng(0)
    verdicts = set()
    for _ in range(80):
        data = bytearray(whole)
        # Half of the damage in the header, which would seldom be met else.
        for place in draw.integers(2, 700 if draw.random() < 0.5 else len(data), 2):
            data[place] = draw.integers(0, 256)
        found, expected = verdict(fast.pixels, bytes(data)), verdict(exact.pixels, bytes(data))
        if isinstance(expected, type):
            assert found is expected
        else:
            assert is_within(difference(preprocess, bytes(data)), UNSCALED)
        verdicts.add(isinstance(expected, type))
    assert verdicts == {True, False}


def of_size(data: bytes, width: int, height: int) -> bytes:
    """A JPEG whose header states another size."""
    start = data.index(b"\xff\xc0") + 5
    return data[:start] + height.to_bytes(2, "big") + width.to_bytes(2, "big") + data[start + 4 :]


@pytest.mark.parametrize(
    ("size", "error"),
    [((60_000, 60_000), TooManyPixelsError), ((9000, 8000), TooManyPixelsError),
     ((60_000, 16), TooNarrowError)],
)  # fmt: skip
def test_bombs_are_refused_before_decoding(
    size: tuple[int, int], error: type[ImageError], monkeypatch: pytest.MonkeyPatch
):
    data = of_size(jpeg(photo(64, 64, 0)), *size)
    fast = derived(PREPROCESS["clip"])
    monkeypatch.setattr(simplejpeg, "decode_jpeg", lambda *_, **__: pytest.fail("decoded"))
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    tracemalloc.start()
    try:
        for pixels in (fast.pixels, ExactDecoder(PREPROCESS["clip"]).pixels):
            with pytest.raises(error):
                pixels(data)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_a_jpeg_of_many_scans_is_refused_before_decoding(monkeypatch: pytest.MonkeyPatch):
    data = png(photo(64, 64, 0), "JPEG", progressive=True)
    at, end = data.rindex(b"\xff\xda"), data.rindex(b"\xff\xd9")
    bomb = data[:at] + data[at:end] * 100 + data[end:]
    monkeypatch.setattr(simplejpeg, "decode_jpeg", lambda *_, **__: pytest.fail("decoded"))
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    for pixels in (derived(PREPROCESS["clip"]).pixels, ExactDecoder(PREPROCESS["clip"]).pixels):
        with pytest.raises(ImageError, match="more than 100 scans"):
            pixels(bomb)


def test_two_headers_that_disagree_leave_it_to_pillow(monkeypatch: pytest.MonkeyPatch):
    data, fast = jpeg(photo(203, 311, 3)), derived(PREPROCESS["clip"])
    expected = fast(open_image(data))
    assert not torch.equal(fast.pixels(data), expected)
    header = (32, 32, "YCbCr", "420")
    monkeypatch.setattr(simplejpeg, "decode_jpeg_header", lambda data: header)
    assert torch.equal(fast.pixels(data), expected)


# --- what the fast way is derived from


class Cropping:
    """A processor that does what its options do not say."""

    def to_dict(self) -> dict[str, Any]:
        return hf.SiglipImageProcessor(**_SQUASH).to_dict()

    def __call__(self, image: Image.Image, return_tensors: str) -> Any:
        middle = image.crop((4, 4, image.width - 4, image.height - 4))
        return hf.SiglipImageProcessor(**_SQUASH)(middle, return_tensors=return_tensors)


def unknown(image: Image.Image) -> torch.Tensor:
    return torch.zeros(3, 4, 4)


@pytest.mark.parametrize(
    ("preprocess", "message"),
    [
        (HFPreprocess(hf.CLIPImageProcessor(**_CROP, resample=Image.Resampling.LANCZOS)),
         "CLIPImageProcessor.*filter"),
        (HFPreprocess(hf.CLIPImageProcessor(**_CROP, do_resize=False)), "does not resize"),
        (HFPreprocess(hf.CLIPImageProcessor(size={"shortest_edge": 9}, do_center_crop=False)),
         "different sizes"),
        (HFPreprocess(hf.CLIPImageProcessor(size={"shortest_edge": 9})), r"crops \(224, 224\) of"),
        (HFPreprocess(hf.BitImageProcessor(size={"shortest_edge": 9, "longest_edge": 20})),
         "its size is"),
        (HFPreprocess(Cropping()), "Cropping.*pixels are others"),
        (HFPreprocess(object()), "object.*options are not the usual"),
        (unknown, "unknown.*not known"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_fast_is_named(preprocess: Preprocess, message: str):
    with pytest.raises(ValueError, match=rf"{message}.*set decode: exact"):
        derive_fast(preprocess)


def test_it_can_be_sent_to_a_worker():
    for preprocess in (PREPROCESS["clip"], PREPROCESS["rescale"]):
        fast, data = derived(preprocess), FILES["progressive jpeg"]
        again = pickle.loads(pickle.dumps(fast))
        assert again == fast and torch.equal(again.pixels(data), fast.pixels(data))
        exact = ExactDecoder(preprocess)
        again = pickle.loads(pickle.dumps(exact))
        assert torch.equal(again.pixels(data), exact.pixels(data))


def test_exact_is_the_processor_to_the_bit():
    image = open_image(FILES["alpha"])
    exact = ExactDecoder(PREPROCESS["clip"])
    assert torch.equal(exact.pixels(FILES["alpha"]), PREPROCESS["clip"](image))
    assert torch.equal(exact(image), PREPROCESS["clip"](image))
