"""The reader: where its blocks go, and how often it projects the images."""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import tiny
import torch

from bridges import (
    DecoderShape,
    LanguageModel,
    VisionEncoder,
    VisionFeatures,
    VisionLanguageModel,
    VisionShape,
    bridge_factory,
)
from gated_xattn import GatedXAttn, reading
from perceiver import PerceiverResampler
from recipes.workload import count_flops

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


@pytest.mark.parametrize(
    ("options", "sizes", "start"),
    [
        ({}, [1] * 4, 0.0),
        ({"gate": "channel", "gate_init": 1.0}, [32] * 4, 1.0),
        ({"gate": "none"}, [], None),
    ],
)
def test_gates(options: dict[str, Any], sizes: list[int], start: float | None):
    gates = tiny.gates(bridge_of(8, **options))
    assert [gate.numel() for gate in gates] == sizes
    assert all((gate == start).all() for gate in gates)


def test_noise_on_gates_only_where_it_is_asked_for():
    torch.manual_seed(0)
    noisy = tiny.gates(bridge_of(8, gate="channel", gate_init=2.0, gate_std=0.1))
    assert all(1.9 < gate.mean() < 2.1 and 0.05 < gate.std() < 0.2 for gate in noisy)
    states = []
    for std in (0.0, 0.1):
        torch.manual_seed(0)
        block = bridge_of(8, gate_std=std).blocks[0]
        states.append(block.ff.up.weight)
    assert not torch.equal(*states)  # drawn after the gate: without noise nothing is drawn for it


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"first": 8}, "found first=8 for an LM of 8 layers"),
        ({"gate": "tanh"}, "found gate='tanh'; expected one of scalar, channel, none"),
        ({"gate": "none", "gate_init": 0.5}, "found gate_init=0.5 and gate_std=0.0 for gate"),
        ({"visible": "next"}, "found visible='next'; expected one of latest, all"),
        ({"next_image_probability": 1.5}, "found next_image_probability=1.5; expected 0 to 1"),
        (
            {"next_image_probability": 0.5, "visible": "all"},
            "found next_image_probability with visible='all'",
        ),
    ],
)
def test_options_that_do_not_fit(options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        bridge_of(8, **options)


def test_the_next_image_is_drawn_for_each_row_and_in_training_only():
    bridge = bridge_of(8, next_image_probability=0.5)
    features = VisionFeatures(torch.randn(400, 1, 9, 16), torch.ones(400, 1).bool(), (3, 3))
    drawn = bridge(features).next_image
    assert drawn is not None and 150 < drawn.sum() < 250
    assert bridge.eval()(features).next_image is None
    assert bridge_of(8)(features).next_image is None


class ThreeBlocks:
    """A model of three LM blocks, its gates open."""

    def __init__(self, encoder: VisionEncoder, lm: LanguageModel, **options: Any) -> None:
        kind = tiny.BRIDGES["perceiver_gated"]
        spec = kind | {"init_args": kind["init_args"] | options}
        self.model = VisionLanguageModel.connect(encoder, lm, bridge_factory(spec))
        tiny.open_gates(self.model.bridge)
        self.batch = tiny.batch_of(
            self.model, ["a<image>b<image>cd<image>e", "<image>f"], ["gh", "i"]
        )

    def loss(self) -> Any:
        text, features = self.batch
        return self.model(text.input_ids, text.attention_mask, text.labels, features).loss


@pytest.mark.parametrize("checkpointing", [False, True])
def test_grouped_positions_train_as_masked_ones_do(
    checkpointing: bool, encoder: VisionEncoder, monkeypatch: pytest.MonkeyPatch
):
    lm = tiny.language_model("llama", gradient_checkpointing=checkpointing)
    gradients = []
    for grouped in (True, False):
        monkeypatch.setattr(reading, "grouping_is_faster", lambda *_, grouped=grouped: grouped)
        torch.manual_seed(0)
        three = ThreeBlocks(encoder, lm)
        three.model.train()
        three.loss().backward()
        gradients.append({n: p.grad for n, p in three.model.bridge.named_parameters()})
        three.model.hooks.remove()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("options", [{"visible": "all"}, {"next_image_probability": 1.0}])
def test_other_images_make_another_loss(
    options: dict[str, Any],
    encoder: VisionEncoder,
    language_models: Callable[[str], LanguageModel],
):
    losses = []
    for kind in ({}, options):
        torch.manual_seed(0)
        three = ThreeBlocks(encoder, language_models("llama"), **kind)
        losses.append(three.loss())
        three.model.hooks.remove()
    assert abs(losses[0] - losses[1]) > 1e-4
    losses[1].backward()
    assert all(p.grad is not None for p in three.model.bridge.parameters())


def note(layers: list[bool], _module: Any, _inputs: Any, output: torch.Tensor) -> None:
    layers.append(output.requires_grad)


def test_backward_stops_below_the_first_block_when_the_marker_is_frozen(
    encoder: VisionEncoder, language_models: Callable[[str], LanguageModel]
):
    lm = language_models("llama")
    flops, reached = {}, {}
    for trained in (True, False):
        three = ThreeBlocks(encoder, lm, every=1, first=2, train_marker=trained)
        layers: list[bool] = []
        handles = [
            block.register_forward_hook(partial(note, layers)) for block in lm.model.model.layers
        ]
        losses = [three.loss()]
        reached[trained] = layers
        flops[trained] = count_flops(losses.pop().backward)
        for handle in handles:
            handle.remove()
        three.model.hooks.remove()
        trains = {n for n, p in three.model.named_parameters() if p.requires_grad}
        assert ("bridge.marker" in trains) == trained
    assert reached == {True: [True, True, True], False: [False, False, True]}
    # What remains: the head, the last block, and the resampler with the gated block before it.
    assert flops[False] < 0.7 * flops[True]


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


def between(kind: str = "perceiver_gated", **options) -> VisionLanguageModel:
    torch.manual_seed(0)
    row = tiny.BRIDGES[kind]
    spec = row | {"init_args": row["init_args"] | options}
    model = VisionLanguageModel.connect(
        tiny.vision_encoder(), tiny.language_model(), bridge_factory(spec)
    )
    tiny.open_gates(model.bridge)
    return model


def test_in_training_mode_nothing_written_or_looked_at_is_augmented():
    model = between(next_image_probability=1.0)
    text, features = tiny.batch_of(model, ["<image>ab<image>c", "d<image>"], padding_side="left")

    def said(mode: bool) -> tuple[torch.Tensor, torch.Tensor]:
        model.train(mode)
        with torch.no_grad():
            logits = model.logits(text.input_ids, text.attention_mask, features)
        ids = model.generate(
            text.input_ids, text.attention_mask, features, max_new_tokens=4, do_sample=False
        )
        return logits, ids

    (logits, ids), (training_logits, training_ids) = said(False), said(True)
    assert torch.equal(logits, training_logits) and torch.equal(ids, training_ids)
    with torch.enable_grad():  # it is there to be seen
        augmented = model.logits(text.input_ids, text.attention_mask, features)
    assert not torch.allclose(augmented, logits, atol=1e-3)


def test_a_deep_copy_has_hooks_of_its_own():
    model = between()
    text, features = tiny.batch_of(model, ["<image>ab"], ["c"])
    twin = copy.deepcopy(model)
    before = model.logits(text.input_ids, text.attention_mask, features)
    assert torch.equal(twin.logits(text.input_ids, text.attention_mask, features), before)
    with torch.no_grad():
        twin.bridge.blocks[0].attn_gate.zero_()
    assert torch.equal(model.logits(text.input_ids, text.attention_mask, features), before)
    assert not torch.equal(twin.logits(text.input_ids, text.attention_mask, features), before)


def test_padding_reads_no_image():
    model = between()
    text, features = tiny.batch_of(model, ["<image>abcdef", "<image>"])
    seen = []
    decoder = model.lm.model.model
    decoder.register_forward_pre_hook(lambda *_: seen.append(model.hooks.condition.index))
    model.logits(text.input_ids, text.attention_mask, features)
    assert (seen[0][~text.attention_mask] == -1).all()
    assert (seen[0][text.attention_mask] == 0).all()


def test_a_batch_without_labels_has_no_loss_and_zero_gradients():
    model = between()
    text, features = tiny.batch_of(model, ["<image>ab"])
    output = model(text.input_ids, text.attention_mask, text.labels, features)
    assert output.loss == 0
    output.loss.backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.bridge.parameters())
