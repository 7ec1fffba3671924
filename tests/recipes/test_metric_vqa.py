"""VQA accuracy, against the official evaluation."""

import json
from pathlib import Path

import pytest

from recipes.metric_vqa import CONTRACTIONS, VqaAccuracy, normalise_answer

FIXTURE = json.loads(Path(__file__).with_name("data").joinpath("metric_vqa.json").read_text())


def test_the_normal_form_is_the_official_one():
    found = {text: normalise_answer(text) for text, _ in FIXTURE["normal"]}
    assert found == dict(FIXTURE["normal"])


def test_every_contraction_is_among_the_cases():
    assert set(CONTRACTIONS) <= {text for text, _ in FIXTURE["normal"]}


@pytest.mark.parametrize(("prediction", "answers", "accuracy"), FIXTURE["accuracy"])
def test_the_accuracy_is_the_official_one(prediction, answers, accuracy):
    metric = VqaAccuracy()
    metric.update([prediction], [answers])
    assert metric.compute() == pytest.approx(accuracy, abs=1e-12)


def test_the_accuracy_is_the_mean_over_questions():
    metric = VqaAccuracy()
    for prediction, answers, _ in FIXTURE["accuracy"]:
        metric.update([prediction], [answers])
    right = [accuracy for *_, accuracy in FIXTURE["accuracy"]]
    assert metric.per_image().tolist() == pytest.approx(right, abs=1e-12)
    assert metric.compute() == pytest.approx(sum(right) / len(right), abs=1e-12)


@pytest.mark.parametrize(
    ("answers", "accuracy"),
    [
        (["two"], 1),
        (["2 dogs"], 0),
        (["2", "3"], 0.5),
        (["2", "two"], 1),
        (["2", "2", "3"], (1 / 2 + 1 / 2 + 1) / 3),
        (["2", "2", "2"], 1),
        (["2", "3", "3", "3"], (0 + 1 / 3 + 1 / 3 + 1 / 3) / 4),
        (["2", "2", "2", "2"], 1),
    ],
)
def test_fewer_answers_than_ten(answers, accuracy):
    metric = VqaAccuracy()
    metric.update(["Two."], [answers])
    assert metric.compute() == pytest.approx(accuracy)
