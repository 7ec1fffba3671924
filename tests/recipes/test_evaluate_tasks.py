"""The tasks of an evaluation: what is asked and counted, beside baselines that see nothing."""

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import tiny_run
import torch
from PIL import Image

from bridges import VisionEncoder, VisionLanguageModel, caption_features
from bridges.prompts import encode_text
from recipes import evaluate_classify, evaluate_retrieval, evaluate_tasks
from recipes.evaluate import caption_sums, captions
from recipes.evaluate_found import ImpossibleError, Options, Trained, TrainedStage1
from recipes.evaluate_pictures import Pictures, spread
from recipes.evaluate_prompts import Asker
from recipes.evaluate_scores import caption_figures
from recipes.shard_writer import write_shards
from recipes.workload import matmul_precision

COLOURS = {"red": (200, 30, 30), "green": (30, 160, 60), "blue": (40, 70, 200)}
GOOD = 7


def png(seed: int, colour: str) -> bytes:
    """A picture of its own: noise about a colour."""
    noise = torch.randint(-25, 25, (12, 12, 3), generator=torch.Generator().manual_seed(seed))
    pixels = (torch.tensor(COLOURS[colour]) + noise).clamp(0, 255).byte().numpy()
    Image.fromarray(pixels).save(data := io.BytesIO(), "PNG")
    return data.getvalue()


def sample(index: int) -> dict[str, Any]:
    colour = list(COLOURS)[index % 3]
    meta = {
        "captions": [f"{colour} {index}", f"a {colour} one"][: 1 + index % 2],
        "colour": colour,
        "hues": [colour, "any"],
        "qa": [
            {"question": "hue?", "answer": colour, "answers": [colour, colour, "grey"]},
            {"question": "n?", "answer": "one"},
        ][: 2 - index % 2],
    }
    return {"__key__": f"val-{index}", "png": png(index, colour), "json": meta}


@pytest.fixture(scope="module", autouse=True)
def exact_products():
    """A training run in this process leaves coarser ones behind."""
    with matmul_precision("highest"):
        yield


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    """Eight samples, one of which has no picture."""
    folder = tmp_path_factory.mktemp("shards")
    bad = sample(4) | {"png": b"no picture"}
    write_shards((bad if i == 4 else sample(i) for i in range(GOOD + 1)), folder, "val")
    return folder


@pytest.fixture(scope="module")
def model() -> VisionLanguageModel:
    torch.manual_seed(0)
    encoder, lm = tiny.vision_encoder("clip"), tiny.language_model("llama")
    model = VisionLanguageModel.connect(encoder, lm, tiny.factory("perceiver"))
    tiny.randomise(model.bridge)
    return model


@pytest.fixture(scope="module")
def trained(model, shards) -> Trained:
    found = Pictures.collect(str(shards), model.vision)
    return Trained(model, found.held_out, Options(data=str(shards), max_new_tokens=6))


def changed(run: Any, **options: Any) -> Any:
    """The same run with other options."""
    return replace(run, options=replace(run.options, **options))


# --- pictures


def test_pictures_come_with_what_is_asked_of_them(model, shards, tmp_path):
    found = Pictures.collect(str(shards), model.vision, batch_size=3)
    samples = found.held_out.samples
    assert [one["key"] for one in samples] == [f"val-{i}" for i in range(8) if i != 4]
    assert samples[0]["questions"] == [("hue?", ["red", "red", "grey"]), ("n?", ["one"])]
    assert samples[1]["captions"] == ["green 1", "a green one"]
    (skipped,) = found.skipped
    assert skipped["sample"].endswith("val-000000.tar: val-4")
    assert skipped["problem"].startswith("unreadable image")
    for row, one in enumerate(samples):
        pixels = model.vision.preprocess(Image.open(io.BytesIO(sample(int(one["key"][4:]))["png"])))
        alone = model.vision.encode(pixels[None, None]).patches[0, 0]
        torch.testing.assert_close(found.held_out.features[row], alone)
    cached = Pictures.collect(str(shards), model.vision, feature_cache=tmp_path)
    (skipped,) = cached.skipped
    assert skipped["sample"].endswith("val-000000.tar: val-4")
    assert skipped["problem"] == "left out of the feature cache"
    assert [s["name"] for s in cached.held_out.samples] == [s["name"] for s in samples]
    torch.testing.assert_close(
        cached.held_out.features, found.held_out.features, rtol=1e-2, atol=1e-2
    )


def test_a_picture_may_have_questions_and_no_caption(model, tmp_path):
    asked = [sample(i) for i in range(3)]
    for one in asked:
        del one["json"]["captions"]
    write_shards(asked, tmp_path, "val")
    found = Pictures.collect(str(tmp_path), model.vision, limit=2)
    assert [s["captions"] for s in found.held_out.samples] == [[], []]
    run = Trained(model, found.held_out, Options(data=str(tmp_path)))
    assert evaluate_tasks.vqa(run).described["questions"] == 3
    for task in (evaluate_tasks.caption, evaluate_tasks.likelihood):
        with pytest.raises(ImpossibleError, match="no caption of 2 of 2"):
            task(run)
    with pytest.raises(ValueError, match="found 1 good pictures"):
        Pictures.collect(str(tmp_path), model.vision, limit=1)


@pytest.mark.parametrize(("total", "shown"), [(1, 12), (5, 5), (100, 12), (13, 12)])
def test_examples_are_spread_over_all(total: int, shown: int):
    places = spread(total, shown)
    assert len(set(places)) == len(places) == min(total, shown)
    assert places[0] == 0 and places[-1] == total - 1


# --- prompts


def test_scores_are_the_likelihood_of_training(trained, model):
    """Whatever is scored together: what is added up is the loss of each caption, as trained."""
    held = trained.held_out
    texts = [s["captions"][0] for s in held.samples]
    asker = Asker.of(model, held, batch_size=3)
    scores = asker.score([*range(len(held)), asker.mean], texts, "scoring")
    first = [{**s, "captions": s["captions"][:1]} for s in held.samples]
    own = caption_sums(model, type(held)(held.features, held.grid, first))[:, 0]
    torch.testing.assert_close(scores[:-1].diagonal(), -own, rtol=1e-5, atol=1e-5)
    blind = held.blind(held.features.mean(dim=0))
    unseen = caption_sums(model, type(held)(blind.features, held.grid, first))[:, 0]
    torch.testing.assert_close(scores[-1], -unseen, rtol=1e-5, atol=1e-5)


def test_answers_are_those_to_the_question_of_the_picture(trained, model):
    held = trained.held_out
    asker = Asker.of(model, held, batch_size=2, asks=True)
    asked = [(2, "what is it?"), (0, "n?"), (2, "n?"), (0, "n?")]
    found = asker.write(asked, 5, "asking")
    template = "<image>Question:{question} Short answer:"
    for (place, question), answer in zip(asked, found, strict=True):
        (alone,) = caption_features(
            model, held.vision([place]), prompt=template, question=question, max_new_tokens=5
        )
        assert answer == alone.split("\n")[0].strip()
    assert found[1] == found[3]
    assert len(set(found)) > 1
    assert asker.text.template == template + "{answer}"


# --- tasks


def test_captions_are_compared_with_those_of_other_pictures(trained, model):
    found = evaluate_tasks.caption(trained)
    held = trained.held_out
    written = captions(model, held, max_new_tokens=6)
    assert found.described["written"] == written
    assert captions(model, held.shuffled(), max_new_tokens=6) == [written[-1], *written[:-1]]
    blind = captions(model, held.blind(held.features.mean(dim=0)), max_new_tokens=6)
    assert set(blind) == {found.described["written_blind"]}
    assert set(found.figures) == {
        f"{name}{look}"
        for name in ("cider_d", "bleu_4", "rouge_l", "exact_match")
        for look in ("", "_shuffled", "_blind")
    }


def test_a_caption_of_another_picture_is_what_that_picture_got(trained, monkeypatch):
    """Who writes what is true has nothing right where the pictures are others'."""
    held = trained.held_out
    truths = [s["captions"][-1] for s in held.samples]

    def write(model, pictures, **options):
        return truths if len(pictures) == len(held) else ["a blind guess"]

    monkeypatch.setattr(evaluate_tasks, "captions", write)
    found = evaluate_tasks.caption(trained)
    said = {"": truths, "_shuffled": [truths[-1], *truths[:-1]], "_blind": ["a blind guess"] * GOOD}
    for look, texts in said.items():
        for name, sums in caption_figures(texts, held.samples).items():
            assert found.figures[name + look].rows.tolist() == sums.rows.tolist(), name + look
    values = [found.figures[f"exact_match{look}"].value() for look in said]
    assert values == [1, 0, 0]


def test_questions_are_counted_by_picture(trained, monkeypatch):
    """A model that says "red" whatever it sees is as good without the picture."""
    asked: list[list[tuple[int, str]]] = []

    def write(self, pairs, max_new_tokens, title):
        asked.append(list(pairs))
        return ["red"] * len(pairs)

    monkeypatch.setattr(Asker, "write", write)
    found = evaluate_tasks.vqa(trained)
    samples = trained.held_out.samples
    # 3 of 7 are red, and two of three people say so; 3 are asked for the number as well.
    red = [s["meta"]["colour"] == "red" for s in samples]
    weights = [len(s["questions"]) for s in samples]
    assert (sum(red), sum(weights)) == (3, 10)
    accuracy = found.figures["vqa_accuracy"]
    assert accuracy.rows[:, 1].tolist() == weights
    # Of two others, both must have said it: 1 where "grey" is left out, ½ where one "red" is.
    assert accuracy.value() == pytest.approx(3 * (2 / 3 * 0.5 + 1 / 3) / 10)
    assert found.figures["vqa_exact_match"].value() == pytest.approx(3 / 10)
    assert {
        found.figures[f"vqa_accuracy{look}"].value() for look in ("", "_shuffled", "_blind")
    } == {accuracy.value()}
    right, shuffled, blind = asked
    assert [(place + 1) % GOOD for place, _ in shuffled] == [place for place, _ in right]
    assert {place for place, _ in blind} == {GOOD}
    once = evaluate_tasks.vqa(changed(trained, questions=1))
    assert once.described["questions"] == GOOD
    for one in samples:
        assert {"question", "answer"} <= {line.label for line in found.lines[samples.index(one)]}


def test_a_frequent_text_wins_by_likelihood_until_its_own_is_taken_off(trained, monkeypatch):
    held = trained.held_out
    owners = torch.tensor([i for i, s in enumerate(held.samples) for _ in s["captions"]])

    def score(self, places, texts, title):
        assert places == [*range(5), self.mean]
        frequent = torch.zeros(len(texts))
        frequent[0] = 100.0  # of the first picture
        right = (owners[: len(texts)] == torch.arange(5)[:, None]).double()
        return torch.cat([right, torch.zeros(1, len(texts))]) + frequent

    monkeypatch.setattr(Asker, "score", score)
    found = evaluate_retrieval.by_likelihood(changed(trained, few=5))
    values = {name: sums.value() for name, sums in found.figures.items()}
    assert values["image_to_text_recall@1"] == pytest.approx(1 / 5)
    assert values["image_to_text_recall@1_normalised"] == 1
    assert values["text_to_image_recall@1"] == 1
    assert "text_to_image_recall@1_normalised" not in values
    assert found.described["pictures"] == 5
    assert found.chance["text_to_image_recall@1"] == pytest.approx(1 / 5)


@pytest.mark.parametrize("labels", ["colour", "hues"])
def test_a_class_is_scored_by_the_mean_of_its_prompts(trained, tmp_path, monkeypatch, labels):
    """A name that is likely whatever is seen is chosen until its own likelihood is taken off."""
    held = trained.held_out
    (tmp_path / "templates.txt").write_text("{}\n\nthe {}\n")
    (tmp_path / "classes.txt").write_text("green\nred\nblue\nany\ngrey\nodd\n")
    described = {name: ["a", "b"][: 1 + len(name) % 2] for name in ("red", "green", "blue")}
    described |= {"any": ["c"], "grey": ["d"], "odd": ["e"]}
    (tmp_path / "about.json").write_text(json.dumps(described))
    asked: list[str] = []

    def score(self, places, texts, title):
        asked[:] = texts
        table = torch.zeros(len(places), len(texts), dtype=torch.float64)
        names = list(COLOURS)
        for column, text in enumerate(texts):
            name = text.removeprefix("the ")
            table[:, column] = 50.0 if name == "grey" else 0.0
            for row in range(len(places) - 1):
                colour = held.samples[row]["meta"]["colour"]
                # One prompt of a class alone would mislead; the mean of both is right.
                misled = names[names.index(colour) - 1]
                table[row, column] += 3.0 * (text == f"the {colour}") + 2.0 * (text == misled)
        return table

    monkeypatch.setattr(Asker, "score", score)
    options = {"templates": tmp_path / "templates.txt", "classes": tmp_path / "classes.txt"}
    found = evaluate_classify.by_likelihood(changed(trained, labels=labels, **options))
    assert asked[:4] == ["green", "the green", "red", "the red"]
    values = {name: sums.value() for name, sums in found.figures.items()}
    assert values["accuracy@1"] == values["accuracy@1_blind"] == 0
    assert values["normalised_accuracy@1"] == 1
    # The picture before has another colour, but where the bad one is left out.
    others = [s["meta"]["colour"] for s in held.samples]
    same = [a == b for a, b in zip(others, [others[-1], *others[:-1]], strict=True)]
    assert values["normalised_accuracy@1_shuffled"] == pytest.approx(sum(same) / GOOD)
    assert found.chance["accuracy@1"] == pytest.approx((1 if labels == "colour" else 2) / 6)
    more = changed(trained, descriptions=tmp_path / "about.json", **options)
    evaluate_classify.by_likelihood(more)
    assert asked[:4] == ["green", "the green", "a", "b"]
    evaluate_classify.by_likelihood(changed(more, templates=None))
    assert asked[:3] == ["a", "b", "a"]


def test_classes_that_cannot_be_told_are_refused(trained, tmp_path):
    with pytest.raises(ImpossibleError, match="--labels"):
        evaluate_classify.by_likelihood(changed(trained, labels="nothing"))
    (tmp_path / "classes.txt").write_text("red\ngreen\n")
    with pytest.raises(ValueError, match=r"found \['blue'\]"):
        evaluate_classify.by_likelihood(changed(trained, classes=tmp_path / "classes.txt"))


# --- stage 1


@pytest.fixture(scope="module")
def stage1(on_disk, shards, tmp_path_factory) -> tuple[VisionEncoder, TrainedStage1]:
    folder = tmp_path_factory.mktemp("stage1")
    encoder, model = tiny_run.save_stage1_run(folder, on_disk.vision)
    held_out = Pictures.collect(str(shards), encoder).held_out
    return encoder, TrainedStage1(model, 32, held_out, Options(data=str(shards), batch_size=3))


@torch.no_grad()
def test_stage1_classes_are_those_of_the_mean_prompt(stage1, tmp_path):
    _, run = stage1
    (tmp_path / "templates.txt").write_text("a {}\nscene {}\n")
    found = evaluate_classify.by_stage1(changed(run, templates=tmp_path / "templates.txt"))
    classes = ["blue", "green", "red"]
    assert found.described["classes"] == classes
    columns = []
    for name in classes:
        each = [
            run.stage1.text_embeddings(
                encode_text(run.stage1.qformer.tokenizer, [template.format(name)], 32)
            )[0]
            for template in ("a {}", "scene {}")
        ]
        columns.append(torch.nn.functional.normalize(sum(each), dim=0))
    hits = []
    for row, one in enumerate(run.held_out.samples):
        image = run.stage1.image_embeddings(run.held_out.vision([row]))[0]
        best = int((image @ torch.stack(columns).T).amax(dim=0).argmax())
        hits.append(classes[best] == one["meta"]["colour"])
    assert found.figures["accuracy@1"].rows[:, 0].tolist() == hits
    everywhere = evaluate_classify.by_stage1(run).described["prompts"]["red"]
    assert len(everywhere) == 80 and "a bad photo of a red." in everywhere


def test_stage1_ranks_by_itc_and_again_by_itm(stage1):
    _, run = stage1
    found = evaluate_retrieval.by_stage1(run)
    assert len(found.figures) == 12
    texts = sum(len(s["captions"]) for s in run.held_out.samples)
    assert found.described["texts"] == texts
    assert found.figures["text_to_image_recall@1_itm"].rows[:, 1].sum() == texts
    assert found.figures["image_to_text_recall@1"].rows[:, 1].sum() == GOOD
