"""The attention that all bridges share."""

import pytest
import torch

from bridges.attention import Attention, attend


def by_hand(q, k, v, mask):
    scores = (q @ k.transpose(-1, -2)) * q.shape[-1] ** -0.5
    weights = scores.masked_fill(~mask, -torch.inf).softmax(dim=-1)
    return weights.nan_to_num(0.0) @ v


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_masked_keys_count_for_nothing_and_rows_without_keys_are_zero(dtype: torch.dtype):
    q, k, v = (torch.randn(2, 3, t, 8).to(dtype).requires_grad_() for t in (4, 5, 5))
    mask = torch.rand(2, 1, 4, 5) > 0.4
    mask[0, 0, 1] = False
    mask[1] = False
    out = attend(q, k, v, mask)
    expected = by_hand(q.float(), k.float(), v.float(), mask)
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    torch.testing.assert_close(out.float(), expected, rtol=0, atol=tolerance)
    assert not out[~mask.any(-1).expand(2, 3, 4)].any()
    out.float().square().sum().backward()
    for x in (q, k, v):
        assert x.grad is not None and x.grad.isfinite().all()
    assert not q.grad[1].any() and not k.grad[1].any() and not v.grad[1].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_a_mask_every_key_counts(dtype: torch.dtype):
    q, k, v = (torch.randn(2, 3, t, 8, dtype=dtype) for t in (4, 5, 5))
    everything = torch.ones(2, 1, 4, 5, dtype=torch.bool)
    torch.testing.assert_close(attend(q, k, v), attend(q, k, v, everything))


def test_keys_and_values_can_be_projected_beforehand():
    attention = Attention(16, 6, num_heads=2, head_dim=5, qk_norm=torch.nn.LayerNorm)
    kv = attention.project(torch.randn(3, 4, 6))
    assert kv[0].shape == kv[1].shape == (3, 2, 4, 5)
    assert attention(torch.randn(3, 7, 16), kv).shape == (3, 7, 16)
    assert attention(torch.randn(3, 1, 16), kv).shape == (3, 1, 16)


def test_heads_must_divide_the_width():
    with pytest.raises(ValueError, match="found width 10 for 3 heads; expected a multiple"):
        Attention(10, num_heads=3)
