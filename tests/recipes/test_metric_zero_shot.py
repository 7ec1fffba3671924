"""Zero-shot classification: prompts, class embeddings, accuracy."""

import json
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from torchmetrics.classification import MulticlassAccuracy

from recipes.metric_templates import CLIP_SIMPLE_TEMPLATES, CLIP_TEMPLATES
from recipes.metric_zero_shot import (
    ZeroShotAccuracy,
    class_embeddings,
    read_class_prompts,
    read_templates,
)


def described(folder: Path, content: object) -> Path:
    file = folder / "descriptions.json"
    file.write_text(json.dumps(content))
    return file


def test_clips_templates():
    assert len(CLIP_TEMPLATES) == len(set(CLIP_TEMPLATES)) == 80
    assert set(CLIP_SIMPLE_TEMPLATES) < set(CLIP_TEMPLATES)
    assert {"a photo of a {}.", "the origami {}.", "itap of my {}."} < set(CLIP_TEMPLATES)


def test_prompts_are_filled_templates_and_then_descriptions(tmp_path):
    file = described(tmp_path, {"cat": ["It purrs."], "dog": ["It barks.", "A pet."], "cow": []})
    found = read_class_prompts(["dog", "cat"], ["a {}.", "the {0.x} {}"[4:]], file)
    assert list(found) == ["dog", "cat"]
    assert found["cat"] == ["a cat.", "{0.x} cat", "It purrs."]
    assert read_class_prompts(["dog"], None, file) == {"dog": ["It barks.", "A pet."]}
    assert len(read_class_prompts(["dog"])["dog"]) == 80


def test_templates_come_from_a_file(tmp_path):
    file = tmp_path / "templates.txt"
    file.write_text("a {}.\n\n  my {}\n", encoding="utf-8-sig")
    assert read_templates(file) == ["a {}.", "my {}"]
    file.write_text("a {}.\na photo\n")
    with pytest.raises(
        ValueError, match=r"the template 'a photo' in .*templates.txt; expected one"
    ):
        read_templates(file)


def test_prompts_that_cannot_be_are_refused(tmp_path):
    with pytest.raises(ValueError, match="neither templates nor descriptions"):
        read_class_prompts(["dog"], None)
    with pytest.raises(ValueError, match=r"the template 'a photo'; expected one \{\} in it"):
        read_class_prompts(["dog"], ["a {}", "a photo"])
    with pytest.raises(ValueError, match=r"the classes \['dog'\] twice"):
        read_class_prompts(["dog", "cat", "dog"])
    for content, message in (
        (["dog"], "found a list in .*expected an object"),
        ({"cat": ["It purrs."]}, r"no descriptions of \['dog'\]"),
        ({"dog": []}, r"found \[\] as the descriptions of 'dog'"),
        ({"dog": "It barks."}, "found 'It barks.' as the descriptions"),
        ({"dog": ["It barks.", " "]}, "none of them empty"),
    ):
        with pytest.raises(ValueError, match=message):
            read_class_prompts(["dog"], None, described(tmp_path, content))


def test_a_class_is_the_mean_direction_of_its_prompts():
    """However long the encoder's vectors are."""
    vectors = {"x": [3.0, 0.0], "y": [0.0, 0.5], "z": [0.0, -4.0]}

    def encode(texts: list[str]) -> torch.Tensor:
        return torch.tensor([vectors[text] for text in texts])

    found = class_embeddings(encode, {"xy": ["x", "y"], "z": ["z"]})
    torch.testing.assert_close(found, torch.tensor([[0.5**0.5, 0.5**0.5], [0.0, -1.0]]))


def test_accuracy_is_that_of_torchmetrics():
    """Where no scores are equal and every class has images."""
    scores = torch.randn(60, 7, generator=torch.Generator().manual_seed(0))
    targets = torch.arange(60) % 7
    scores[torch.arange(60), targets] += 1
    metric = ZeroShotAccuracy(7, top_k=(1, 3))
    metric.update(scores[:20], targets[:20])
    metric.update(scores[20:], targets[20:])
    found = metric.compute()
    for k in (1, 3):
        for name, average in ((f"accuracy@{k}", "micro"), (f"accuracy_per_class@{k}", "macro")):
            theirs = MulticlassAccuracy(7, top_k=k, average=average)(scores, targets)
            assert float(found[name]) == pytest.approx(float(theirs), abs=1e-6)
    right = (scores.argmax(dim=1) == targets).double()
    assert metric.per_image().tolist() == right.tolist()


def test_a_class_without_images_is_left_out_of_the_mean():
    """Guessed though it is."""
    metric = ZeroShotAccuracy(3, top_k=(1,))
    scores = F.one_hot(torch.tensor([0, 0, 2, 1]), 3).float()
    metric.update(scores, torch.tensor([0, 0, 0, 1]))
    found = metric.compute()
    assert found["accuracy@1"] == pytest.approx(3 / 4)
    assert found["accuracy_per_class@1"] == pytest.approx((2 / 3 + 1) / 2)


def test_equal_scores_are_right_as_often_as_chance():
    """What an encoder that sees nothing gets; ranking by column would give one class all."""
    metric = ZeroShotAccuracy(4, top_k=(1, 2))
    metric.update(torch.zeros(400, 4), torch.arange(400) % 4)
    found = metric.compute()
    assert found["accuracy@1"] == pytest.approx(0.25)
    assert found["accuracy@2"] == pytest.approx(0.5)


def test_scores_that_cannot_be_are_refused():
    metric = ZeroShotAccuracy(3)
    with pytest.raises(ValueError, match=r"expected \(b, 3\) and \(b,\)"):
        metric.update(torch.zeros(2, 4), torch.zeros(2, dtype=torch.long))
    with pytest.raises(ValueError, match="targets from 0 to 3; expected 0 to 2"):
        metric.update(torch.zeros(2, 3), torch.tensor([0, 3]))
    with pytest.raises(ValueError, match="found NaN"):
        metric.update(torch.full((2, 3), torch.nan), torch.tensor([0, 2]))
