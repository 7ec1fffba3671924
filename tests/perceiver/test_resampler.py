"""The Perceiver Resampler beyond its parity with the reference."""

import pytest
import torch

from bridges import VisionFeatures, VisionShape
from perceiver import PerceiverResampler


def features_of(b: int, i: int, p: int, d: int) -> VisionFeatures:
    return VisionFeatures(torch.randn(b, i, p, d), torch.ones(b, i, dtype=torch.bool), (1, p))


def resampler_of(**options) -> PerceiverResampler:
    sizes = {"num_latents": 3, "depth": 2, "num_heads": 2, "head_dim": 4}
    return PerceiverResampler(vision=VisionShape(8, 5, (1, 5)), **(sizes | options))


@torch.no_grad()
def test_each_image_by_itself():
    resampler = resampler_of()
    features = features_of(2, 3, 5, 8)
    found = resampler(features)
    assert found.shape == (2, 3, 3, 8)
    for row in range(2):
        for image in range(3):
            one = features.patches[row : row + 1, image : image + 1]
            alone = resampler(VisionFeatures(one, torch.ones(1, 1, dtype=torch.bool), (1, 5)))
            torch.testing.assert_close(found[row, image], alone[0, 0])


@pytest.mark.parametrize("activation", ["gelu", "relu", "squared_relu", "swiglu"])
def test_one_of_everything(activation: str):
    resampler = resampler_of(num_latents=1, depth=1, activation=activation)
    assert resampler(features_of(1, 1, 1, 8)).shape == (1, 1, 1, 8)


def test_another_width_adds_one_linear_layer():
    assert sum(p.numel() for p in resampler_of().input.parameters()) == 0
    wide = resampler_of(dim=12)
    assert wide.dim == 12
    assert wide.input.weight.shape == (12, 8)
    assert wide(features_of(1, 2, 5, 8)).shape == (1, 2, 3, 12)


@torch.no_grad()
def test_any_number_of_patches():
    resampler = resampler_of()
    assert resampler(features_of(1, 1, 7, 8)).shape == (1, 1, 3, 8)
    found = resampler(features := features_of(1, 1, 5, 8))
    order = torch.randperm(5)
    shuffled = VisionFeatures(features.patches[:, :, order], features.image_mask, (1, 5))
    torch.testing.assert_close(resampler(shuffled), found)  # no spatial positions (A.1.1)


def test_padding_images_give_zeros():
    resampler = resampler_of()
    features = features_of(2, 3, 5, 8)
    mask = torch.tensor([[True, False, True], [False, True, True]])
    patches = features.patches.masked_fill(~mask[..., None, None], torch.nan).requires_grad_()
    found = resampler(VisionFeatures(patches, mask, (1, 5)))
    assert not found[~mask].any()
    torch.testing.assert_close(found[mask], resampler(features)[mask])
    found.square().sum().backward()
    assert patches.grad is not None and patches.grad.isfinite().all()
    assert patches.grad.flatten(2).any(dim=-1).equal(mask)


@pytest.mark.parametrize("num_frames", [0, 2])
@pytest.mark.parametrize("dim", [8, 12])
def test_a_batch_without_images_gives_every_parameter_a_gradient_of_zero(dim: int, num_frames: int):
    resampler = resampler_of(num_frames=num_frames, dim=dim)
    patches = torch.full((2, 1, 5, 8), torch.nan)
    none = torch.zeros(2, 1, dtype=torch.bool)
    found = resampler(VisionFeatures(patches, none, (1, 5)))
    assert found.shape == (2, 1, 3, dim) and not found.any()
    (found + 1).square().sum().backward()
    for name, parameter in resampler.named_parameters():
        assert parameter.grad is not None and not parameter.grad.any(), name


def test_names_of_the_parameters_hold():
    """Weights of older runs, and official ones, go by these names."""
    names = {name for name, _ in resampler_of(depth=1).named_parameters()}
    norms = {
        f"{norm}.{part}"
        for norm in ("norm", "layers.0.features_norm", "layers.0.latents_norm", "layers.0.ff_norm")
        for part in ("weight", "bias")
    }
    weights = {f"layers.0.{part}.weight" for part in ("ff.up", "ff.out")}
    weights |= {f"layers.0.attention.{part}.weight" for part in ["q", "k", "v", "out"]}
    assert names == {"latents"} | norms | weights
    more = {name for name, _ in resampler_of(depth=1, num_frames=4, dim=6).named_parameters()}
    assert more - names == {"time_embedding", "input.weight", "input.bias"}


def test_latents_start_as_wished():
    assert torch.equal(resampler_of(latents_init="ones").latents, torch.ones(3, 8))
    assert resampler_of().latents.std() > 0.3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"projection_dim": 4}, "found projection_dim=4 for a linear projection"),
        ({"num_kv_heads": 3}, "found 2 heads for 3 heads of keys; expected a multiple"),
    ],
)
def test_wrong_options(options: dict, message: str):
    with pytest.raises(ValueError, match=message):
        resampler_of(**options)
