"""Which image may change which position: never a later one, never a padding one."""

from collections.abc import Callable

import pytest
import tiny
import torch
from torch import Tensor

from bridges import (
    Condition,
    LanguageModel,
    VisionEncoder,
    VisionFeatures,
    VisionLanguageModel,
    image_index,
)

PROMPTS = ["ab<image>cd<image>ef", "g<image>hij<image>k"]


def before(ids: Tensor, model: VisionLanguageModel, image: int) -> Tensor:
    """Positions before the first placeholder of an image: bool (b, t)."""
    seen = (ids == model.lm.image_token_id).cumsum(dim=1)
    return seen <= image * model.bridge.num_tokens


def changed(features: VisionFeatures, image: int) -> VisionFeatures:
    patches = features.patches.clone()
    patches[:, image] += torch.randn_like(patches[:, image])
    return VisionFeatures(patches, features.image_mask, features.grid)


def test_an_image_changes_nothing_before_it(open_vlm: VisionLanguageModel):
    text, features = tiny.batch_of(open_vlm, PROMPTS)
    features.patches.requires_grad_()
    logits = open_vlm.logits(text.input_ids, text.attention_mask, features)
    for image in (0, 1):
        earlier = before(text.input_ids, open_vlm, image) & text.attention_mask
        later = ~before(text.input_ids, open_vlm, image) & text.attention_mask
        with torch.no_grad():
            other = open_vlm.logits(text.input_ids, text.attention_mask, changed(features, image))
        assert torch.equal(other[earlier], logits[earlier])
        assert ((other - logits)[later].abs().amax(dim=-1) > 1e-5).all()

        weights = torch.randn_like(logits)
        (leak,) = torch.autograd.grad(
            (logits * weights)[earlier].sum(), features.patches, retain_graph=True
        )
        assert not leak[:, image:].any()
        assert image == 0 or leak[:, 0].any()
        (used,) = torch.autograd.grad(
            (logits * weights)[later].sum(), features.patches, retain_graph=True
        )
        assert used[:, image].abs().amax(dim=(1, 2)).all()


@torch.no_grad()
def test_padding_images_change_nothing_wherever_they_stand(open_vlm: VisionLanguageModel):
    text, features = tiny.batch_of(open_vlm, ["ab<image>cd<image>ef"])
    expected = open_vlm.logits(text.input_ids, text.attention_mask, features)
    for order in ([0, 1, 2, 3], [2, 0, 3, 1]):  # 2 and 3 are padding
        patches = torch.cat([features.patches, torch.full_like(features.patches, torch.nan)], 1)
        mask = torch.tensor([[True, True, False, False]])
        padded = VisionFeatures(patches[:, order], mask[:, order], features.grid)
        found = open_vlm.logits(text.input_ids, text.attention_mask, padded)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", [k for k in tiny.BRIDGES if "gated" in k or k == "third_party"])
def test_inserted_layers_read_the_latest_image_only(
    kind: str, encoder: VisionEncoder, language_models: Callable[[str], LanguageModel]
):
    model = VisionLanguageModel.connect(encoder, language_models("llama"), tiny.factory(kind))
    model.hooks.remove()
    tiny.open_gates(model.bridge)
    text, features = tiny.batch_of(model, PROMPTS)
    placeholders = text.input_ids == model.lm.image_token_id
    index = image_index(placeholders, model.bridge.num_tokens)
    memory = model.bridge(features).memory.detach().requires_grad_()
    hidden = torch.randn(*index.shape, model.lm.shape.dim)
    for insert in model.bridge.inserts():
        out = insert.module(hidden, Condition(memory, features.image_mask, index))
        for latest in (-1, 0, 1):
            (used,) = torch.autograd.grad(
                (out * torch.randn_like(out))[index == latest].sum(), memory, retain_graph=True
            )
            read = [bool(used[:, image].any()) for image in (0, 1)]
            assert read == [latest == 0, latest == 1]
