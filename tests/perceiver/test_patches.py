"""Frozen patches: what their backward leaves out changes no gradient."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from bridges import VisionFeatures, VisionShape
from perceiver import PerceiverResampler

M, F, P, DIM, HEADS, HEAD_DIM, DEPTH = 2, 3, 40, 16, 2, 4, 2


def resampler_of(num_frames: int = F, **options) -> PerceiverResampler:
    sizes = {"num_latents": 4, "depth": DEPTH, "num_heads": HEADS, "head_dim": HEAD_DIM}
    shape = VisionShape(DIM, P, (1, P))
    resampler = PerceiverResampler(vision=shape, num_frames=num_frames, **(sizes | options))
    with torch.no_grad():
        for parameter in resampler.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return resampler


def clips(needs_gradient: bool, seed: int = 0, media: int = M) -> VisionFeatures:
    patches = torch.randn(media, 1, F * P, DIM, generator=torch.Generator().manual_seed(seed))
    mask = torch.ones(media, 1, F, dtype=torch.bool)
    return VisionFeatures(patches.requires_grad_(needs_gradient), mask[..., 0], (1, P), mask)


def step(resampler: PerceiverResampler, vision: VisionFeatures, *, autocast: bool = False) -> None:
    resampler.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = resampler(vision)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    (out.float() * weights).sum().backward()


def gradients(resampler: PerceiverResampler) -> dict[str, torch.Tensor]:
    found = {name: p.grad for name, p in resampler.named_parameters() if p.grad is not None}
    assert len(found) == len(list(resampler.parameters()))
    return found


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"norm": "rms"},
        {"norm": "rms", "num_kv_heads": 1, "activation": "swiglu"},
        {"qk_norm": True, "norm_eps": 0.5},
        {"num_frames": 0},
        {"num_frames": 2},
    ],
)
def test_gradients_are_those_of_plain_autograd(options: dict):
    """With patches that need a gradient, autograd goes all the way by itself."""
    resampler = resampler_of(**options)
    step(resampler, clips(True))
    expected = gradients(resampler)
    step(resampler, clips(False))
    for name, found in gradients(resampler).items():
        assert expected[name].any()
        torch.testing.assert_close(found, expected[name], rtol=1e-4, atol=1e-4, msg=name)


@pytest.mark.parametrize("autocast", [False, True])
def test_gradients_in_bf16(autocast: bool):
    """As good as plain autograd's in bf16: both beside fp32."""
    resampler = resampler_of(activation="gelu")
    step(resampler, clips(True))
    exact = gradients(resampler)
    if not autocast:
        resampler = resampler.bfloat16()
    errors = {}
    for needs_gradient in (True, False):
        step(resampler, clips(needs_gradient), autocast=autocast)
        errors[needs_gradient] = {
            name: ((found.float() - exact[name]).norm() / exact[name].norm()).item()
            for name, found in gradients(resampler).items()
        }
    for name, error in errors[False].items():
        assert error < 1.5 * errors[True][name] + 0.02, name


@torch.no_grad()
def test_every_layer_has_its_own_scale_and_shift():
    """The normalised patches are shared, the weights of their norms are not."""
    resampler = resampler_of(num_frames=0)
    vision = clips(False)
    before = resampler(vision)
    layers = [layer.features_norm for layer in resampler.layers]
    for norm in layers:
        for parameter in (norm.weight, norm.bias):
            kept = parameter.clone()
            parameter.add_(torch.randn_like(parameter))
            assert (resampler(vision) - before).abs().max() > 1e-3
            parameter.copy_(kept)
    torch.testing.assert_close(resampler(vision), before)


def flops(resampler: PerceiverResampler, vision: VisionFeatures) -> int:
    with FlopCounterMode(display=False) as counter:
        step(resampler, vision)
    return counter.get_total_flops()


def test_nothing_is_multiplied_into_frozen_patches():
    """Neither do time embeddings ask for it."""
    into_patches = DEPTH * 2 * 2 * M * F * P * DIM * HEADS * HEAD_DIM  # through keys and values
    without = resampler_of(num_frames=0)
    assert flops(without, clips(True)) - flops(without, clips(False)) == into_patches
    timed = resampler_of()
    more = flops(timed, clips(False)) - flops(without, clips(False))
    assert 0 < more < 0.3 * into_patches


def test_frozen_weights_get_no_gradient():
    resampler = resampler_of()
    resampler.layers.requires_grad_(False)
    before = flops(resampler_of(), clips(False))
    step(resampler, clips(False))
    assert resampler.time_embedding is not None and resampler.time_embedding.grad is not None
    assert all(p.grad is None for p in resampler.layers.parameters())
    weights = DEPTH * 2 * 2 * M * F * P * DIM * HEADS * HEAD_DIM  # of keys and values
    assert flops(resampler, clips(False)) < before - weights


def test_padding_images_cost_nothing():
    resampler = resampler_of()
    vision = clips(False, media=4)
    some = torch.tensor([True, False, False, True])[:, None]
    half = VisionFeatures(vision.patches, some, vision.grid, vision.frame_mask)
    assert flops(resampler, half) == flops(resampler, clips(False, media=2))
