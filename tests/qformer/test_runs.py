"""Stage-1 runs: written, read back, refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import tiny_stage1 as tiny1
import torch
import transformers as hf

from bridges import VisionEncoder, VisionFeatures
from bridges.run import RUN_FILE, VisionSource
from qformer import QFormer, Stage1
from qformer.runs import (
    WEIGHTS_FILE,
    Stage1Spec,
    is_stage1_run,
    load_stage1,
    read_qformer,
    read_stage1,
    save_stage1,
)

SIZES = {"num_queries": 3, "dim": 16, "depth": 3, "num_heads": 2}
TEXT = {"vocab_size": tiny1.WORDS, "max_text": 12}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> VisionSource:
    """A tiny encoder on disk."""
    folder = tmp_path_factory.mktemp("vision")
    tiny.vision_model("clip").save_pretrained(folder)
    size = {"height": tiny.IMAGE_SIZE, "width": tiny.IMAGE_SIZE}
    hf.CLIPImageProcessorPil(size=size, crop_size=size).save_pretrained(folder)
    return VisionSource(str(folder), dtype="fp32")


@pytest.fixture(scope="module")
def vision(source: VisionSource) -> VisionEncoder:
    return VisionEncoder.load(**vars(source))


@pytest.fixture
def run(tmp_path: Path, source: VisionSource, vision: VisionEncoder) -> Path:
    """A run's folder."""
    save_stage1(tmp_path / "run", trained(source, vision), spec_of(source), vision)
    return tmp_path / "run"


def spec_of(source: VisionSource) -> Stage1Spec:
    return Stage1Spec(source, SIZES | TEXT, {"embed_dim": 6, "dec_token_id": 5}, max_text_tokens=9)


def trained(source: VisionSource, vision: VisionEncoder) -> Stage1:
    torch.manual_seed(0)
    stage1 = spec_of(source).build(vision)
    tiny.randomise(stage1)
    return stage1


def qformer_of(vision: VisionEncoder, **options: Any) -> QFormer:
    qformer = QFormer(vision=vision.shape, **(SIZES | options))
    tiny.randomise(qformer, seed=1)
    return qformer


def test_what_is_read_is_what_was_written(run: Path, source, vision):
    expected = trained(source, vision)
    assert is_stage1_run(run)
    found_vision, found = load_stage1(run, device="cpu")
    assert found_vision.fingerprint == vision.fingerprint
    assert not found.training
    assert found.dec_token_id == 5
    state = found.state_dict()
    assert state.keys() == expected.state_dict().keys()
    for name, tensor in expected.state_dict().items():
        assert torch.equal(state[name], tensor), name
    pixels = torch.rand(4, 1, 3, tiny.IMAGE_SIZE, tiny.IMAGE_SIZE)
    text = tiny1.texts_of()
    with torch.no_grad():
        losses = [
            model(encoder.encode(pixels), text, generator=torch.Generator().manual_seed(0)).losses
            for encoder, model in ((vision, expected), (found_vision, found))
        ]
    assert losses[0].keys() == {"itc", "itm", "itg"}
    for name, loss in losses[0].items():
        assert torch.equal(losses[1][name], loss), name


def test_the_file_says_what_the_run_is_made_of(run: Path, source, vision):
    raw = json.loads((run / RUN_FILE).read_text())
    assert (raw["format"], raw["kind"]) == (1, "blip2_stage1")
    assert raw["fingerprints"] == {"vision": vision.fingerprint}
    assert sorted(path.name for path in run.iterdir()) == sorted([RUN_FILE, WEIGHTS_FILE])
    spec = read_stage1(run)
    expected = spec_of(source)
    expected.fingerprints["vision"] = vision.fingerprint
    assert spec == expected
    again, _ = load_stage1(run, vision=vision, device="cpu")
    assert again is vision


def test_another_encoder_is_refused(run: Path, source):
    other = VisionEncoder.load(source.name, layer=1, dtype="fp32")
    with pytest.raises(ValueError, match=f"fingerprint {other.fingerprint}; .* was trained with"):
        load_stage1(run, vision=other)


def test_damaged_weights_are_refused(run: Path, vision):
    path = run / WEIGHTS_FILE
    whole = path.read_bytes()
    for part in (whole[:-10], whole[:20], b""):
        path.write_bytes(part)
        with pytest.raises(ValueError, match=f"{WEIGHTS_FILE} damaged .*; expected the file as"):
            load_stage1(run, vision=vision)
        with pytest.raises(ValueError, match=f"{WEIGHTS_FILE} damaged"):
            read_qformer(run, qformer_of(vision))


def edited(run: Path, **changes: Any) -> None:
    raw = json.loads((run / RUN_FILE).read_text())
    (run / RUN_FILE).write_text(json.dumps(raw | changes))


@pytest.mark.parametrize(
    "changes", [{"kind": "captions"}, {"format": 2}, {"vision": {"nam": "x"}}, {"more": 1}]
)
def test_other_descriptions_are_refused(run: Path, vision, changes: dict[str, Any]):
    edited(run, **changes)
    with pytest.raises(ValueError, match=r"does not describe a stage-1 run .*; expected the file"):
        load_stage1(run, vision=vision)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"format": 1}'])
def test_damaged_descriptions_are_refused(run: Path, vision, content: str):
    (run / RUN_FILE).write_text(content)
    with pytest.raises(ValueError, match="does not describe a stage-1 run"):
        load_stage1(run, vision=vision)


@pytest.mark.parametrize("missing", [RUN_FILE, WEIGHTS_FILE])
def test_another_folder_is_refused(run: Path, vision, missing: str):
    (run / missing).unlink()
    assert not is_stage1_run(run)
    for read in (lambda: load_stage1(run), lambda: read_qformer(run, qformer_of(vision))):
        with pytest.raises(ValueError, match="expected a stage-1 run: give the folder that"):
            read()


def test_weights_of_other_sizes_are_refused(run: Path, vision):
    spec = read_stage1(run)
    edited(run, stage1=spec.stage1 | {"embed_dim": 7})
    with pytest.raises(
        ValueError, match=r"do not fit this Stage1 in 4 places, e\.g\. .*; expected"
    ):
        load_stage1(run, vision=vision)


@pytest.mark.parametrize("options", [{}, TEXT])
@torch.no_grad()
def test_a_qformer_takes_the_run_s(run: Path, source, vision, options: dict[str, int]):
    """With a text branch and without; both read an image as stage 1 does."""
    qformer, expected = qformer_of(vision, **options), trained(source, vision).qformer
    qformer.load_pretrained(run)
    patches = torch.randn(2, 1, vision.shape.num_patches, vision.shape.dim)
    images = VisionFeatures(patches, torch.ones(2, 1).bool(), vision.shape.grid)
    assert torch.equal(qformer(images), expected(images))
    if options:
        text = tiny1.texts_of((5, 3))
        assert torch.equal(qformer(images, text), expected(images, text))
    theirs = expected.state_dict()
    for name, tensor in qformer.state_dict().items():
        assert torch.equal(tensor, theirs[name]), name


@pytest.mark.parametrize(
    "options", [{"num_queries": 4}, {"depth": 2}, {"dim": 32}, {"vocab_size": 31, "max_text": 12}]
)
def test_a_qformer_of_other_sizes_is_left_alone(run: Path, vision, options: dict[str, int]):
    qformer = qformer_of(vision, **options)
    before = {name: tensor.clone() for name, tensor in qformer.state_dict().items()}
    with pytest.raises(ValueError, match=r"do not fit this QFormer .*; expected the same sizes"):
        read_qformer(run, qformer)
    assert all(torch.equal(t, before[name]) for name, t in qformer.state_dict().items())
