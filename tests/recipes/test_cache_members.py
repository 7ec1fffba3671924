"""Features as bytes: what storing them loses, and what a hostile member costs."""

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from torch import Tensor

from bridges import VisionFeatures, VisionLanguageModel
from recipes.batch import CaptionBatch
from recipes.cache_form import PICTURES
from recipes.cache_set import FeatureSet
from recipes.cache_writer import Encoding, write_features
from recipes.data import CaptionData
from recipes.features import MEMBER, Storage, decode_features, encode_features, has_features
from recipes.shard_writer import write_shards

SIGNIFICANT = {"fp16": 2.0**-11, "bf16": 2.0**-8}
TINY = 2.0**-25
"""Half of the smallest step of fp16, near 0."""


def bound(features: Tensor, dtype: Storage) -> Tensor:
    """The greatest error of each value by the storage's precision."""
    if dtype != "int8":
        return features.abs() * SIGNIFICANT[dtype] + TINY
    greatest = features.abs().amax(dim=-1, keepdim=True)
    # Half a step of the patch; fp16, which int8 is read as; and the division in fp32.
    return greatest / 254 + greatest * SIGNIFICANT["fp16"] + greatest * 2.0**-22 + TINY


def stored(features: Tensor, dtype: Storage) -> Tensor:
    member, data = encode_features(features, dtype)
    assert member == MEMBER[dtype]
    assert has_features({member: data})
    assert encode_features(features, dtype) == (member, data)
    return decode_features({member: data, "txt": b"a"})


@pytest.mark.parametrize("dtype", MEMBER)
def test_what_is_stored_is_off_by_no_more_than_its_precision(dtype):
    features = torch.randn(3, 7, 64, generator=torch.Generator().manual_seed(0)) * 30
    features[0, 0] = 0
    features[0, 1, 5] = 4000  # an outlier: its patch alone is the coarser for it
    features[1, 2] *= 1e-5
    found = stored(features, dtype)
    assert found.dtype == (torch.bfloat16 if dtype == "bf16" else torch.float16)
    assert found.shape == features.shape
    limit = bound(features, dtype)
    assert ((found.float() - features).abs() <= limit).all()
    assert ((found.float().roll(1, dims=1) - features).abs() > limit).any()
    # The bound is not a loose one.
    assert ((found.float() - features).abs() > 0.8 * limit).any()


@pytest.mark.parametrize("dtype", MEMBER)
def test_features_of_no_picture_keep_their_shape(dtype):
    assert stored(torch.zeros(0, 7, 16), dtype).shape == (0, 7, 16)


def test_bf16_keeps_what_a_bf16_encoder_gives():
    features = torch.randn(5, 8).bfloat16()
    assert torch.equal(stored(features, "bf16"), features)


@pytest.mark.parametrize(
    ("value", "dtype", "expected"),
    [
        (float("nan"), "fp16", "NaN or infinity"),
        (float("-inf"), "bf16", "NaN or infinity"),
        (float("nan"), "int8", "NaN or infinity"),
        (1e5, "fp16", r"up to 1e\+05; expected at most 6.55e\+04.*--dtype bf16"),
        (-1e5, "int8", r"up to 1e\+05; expected at most 6.55e\+04.*--dtype bf16"),
    ],
)
def test_features_that_would_not_come_back_are_refused(value, dtype, expected):
    features = torch.ones(4, 8)
    features[2, 3] = value
    with pytest.raises(ValueError, match=expected):
        encode_features(features, dtype)
    stored(torch.full((4, 8), 1e5), "bf16")


def blocks(index: int) -> dict[str, object]:
    """A captioned picture that is like no other."""
    png = io.BytesIO()
    colours = np.random.default_rng(index).integers(0, 2, (3, 3, 3), np.uint8) * 255
    pixels = np.kron(colours, np.ones((4, 4, 1), np.uint8))
    Image.fromarray(pixels).save(png, "PNG")
    return {"__key__": f"s{index}", "png": png.getvalue(), "txt": f"caption number {index}"}


def batch_of(shards: Path, model: VisionLanguageModel) -> CaptionBatch:
    data = CaptionData(str(shards), batch_size=8)
    data.connect(model.vision, data.collator(model))
    (batch,) = data.val_dataloader()
    assert isinstance(batch, CaptionBatch)
    assert len(batch) == 8
    return batch


def losses_of(model: VisionLanguageModel, batch: CaptionBatch, vision: VisionFeatures) -> Tensor:
    """The loss of each sample: (b,)."""
    text = batch.text
    return model(text.input_ids, text.attention_mask, text.labels, vision).row_losses()


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", MEMBER)
def test_the_loss_is_the_online_one_within_the_precision(tmp_path, dtype, precision):
    encoder = tiny.vision_encoder("clip", dtype=precision)
    factory = tiny.factory("perceiver")
    model = VisionLanguageModel.connect(encoder, tiny.language_model("llama"), factory)
    tiny.randomise(model.bridge)
    shards = [
        *write_shards(map(blocks, range(8, 16)), tmp_path / "shards", "train"),
        *write_shards(map(blocks, range(8)), tmp_path / "shards", "val", samples_per_shard=4),
    ]
    features = FeatureSet.of(shards, tmp_path / "features", encoder, PICTURES, dtype)
    assert not features.begin()
    write_features(features, Encoding(encoder, PICTURES, dtype, batch_size=4))
    assert features.finish()
    batch, cached = (batch_of(tmp_path / name, model) for name in ("shards", "features"))
    assert cached.grid == encoder.shape.grid
    assert torch.equal(batch.text.input_ids, cached.text.input_ids)

    online = batch.features(encoder)
    patches = online.patches.float().requires_grad_()
    expected = losses_of(model, batch, replace(online, patches=patches))
    (slope,) = torch.autograd.grad(expected.sum(), patches)
    found = cached.features(encoder)
    losses = losses_of(model, cached, found)
    if precision is torch.bfloat16 and dtype == "bf16":
        assert torch.equal(found.patches, online.patches)
        assert torch.equal(losses, expected)
    # An error of rounding is anywhere within its bound, whatever the others are: of their sum,
    # each times its slope, this is the standard deviation. Six of them, and fp32's own rounding.
    spread = (slope * bound(patches.detach(), dtype)).square().sum(dim=(1, 2, 3)).div(3).sqrt()
    limit = 6 * spread + 1e-4
    assert ((losses - expected).abs() <= limit).all()
    shuffled = replace(found, patches=found.patches.roll(1, dims=0))
    assert ((losses_of(model, cached, shuffled) - expected).abs() > limit).all()
