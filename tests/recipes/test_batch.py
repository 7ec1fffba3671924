"""Batches of pictures and clips: what the encoder is given of them, and what moves with them."""

import pytest
import tiny
import torch

from recipes.batch import Batch, pictures

PIXELS = (3, tiny.IMAGE_SIZE, tiny.IMAGE_SIZE)
SAMPLE = {"key": "k", "captions": ["c"], "meta": {}}


def some(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def mask(*counts: int, most: int) -> torch.Tensor:
    return torch.arange(most) < torch.tensor(counts)[:, None]


def test_padding_pictures_are_masked(encoder):
    images, real = some(2, 3, *PIXELS), mask(3, 1, most=3)
    images[~real] = torch.nan
    found = Batch(images, None, [SAMPLE] * 2, real).features(encoder)
    assert torch.equal(found.image_mask, real)
    assert found.frame_mask is None
    for row, image in real.nonzero().tolist():
        alone = encoder.encode(images[row, image][None, None]).patches[0, 0]
        torch.testing.assert_close(found.patches[row, image], alone)


def test_frames_of_clips_stand_one_after_the_other(encoder):
    frames = torch.stack([mask(4, 2, 1, most=4)], dim=1)
    images = some(3, 1, 4, *PIXELS)
    images[~frames] = torch.nan
    batch = Batch(images, None, [SAMPLE] * 3, frame_mask=frames)
    found = batch.features(encoder)
    assert found.num_frames == 4
    assert found.patches.shape[:3] == (3, 1, 4 * 9)
    assert torch.equal(found.frame_mask, frames)
    alone = encoder.encode(images[1, 0, 1][None, None]).patches[0, 0]
    torch.testing.assert_close(found.patches[1, 0, 9:18], alone)
    # The same from a cache.
    cached = found.patches.unflatten(2, (4, 9))
    kept = Batch(cached, (3, 3), [SAMPLE] * 3, frame_mask=frames).features(encoder)
    assert torch.equal(kept.patches, found.patches)
    assert torch.equal(kept.frame_mask, frames)
    assert kept.image_mask.all()


@pytest.mark.parametrize("clips", [False, True])
def test_samples_may_be_encoded_a_few_at_a_time(encoder, clips):
    real = mask(2, 1, 0, 2, 1, most=2)
    images = some(5, 2, *((3,) if clips else ()), *PIXELS)
    frames = torch.ones(5, 2, 3, dtype=torch.bool) if clips else None
    batch = Batch(images, None, [SAMPLE] * 5, real, frames)
    whole, parts = batch.features(encoder), batch.features(encoder, 2)
    torch.testing.assert_close(parts.patches[real], whole.patches[real])
    assert torch.equal(parts.image_mask, whole.image_mask)
    assert (parts.frame_mask is None) == (not clips)
    assert parts.grid == whole.grid


def test_single_pictures_need_no_mask(encoder):
    batch = pictures([{**SAMPLE, "image": some(*PIXELS)}] * 2, (3, 3))
    assert batch.image_mask is None
    assert batch.frame_mask is None
    assert batch.features(encoder).image_mask.all()
    cached = pictures([{**SAMPLE, "features": some(9, 16)}] * 2, (3, 3))
    assert cached.features(encoder).patches.shape == (2, 1, 9, 16)


def test_masks_move_with_the_pictures():
    real, frames = mask(1, most=1), torch.ones(1, 1, 2, dtype=torch.bool)
    moved = Batch(some(1, 1, 2, *PIXELS), None, [SAMPLE], real, frames).to("meta")
    for tensor in (moved.images, moved.image_mask, moved.frame_mask):
        assert tensor is not None
        assert tensor.device.type == "meta"
    assert Batch(some(1, 1, *PIXELS), None, [SAMPLE]).to("meta").image_mask is None
