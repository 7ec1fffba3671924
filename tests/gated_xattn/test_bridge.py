"""The reader: where its blocks go, and how often it projects the images."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import tiny
import torch

from bridges import DecoderShape, LanguageModel, VisionEncoder, VisionLanguageModel, VisionShape
from gated_xattn import GatedXAttn
from perceiver import PerceiverResampler

VISION = VisionShape(16, 9, (3, 3))


def bridge_of(num_layers: int, **options: Any) -> GatedXAttn:
    resampler = partial(PerceiverResampler, num_latents=2, depth=1, num_heads=1, head_dim=4)
    decoder = DecoderShape(32, num_layers, 4, embedding_std=0.02)
    return GatedXAttn(
        vision=VISION, decoder=decoder, resampler=resampler, num_heads=1, head_dim=4, **options
    )


@pytest.mark.parametrize(
    ("options", "layers"),
    [
        ({"every": 1}, [0, 1, 2, 3, 4, 5, 6, 7]),
        ({"every": 4}, [0, 4]),  # Flamingo
        ({"every": 4, "first": 3}, [3, 7]),  # OpenFlamingo
        ({"every": 20}, [0]),
    ],
)
def test_a_block_before_every_nth(options: dict[str, int], layers: list[int]):
    bridge = bridge_of(8, **options)
    inserts = bridge.inserts()
    assert [insert.layer for insert in inserts] == layers
    assert {insert.site for insert in inserts} == {"layer_input"}
    assert [insert.module for insert in inserts] == list(bridge.blocks)


def test_a_fresh_bridge_is_closed_and_speaks_at_the_scale_of_the_lm():
    torch.manual_seed(0)
    bridge = bridge_of(8)
    assert [gate.item() for gate in tiny.gates(bridge)] == [0.0] * 4
    assert bridge.num_tokens == 1
    assert 0.01 < bridge.marker.std() < 0.04


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"do_sample": True}])
def test_images_are_projected_once_a_layer_and_generation(
    options: dict[str, Any],
    encoder: VisionEncoder,
    language_models: Callable[[str], LanguageModel],
):
    lm = language_models("llama")
    model = VisionLanguageModel.connect(encoder, lm, tiny.factory("perceiver_gated"))
    tiny.open_gates(model.bridge)
    calls = []
    for block in model.bridge.blocks:
        block.attn.k.register_forward_hook(lambda *_: calls.append(1))
    text, features = tiny.batch_of(model, ["<image>a", "b<image>cd"], padding_side="left")
    lengths = {"max_new_tokens": 5, "min_new_tokens": 5}
    for generation in (1, 2):
        model.generate(text.input_ids, text.attention_mask, features, **lengths, **options)
        assert len(calls) == 2 * generation
    model.hooks.remove()
