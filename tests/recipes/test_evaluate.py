"""Scores that tell a bridge that looks from one that does not."""

import math

import pytest
import tiny
import torch
from torch import Tensor

from bridges import VisionLanguageModel
from bridges.compact_head import compact_head
from recipes.evaluate import (
    HeldOut,
    caption_nll,
    caption_sums,
    captions,
    scene_accuracy,
)
from recipes.workload import matmul_precision


@pytest.fixture(scope="module", autouse=True)
def exact_products():
    """A training run in this process leaves coarser ones behind."""
    with matmul_precision("highest"):
        yield


@pytest.fixture(scope="module")
def model() -> VisionLanguageModel:
    torch.manual_seed(0)
    encoder, lm = tiny.vision_encoder("clip"), tiny.language_model("llama")
    model = VisionLanguageModel.connect(encoder, lm, tiny.factory("perceiver"))
    tiny.randomise(model.bridge)
    return model


def held_out(model: VisionLanguageModel, n: int = 5) -> HeldOut:
    shape = model.vision.shape
    samples = [
        {"key": str(i), "captions": [f"caption {i}", "two"][: 1 + i % 2], "meta": {}}
        for i in range(n)
    ]
    patches = torch.randn(
        n, shape.num_patches, shape.dim, generator=torch.Generator().manual_seed(1)
    )
    return HeldOut(patches, shape.grid, samples)


def by_hand(model: VisionLanguageModel, held: HeldOut) -> Tensor:
    """Every caption by itself, and the plain mean over all their tokens."""
    losses = []
    for patches, sample in zip(held.features, held.samples, strict=True):
        for text in sample["captions"]:
            batch = model.prompt_encoder()([model.prompt], [text])
            alone = HeldOut(patches[None], held.grid, [sample])
            features = tiny.VisionFeatures(
                alone.features[:, None], torch.ones(1, 1, dtype=torch.bool), held.grid
            )
            with torch.no_grad():
                output = model(batch.input_ids, batch.attention_mask, batch.labels, features)
            losses.append(output.token_losses)
    return torch.cat(losses).mean()


def test_nll_is_the_mean_over_tokens_whatever_the_batch(model):
    held = held_out(model)
    expected = float(by_hand(model, held))
    for size in (1, 2, 32):
        assert math.isclose(caption_nll(model, held, batch_size=size), expected, rel_tol=1e-5)


def test_the_sums_of_a_picture_are_those_of_its_captions_alone(model):
    held = held_out(model)
    for row, sums in enumerate(caption_sums(model, held, batch_size=3)):
        alone = HeldOut(held.features[[row]], held.grid, [held.samples[row]])
        tokens = sum(len(text) + 1 for text in held.samples[row]["captions"])  # one a letter
        assert float(sums[1]) == tokens
        assert math.isclose(sums[0] / sums[1], float(by_hand(model, alone)), rel_tol=1e-5)


def test_the_first_pictures_are_those_of_the_first_samples(model):
    held = held_out(model)
    two = held.first(2)
    assert [s["key"] for s in two.samples] == ["0", "1"]
    torch.testing.assert_close(two.features, held.features[:2], rtol=0, atol=0)
    assert len(held.first(99)) == len(held)


def test_the_head_is_given_no_view_while_captions_are_written(model):
    """A view of the last column costs a copy of the head's weight for each row."""
    given = []
    head = model.lm.model.get_output_embeddings()
    watch = head.register_forward_hook(lambda _, inputs, output: given.append(inputs[0]))
    try:
        captions(model, held_out(model), max_new_tokens=2)
    finally:
        watch.remove()
    assert given and all(tensor.is_contiguous() for tensor in given)
    with pytest.raises(RuntimeError), compact_head(head):
        raise RuntimeError
    assert not head._forward_pre_hooks


def test_shuffled_pictures_never_stay_with_their_caption(model):
    held = held_out(model)
    shuffled = held.shuffled()
    same = (held.features == shuffled.features).flatten(1).all(dim=1)
    assert not same.any()
    assert [s["key"] for s in shuffled.samples] == [s["key"] for s in held.samples]
    assert caption_nll(model, shuffled) != caption_nll(model, held)
    with pytest.raises(ValueError, match="at least 2"):
        held_out(model, 1).shuffled()


def test_a_blind_model_writes_the_same_under_every_picture(model):
    held = held_out(model)
    blind = held.blind(held.features.mean(dim=0))
    assert len(set(captions(model, blind))) == 1
    assert captions(model, held, batch_size=2) == captions(model, held)


def test_accuracy_counts_only_what_a_scene_has(model):
    held = held_out(model, 2)
    cat = {"captions": ["a cat on a red background"], "objects": ["cat"], "colour": "red"}
    pair = {
        "captions": ["a cat above a dog on a red background"],
        "objects": ["cat", "dog"],
        "relation": "above",
        "colour": "red",
    }
    held.samples[0]["meta"] = {**cat, "relation": None}
    held.samples[1]["meta"] = pair
    written = ["a cat on a blue background", "a dog below a cat on a red background"]
    assert scene_accuracy(written, held) == {"object": 1.0, "relation": 1.0, "colour": 0.5}
    held.samples[0]["meta"] = {}
    assert set(scene_accuracy(written, held).values()) == {None}
