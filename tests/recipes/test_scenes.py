"""The emoji scenes: what they promise about splits, seeds, places and scores."""

import hashlib
import io
import itertools
import random
import re
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

from recipes import cli, scene_documents, scenes
from recipes.data import split_shards
from recipes.documents import read_document
from recipes.scene_captions import Parsed, caption, parse_caption, questions, score
from recipes.scene_documents import PAIRS_ONLY, document_samples, scene_document, styles
from recipes.scene_names import CODE_POINTS, GROUND_COLOURS, INVERSE_RELATION
from recipes.scenes import draw, generate, scene_samples
from recipes.stream import ShardStream

MANY = 4000


@pytest.fixture(scope="module")
def emoji(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Black squares in the place of the artwork."""
    folder = tmp_path_factory.mktemp("emoji")
    for vendor in scenes.VENDORS:
        (folder / vendor).mkdir()
        for code in CODE_POINTS.values():
            Image.new("RGBA", (8, 8), (0, 0, 0, 255)).save(folder / vendor / f"U+{code:X}.png")
    return folder


def _composition(scene: scenes.Scene) -> frozenset[str]:
    names = frozenset(placed.name for placed in scene.objects)
    return names if len(names) > 1 else names | {scene.colour}


def test_splits_share_no_composition_across_seeds():
    train = {_composition(s) for seed in (0, 1) for s in generate(MANY, seed, "train")}
    val = {_composition(s) for seed in (0, 2) for s in generate(MANY, seed, "val")}
    assert train.isdisjoint(val)


def test_about_15_percent_of_the_compositions_are_held_out():
    pairs = [scenes.is_held_out(pair, "red") for pair in itertools.combinations(CODE_POINTS, 2)]
    singles = [
        scenes.is_held_out([name], colour) for name in CODE_POINTS for colour in GROUND_COLOURS
    ]
    assert 0.13 < sum(pairs) / len(pairs) < 0.17
    assert 0.10 < sum(singles) / len(singles) < 0.20


def test_a_pair_is_held_out_on_any_ground_and_in_any_order():
    for first, second in itertools.combinations(list(CODE_POINTS)[:20], 2):
        found = {
            scenes.is_held_out(pair, colour)
            for pair in ((first, second), (second, first))
            for colour in GROUND_COLOURS
        }
        assert len(found) == 1


def test_every_word_occurs_in_training():
    train = list(generate(MANY, 0, "train"))
    assert {p.name for s in train for p in s.objects} == set(CODE_POINTS)
    assert {s.colour for s in train} == set(GROUND_COLOURS)
    assert {s.relation for s in train} == {*INVERSE_RELATION, None}
    # Each alone too: some ground is open to every single object.
    alone = {s.objects[0].name for s in generate(MANY, 0, "train", two_object_share=0)}
    assert alone == set(CODE_POINTS)


@pytest.mark.parametrize("split", ["train", "val"])
def test_scenes_repeat_and_a_longer_run_begins_with_the_shorter(split: str):
    long, short = list(generate(50, 7, split)), list(generate(20, 7, split))
    assert long[:20] == short
    assert list(generate(20, 8, split)) != short


def test_splits_are_not_the_same_draws():
    # The number of objects is drawn before the split's compositions come into it.
    counts = [[len(s.objects) for s in generate(50, 7, split)] for split in ("train", "val")]
    assert counts[0] != counts[1]


@pytest.mark.parametrize(("share", "counts"), [(0.0, {1}), (0.5, {1, 2}), (1.0, {2})])
def test_two_object_share(share: float, counts: set[int]):
    drawn = generate(200, 0, "train", two_object_share=share)
    assert {len(scene.objects) for scene in drawn} == counts


def test_a_vendor_can_be_held_out():
    drawn = generate(200, 0, "train", vendors=["Twtr"])
    assert {placed.vendor for scene in drawn for placed in scene.objects} == {"Twtr"}


def test_boxes_lie_inside_apart_and_as_the_relation_says():
    for scene in generate(MANY, 3, "train"):
        for placed in scene.objects:
            left, top, right, bottom = placed.box
            assert 0 <= left < right <= scenes.IMAGE_SIZE
            assert 0 <= top < bottom <= scenes.IMAGE_SIZE
            assert right - left == bottom - top  # drawn without distortion
        if scene.relation is None:
            continue
        first, second = (placed.box for placed in scene.objects)
        # As seen from the first: its far edge comes before the near edge of the second.
        before = {
            "to the left of": first[2] <= second[0],
            "to the right of": second[2] <= first[0],
            "above": first[3] <= second[1],
            "below": second[3] <= first[1],
        }
        assert [phrase for phrase, holds in before.items() if holds] == [scene.relation]
        across = abs(first[0] + first[2] - second[0] - second[2])
        along = abs(first[1] + first[3] - second[1] - second[3])
        if scene.relation.startswith("to the"):
            along, across = across, along
        assert across <= scenes.MAX_SLANT * along


def test_captions_read_back():
    for scene in generate(MANY, 5, "train"):
        names = tuple(placed.name for placed in scene.objects)
        assert parse_caption(caption(scene)) == Parsed(names, scene.relation, scene.colour)


def test_articles():
    captions = [caption(scene) for scene in generate(MANY, 5, "train")]
    assert any(text.startswith("an apple ") for text in captions)
    assert not any(re.search(r"\ba [aeiou]|\ban [^aeiou]", text) for text in captions)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", (None, None, None)),
        ("A cat on a green background. A dog", (("cat",), None, "green")),
        ("a cat", (("cat",), None, None)),
        ("a cat above", (("cat",), "above", None)),
        ("a small cat below the dog on red ground", (("cat", "dog"), "below", "red")),
        ("a blorg to the left of a cat on an orange background",
         (("blorg", "cat"), "to the left of", None)),
        ("a cat and a dog on a red background\nmore", (("cat", "dog"), None, "red")),
        # Names are whole words: no "car" in a carrot.
        ("a carrot on a blue background", (("carrot",), None, "blue")),
    ],
)  # fmt: skip
def test_parsing_tolerates_what_is_missing(text: str, expected: tuple):
    assert parse_caption(text) == Parsed(*expected)


PAIR = {"objects": ["cat", "dog"], "relation": "above", "colour": "red"}
SINGLE = {"objects": ["cat"], "relation": None, "colour": "red"}


@pytest.mark.parametrize(
    ("text", "truth", "expected"),
    [
        ("a cat above a dog on a red background", PAIR, (True, True, True)),
        ("a dog below a cat on a red background", PAIR, (True, True, True)),
        ("a dog above a cat on a red background", PAIR, (True, False, True)),
        ("a cat below a dog on a blue background", PAIR, (True, False, False)),
        ("a cat above a key on a red background", PAIR, (False, True, True)),
        ("a key below a cat on a red background", PAIR, (False, False, True)),
        ("a cat and a dog on a red background", PAIR, (True, False, True)),
        ("a cat on a red background", PAIR, (False, False, True)),
        ("", PAIR, (False, False, False)),
        ("a cat on a red background", SINGLE, (True, None, True)),
        ("a cat above a cat on a red background", SINGLE, (False, None, True)),
        ("a blorg above a cat on a red background", SINGLE, (False, None, True)),
        ("a dog on a green background", SINGLE, (False, None, False)),
    ],
)
def test_score(text: str, truth: dict, expected: tuple):
    assert score(text, truth) == dict(zip(("object", "relation", "colour"), expected, strict=True))


def test_drawing_fills_the_boxes_on_the_ground(emoji: Path):
    for scene in generate(20, 0, "train"):
        image = draw(scene, emoji)
        left, top, right, bottom = scene.objects[0].box
        assert image.size == (224, 224)
        assert image.getpixel(((left + right) // 2, (top + bottom) // 2)) == (0, 0, 0)
        black = sum(
            (placed.box[2] - placed.box[0]) * (placed.box[3] - placed.box[1])
            for placed in scene.objects
        )
        counts = {colour: count for count, colour in image.getcolors() or []}
        assert counts == {(0, 0, 0): black, scene.ground: 224 * 224 - black}


def test_samples_carry_the_truth(emoji: Path):
    samples = list(scene_samples(12, 0, "val", emoji))
    for k, (sample, scene) in enumerate(zip(samples, generate(12, 0, "val"), strict=True)):
        assert sample["__key__"] == f"val-{k:06d}"
        assert sample["txt"] == caption(scene)
        assert sample["json"]["captions"] == [caption(scene)]
        assert set(score(sample["txt"], sample["json"]).values()) <= {True, None}
        assert Image.open(io.BytesIO(sample["jpg"])).size == (224, 224)


@pytest.mark.parametrize(
    ("split", "digest"),
    [
        ("train", "43d7587ce7b5e97fab6edc502e80282cea70553a3d3681d0a1bab48d7b857860"),
        ("val", "9359e0b9dbfb1b0f694336be379859737d6d122e2208211db8102783e3a2cfef"),
    ],
)
def test_scenes_are_those_of_version_1(split: str, digest: str):
    """Shards drawn earlier stay in caches: if this goes red, raise the demo's SCENES_VERSION."""
    drawn = "".join(map(repr, generate(200, 0, split)))
    assert hashlib.sha256(drawn.encode()).hexdigest() == digest


def test_asking_changes_nothing_but_the_questions(emoji: Path, monkeypatch: pytest.MonkeyPatch):
    asked = list(scene_samples(20, 5, "train", emoji))
    monkeypatch.setattr(scenes, "questions", lambda _, rng: [rng.random() for _ in range(9)])
    for sample, other in zip(asked, scene_samples(20, 5, "train", emoji), strict=True):
        assert sample["json"].pop("qa") != other["json"].pop("qa")
        assert sample == other


def _answers(scene: scenes.Scene, seed: int = 0) -> dict[str, str]:
    asked = questions(scene, random.Random(seed))
    assert all(pair.keys() == {"question", "answer"} for pair in asked)
    answers = {pair["question"]: pair["answer"] for pair in asked}
    assert len(answers) == len(asked)
    return answers


def _placed(name: str) -> scenes.PlacedEmoji:
    return scenes.PlacedEmoji(name, "Goog", (0, 0, 64, 64))


def test_questions_of_one_object():
    answers = _answers(scenes.Scene((_placed("apple"),), None, "green", (0, 0, 0)))
    (absent,) = (question for question, answer in answers.items() if answer == "no")
    assert re.fullmatch(r"Is there an? \w+\?", absent)
    assert answers == {
        "What colour is the background?": "green",
        "How many things are there?": "one",
        "What is there?": "apple",
        "Is there an apple?": "yes",
        absent: "no",
    }


@pytest.mark.parametrize(
    ("relation", "asked"),
    [
        ("to the left of", ("What is to the left of the dog?", "What is to the right of the cat?")),
        (
            "to the right of",
            ("What is to the right of the dog?", "What is to the left of the cat?"),
        ),
        ("above", ("What is above the dog?", "What is below the cat?")),
        ("below", ("What is below the dog?", "What is above the cat?")),
    ],
)
def test_questions_of_two_objects(relation: str, asked: tuple[str, str]):
    answers = _answers(scenes.Scene((_placed("cat"), _placed("dog")), relation, "red", (0, 0, 0)))
    assert [answers[question] for question in asked] == ["cat", "dog"]
    assert answers["How many things are there?"] == "two"
    assert "What is there?" not in answers
    assert len(answers) == 6


def test_yes_and_no_are_true_and_their_words_give_nothing_away():
    said: dict[str, list[str]] = {"yes": [], "no": []}
    for k, scene in enumerate(generate(MANY, 0, "train")):
        names = [placed.name for placed in scene.objects]
        for question, answer in _answers(scene, k).items():
            if found := re.fullmatch(r"Is there an? (\w+)\?", question):
                assert answer == ("yes" if found[1] in names else "no")
                said[answer].append(found[1])
    assert len(said["yes"]) == len(said["no"]) == MANY
    assert set(said["yes"]) == set(said["no"]) == set(CODE_POINTS)


def test_any_kind_of_question_may_come_first():
    first = Counter(
        questions(scene, random.Random(k))[0]["question"].split()[1]
        for k, scene in enumerate(generate(MANY, 0, "train"))
    )
    # One of five or six in each scene.
    for word in ("colour", "many"):
        assert 0.14 < first[word] / MANY < 0.22


def test_an_unknown_split_or_vendor_is_refused():
    with pytest.raises(ValueError, match="'test', expected 'train' or 'val'"):
        next(generate(1, 0, "test"))
    with pytest.raises(ValueError, match=r"\['Apple'\], expected some of"):
        next(generate(1, 0, "train", vendors=["Apple"]))


def test_a_missing_picture_says_where_pictures_come_from(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"no picture of .*fetch\('emoji'\)"):
        draw(next(generate(1, 0, "train")), tmp_path)


# --- documents


def _documents(n: int, seed: int, split: str) -> list[tuple[str, list[scenes.Scene]]]:
    return [scene_document(seed, split, k) for k in range(n)]


def test_documents_of_val_show_no_composition_of_train():
    train = {
        _composition(scene)
        for seed in (0, 1)
        for _, shown in _documents(MANY // 4, seed, "train")
        for scene in shown
    } | {_composition(scene) for scene in generate(MANY, 0, "train")}
    val = {
        _composition(scene)
        for seed in (0, 2)
        for _, shown in _documents(MANY // 4, seed, "val")
        for scene in shown
    }
    assert train.isdisjoint(val)


def test_documents_repeat_and_differ():
    drawn = _documents(40, 7, "train")
    assert drawn == _documents(40, 7, "train")
    assert drawn != _documents(40, 8, "train")
    assert drawn != _documents(40, 7, "val")
    assert {len(shown) for _, shown in drawn} == {2, 3, 4, 5}
    assert {style for style, _ in drawn} == set(styles)
    assert all(len(s.objects) == 2 for style, shown in drawn if style in PAIRS_ONLY for s in shown)
    counts = {len(s.objects) for style, shown in drawn if style not in PAIRS_ONLY for s in shown}
    assert counts == {1, 2}


def test_a_scene_does_not_depend_on_how_many_come_with_it(monkeypatch: pytest.MonkeyPatch):
    usual = _documents(20, 3, "train")
    monkeypatch.setattr(scene_documents, "SCENES", (7, 7))
    for (style, few), (same, many) in zip(usual, _documents(20, 3, "train"), strict=True):
        if style == same:
            assert many[: len(few)] == few


def test_what_each_style_says():
    pair = scenes.Scene((_placed("apple"), _placed("dog")), "to the left of", "green", (0, 0, 0))
    alone = scenes.Scene((_placed("apple"),), None, "green", (0, 0, 0))
    assert {name: say(pair) for name, say in styles.items()} == {
        "caption": "an apple to the left of a dog on a green background",
        "colour": "colour: green",
        "objects": "objects: apple, dog",
        "relation": "the apple is to the left of the dog",
        "shout": "AN APPLE TO THE LEFT OF A DOG ON A GREEN BACKGROUND!",
        "ground first": "on a green background there is an apple to the left of a dog",
    }
    assert styles["objects"](alone) == "objects: apple"
    # The same picture reads otherwise in each of them.
    assert len({say(pair) for say in styles.values()}) == len(styles)


def test_documents_carry_the_truth(emoji: Path):
    samples = list(document_samples(12, 0, "val", emoji))
    assert samples[:5] == list(document_samples(5, 0, "val", emoji))
    for k, sample in enumerate(samples):
        style, shown = scene_document(0, "val", k)
        meta = sample["json"]
        assert meta["style"] == style
        assert meta["parts"][::2] == [{"image": j} for j in range(len(shown))]
        assert meta["parts"][1::2] == [styles[style](scene) for scene in shown]
        for j, (scene, truth) in enumerate(zip(shown, meta["scenes"], strict=True)):
            assert set(score(caption(scene), truth).values()) <= {True, None}
            assert Image.open(io.BytesIO(sample[f"{j}.jpg"])).size == (224, 224)


def test_documents_become_shards_that_are_read_back(
    emoji: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr("recipes.scene_shards.fetch", lambda name: emoji)
    out = tmp_path / "out"
    command = ["scenes", str(out), "--documents=true", "--train=7", "--val=3", "--seed=4"]
    assert cli.main(command) == 0
    texts = 0
    for split, shards in zip(("train", "val"), split_shards(str(out), None), strict=True):
        found = list(ShardStream(shards, read_document, seed=0, shuffle=False))
        for k, document in enumerate(found):
            style, shown = scene_document(4, split, k)
            assert document.meta["style"] == style
            expected = [part for j, scene in enumerate(shown) for part in (j, styles[style](scene))]
            assert list(document.parts) == expected
            texts += len(shown)
        assert len(found) == {"train": 7, "val": 3}[split]
    said = " ".join(capsys.readouterr().out.split())
    assert f"{texts} pictures with texts in 10 documents" in said
