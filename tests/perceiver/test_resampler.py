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


@pytest.mark.parametrize("activation", ["gelu", "relu", "squared_relu"])
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
