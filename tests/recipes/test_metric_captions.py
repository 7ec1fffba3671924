"""CIDEr-D, BLEU, ROUGE-L and METEOR, against COCO's official scorer; exact match."""

import json
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torchmetrics.text import BLEUScore

from recipes.metric_captions import Bleu, CiderD, ExactMatch, RougeL, bleu_of
from recipes.metric_meteor import Meteor

FIXTURE = json.loads(Path(__file__).with_name("data").joinpath("metric_captions.json").read_text())
PREDICTIONS = [image["prediction"] for image in FIXTURE["images"]]
REFERENCES = [image["references"] for image in FIXTURE["images"]]
CORPUS, EACH = FIXTURE["corpus"], FIXTURE["per_image"]
MEANS = {"cider_d": CiderD, "rouge_l": RougeL}
TOLERANCE = {"rtol": 0, "atol": 1e-9}


def in_two_updates(metric):
    """Fed with the fixture."""
    metric.update(PREDICTIONS[:5], REFERENCES[:5])
    metric.update(PREDICTIONS[5:], REFERENCES[5:])
    return metric


def close(found, expected) -> None:
    expected = torch.as_tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(torch.as_tensor(found), expected, **TOLERANCE)


@pytest.mark.parametrize("name", MEANS)
def test_figures_are_those_of_the_official_scorer(name: str):
    metric = in_two_updates(MEANS[name]())
    close(metric.compute(), CORPUS[name])
    close(metric.per_image(), EACH[name])
    metric.reset()
    with pytest.raises(ValueError, match="call update"), pytest.warns(UserWarning, match="before"):
        metric.compute()


def test_ciders_width_is_that_of_the_official_scorer():
    close(in_two_updates(CiderD(sigma=2.0)).compute(), CORPUS["cider_d_sigma_2"])


def test_cider_of_shorter_ngrams_leaves_the_longer_ones_out():
    """Words alone: the order makes no difference then."""
    metric = CiderD(n=1)
    metric.update(["a cat here", "two dogs"], [["here a cat"], ["dogs run", "two"]])
    backwards = CiderD(n=1)
    backwards.update(["cat here a", "dogs two"], [["a cat here"], ["run dogs", "two"]])
    close(metric.per_image(), backwards.per_image())
    assert metric.per_image()[0] == pytest.approx(10)


def test_bleu_is_that_of_the_official_scorer():
    metric = in_two_updates(Bleu())
    for name, value in metric.compute().items():
        assert value == pytest.approx(CORPUS[name], abs=1e-9)
    close(metric.per_image(), EACH["bleu_4"])


def test_bleu_can_be_made_of_any_images():
    """A bootstrap's sample, an image in it twice, is BLEU of those images."""
    sums = in_two_updates(Bleu()).per_image_sums()
    assert sums.shape == (len(PREDICTIONS), 10)
    chosen = [0, 3, 3, 9]
    again = Bleu()
    again.update([PREDICTIONS[i] for i in chosen], [REFERENCES[i] for i in chosen])
    assert bleu_of(sums[chosen].sum(dim=0)) == pytest.approx(again.compute(), abs=1e-12)


def test_bleu_of_torchmetrics_is_another_figure():
    """Why it is not used: without a match of four words it is 0."""
    predictions, references = ["a red bus here"], [["a red bus there"]]
    ours = Bleu()
    ours.update(predictions, references)
    theirs = BLEUScore()(predictions, references)
    assert float(theirs) == 0
    assert ours.compute()["bleu_4"] > 1e-5


def test_exact_match():
    metric = ExactMatch()
    metric.update(["The dog.", "a cat", "one"], [["dog"], ["dog", "dogs"], ["two", "One!"]])
    assert metric.per_image().tolist() == [1, 0, 1]
    assert metric.compute() == pytest.approx(2 / 3)


@pytest.mark.parametrize("metric", [CiderD(), Bleu(), RougeL(), ExactMatch()])
def test_what_does_not_belong_together_is_refused(metric):
    with pytest.raises(ValueError, match="found 2 predictions for 1 lists"):
        metric.update(["a", "b"], [["a"]])
    with pytest.raises(TypeError, match=r"found the string 'a dog'.*expected a list of them"):
        metric.update(["a"], ["a dog"])
    with pytest.raises(ValueError, match="no right text for prediction 1"):
        metric.update(["a", "b"], [["a"], []])


PROGRAM = """
import sys
for line in sys.stdin:
    fields = line.rstrip("\\n").split(" ||| ")
    if fields[0] == "SCORE":
        if "fail" in line:
            sys.exit("out of memory")
        print(len(fields) - 2, len(fields[-1].split()), flush=True)
    else:
        stats = [sum(map(int, field.split())) for field in fields[1:]]
        print(*stats, sum(stats), sep="\\n", flush=True)
"""
"""Speaks as METEOR does: a line of statistics for each image, then their scores and the whole's."""


@pytest.fixture
def meteor(tmp_path) -> Meteor:
    """With a program in place of Java that counts references and words."""
    (tmp_path / "talk.py").write_text(PROGRAM)
    java = tmp_path / "java"
    java.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{tmp_path}/talk.py"\n')
    java.chmod(0o755)
    return Meteor(tmp_path / "meteor.jar", str(java))


def test_meteor_talks_with_its_program(meteor):
    """A caption that holds the separator is still one, without it."""
    meteor.update(["A dog runs.", "<a ||| b>"], [["x", "y"], ["<z ||| w>"]])
    assert meteor.per_image().tolist() == [2 + 3, 1 + 2]
    meteor.update(["one"], [["two"]])
    assert meteor.compute() == 5 + 3 + 2
    assert meteor.per_image().tolist() == [5, 3, 2]


def test_meteor_says_how_its_program_failed(meteor):
    meteor.update(["fail"], [["x"]])
    with pytest.raises(RuntimeError, match=r"ended with code 1.*out of memory"):
        meteor.compute()


def test_meteor_says_what_is_missing(tmp_path):
    with pytest.raises(ImportError, match=r"no program 'no-such-java'.*bridges\[meteor\]"):
        Meteor(tmp_path / "meteor.jar", "no-such-java")


@pytest.mark.skipif(
    find_spec("pycocoevalcap") is None or shutil.which("java") is None,
    reason="METEOR's program is not installed",
)
def test_meteor_is_that_of_the_official_scorer():
    metric = in_two_updates(Meteor())
    close(metric.compute(), CORPUS["meteor"])
    close(metric.per_image(), EACH["meteor"])
