"""Attention pages: the picture as the encoder sees it, the maps where they belong."""

import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import tiny
import tiny_run
import torch
import transformers as hf
from PIL import Image

import bridges
from bridges import VisionLanguageModel
from bridges.run import LanguageSource, RunSpec, VisionSource, save_run
from qformer import QFormer
from qformer.maps import cross_attention_maps
from recipes import cli
from recipes.attention import load_qformer, picture
from recipes.attention_picture import as_seen, overlay


def noise(width: int = 30, height: int = 20) -> Image.Image:
    """Coarse noise: resizing and JPEG leave it recognisable."""
    pixels = torch.randint(40, 215, (3, 4, 3), generator=torch.Generator().manual_seed(0))
    return Image.fromarray(pixels.byte().numpy()).resize((width, height), Image.Resampling.NEAREST)


@pytest.fixture(scope="module")
def stage1_run(on_disk, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("stage1")
    tiny_run.save_stage1_run(folder, on_disk.vision)
    return folder


def stage2_run(folder: Path, on_disk, resampler: dict[str, object]) -> Path:
    """A soft prefix on a tiny LM."""
    bridge = {"class_path": "bridges.SoftPrefix", "init_args": {"resampler": resampler}}
    vision = VisionSource(str(on_disk.vision), dtype="fp32")
    lm = LanguageSource(str(on_disk.lm), dtype="fp32")
    model = VisionLanguageModel.connect(
        bridges.VisionEncoder.load(**vars(vision)),
        bridges.LanguageModel.load(**vars(lm)),
        bridges.bridge_factory(bridge),
    )
    tiny.randomise(model.bridge)
    save_run(folder, model, RunSpec(vision, lm, bridge))
    return folder


QFORMER = {
    "class_path": "qformer.QFormer",
    "init_args": {"num_queries": 4, "dim": 16, "depth": 3, "num_heads": 2},
}


@pytest.fixture
def photo(tmp_path) -> Path:
    path = tmp_path / "photo & co.png"
    noise().save(path)
    return path


def run(*arguments: object) -> int:
    return cli.main(["attention", *map(str, arguments)])


def test_a_page_with_every_query_over_the_picture(stage1_run, photo, tmp_path, capsys):
    out = tmp_path / "page.html"
    assert run(photo, photo, "--run", stage1_run, "--out", out) == 0
    page = out.read_text()
    HTMLParser().feed(page)
    # For each picture: itself, the mean, and three queries.
    assert page.count("data:image/jpeg;base64,") == 2 * (1 + 1 + 3)
    assert "photo &amp; co.png" in page
    assert "30 × 20 pixels" in page
    # Self-contained: nothing is fetched.
    assert not re.search(r"""(src|href)=["'](?!data:|#)""", page)
    assert str(out) in capsys.readouterr().out


def test_layers_give_other_pages(stage1_run, photo, tmp_path):
    pages = []
    for layer in ("last", "mean"):
        out = tmp_path / f"{layer}.html"
        assert run(photo, "--run", stage1_run, "--out", out, f"--layer={layer}") == 0
        pages.append(re.findall(r"base64,[^\"]+", out.read_text()))
    assert pages[0][0] == pages[1][0]  # the picture
    assert pages[0][1:] != pages[1][1:]


def test_the_figures_are_those_of_the_maps(stage1_run, photo):
    vision, qformer, text = load_qformer(stage1_run)
    assert text is None
    features = vision.encode(vision.preprocess(noise())[None, None])
    maps = cross_attention_maps(qformer, features)[0, 0]
    shown = picture(photo, vision, qformer, None, "last")
    expected = maps[-1].mean(dim=0).amax(dim=-1)
    assert [q["peak"] for q in shown["queries"]] == pytest.approx(expected.tolist())
    expected = maps[-1].mean(dim=0).amin(dim=-1)
    assert [q["lowest"] for q in shown["queries"]] == pytest.approx(expected.tolist())
    assert shown["grid"] == (3, 3)
    assert not shown["has_prefix"]
    mean = picture(photo, vision, qformer, None, "mean")
    expected = maps.mean(dim=(0, 1)).amax(dim=-1)
    assert [q["peak"] for q in mean["queries"]] == pytest.approx(expected.tolist())


def test_prefix_tokens_have_no_place_in_the_picture(photo):
    vision = tiny.vision_encoder("clip", drop_prefix=False)
    qformer = QFormer(vision=vision.shape, num_queries=4, dim=16, depth=3, num_heads=2)
    tiny.randomise(qformer)
    shown = picture(photo, vision, qformer, None, "last")
    maps = cross_attention_maps(qformer, vision.encode(vision.preprocess(noise())[None, None]))
    on_cls = maps[0, 0, -1].mean(dim=0)[:, 0]
    assert shown["has_prefix"]
    assert [q["prefix"] for q in shown["queries"]] == pytest.approx(on_cls.tolist(), abs=1e-6)


def test_a_run_that_was_trained_into_an_lm(on_disk, photo, tmp_path):
    folder = stage2_run(tmp_path / "run", on_disk, QFORMER)
    out = tmp_path / "page.html"
    assert run(photo, "--run", folder, "--out", out) == 0
    assert out.read_text().count("data:image/jpeg;base64,") == 1 + 1 + 4


def test_an_instruction_turns_the_maps(on_disk, photo, tmp_path):
    tiny_run.save_tokenizer(tmp_path / "tokenizer")
    text = {"tokenizer": str(tmp_path / "tokenizer"), "max_text": 40}
    init_args = QFORMER["init_args"] | text
    folder = stage2_run(tmp_path / "run", on_disk, QFORMER | {"init_args": init_args})
    pages = {}
    for name, options in {"none": [], "dog": ["--question", "a red dog"]}.items():
        out = tmp_path / f"{name}.html"
        assert run(photo, "--run", folder, "--out", out, *options) == 0
        pages[name] = out.read_text()
    assert "a red dog" in pages["dog"]
    assert "A short image description." in pages["none"]
    maps = {name: re.findall(r"base64,[^\"]+", page) for name, page in pages.items()}
    assert maps["none"][1:] != maps["dog"][1:]


def test_what_cannot_be_drawn_is_said(stage1_run, on_disk, photo, tmp_path, capsys):
    out = tmp_path / "page.html"
    assert run(photo, "--run", stage1_run, "--out", out, "--question", "what?") == 2
    assert "leave --question out" in capsys.readouterr().err
    assert run(tmp_path / "none.png", "--run", stage1_run, "--out", out) == 2
    assert "none.png" in capsys.readouterr().err
    projector = {"class_path": "bridges.Projector", "init_args": {"layers": 1}}
    folder = stage2_run(tmp_path / "run", on_disk, projector)
    assert run(photo, "--run", folder, "--out", out, "--of", "queries") == 2
    assert "Projector" in capsys.readouterr().err
    assert run(photo, "--run", stage1_run, "--out", out, "--words", "cat") == 2
    assert "no language model" in capsys.readouterr().err
    assert not out.exists()


def test_without_matplotlib_the_extra_is_named(stage1_run, photo, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert run(photo, "--run", stage1_run, "--out", tmp_path / "page.html") == 2
    assert "bridges[demo]" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options",
    [
        {"do_resize": False, "do_center_crop": True, "crop_size": {"height": 12, "width": 16}},
        {"do_resize": False, "do_center_crop": True, "crop_size": {"height": 24, "width": 40}},
    ],
    ids=["cropped", "padded"],
)
def test_the_picture_is_the_one_the_encoder_sees(options):
    processor = hf.CLIPImageProcessorPil(
        image_mean=[0.5, 0.1, 0.3], image_std=[0.2, 0.7, 0.4], **options
    )

    def preprocess(image: Image.Image) -> torch.Tensor:
        return processor(image, return_tensors="pt")["pixel_values"][0]

    image = noise(30, 20)
    height, width = (options["crop_size"][side] for side in ("height", "width"))
    left, top = (30 - width) // 2, (20 - height) // 2
    found = np.asarray(as_seen(preprocess, image)).astype(int)
    expected = np.asarray(image.crop((left, top, left + width, top + height))).astype(int)
    inside = np.s_[max(0, -top) : height + min(0, top), max(0, -left) : width + min(0, left)]
    assert found.shape == (height, width, 3)
    assert abs(found[inside] - expected[inside]).max() <= 1


def test_a_preprocessing_without_light_is_refused():
    with pytest.raises(ValueError, match="no black from white"):
        as_seen(lambda image: torch.zeros(3, 4, 4), noise())


def test_a_planted_patch_is_bright_where_it_lies():
    attention = torch.full((3, 4), 0.01)
    attention[0, 2] = 0.8
    drawn = np.asarray(overlay(Image.new("RGB", (40, 30), "grey"), attention)).astype(int)
    colour = drawn.max(axis=2) - drawn.min(axis=2)
    cells = colour.reshape(3, 10, 4, 10).mean(axis=(1, 3))
    assert np.unravel_index(cells.argmax(), cells.shape) == (0, 2)
    # Its neighbours take part of its light, what lies further off none.
    assert cells[2, 0] == 0 < cells[1, 2] < cells[0, 2]
    assert (drawn[20:, :10] == 128).all()


def test_an_even_map_is_no_light_at_all():
    drawn = np.asarray(overlay(Image.new("RGB", (40, 30), "grey"), torch.full((3, 4), 1 / 12)))
    assert (drawn == 128).all()
