"""Figures with a row for each picture: the sums, by hand; and back from JSON to the bit."""

import json

import pytest
import tiny
import tiny_run
import torch

from bridges import VisionLanguageModel
from qformer.retrieval import recall_at
from recipes.evaluate import HeldOut, caption_nll, captions, scene_accuracy
from recipes.evaluate_scores import (
    BETTER,
    TITLES,
    Scored,
    caption_figures,
    most_of,
    recall_figures,
    score_model,
    score_stage1,
)
from recipes.retrieve import retrieve
from recipes.workload import matmul_precision

PICTURES = 6


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


def pictures(shape, *, scenes: bool = False) -> HeldOut:
    """Pictures of noise with one or two captions, or one of a scene."""
    samples = []
    for i in range(PICTURES):
        colour = ("red", "green")[i % 2]
        names, relation = (["cat"], None) if i % 3 else (["cat", "dog"], "above")
        scene = {"objects": names, "relation": relation, "colour": colour}
        text = " above ".join(f"a {name}" for name in names) + f" on a {colour} background"
        several = [f"picture number {i}", f"{i} again"][: 1 + i % 2]
        samples.append(
            {
                "key": f"key-{i}",
                "captions": [text] if scenes else several,
                "meta": scene if scenes else {},
            }
        )
    generator = torch.Generator().manual_seed(1)
    patches = torch.randn(PICTURES, shape.num_patches, shape.dim, generator=generator)
    return HeldOut(patches, shape.grid, samples)


def test_figures_of_a_model_are_those_of_all_pictures_together(model):
    held = pictures(model.vision.shape, scenes=True)
    mean = held.features.mean(dim=0)
    scored = score_model(model, held, mean, batch_size=4, max_new_tokens=8)
    found = {name: sums.value() for name, sums in scored.figures.items()}
    assert found["nll"] == caption_nll(model, held, batch_size=4)
    assert found["nll_shuffled"] == caption_nll(model, held.shuffled(), batch_size=4)
    assert found["nll_blind"] == caption_nll(model, held.blind(mean), batch_size=4)
    assert len({found["nll"], found["nll_shuffled"], found["nll_blind"]}) == 3
    assert scored.written == captions(model, held, batch_size=4, max_new_tokens=8)
    right = scene_accuracy(scored.written, held)
    assert {part: found[part] for part in right} == right
    assert scored.images == [sample["key"] for sample in held.samples]
    assert all(len(sums.rows) == PICTURES for sums in scored.figures.values())
    assert set(found) <= TITLES.keys() == BETTER.keys()


def test_the_same_twice_and_through_json_to_the_bit(model):
    held = pictures(model.vision.shape, scenes=True)
    first, again = (
        score_model(model, held, None, batch_size=4, max_new_tokens=8).to_json() for _ in range(2)
    )
    assert "nll_blind" not in first["figures"]
    assert first == again
    through = Scored.from_json(json.loads(json.dumps(first)))
    assert through.to_json() == first


def test_what_is_not_asked_for_is_not_measured(model):
    held = pictures(model.vision.shape)
    scored = score_model(model, held, None, captions=False)
    assert set(scored.figures) == {"nll", "nll_shuffled"}
    assert scored.written == []
    scored = score_model(model, held, None, likelihood=False, max_new_tokens=2)
    assert set(scored.figures) == {"cider_d", "bleu_4", "rouge_l", "exact_match"}


def test_a_true_caption_has_every_figure_at_its_best():
    samples = pictures(tiny.vision_encoder("clip").shape, scenes=True).samples
    truths = [sample["captions"][0] for sample in samples]
    found = caption_figures(truths, samples)
    for name in ("bleu_4", "rouge_l", "exact_match", "object", "relation", "colour"):
        assert found[name].value() == pytest.approx(1), name
        assert most_of(name) == 1
    assert 0 < found["cider_d"].value() <= most_of("cider_d")
    # Two of the six have a relation, and only they count.
    assert found["relation"].rows[:, 1].tolist() == [1, 0, 0, 1, 0, 0]
    wrong = truths.copy()
    wrong[0] = "a dog below a cat on a red background"
    found = caption_figures(wrong, samples)
    assert found["relation"].value() == 1  # the inverse, the other way round
    wrong[0] = "a cat below a dog on a red background"
    found = caption_figures(wrong, samples)
    assert found["relation"].value() == 0.5
    assert found["exact_match"].value() == pytest.approx(5 / 6)
    assert caption_figures(truths[1:2], samples[1:2]).keys().isdisjoint({"relation"})


def test_recall_is_that_of_all_texts_and_pictures():
    owners = torch.tensor([0, 0, 0, 1, 2, 2])
    scores = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))
    figures = recall_figures(scores, scores.T, owners)
    both = {
        "text_to_image": recall_at(scores, owners, torch.arange(3)),
        "image_to_text": recall_at(scores.T, torch.arange(3), owners),
    }
    for direction, shares in both.items():
        for name, share in shares.items():
            assert figures[f"{direction}_{name}"].value() == pytest.approx(share)
    # A picture weighs what it has texts.
    assert figures["text_to_image_recall@1"].rows[:, 1].tolist() == [3, 1, 2]


def test_a_stage1_run_has_the_figures_of_retrieval(on_disk, tmp_path):
    encoder, stage1 = tiny_run.save_stage1_run(tmp_path, on_disk.vision)
    held = pictures(encoder.shape)
    scored = score_stage1(stage1, encoder, held, batch_size=4)
    samples = [
        {"captions": sample["captions"], "features": patches}
        for sample, patches in zip(held.samples, held.features, strict=True)
    ]
    expected = retrieve(stage1, encoder, samples)["itc"]
    for name, sums in scored.figures.items():
        direction, _, recall = name.rpartition("_")
        assert sums.value() == pytest.approx(expected[direction][recall]), name
    assert len(scored.figures) == 6 and set(scored.figures) <= TITLES.keys()
    assert scored.written == []
    narrow = HeldOut(held.features[..., :-1], held.grid, held.samples)
    with pytest.raises(ValueError, match="of this run"):
        score_stage1(stage1, encoder, narrow)
