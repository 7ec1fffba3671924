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
    yield model
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


def test_greyscale_and_transparency_are_no_matter(model: VisionLanguageModel):
    given = [noise(9, 9).convert(mode) for mode in ("L", "RGBA", "CMYK", "P")]
    assert len(caption(model, given, max_new_tokens=2)) == 4
