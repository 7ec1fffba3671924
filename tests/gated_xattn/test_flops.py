"""What backward does not compute: gradients of frozen weights, and anything below what is trained.

Counted exactly, in floating-point operations of matrix products, on a tiny Llama.
"""

from collections.abc import Callable
from itertools import pairwise

import pytest
import tiny
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from bridges import LanguageModel, VisionLanguageModel, bridge_factory

DEPTH, BATCH, LENGTH = 6, 2, 8
LABELS = BATCH * 5
"""Four letters and the end, of each row."""

END = "<|endofchunk|>"


def model_of(**options: object) -> VisionLanguageModel:
    """An LM of six blocks with a gated block before block `first`, and one alone by default."""
    end = options.pop("end_of_chunk", None)
    bridge = tiny.BRIDGES["perceiver_gated"]
    bridge = bridge | {"init_args": bridge["init_args"] | {"every": DEPTH} | options}
    # Eager attention: its products are those of the formula below, whatever the machine.
    core = tiny.causal_lm("llama", num_hidden_layers=DEPTH)
    core.set_attn_implementation("eager")
    lm = LanguageModel(core, tiny.make_tokenizer(), end_of_chunk=end)
    model = VisionLanguageModel.connect(tiny.vision_encoder(), lm, bridge_factory(bridge))
    tiny.open_gates(model.bridge)
    return model


def backward_flops(model: VisionLanguageModel) -> int:
    text, features = tiny.batch_of(model, ["a<image>b", "c<image>d"], ["efgh", "ijkl"])
    assert text.input_ids.shape == (BATCH, LENGTH)
    loss = model(text.input_ids, text.attention_mask, text.labels, features).loss
    return counted(loss.backward)


def counted(step: Callable[[], object]) -> int:
    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()


def block_flops(model: VisionLanguageModel) -> tuple[int, int]:
    """Of one forward pass of an LM block: its linear layers, and its attention's two products."""
    block = model.lm.model.model.layers[0]
    weights = sum(m.weight.numel() for m in block.modules() if isinstance(m, nn.Linear))
    return 2 * BATCH * LENGTH * weights, 2 * 2 * BATCH * LENGTH * LENGTH * model.lm.shape.dim


def frozen_block(model: VisionLanguageModel) -> int:
    """Of backward through a frozen block: activations' gradients, and those alone.

    As many products as forward has for each linear layer, and two for each of attention's, whose
    factors are both activations.
    """
    linear, attention = block_flops(model)
    return linear + 2 * attention


def test_the_formula_counts_forward():
    model = model_of()
    hidden = torch.randn(BATCH, LENGTH, model.lm.shape.dim)
    with torch.no_grad():
        cos_sin = model.lm.model.model.rotary_emb(hidden, torch.arange(LENGTH)[None])
        block = model.lm.model.model.layers[0]
        found = counted(lambda: block(hidden, position_embeddings=cos_sin))
    assert found == sum(block_flops(model))


def test_each_block_above_costs_what_a_frozen_one_must():
    """Raised by one block, the lowest gated block saves the backward of exactly one."""
    flops = [backward_flops(model_of(first=first, train_marker=False)) for first in range(DEPTH)]
    saved = [below - above for below, above in pairwise(flops)]
    assert saved == [frozen_block(model_of())] * (DEPTH - 1)


def test_blocks_below_the_lowest_gated_one_cost_nothing():
    """In the last block's place, backward has the head, one frozen block, and the bridge."""
    model = model_of(first=DEPTH - 1, train_marker=False)
    _, features = tiny.batch_of(model, ["a<image>b", "c<image>d"], ["efgh", "ijkl"])
    hidden = torch.randn(BATCH, LENGTH, model.lm.shape.dim)  # nothing below asks for a gradient
    seen: list[tuple[torch.Tensor, object]] = []
    block = model.bridge.blocks[0]
    handle = block.register_forward_pre_hook(lambda _, inputs: seen.append(inputs))
    found = backward_flops(model)
    handle.remove()
    condition = seen[0][1]
    memory = model.bridge.resampler(features)
    resampler = counted(memory.sum().backward)
    condition.memory = memory.detach().requires_grad_()
    condition.index = condition.index.clone()
    gated = counted(block(hidden, condition).sum().backward)
    head = 2 * LABELS * model.lm.shape.dim * tiny.VOCABULARY
    assert found == head + frozen_block(model) + gated + resampler


@pytest.mark.parametrize("first", [1, 4])
def test_something_trained_below_takes_backward_all_the_way_down(first: int):
    """A trained marker, or a trained row of a new token, stands in the text, below all blocks."""
    lean = model_of(first=first, train_marker=False)
    assert not lean.bridge.marker.requires_grad
    marker = model_of(first=first, train_marker=True)
    below = first * frozen_block(lean)
    assert backward_flops(marker) == backward_flops(lean) + below > backward_flops(lean)
    assert marker.bridge.marker.grad is not None and lean.bridge.marker.grad is None

    rows = model_of(first=first, train_marker=False, end_of_chunk=END)
    # The row is scored too: the gradient of its logit, to the row and to the hidden state.
    head = 2 * 2 * LABELS * lean.lm.shape.dim
    assert backward_flops(rows) == backward_flops(lean) + below + head


def test_more_gated_blocks_below_are_paid_for_block_by_block():
    """Every second block: backward starts at the lowest of them."""
    one = backward_flops(model_of(first=4, train_marker=False))
    two = backward_flops(model_of(first=2, every=2, train_marker=False))
    three = backward_flops(model_of(first=0, every=2, train_marker=False))
    # Each more is one gated block (with its share of the memory's gradient) and two LM blocks.
    assert three - two == two - one > 2 * frozen_block(model_of())


def test_no_gradient_of_a_frozen_weight_is_computed():
    """Were they computed, each weight would cost as many products again as in forward."""
    frozen, wasteful = model_of(), model_of()
    wasteful.lm.model.model.layers.requires_grad_(True)
    linear, _ = block_flops(frozen)
    assert backward_flops(wasteful) - backward_flops(frozen) == DEPTH * linear
    assert all(p.grad is None for p in frozen.lm.parameters())
    assert all(p.grad is not None for p in wasteful.lm.model.model.layers.parameters())


def test_nor_of_the_head_and_the_vocabulary():
    frozen, wasteful = model_of(), model_of()
    wasteful.lm.model.get_output_embeddings().weight.requires_grad_(True)
    head = 2 * LABELS * frozen.lm.shape.dim * tiny.VOCABULARY
    assert backward_flops(wasteful) - backward_flops(frozen) == head
