"""Heads of queries that share heads of keys and values."""

import pytest
import torch

from bridges.attention import Attention, attend


@pytest.mark.parametrize(
    "mask_shape", [None, (2, 1, 1, 5), (2, 1, 4, 5), (1, 1, 4, 5), (2, 6, 4, 5)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shared_keys_are_as_good_as_repeated_ones(mask_shape, dtype: torch.dtype):
    q = torch.randn(2, 6, 4, 8, dtype=dtype)
    k, v = torch.randn(2, 2, 2, 5, 8, dtype=dtype)
    mask = torch.rand(mask_shape) > 0.4 if mask_shape else None
    repeated = (x.repeat_interleave(3, dim=1) for x in (k, v))
    torch.testing.assert_close(attend(q, k, v, mask), attend(q, *repeated, mask))


def test_fewer_heads_of_keys():
    attention = Attention(16, 6, num_heads=6, num_kv_heads=2, head_dim=5)
    assert attention.k.weight.shape == attention.v.weight.shape == (10, 6)
    x, memory = torch.randn(3, 7, 16), torch.randn(3, 4, 6)
    keys, values = attention.project(memory)
    assert keys.shape == values.shape == (3, 2, 4, 5)
    full = Attention(16, 6, num_heads=6, head_dim=5)
    weights = attention.state_dict()
    for name in ("k.weight", "v.weight"):
        by_head = weights[name].unflatten(0, (2, 5)).repeat_interleave(3, dim=0)
        weights[name] = by_head.flatten(0, 1)
    full.load_state_dict(weights)
    torch.testing.assert_close(attention(x, (keys, values)), full(x, full.project(memory)))
    torch.testing.assert_close(attention.weights(x, keys), full.weights(x, full.project(memory)[0]))


def test_heads_of_keys_must_divide_the_heads():
    with pytest.raises(ValueError, match="found 6 heads for 4 heads of keys; expected a multiple"):
        Attention(12, num_heads=6, num_kv_heads=4)
