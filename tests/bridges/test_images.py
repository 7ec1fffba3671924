"""Every kind of picture comes out upright, opaque, 8-bit RGB, or as an error that says why."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image
from PIL.TiffImagePlugin import TiffImageFile

from bridges.images import ImageError, TooManyPixelsError, TooNarrowError, open_image

# What Pillow must have done to a picture for the tag to undo it (the EXIF table, read backwards).
STORED_AS = {
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


def encode(image: Image.Image, format: str = "PNG", **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format, **options)
    return stream.getvalue()


def noise(height: int = 5, width: int = 7, channels: int = 3) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, channels), np.uint8)
    return Image.fromarray(pixels)


def pixels(data: bytes) -> np.ndarray:
    image = open_image(data)
    assert image.mode == "RGB"
    return np.asarray(image)


@pytest.mark.parametrize("format", ["PNG", "TIFF", "BMP", "WEBP"])
def test_lossless_rgb_is_unchanged(format, tmp_path):
    options = {"lossless": True} if format == "WEBP" else {}
    path = tmp_path / "image"
    path.write_bytes(encode(noise(), format, **options))
    for source in (path, path.read_bytes()):
        np.testing.assert_array_equal(np.asarray(open_image(source)), np.asarray(noise()))


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied_once(orientation, format):
    how = STORED_AS[orientation]
    stored = noise() if how is None else noise().transpose(how)
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = open_image(encode(stored, format, exif=exif.tobytes()))
    np.testing.assert_array_equal(np.asarray(image), np.asarray(noise()))
    assert image.getexif().get(0x0112, 1) == 1


def test_exif_orientation_of_a_jpeg():
    stored = Image.new("RGB", (64, 32), "blue")
    stored.paste("red", (0, 0, 32, 32))  # orientation 6: the left ends on top
    exif = Image.Exif()
    exif[0x0112] = 6
    image = open_image(encode(stored, "JPEG", exif=exif.tobytes(), quality=95))
    assert image.size == (32, 64)
    top, bottom = image.getpixel((16, 10)), image.getpixel((16, 54))
    assert top[0] > 240 > 15 > top[2]
    assert bottom[2] > 240 > 15 > bottom[0]


def test_an_unreadable_exif_block_does_not_lose_the_picture():
    data = encode(noise(), exif=b"Exif\0\0MM\0*" + b"\xff" * 20)
    np.testing.assert_array_equal(pixels(data), np.asarray(noise()))


def test_alpha_is_composited_on_white():
    rgba = np.zeros((1, 3, 4), np.uint8)
    rgba[0, :, 0] = 200
    rgba[0, :, 3] = [0, 255, 51]  # transparent, opaque, one fifth
    expected = [[255, 255, 255], [200, 0, 0], [244, 204, 204]]
    np.testing.assert_allclose(pixels(encode(Image.fromarray(rgba)))[0], expected, atol=1)


def test_grey_with_alpha_is_composited_on_white():
    image = Image.new("LA", (2, 1), (0, 0))
    image.putpixel((1, 0), (0, 255))
    assert pixels(encode(image))[0].tolist() == [[255] * 3, [0] * 3]


@pytest.mark.parametrize("format", ["PNG", "GIF"])
def test_a_transparent_palette_entry_is_white(format):
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putdata([0, 1])
    data = encode(image, format, transparency=0)
    assert pixels(data)[0].tolist() == [[255, 255, 255], [40, 50, 60]]


def test_palette_transparency_in_bytes():
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putdata([0, 1])
    data = encode(image, transparency=b"\xff\x00")
    assert pixels(data)[0].tolist() == [[10, 20, 30], [255, 255, 255]]


def test_a_transparent_colour_of_rgb_is_white():
    image = Image.new("RGB", (2, 1), (1, 2, 3))
    image.putpixel((1, 0), (4, 5, 6))
    assert pixels(encode(image, transparency=(1, 2, 3)))[0].tolist() == [[255] * 3, [4, 5, 6]]


def test_grey_and_black_and_white():
    grey = Image.fromarray(np.arange(6, dtype=np.uint8).reshape(2, 3) * 50)
    assert (pixels(encode(grey)) == np.asarray(grey)[..., None]).all()
    assert pixels(encode(Image.new("1", (1, 1), 1)))[0, 0].tolist() == [255] * 3


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_16_bits_are_scaled_not_saturated(format):
    samples = np.array([[0, 257, 128 * 257, 65535]], np.uint16)
    assert pixels(encode(Image.fromarray(samples), format))[0, :, 0].tolist() == [0, 1, 128, 255]


def test_a_transparent_16_bit_grey_is_white():
    def chunk(name: bytes, data: bytes) -> bytes:
        crc = struct.pack(">I", zlib.crc32(name + data))
        return struct.pack(">I", len(data)) + name + data + crc

    header = struct.pack(">IIBBBBB", 2, 1, 16, 0, 0, 0, 0)
    row = zlib.compress(b"\0" + struct.pack(">HH", 1000, 2570))
    parts = [(b"IHDR", header), (b"tRNS", struct.pack(">H", 1000)), (b"IDAT", row), (b"IEND", b"")]
    data = b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)
    assert pixels(data)[0, :, 0].tolist() == [255, 10]


def test_cmyk_jpeg():
    image = Image.new("CMYK", (32, 32), (0, 255, 255, 0))  # no cyan: red
    assert np.abs(pixels(encode(image, "JPEG")) - [254.0, 0, 0]).max() < 5


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG", "TIFF"])
def test_the_first_frame_of_an_animation(format):
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    data = encode(frames[0], format, save_all=True, append_images=frames[1:])
    assert np.abs(pixels(data) - [255.0, 0, 0]).max() < 5


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "GIF"])
def test_truncated_data_is_an_error(format):
    data = encode(noise(64, 64), format)
    with pytest.raises(ImageError, match=r"cannot be decoded|begins with"):
        open_image(data[: len(data) // 2])


@pytest.mark.parametrize("data", [b"", b"<!DOCTYPE html>"])
def test_what_is_no_image_is_shown(data):
    with pytest.raises(ImageError, match="begins with") as error:
        open_image(data)
    assert repr(data) in str(error.value)
    assert "JPEG" in str(error.value)


def test_a_format_off_the_list_is_refused():
    with pytest.raises(ImageError, match="expected one of"):
        open_image(encode(noise(), "PPM"))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ImageError, match=r"nothing.png"):
        open_image(tmp_path / "nothing.png")


def test_the_pixel_count_is_refused_before_decoding(monkeypatch):
    data = encode(Image.new("1", (300, 200)))
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    with pytest.raises(ImageError, match="300×200 = 60,000 pixels; expected at most 59,999"):
        open_image(data, max_pixels=59_999)


def test_pillows_own_limit_is_an_error_too(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with pytest.raises(ImageError, match="Decompression"):
        open_image(encode(noise()))


@pytest.mark.parametrize("size", [(101, 1), (2, 201)])
def test_a_narrow_picture_is_refused_before_decoding(size, monkeypatch):
    """Of 1×60,000 an encoder that scales the shorter side would make billions of pixels."""
    open_image(encode(Image.new("1", (100, 1))))
    data = encode(Image.new("1", size))
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    with pytest.raises(TooNarrowError, match="at most 100 times the other"):
        open_image(data)


def of_scans(count: int) -> bytes:
    """A progressive JPEG of 256 grey pixels, its last scan repeated."""
    data = encode(Image.new("L", (16, 16), 90), "JPEG", progressive=True)
    assert data.count(b"\xff\xda") == 6
    at, end = data.rindex(b"\xff\xda"), data.rindex(b"\xff\xd9")
    return data[:at] + data[at:end] * (count - 5) + data[end:]


def tiff(data: bytes, *, compression: int, tile: tuple[int, int] | None = None) -> bytes:
    """16×16 grey pixels as one strip, or one tile."""
    tags = {256: 16, 257: 16, 258: 8, 259: compression, 262: 1, 277: 1}
    places = {273: -1, 278: 16, 279: len(data)}
    if tile:
        places = {322: tile[0], 323: tile[1], 324: -1, 325: len(data)}
    tags |= places
    start = 8 + 2 + 12 * len(tags) + 4
    entries = (
        struct.pack("<HHII", tag, 4, 1, start if value < 0 else value)
        for tag, value in sorted(tags.items())
    )
    head = b"II*\0" + struct.pack("<IH", 8, len(tags))
    return head + b"".join(entries) + bytes(4) + data


def test_a_jpeg_of_many_scans_is_refused_before_decoding(tmp_path, monkeypatch):
    """Each takes a pass over all pixels."""
    path = tmp_path / "image"
    assert open_image(of_scans(100)).size == (16, 16)
    path.write_bytes(of_scans(101))
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    for source in (path, path.read_bytes()):
        with pytest.raises(ImageError, match="JPEG of more than 100 scans; expected a dozen"):
            open_image(source)


def test_what_only_looks_like_scans_is_none():
    """Within a segment, or behind the picture, where phones put a film."""
    data = encode(noise(16, 16), "JPEG")
    segment = b"\xff\xe5" + (2 + 400).to_bytes(2, "big") + b"\xff\xda" * 200
    np.testing.assert_array_equal(
        pixels(data[:2] + segment + data[2:] + b"\xff\xda" * 200), pixels(data)
    )


def test_a_tiff_of_a_jpeg_of_many_scans_is_refused(capfd):
    assert open_image(tiff(of_scans(50), compression=7)).size == (16, 16)
    with pytest.raises(ImageError, match="cannot be decoded"):
        open_image(tiff(of_scans(1000), compression=7))
    assert "Scan number 100" in capfd.readouterr().err  # libtiff, by itself


def test_a_tile_of_many_pixels_is_refused_before_decoding(monkeypatch):
    data = zlib.compress(bytes([7]) * 32 * 16)
    assert pixels(tiff(data, compression=8, tile=(32, 16)))[:, :].min() == 7
    bomb = tiff(data, compression=8, tile=(4096, 4112))
    monkeypatch.setattr(TiffImageFile, "load", lambda self: pytest.fail("decoded"))
    with pytest.raises(TooManyPixelsError, match="tiles of 4096×4112 = 16,842,752 pixels for a"):
        open_image(bomb)


def test_32_bit_samples_are_refused():
    with pytest.raises(ImageError, match="32-bit samples"):
        open_image(encode(Image.new("F", (2, 2)), "TIFF"))
