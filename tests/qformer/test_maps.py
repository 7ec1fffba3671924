"""Attention maps show what the Q-Former does; the diagnostics agree with hand-made cases."""

import math

import pytest
import tiny
import torch
from einops import rearrange

from bridges import Instruction, VisionFeatures, VisionShape
from qformer import QFormer
from qformer.maps import cross_attention_maps, query_diversity, query_usage

QUERIES, HEADS, PATCHES, WIDTH = 3, 2, 7, 16


def qformer_of(**options) -> QFormer:
    torch.manual_seed(0)
    sizes = {"num_queries": QUERIES, "dim": WIDTH, "depth": 3, "num_heads": HEADS}
    model = QFormer(vision=VisionShape(WIDTH, PATCHES, (2, 3)), **(sizes | options))
    tiny.randomise(model)
    return model


def features(b: int = 2, i: int = 2) -> VisionFeatures:
    patches = torch.randn(b, i, PATCHES, WIDTH, generator=torch.Generator().manual_seed(1))
    return VisionFeatures(patches, torch.ones(b, i, dtype=torch.bool), (2, 3))


def test_a_map_sums_to_one_over_the_patches():
    maps = cross_attention_maps(qformer_of(), features())
    assert maps.shape == (2, 2, 2, HEADS, QUERIES, PATCHES)
    assert maps.dtype == torch.float32
    assert (maps >= 0).all()
    torch.testing.assert_close(maps.sum(dim=-1), torch.ones(maps.shape[:-1]))


@pytest.mark.parametrize("with_text", [False, True])
@torch.no_grad()
def test_a_map_is_what_the_layer_attends_with(with_text: bool):
    """The maps times the values are what goes into the layer's output projection."""
    model, vision = qformer_of(vocab_size=20, max_text=8), features()
    ids = torch.tensor([[3, 4, 5], [6, 7, 0]])
    text = Instruction(ids, ids > 0) if with_text else None
    blocks = [model.layers[0].cross_attention, model.layers[2].cross_attention]
    attended = []
    hooks = [
        block.out.register_forward_pre_hook(lambda _, x: attended.append(x[0])) for block in blocks
    ]
    model(vision, text)
    for hook in hooks:
        hook.remove()
    maps = cross_attention_maps(model, vision, text)
    values = [v for _, v in model.project(vision.patches.flatten(0, 1))]
    for layer, found in enumerate(attended):
        read = maps[:, :, layer].flatten(0, 1) @ values[layer]
        expected = rearrange(read, "b h n d -> (b n) (h d)")
        torch.testing.assert_close(found.reshape(expected.shape), expected, atol=1e-5, rtol=1e-5)


def test_an_instruction_turns_the_gaze():
    model, vision = qformer_of(vocab_size=20, max_text=8), features()
    ids = torch.tensor([[3, 4], [6, 7]])
    told = cross_attention_maps(model, vision, Instruction(ids, ids > 0))
    assert (told - cross_attention_maps(model, vision)).abs().max() > 1e-3


@torch.no_grad()
def test_every_query_finds_the_planted_patch():
    model = qformer_of()
    direction = torch.tensor([1.0, -1.0] * (WIDTH // 2))
    for layer in model.layers:
        if layer.cross_attention is not None:
            # Every query asks for the direction; keys are the patches themselves.
            layer.cross_attention.q.weight.zero_()
            layer.cross_attention.q.bias.copy_(10 * direction)
            layer.cross_attention.k.weight.copy_(torch.eye(WIDTH))
    vision = features()
    planted = torch.tensor([[0, 4], [6, 2]])
    for b in range(2):
        for i in range(2):
            vision.patches[b, i, planted[b, i]] = direction
    maps = cross_attention_maps(model, vision)
    expected = planted[:, :, None, None, None].expand(maps.shape[:-1])
    assert torch.equal(maps.argmax(dim=-1), expected)
    assert maps.amax(dim=-1).min() > 0.9


def test_looking_changes_nothing():
    model, vision = qformer_of(), features()
    before = model(vision)
    cross_attention_maps(model, vision)
    assert torch.equal(model(vision), before)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_usage_is_the_share_of_queries_that_win():
    assert query_usage(torch.arange(8), 8) == pytest.approx(1.0)
    assert query_usage(torch.full((5, 3), 2), 8) == pytest.approx(1 / 8)
    assert query_usage(torch.tensor([0, 0, 7, 7]), 8) == pytest.approx(2 / 8)
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert query_usage(torch.tensor([1, 1, 1, 5]), 8) == pytest.approx(math.exp(entropy) / 8)


def test_diversity_is_one_minus_the_mean_cosine_of_pairs():
    same = torch.randn(2, 1, 6).expand(2, 4, 6) * torch.arange(1, 5)[:, None]
    assert query_diversity(same) == pytest.approx(0.0, abs=1e-6)
    assert query_diversity(torch.eye(4)[None]) == pytest.approx(1.0)
    assert query_diversity(torch.tensor([[[1.0, 0.0], [-1.0, 0.0]]])) == pytest.approx(2.0)
    assert query_diversity(torch.randn(3, 1, 4)) == 0
    queries = torch.randn(3, 5, 4)
    cosines = [
        torch.cosine_similarity(image[a], image[b], dim=0)
        for image in queries
        for a in range(5)
        for b in range(5)
        if a != b
    ]
    assert query_diversity(queries) == pytest.approx(1 - float(torch.stack(cosines).mean()))
