"""What training changes: every parameter of the bridge, and nothing else."""

from collections.abc import Callable
from functools import cache

import pytest
import tiny
import torch
from torch import Tensor

from bridges import LanguageModel, VisionEncoder, VisionLanguageModel
from bridges.sites import decoder_sites

PROMPTS = ["ab<image>cd<image>ef", "g", "h<image>"]
COMPLETIONS = ["one", "two", "three"]


def loss_of(model: VisionLanguageModel, seed: int = 0) -> Tensor:
    text, features = tiny.batch_of(model, PROMPTS, COMPLETIONS, seed=seed)
    return model(text.input_ids, text.attention_mask, text.labels, features).loss


def gradients(model: VisionLanguageModel) -> dict[str, Tensor]:
    model.bridge.zero_grad()
    loss_of(model).backward()
    return {n: p.grad for n, p in model.bridge.named_parameters() if p.grad is not None}


def moves_all_scores_alike(name: str) -> bool:
    """A bias on the keys adds the same to all scores of a query, which softmax takes out."""
    return name.endswith(("attention.k.bias", "attn.k.bias"))


def test_every_parameter_gets_a_gradient(open_vlm: VisionLanguageModel):
    fresh = gradients(open_vlm)
    with torch.no_grad():
        loss_of(open_vlm, seed=1)
        text, features = tiny.batch_of(open_vlm, PROMPTS, padding_side="left", seed=2)
        open_vlm.generate(text.input_ids, text.attention_mask, features, max_new_tokens=3)
    after_validation = gradients(open_vlm)
    for name, _ in open_vlm.bridge.named_parameters():
        assert fresh[name].isfinite().all(), name
        assert fresh[name].any() or moves_all_scores_alike(name), name
        assert torch.equal(fresh[name], after_validation[name]), name


@pytest.fixture(scope="module")
def checkpointing_lms() -> Callable[[str], LanguageModel]:
    return cache(lambda family: tiny.language_model(family, gradient_checkpointing=True))


def test_gradients_with_checkpointing_are_those_without(
    open_vlm: VisionLanguageModel,
    family: str,
    checkpointing_lms: Callable[[str], LanguageModel],
):
    expected = gradients(open_vlm)
    open_vlm.hooks.remove()
    model = VisionLanguageModel(open_vlm.vision, checkpointing_lms(family), open_vlm.bridge)
    model.train()
    calls = []
    # Which hooks of a block itself run again differs between versions of transformers.
    inside = model.lm.model.get_submodule(decoder_sites(model.lm.model).attention.format(i=0))
    counter = inside.register_forward_hook(lambda *_: calls.append(1))
    try:
        found = gradients(model)
    finally:
        model.hooks.remove()
        counter.remove()
    assert len(calls) == 2, "the block must run again in backward"
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6)


def test_frozen_ends_are_bit_identical_after_training(
    open_vlm: VisionLanguageModel, encoder: VisionEncoder
):
    open_vlm.train()
    for end in (open_vlm.vision, open_vlm.lm):
        assert not any(module.training for module in end.modules())
    with torch.no_grad():  # no dropout, though every config asks for it
        assert torch.equal(loss_of(open_vlm), loss_of(open_vlm))

    frozen = {**open_vlm.vision.state_dict(), **open_vlm.lm.state_dict()}
    frozen = {name: tensor.clone() for name, tensor in frozen.items()}
    trained = {n: t.clone() for n, t in open_vlm.trainable_state().items()}
    pixels = torch.rand(1, 1, 3, tiny.IMAGE_SIZE, tiny.IMAGE_SIZE)
    optimizer = torch.optim.AdamW(open_vlm.parameters(), lr=1e-2, weight_decay=0.1)
    for step in range(3):
        optimizer.zero_grad()
        encoder.encode(pixels)
        loss_of(open_vlm, seed=step).backward()
        optimizer.step()
    for end in (open_vlm.vision, open_vlm.lm):
        assert all(p.grad is None and not p.requires_grad for p in end.parameters())
        for name, tensor in end.state_dict().items():
            assert torch.equal(tensor, frozen[name]), name
    for name, tensor in open_vlm.trainable_state().items():
        assert not torch.equal(tensor, trained[name]), name


@pytest.mark.parametrize("kind", ["perceiver_gated", "third_party"])
def test_checkpointed_blocks_run_again_with_the_images_of_their_own_forward(
    kind: str, encoder: VisionEncoder, checkpointing_lms: Callable[[str], LanguageModel]
):
    """Two forwards and a validation pass may come before the backward of both."""
    found = []
    torch.manual_seed(0)
    bridge = tiny.factory(kind)(vision=encoder.shape, decoder=tiny.language_model().shape)
    tiny.open_gates(bridge)
    for lm in (tiny.language_model(), checkpointing_lms("llama")):
        model = VisionLanguageModel(encoder, lm, bridge).train()
        bridge.zero_grad()
        loss = loss_of(model, seed=0) + loss_of(model, seed=1)
        with torch.no_grad():
            loss_of(model, seed=2)
        loss.backward()
        model.hooks.remove()
        found.append([p.grad for p in bridge.parameters()])
    for without, checkpointed in zip(*found, strict=True):
        torch.testing.assert_close(checkpointed, without, rtol=1e-4, atol=1e-6)


@torch.no_grad()
def test_generation_in_training_mode_with_checkpointing_is_not_changed(
    encoder: VisionEncoder, checkpointing_lms: Callable[[str], LanguageModel]
):
    """HF drops the cache of a block that checkpoints."""
    model = VisionLanguageModel.connect(
        encoder, checkpointing_lms("llama"), tiny.factory("perceiver_gated")
    )
    tiny.open_gates(model.bridge)
    text, features = tiny.batch_of(model, PROMPTS, padding_side="left")

    def generate() -> Tensor:
        return model.generate(
            text.input_ids, text.attention_mask, features, max_new_tokens=6, do_sample=False
        )

    expected = model.eval() and generate()
    found = model.train() and generate()
    model.hooks.remove()
    assert model.lm.model.training, "generation must leave the mode as it found it"
    assert torch.equal(found, expected)
