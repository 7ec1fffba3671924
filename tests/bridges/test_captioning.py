"""Captions of pictures, from pixels to text."""

import io
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import tiny
from PIL import Image

from bridges import LanguageModel, VisionEncoder, VisionLanguageModel, caption, caption_features


@pytest.fixture
def model(
    encoder: VisionEncoder, language_models: Callable[[str], LanguageModel]
) -> Iterator[VisionLanguageModel]:
    lm = language_models("llama")
    model = VisionLanguageModel.connect(
        encoder, lm, tiny.factory("perceiver_gated"), prompt="see <image>"
    )
    tiny.open_gates(model.bridge)
    preprocess = encoder.preprocess
    yield model
    encoder.preprocess = preprocess
    model.hooks.remove()


def noise(*size: int) -> Image.Image:
    return Image.merge("RGB", [Image.effect_noise(size, 90.0) for _ in range(3)])


def test_captions_do_not_depend_on_the_batch(model: VisionLanguageModel, tmp_path: Path):
    pictures = [noise(30, 20), noise(12, 12), noise(5, 40), noise(1, 1)]
    path = tmp_path / "noise.png"
    pictures[1].save(path)
    encoded = io.BytesIO()
    pictures[2].save(encoded, "PNG")
    given = [pictures[0], path, encoded.getvalue(), str(path), pictures[3]]
    together = caption(model, given, max_new_tokens=6)
    assert together[1] == together[3]
    assert together == caption(model, given, max_new_tokens=6, batch_size=2)
    assert together == [caption(model, [one], max_new_tokens=6)[0] for one in given]
    assert all(isinstance(text, str) and "<image>" not in text for text in together)


def test_no_images_no_captions(model: VisionLanguageModel):
    assert caption(model, []) == []


def test_the_prompt_can_be_another(model: VisionLanguageModel, encoder: VisionEncoder):
    features = tiny.features_of(model, [1, 1])
    options = {"max_new_tokens": 6, "min_new_tokens": 6}
    usual = caption_features(model, features, **options)
    assert usual == caption_features(model, features, prompt="see <image>", **options)
    assert usual != caption_features(model, features, prompt="Q <image> A", **options)


@pytest.mark.parametrize("kind", ["transparent", "sideways", "16 bit"])
def test_a_picture_is_seen_alike_however_it_comes(model: VisionLanguageModel, kind: str):
    """As a PIL image and as a file: transparency on white, upright, 16 bits scaled."""
    seen = []
    model.vision.preprocess = lambda image: seen.append(image.copy()) or tiny.preprocess(image)
    saved = io.BytesIO()
    if kind == "transparent":
        picture = Image.new("RGBA", (9, 9), (255, 0, 0, 0))
    elif kind == "16 bit":
        picture = Image.new("I;16", (9, 9), 300)
    else:
        picture = noise(9, 5)
        picture.getexif()[274] = 6  # Orientation: turned by 90°
    picture.save(saved, "PNG", exif=picture.getexif())
    with Image.open(saved) as opened:
        caption(model, [opened, saved.getvalue()], max_new_tokens=1)
    first, second = seen
    assert first.mode == second.mode == "RGB"
    assert first.size == second.size
    assert first.tobytes() == second.tobytes()
    if kind == "sideways":
        assert first.size == (5, 9)


def test_several_images_of_one_text_are_no_image(model: VisionLanguageModel):
    with pytest.raises(ValueError, match=r"found a list among the images.*model\.generate"):
        caption(model, [[noise(3, 3), noise(3, 3)]])  # pyright: ignore[reportArgumentType]
