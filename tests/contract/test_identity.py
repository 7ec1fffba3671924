"""A fresh bridge leaves the LM's computation alone; without its hooks the LM is the old one."""

from collections.abc import Callable
from typing import Any

import tiny
import torch
from torch import Tensor

from bridges import TextBatch, VisionEncoder, VisionFeatures, VisionLanguageModel

PROMPTS = ["a<image>bc<image>de", "hello", "x<image>y"]


def bare_logits(
    model: VisionLanguageModel, bare: Any, text: TextBatch, features: VisionFeatures
) -> Tensor:
    """Logits of an LM without hooks, of embeddings filled one placeholder at a time."""
    patches = features.patches.masked_fill(~features.image_mask[..., None, None], 0.0)
    output = model.bridge(VisionFeatures(patches, features.image_mask, features.grid))
    lm = model.lm
    embeddings = bare.get_input_embeddings()(text.input_ids % tiny.VOCABULARY).clone()
    for row, ids in enumerate(text.input_ids):
        soft = iter(output.soft_tokens[row][features.image_mask[row]].flatten(0, 1))
        for column in (ids == lm.image_token_id).nonzero().flatten():
            embeddings[row, column] = next(soft).to(embeddings.dtype)
    positions = (text.attention_mask.cumsum(dim=1) - 1).clamp(min=0)
    hidden = bare.base_model(
        inputs_embeds=embeddings,
        attention_mask=text.attention_mask.long(),
        position_ids=positions,
        use_cache=False,
    ).last_hidden_state
    return lm.head(hidden)


@torch.no_grad()
def test_closed_gates_leave_the_lm_exactly_as_it_was(
    vlm: VisionLanguageModel, family: str, bare_lms: Callable[[str], Any]
):
    text, features = tiny.batch_of(vlm, PROMPTS)
    expected = bare_logits(vlm, bare_lms(family), text, features)
    closed = vlm.logits(text.input_ids, text.attention_mask, features)
    assert torch.equal(closed[text.attention_mask], expected[text.attention_mask])

    tiny.open_gates(vlm.bridge)
    opened = vlm.logits(text.input_ids, text.attention_mask, features)
    change = (opened - expected).abs().amax(dim=(1, 2))
    if tiny.gates(vlm.bridge):
        assert (change[[0, 2]] > 1e-2).all()
    else:  # a soft prefix has nothing to open
        assert torch.equal(opened[text.attention_mask], expected[text.attention_mask])


@torch.no_grad()
def test_closed_gates_leave_a_bf16_lm_exactly_as_it_was(
    kind: str, encoder: VisionEncoder, bare_lms: Callable[[str], Any]
):
    lm = tiny.language_model("llama", dtype=torch.bfloat16)
    model = VisionLanguageModel.connect(encoder, lm, tiny.factory(kind))
    assert next(model.bridge.parameters()).dtype == torch.float32
    text, features = tiny.batch_of(model, PROMPTS)
    bare = tiny.causal_lm("llama").bfloat16()
    expected = bare_logits(model, bare, text, features)
    closed = model.logits(text.input_ids, text.attention_mask, features)
    assert torch.equal(closed[text.attention_mask], expected[text.attention_mask])
    model.bridge.bfloat16()
    closed = model.logits(text.input_ids, text.attention_mask, features)
    expected = bare_logits(model, bare, text, bf16(features))
    assert torch.equal(closed[text.attention_mask], expected[text.attention_mask])


def bf16(features: VisionFeatures) -> VisionFeatures:
    return VisionFeatures(features.patches.bfloat16(), features.image_mask, features.grid)


@torch.no_grad()
def test_without_hooks_the_lm_is_the_original(
    open_vlm: VisionLanguageModel, family: str, bare_lms: Callable[[str], Any]
):
    bare, lm = bare_lms(family), open_vlm.lm.model
    text, features = tiny.batch_of(open_vlm, PROMPTS)
    open_vlm.logits(text.input_ids, text.attention_mask, features)
    ids = text.input_ids[1:2]
    expected = bare(input_ids=ids).logits
    # On its own the LM ignores the hooks that are still there …
    assert torch.equal(lm(input_ids=ids).logits, expected)
    assert list(lm.state_dict()) == list(bare.state_dict())
    # … and once they are gone nothing of them is left.
    open_vlm.hooks.remove()
    assert torch.equal(lm(input_ids=ids).logits, expected)
    for name, module in lm.named_modules():
        assert not module._forward_hooks, name
        assert not module._forward_pre_hooks, name
    assert all(torch.equal(a, b) for a, b in zip(lm.parameters(), bare.parameters(), strict=True))
