"""Clips: time embeddings, padding frames, longer clips than trained."""

import pytest
import torch
from einops import rearrange
from torch import Tensor

from bridges import VisionFeatures, VisionShape
from perceiver import PerceiverResampler
from perceiver.frames import frame_positions, interpolate

PATCHES, DIM = 5, 8


def resampler_of(num_frames: int, **options) -> PerceiverResampler:
    sizes = {"num_latents": 3, "depth": 2, "num_heads": 2, "head_dim": 4}
    shape = VisionShape(DIM, PATCHES, (1, PATCHES))
    return PerceiverResampler(vision=shape, num_frames=num_frames, **(sizes | options))


def clips_of(frames: Tensor, counts: list[int] | None = None) -> VisionFeatures:
    """One clip a sample: (b, f, p, d), and how many of the frames are real (all by default)."""
    b, f = frames.shape[:2]
    mask = torch.arange(f) < torch.tensor(counts or [f] * b)[:, None]
    patches = rearrange(frames, "b f p d -> b 1 (f p) d")
    one = torch.ones(b, 1, dtype=torch.bool)
    return VisionFeatures(patches, one, (1, PATCHES), mask[:, None])


@torch.no_grad()
@pytest.mark.parametrize("num_frames", [0, 1, 4])
def test_an_image_is_a_clip_of_one_frame(num_frames: int):
    resampler = resampler_of(num_frames)
    frames = torch.randn(3, 1, PATCHES, DIM)
    one = torch.ones(3, 1, dtype=torch.bool)
    image = resampler(VisionFeatures(frames, one, (1, PATCHES)))
    assert torch.equal(image, resampler(clips_of(frames)))


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, {"norm": "rms", "num_kv_heads": 1}, {"qk_norm": True}])
@pytest.mark.parametrize("num_frames", [0, 4])
def test_padding_frames_never_matter(num_frames: int, options: dict):
    resampler = resampler_of(num_frames, **options)
    frames, counts = torch.randn(3, 6, PATCHES, DIM), [6, 1, 3]
    for row, count in enumerate(counts):
        frames[row, count:] = torch.nan
    found = resampler(clips_of(frames, counts))
    for row, count in enumerate(counts):
        alone = resampler(clips_of(frames[row : row + 1, :count]))
        torch.testing.assert_close(found[row], alone[0])


@pytest.mark.parametrize("num_frames", [0, 4])
def test_gradients_know_no_padding(num_frames: int):
    resampler = resampler_of(num_frames)
    frames = torch.randn(2, 4, PATCHES, DIM)
    frames[1, 2:] = torch.nan
    frames.requires_grad_()
    resampler(clips_of(frames, [4, 2])).square().sum().backward()
    assert frames.grad is not None and frames.grad.isfinite().all()
    assert not frames.grad[1, 2:].any() and frames.grad[1, :2].any()
    frozen = resampler_of(num_frames)
    frozen.load_state_dict(resampler.state_dict())
    frozen(clips_of(frames.detach(), [4, 2])).square().sum().backward()
    for (name, a), b in zip(resampler.named_parameters(), frozen.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, msg=name)


@torch.no_grad()
def test_only_time_embeddings_tell_the_order():
    frames = torch.randn(1, 4, PATCHES, DIM)
    turned = frames[:, [2, 0, 3, 1]]
    blind, seeing = resampler_of(0), resampler_of(4)
    torch.testing.assert_close(blind(clips_of(turned)), blind(clips_of(frames)))
    difference = seeing(clips_of(turned)) - seeing(clips_of(frames))
    assert difference.abs().max() > 0.01


@torch.no_grad()
def test_frames_of_a_clip_are_read_together():
    resampler = resampler_of(4)
    frames = torch.randn(1, 4, PATCHES, DIM)
    before = resampler(clips_of(frames))
    frames[0, 3] = torch.randn(PATCHES, DIM)
    assert (resampler(clips_of(frames)) - before).abs().amax(dim=-1).min() > 1e-4


def test_clips_up_to_the_trained_length_take_the_embeddings_as_they_are():
    embedding = torch.randn(8, DIM)
    positions = frame_positions(torch.tensor([8, 3, 1, 0]), 8, trained=8)
    assert torch.equal(interpolate(embedding, positions), embedding.expand(4, 8, DIM))


@pytest.mark.parametrize("trained", [1, 2, 8])
@pytest.mark.parametrize("count", [9, 16, 30])
def test_longer_clips_spread_over_all_embeddings(count: int, trained: int):
    """Each clip by its own number of frames."""
    found = frame_positions(torch.tensor([count, 1]), 30, trained)
    real, padding = found[0, :count], found[0, count:]
    expected = torch.linspace(0, trained - 1, count)
    torch.testing.assert_close(real, expected, rtol=0, atol=1e-5)
    assert (real.diff() >= 0).all() and real[-1] == pytest.approx(trained - 1)
    for part in (padding, found[1]):
        assert ((part >= 0) & (part <= trained - 1)).all()
    embedding = torch.randn(trained, DIM)
    between = interpolate(embedding, real)
    torch.testing.assert_close(between[0], embedding[0])
    torch.testing.assert_close(between[-1], embedding[-1], rtol=0, atol=1e-5)


def test_interpolation_is_linear_in_the_position():
    embedding = torch.arange(4.0)[:, None].expand(4, DIM) * 2
    positions = torch.tensor([[0.0, 0.25, 1.5], [2.0, 2.9, 3.0]])
    torch.testing.assert_close(interpolate(embedding, positions)[..., 0], 2 * positions)


@pytest.mark.parametrize("frames", [1, 3, 6])
def test_every_embedding_in_use_is_trained(frames: int):
    resampler = resampler_of(4)
    resampler(clips_of(torch.randn(2, frames, PATCHES, DIM))).square().sum().backward()
    assert resampler.time_embedding is not None and resampler.time_embedding.grad is not None
    used = resampler.time_embedding.grad.any(dim=1)
    assert used.tolist() == [k < frames for k in range(4)]
