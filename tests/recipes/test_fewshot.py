"""Few-shot evaluation: what is asked, what is counted, the curve, the page."""

import io
import json
import math
import random
import re
import shutil
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import tiny
import tiny_run
import torch
from PIL import Image

import bridges
from bridges import VisionLanguageModel
from bridges.fewshot import FewShotPrompts
from bridges.images import open_image
from bridges.loss import IGNORE
from bridges.prompts import CAPTION_INSTRUCTION, END_OF_CHUNK, encode_instruction
from recipes import cli, fewshot_curve, fewshot_documents
from recipes.fewshot_documents import DocumentPool
from recipes.fewshot_match import same_text
from recipes.fewshot_pool import Pool
from recipes.fewshot_runner import Prompt, Runner, exchanged, other_pictures
from recipes.fewshot_tasks import Answers, Captions, Classes, Likelihood, Outcome
from recipes.gallery import thumbnail
from recipes.shard_writer import write_shards
from recipes.train import train

COLOURS = {"red": (200, 30, 30), "green": (30, 160, 60), "blue": (40, 70, 200)}


def png(seed: int, colour: str) -> bytes:
    """A picture of its own: noise about a colour."""
    noise = torch.randint(-25, 25, (12, 12, 3), generator=torch.Generator().manual_seed(seed))
    pixels = (torch.tensor(COLOURS[colour]) + noise).clamp(0, 255).byte().numpy()
    Image.fromarray(pixels).save(data := io.BytesIO(), "PNG")
    return data.getvalue()


def scene(split: str, index: int, seed: int | None = None) -> dict[str, Any]:
    colour = list(COLOURS)[index % 3]
    meta = {
        "captions": [f"cat on {colour}", f"{colour}"],
        "objects": ["cat", "dog"][: 1 + index % 2],
        "relation": [None, "above"][index % 2],
        "colour": colour,
        "qa": [{"question": "hue?", "answer": colour}, {"question": "n?", "answer": "one"}],
    }
    picture = png(index + 100 * len(split) if seed is None else seed, colour)
    return {"__key__": f"{split}-{index}", "png": picture, "json": meta}


def page(index: int, pairs: int) -> dict[str, Any]:
    """A document: a text without a picture, then pairs."""
    parts: list[Any] = ["hi"] if index % 2 else []
    members = {}
    for k in range(pairs):
        colour = list(COLOURS)[(index + k) % 3]
        members[f"{k}.png"] = png(1000 + 10 * index + k, colour)
        parts += [{"image": k}, f"{colour} {k}"]
    return {"__key__": f"page-{index}", **members, "json": {"parts": parts}}


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    # One training picture is a held-out one, under another name.
    write_shards(
        (scene("train", i, seed=7 if i == 3 else None) for i in range(20)), folder, "train"
    )
    write_shards((scene("val", i, seed=7 if i == 0 else None) for i in range(6)), folder, "val")
    return folder


@pytest.fixture(scope="module")
def pages(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pages")
    write_shards((page(i, 3 if i != 2 else 1) for i in range(5)), folder, "val")
    return folder


@pytest.fixture(scope="module")
def run(on_disk, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("fewshot") / "run"
    gate = ["--model.prompt=Pic: <image>", "--trainer.max_steps=2"]
    return train(on_disk.arguments(folder, *gate))


@pytest.fixture(scope="module")
def model(run) -> VisionLanguageModel:
    model = bridges.load(run, device="cpu")
    tiny.randomise(model.bridge)
    return model


def call(*arguments: object) -> int:
    return cli.main(["fewshot", *map(str, arguments), "--device=cpu"])


def result_of(folder: Path, task: str) -> dict[str, Any]:
    return json.loads((folder / f"fewshot_{task}.json").read_text())


def pool(model: VisionLanguageModel, shards: Path, split: str, **options: Any) -> Pool:
    return Pool.collect(sorted(shards.glob(f"{split}-*.tar")), model.vision, 100, **options)


# --- the command


@pytest.mark.parametrize(
    ("task", "metrics"),
    [
        ("caption", {"exact_match", "object", "relation", "colour"}),
        ("vqa", {"exact_match"}),
        ("classify", {"accuracy", "accuracy_per_token"}),
        ("nll", {"nll", "nll_exchanged", "nll_demos_exchanged", "nll_text_only"}),
    ],
)
def test_the_command_writes_a_curve_and_a_page(run, shards, tmp_path, capsys, task, metrics):
    options = ["--shots=0,1,2", "--selection=both", "--seeds=0,1", "--max_new_tokens=4"]
    options += [f"--task={task}", "--queries=5", "--batch_size=2", f"--out={tmp_path}"]
    if task == "vqa":
        options += ["--template=<image>{question}"]
    assert call("--run", run, "--data", shards, *options) == 0
    result = result_of(tmp_path, task)
    assert (result["task"], result["run"], result["seeds"]) == (task, str(run), [0, 1])
    assert result["selection"] == "both"
    assert (result["support"], result["queries"]) == (20, 5)
    assert result["command"].startswith(f"bridges fewshot --run {run}")
    assert list(result["shots"]) == ["0", "1", "2"]
    for selections in result["shots"].values():
        assert set(selections) == {"random", "rices"}
        for values in selections.values():
            assert set(values) == metrics
            for value in values.values():
                assert len(value["values"]) == 2
                assert value["mean"] == pytest.approx(sum(value["values"]) / 2)
                assert all(0 <= v < (30 if task == "nll" else 1.001) for v in value["values"])
    # 0 shots are the same for both; nothing but questions is left to chance in RICES.
    assert result["shots"]["0"]["random"] == result["shots"]["0"]["rices"]
    if task == "nll":
        # What no seed changes has no spread to measure.
        assert result["shots"]["2"]["rices"]["nll"]["std"] is None
        # Without demonstrated pictures there are none to exchange or to leave out.
        zero = result["shots"]["0"]["random"]
        assert zero["nll_demos_exchanged"] == zero["nll_text_only"] == zero["nll"]
        assert len({v["mean"] for v in result["shots"]["2"]["random"].values()}) == 4
        assert result["shots"]["2"]["random"]["nll"]["std"] > 0
        assert result["shots"]["2"]["random"] != result["shots"]["2"]["rices"]
    if task == "classify":
        assert result["classes"] == ["blue", "green", "red"]
    html = (tmp_path / f"fewshot_{task}.html").read_text()
    HTMLParser().feed(html)
    assert "<svg" in html
    assert html.count("data:image/jpeg;base64,") >= 5
    # Self-contained: nothing is fetched.
    assert not re.search(r"""(src|href)=["'](?!data:|#)""", html)
    assert "2 shots, rices" in html
    assert "5 queries" in capsys.readouterr().out


def test_the_json_file_may_be_named(run, shards, tmp_path):
    out = tmp_path / "curve.json"
    assert call("--run", run, "--data", shards, "--shots=1", "--queries=2", "--out", out) == 0
    result = json.loads(out.read_text())
    assert result["shots"]["1"]["random"]["nll"]["std"] is None
    assert result["template"] == "Pic: <image>"  # the run's own
    assert (tmp_path / "curve.html").is_file()


def test_cached_features_give_the_same(run, shards, tmp_path):
    arguments = ["--run", run, "--data", shards, "--shots=0,2", "--selection=both"]
    cache = f"--feature_cache={tmp_path / 'cache'}"
    for name, more in {"now": [], "cached": [cache]}.items():
        assert call(*arguments, "--out", tmp_path / name, *more) == 0
    now, cached = (result_of(tmp_path / name, "nll")["shots"] for name in ("now", "cached"))
    for shots, selections in now.items():
        # Which are drawn depends on names, and those of cached samples are others.
        for metric, value in selections["rices"].items():
            if shots != "0":
                found = cached[shots]["rices"][metric]["mean"]
                assert found == pytest.approx(value["mean"], abs=2e-3)
    html = (tmp_path / "cached" / "fewshot_nll.html").read_text()
    assert "data:image/jpeg;base64," in html


def test_seeds_are_reproducible(run, shards, tmp_path):
    for name, seeds in {"a": "0,1", "b": "0,1", "c": "2"}.items():
        options = ["--shots=0,2", f"--seeds={seeds}", "--out", tmp_path / name]
        assert call("--run", run, "--data", shards, *options) == 0
    a, b, c = (result_of(tmp_path / name, "nll")["shots"] for name in "abc")
    assert a == b
    values = a["2"]["random"]["nll"]["values"] + c["2"]["random"]["nll"]["values"]
    assert len(set(values)) == 3


def test_too_many_shots_are_refused_before_anything_is_read(run, shards, tmp_path, capsys):
    options = ["--run", run, "--data", shards, "--out", tmp_path]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fewshot_curve.Pool, "collect", None)
        assert call(*options, "--shots=0,16") == 2
        error = capsys.readouterr().err
        assert "with 16 shots" in error
        assert "at most 128" in error
    # Eight without texts fit, eight with them do not: known before the LM runs.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fewshot_curve, "Runner", None)
        assert call(*options, "--shots=8") == 2
        assert "with 8 shots" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--shots=0,x"], "numbers with commas"),
        (["--shots=1", "--support=1", "--queries=1", "--held_out={data}/copy.tar"], "found 0 s"),
        (["--task=classify", "--labels=breed"], "as 'breed' in the JSON"),
        (["--task=classify", "--shots=0", "--classes={data}/names"], "not in"),
        (["--task=vqa", "--template=<image>"], "for questions"),
        (["--template=no picture"], "expected '<image>' in it once"),
        (["--queries=1"], "at least 2 to exchange"),
        (["--task=documents", "--zero_shot_texts=0", "--bos=false"], "found --bos, --zero_shot_"),
        (["--task=documents", "--template=openflamingo"], "found --template with --task doc"),
        (["--task=documents", "--selection=rices", "--support=9"], "found --selection, --supp"),
        (["--task=documents", "--seeds=0,1"], "found --seeds with --task documents"),
        (["--task=documents"], "unreadable document"),
    ],
)
def test_what_cannot_be_asked_is_one_clear_error(run, shards, tmp_path, capsys, options, message):
    (shards / "names").write_text("red\nblue\n")
    shutil.copy(shards / "train-000000.tar", shards / "copy.tar")
    options = [option.format(data=shards) for option in options]
    shots = [] if any("shots" in option for option in options) else ["--shots=0,1"]
    assert call("--run", run, "--data", shards, "--out", tmp_path, *shots, *options) == 2
    assert message in capsys.readouterr().err


def test_a_folder_without_held_out_shards_is_refused(run, shards, tmp_path, capsys):
    write_shards([scene("train", 0)], tmp_path / "only", "train")
    assert call("--run", run, "--data", tmp_path / "only", "--out", tmp_path) == 2
    assert "found no held-out shards" in capsys.readouterr().err


# --- demonstrations


@pytest.fixture
def asked(run, shards, tmp_path, monkeypatch) -> Callable[..., dict[str, list[Prompt]]]:
    """Every prompt that the command asks, by setting; nothing is run."""
    seen: list[list[Prompt]] = []

    def note(runner: Runner, prompts: list[Prompt], answers: Any, wrong: str) -> Any:
        seen.append(prompts)
        return Outcome({"nll": 0.0}, [""] * len(prompts))

    monkeypatch.setattr("recipes.fewshot_tasks.likelihood", note)

    def ask(*options: str) -> list[list[Prompt]]:
        seen.clear()
        assert call("--run", run, "--data", shards, "--out", tmp_path, *options) == 0
        return list(seen)

    return ask


def test_zero_shots_have_two_demonstrations_without_images(asked, model):
    (rows,) = asked("--shots=0")
    for number, prompt in enumerate(rows):
        text = model.lm.tokenizer.decode(prompt.ids)
        image = "<image>" * model.bridge.num_tokens
        assert re.fullmatch(rf"<s>(Pic: cat on \w+</s>){{2}}Pic: {image}", text)
        # The query's alone; the first is also that of a training sample.
        assert prompt.pictures == [20 + number if number else 3]
    (rows,) = asked("--shots=0", "--zero_shot_texts=0")
    assert all(model.lm.tokenizer.decode(p.ids).startswith("<s>Pic: <image>") for p in rows)
    (rows,) = asked("--shots=0", "--zero_shot_texts=0", "--bos=false")
    assert all(model.lm.tokenizer.decode(p.ids).startswith("Pic: <image>") for p in rows)
    # Of RICES too they are drawn at random: it would look at the picture.
    assert len(asked("--shots=0", "--selection=both")) == 1


def test_rices_puts_the_most_similar_last_and_never_the_own_picture(asked, model, shards):
    support, queries = pool(model, shards, "train"), pool(model, shards, "val")
    (rows,) = asked("--shots=2", "--selection=rices")
    similarity = torch.nn.functional.cosine_similarity(
        queries.patches.mean(dim=1)[:, None], support.patches.mean(dim=1)[None], dim=-1
    )
    # The query's own picture is in the support set, and would come first.
    assert int(similarity[0].argmax()) == 3
    assert float(similarity[0, 3]) == pytest.approx(1)
    similarity[0, 3] = -1
    for row, prompt in enumerate(rows):
        order = similarity[row].argsort().tolist()
        assert prompt.pictures == [*order[-2:], 20 + row if row else 3]
    # At random it is left out too.
    for rows in asked("--shots=2", "--seeds=0,1,2,3,4,5,6,7,8,9,10,11,12,13,14"):
        assert 3 not in rows[0].pictures[:-1]


def test_the_texts_are_those_of_the_pictures(asked, model, shards):
    support = pool(model, shards, "train")
    for rows in asked("--shots=2", "--selection=both"):
        for prompt in rows:
            said = re.findall(
                r"Pic: (?:<image>)+([^<]*)</s>", model.lm.tokenizer.decode(prompt.ids)
            )
            expected = [support.examples[k].captions[0] for k in prompt.pictures[:-1]]
            assert said == expected


def test_equal_keys_count_as_one_picture(model, shards):
    support, queries = pool(model, shards, "train"), pool(model, shards, "val")
    alike = queries.examples[1].__class__(**{**vars(queries.examples[1]), "key": "train-5"})
    assert (~support.allowed(alike)).nonzero()[:, 0].tolist() == [5]
    assert (~support.allowed(queries.examples[0])).nonzero()[:, 0].tolist() == [3]


# --- figures


@torch.no_grad()
def loss_of(model: VisionLanguageModel, runner: Runner, prompt: Prompt, answer: list[int]) -> Any:
    """Summed loss of an answer, the whole sequence by itself."""
    row = (prompt.ids + answer, [IGNORE] * len(prompt.ids) + answer)
    batch = model.prompt_encoder().pad([row])
    features = runner._features([prompt])
    output = model(batch.input_ids, batch.attention_mask, batch.labels, features)
    return float(output.token_losses.sum())


@pytest.mark.parametrize("batch_size", [1, 4])
def test_the_loss_is_that_of_whole_sequences(model, shards, batch_size):
    support, queries = pool(model, shards, "train"), pool(model, shards, "val")
    text = FewShotPrompts.of(model)
    task = Likelihood(text=text)
    runner = Runner(model, [*support.patches, *queries.patches], batch_size)
    shots = [task.shot(example, random.Random(0)) for example in support.examples]
    prompts = [Prompt(text([shots[r]]), [r, 20 + r]) for r in range(6)]
    outcome = task.run(runner, prompts, queries.examples)
    answers = [text.answer(query.captions[0]) for query in queries.examples]
    for name, rows in {"nll": prompts, "nll_exchanged": exchanged(prompts, "query")}.items():
        losses = [loss_of(model, runner, p, a) for p, a in zip(rows, answers, strict=True)]
        assert outcome.metrics[name] == pytest.approx(
            sum(losses) / sum(map(len, answers)), rel=1e-4
        )
        expected = torch.tensor([[n, len(a)] for n, a in zip(losses, answers, strict=True)])
        torch.testing.assert_close(outcome.sums[name], expected.double(), rtol=1e-4, atol=1e-4)
    assert outcome.metrics["nll"] != outcome.metrics["nll_exchanged"]
    # The demonstrations keep their pictures.
    wrong = [prompt.pictures for prompt in exchanged(prompts, "query")]
    assert wrong == [*([r, 21 + r] for r in range(5)), [5, 20]]
    assert exchanged(prompts)[0].pictures == [1, 21]
    assert exchanged(prompts, "demonstrations")[5].pictures == [0, 25]


def test_the_class_is_the_likeliest_of_the_names(model, shards):
    queries = pool(model, shards, "val")
    text = FewShotPrompts.of(model)
    names = ["red", "green", "blue", "a long name"]
    task = Classes(text=text, names=names, labels="colour")
    runner = Runner(model, list(queries.patches))
    prompts = [Prompt(text([]), [row]) for row in range(6)]
    outcome = task.run(runner, prompts, queries.examples)
    right = per_token = 0
    for row, (prompt, query) in enumerate(zip(prompts, queries.examples, strict=True)):
        losses = [loss_of(model, runner, prompt, text.answer(name)) for name in names]
        means = [loss / len(text.answer(n)) for loss, n in zip(losses, names, strict=True)]
        said = names[losses.index(min(losses))]
        assert outcome.answers[row] == said
        right += said == query.meta["colour"]
        per_token += names[means.index(min(means))] == query.meta["colour"]
    assert outcome.metrics == {"accuracy": right / 6, "accuracy_per_token": per_token / 6}
    # Of several truths each is right.
    task = Classes(text=text, names=["cat", "dog"], labels="objects")
    outcome = task.run(runner, prompts, queries.examples)
    assert outcome.metrics["accuracy"] >= 0.5
    assert task.truth(queries.examples[1]) == "cat or dog"


def test_answers_are_counted_but_for_articles_and_case(model, shards, monkeypatch):
    queries = pool(model, shards, "val", questions=True)
    written = ["The Red.", "green\nQuestion: n?", "blues", " blue", "a green", ""]
    monkeypatch.setattr(Runner, "generate", lambda *_, **__: written)
    text = FewShotPrompts.of(model, "<image>{question}")
    task = Answers(text=text)
    outcome = task.run(Runner(model, []), [], queries.examples)
    assert outcome.metrics == {"exact_match": pytest.approx(3 / 6)}
    assert outcome.answers[1] == "green"
    captions = Captions(text=text)
    monkeypatch.setattr(
        Runner,
        "generate",
        lambda *_, **__: ["a cat on red", "GREEN", *["a cat on a blue ground"] * 4],
    )
    metrics = captions.run(Runner(model, []), [], queries.examples).metrics
    assert metrics["exact_match"] == pytest.approx(2 / 6)
    assert metrics["object"] == pytest.approx(3 / 6)
    assert metrics["colour"] == pytest.approx(3 / 6)
    assert metrics["relation"] == 0


@pytest.mark.parametrize(
    ("text", "truth", "same"),
    [
        ("The Red.", "red", True),
        ("1,500", "1500", True),
        ("it's 5%", "its 5", True),
        ("red-haired", "redhaired", True),
        ("covid-19.", "COVID19", True),
        ("(-1)", "\N{MINUS SIGN}1", True),
        ("15", "1.5", False),
        ("1", "-1", False),
        ("5", ".5", False),
        ("12", "1/2", False),
        ("1030", "10:30", False),
        ("35", "3,5", False),
        ("", "A", False),
        ("", "!", False),
        ("", "", False),
        ("the", "a", False),
        ("A.", "a", True),
        ("!", "?", False),
        ("!", " ! ", True),
    ],
)
def test_texts_are_the_same_but_for_what_says_nothing(text: str, truth: str, same: bool):
    assert same_text(text, ["other", truth]) is same
    assert same_text(truth, [text]) is same


def test_another_picture_is_never_the_same_one():
    assert other_pictures([[1], [2], [3]]) == [[2], [3], [1]]
    # Several captions of one picture.
    assert other_pictures([[7], [7], [7], [8]]) == [[8], [8], [8], [7]]
    # From the end; a row of fewer gives them again, and one of none is passed over.
    assert other_pictures([[1, 2, 3], [4], []]) == [[4, 4, 4], [3], []]
    with pytest.raises(ValueError, match="the same picture in the place of number 2 in all of 2"):
        other_pictures([[1, 5], [2, 5]])


def test_several_captions_of_one_picture_are_no_exchange(run, shards, tmp_path, capsys):
    write_shards(
        (scene("val", i, seed=5) | {"png": png(5, "red")} for i in range(3)), tmp_path, "val"
    )
    held_out = f"--held_out={tmp_path}/val-*.tar"
    assert call("--run", run, "--data", shards, held_out, "--shots=0", "--out", tmp_path) == 2
    assert "the same picture" in capsys.readouterr().err


def test_a_single_question_needs_no_list(model, tmp_path):
    sample = scene("val", 0)
    sample["json"] = {"qa": {"question": " hue? ", "answer": "red"}}
    write_shards([sample], tmp_path, "val")
    assert pool(model, tmp_path, "val", questions=True).examples[0].questions == [("hue?", "red")]


def test_captions_that_are_cut_are_counted(run, shards, tmp_path):
    long = [scene("val", i) for i in range(3)]
    long[1]["json"]["captions"] = ["x" * 70]
    write_shards(long, tmp_path / "long", "val")
    options = ["--held_out", f"{tmp_path}/long/*.tar", "--shots=0", "--zero_shot_texts=1"]
    assert call("--run", run, "--data", shards, *options, "--out", tmp_path) == 0
    assert result_of(tmp_path, "nll")["cut"] == {"scored": 1, "demonstrations": 0}
    html = (tmp_path / "fewshot_nll.html").read_text()
    assert "1 of the scored texts" in html
    assert "demonstrated texts" not in html


def test_an_end_that_is_not_scored(model, shards):
    """OpenFlamingo's way: a name that begins another is then the likelier."""
    queries = pool(model, shards, "val")
    text = FewShotPrompts.of(model)
    runner = Runner(model, list(queries.patches))
    prompts = [Prompt(text([]), [row]) for row in range(6)]
    task = Classes(text=text, names=["car", "carrot"], labels="colour", end=False)
    assert task.run(runner, prompts, queries.examples).answers == ["car"] * 6


@pytest.mark.parametrize("beams", [1, 2])
def test_answers_are_those_of_each_query_alone(model, shards, beams):
    queries = pool(model, shards, "val")
    text = FewShotPrompts.of(model, bos=False)  # as a pair in training
    prompts = [Prompt(text([]), [row]) for row in range(6)]
    task = Captions(text=text, max_new_tokens=6, num_beams=beams, length_penalty=0.0)
    together = task.run(Runner(model, list(queries.patches), 4), prompts, queries.examples).answers
    runner = Runner(model, list(queries.patches))
    alone = [
        task.run(runner, [p], [q]).answers[0]
        for p, q in zip(prompts, queries.examples, strict=True)
    ]
    assert together == alone
    with torch.no_grad():
        features = runner._features(prompts[:1])
        one = bridges.caption_features(model, features, max_new_tokens=6, num_beams=beams)
    assert beams > 1 or one == alone[:1]


def test_a_resampler_that_reads_is_given_the_question(tmp_path, shards):
    tiny_run.save_tokenizer(tmp_path)
    sizes = {"num_queries": 3, "dim": 16, "depth": 2, "num_heads": 2, "tokenizer": str(tmp_path)}
    resampler = {"class_path": "qformer.QFormer", "init_args": sizes}
    bridge = {"class_path": "bridges.SoftPrefix", "init_args": {"resampler": resampler}}
    torch.manual_seed(0)
    model = VisionLanguageModel.connect(
        tiny.vision_encoder(), tiny.language_model(), bridges.bridge_factory(bridge)
    )
    tiny.randomise(model.bridge)
    queries = pool(model, shards, "val", questions=True)
    text = FewShotPrompts.of(model)
    runner = Runner(model, list(queries.patches), 2)
    asked = ["a cat", None, "dog on red"]
    prompts = [Prompt(text([]), [0], question) for question in asked]
    found = [float(scores) for scores, _ in runner.score(prompts, [[text.answer("x")]] * 3)]
    for prompt, score in zip(prompts, found, strict=True):
        question = prompt.question or CAPTION_INSTRUCTION
        ids, answer = prompt.ids, text.answer("x")
        batch = model.prompt_encoder().pad([(ids + answer, [IGNORE] * len(ids) + answer)])
        read = encode_instruction(model.bridge.resampler.tokenizer, [question])  # pyright: ignore
        with torch.no_grad():
            output = model(
                batch.input_ids,
                batch.attention_mask,
                batch.labels,
                runner._features([prompt]),
                read,
            )
        assert score == pytest.approx(-float(output.token_losses.sum()), rel=1e-4)
    assert len({round(score, 4) for score in found}) == 3


# --- documents


def test_documents_are_asked_after_ever_more_of_them(run, pages, tmp_path, capsys):
    out = ["--out", tmp_path, "--task=documents"]
    assert (
        call("--run", run, "--data", pages, "--shots=0,1,2", *out, "--held_out", f"{pages}/*.tar")
        == 0
    )
    result = result_of(tmp_path, "documents")
    assert result["queries"] == 4
    assert result["skipped"] == {"queries": {"fewer than 3 pairs of pictures and text": 1}}
    assert list(result["shots"]) == ["0", "1", "2"]
    model = bridges.load(run, device="cpu")
    encode = model.prompt_encoder()
    documents = [page(i, 3) for i in (0, 1, 3, 4)]
    patches = [
        model.vision.encode(
            torch.stack(
                [model.vision.preprocess(Image.open(io.BytesIO(d[f"{k}.png"]))) for k in range(3)]
            )[None]
        ).patches[0]
        for d in documents
    ]
    by_metric = {
        "nll": (0, 0),
        "nll_exchanged": (1, 1),
        "nll_demos_exchanged": (1, 0),
        "nll_text_only": (None, 0),
    }
    for shots in (0, 1, 2):
        assert set(result["shots"][str(shots)]["document"]) == set(by_metric)
        for metric, (before, by) in by_metric.items():
            total = count = 0
            for row, document in enumerate(documents):
                texts = [p for p in document["json"]["parts"] if p != "hi"][1::2]
                parts: list[Any] = []
                for text in texts[-shots - 1 : -1]:
                    parts += [*([] if before is None else [None]), text, END_OF_CHUNK]
                ids = encode.bos() + encode.document([*parts, None])[0]
                answer = encode.document([texts[-1], END_OF_CHUNK])[0]
                shown = patches[(row + by) % 4][2:]
                if before is not None:
                    shown = torch.cat([patches[(row + before) % 4][2 - shots : 2], shown])
                prompt = Prompt(ids, list(range(len(shown))))
                runner = Runner(model, list(shown))
                total += loss_of(model, runner, prompt, answer)
                count += len(answer)
            found = result["shots"][str(shots)]["document"][metric]["mean"]
            assert math.isclose(found, total / count, rel_tol=1e-4)
    zero, two = (result["shots"][shots]["document"] for shots in "02")
    assert zero["nll_text_only"] == zero["nll_demos_exchanged"] == zero["nll"]
    assert len({value["mean"] for value in two.values()}) == 4
    html = (tmp_path / "fewshot_documents.html").read_text()
    assert "what the right ones add" in html
    assert html.count("data:image/jpeg;base64,") == 3 * 4
    assert not re.search(r"""(src|href)=["'](?!data:|#)""", html)
    # The last text with the last two pictures, and with another document's in the last place.
    exchange = result["exchange"]
    assert (exchange["images"], exchange["documents"]) == (2, 4)
    assert exchange["loss"]["right"][1] == pytest.approx(
        result["shots"]["1"]["document"]["nll"]["mean"], rel=1e-4
    )
    assert exchange["gap"]["image 2"]["text 1"] == {"mean": 0, "se": 0}
    assert exchange["largest_change_before"] == 0
    assert "image 2 exchanged" in html
    assert "image 2 exchanged" in capsys.readouterr().out


def test_one_picture_is_not_exchanged_one_at_a_time(run, pages, tmp_path):
    out = ["--out", tmp_path, "--task=documents", "--shots=0"]
    assert call("--run", run, "--data", pages, *out) == 0
    assert "exchange" not in result_of(tmp_path, "documents")
    assert "One picture exchanged" not in (tmp_path / "fewshot_documents.html").read_text()


def test_cached_documents_give_the_same(run, pages, tmp_path):
    common = ["--run", run, "--data", pages, "--task=documents", "--shots=0,1"]
    cache = f"--feature_cache={tmp_path / 'cache'}"
    for name, more in {"now": [], "cached": [cache]}.items():
        assert call(*common, "--out", tmp_path / name, *more) == 0
    now, cached = (result_of(tmp_path / n, "documents") for n in ("now", "cached"))
    assert now["skipped"] == cached["skipped"]
    for shots, found in now["shots"].items():
        for metric, value in found["document"].items():
            again = cached["shots"][shots]["document"][metric]["mean"]
            assert again == pytest.approx(value["mean"], abs=2e-3)
    # The pictures are shown too: those of the last two texts of each, in their order.
    documents = [page(i, 3) for i in (0, 1, 3, 4)]
    expected = [
        thumbnail(open_image(document[f"{k}.png"]), fewshot_curve.SIDE)
        for document in documents
        for k in (2, 1)  # the query first
    ]
    for name in ("now", "cached"):
        html = (tmp_path / name / "fewshot_documents.html").read_text()
        assert re.findall(r'src="(data:image/jpeg[^"]+)"', html) == expected
        assert 'class="none"' not in html


def test_features_without_their_pictures_have_no_thumbnails(run, pages, tmp_path):
    cache = ["--run", run, "--data", pages, "--task=documents", "--shots=0,1"]
    assert call(*cache, f"--feature_cache={tmp_path}", "--out", tmp_path) == 0
    (features,) = tmp_path.glob("*/val-*.tar")
    out = ["--held_out", features, "--out", tmp_path / "alone"]
    assert call("--run", run, "--data", pages, "--task=documents", "--shots=0,1", *out) == 0
    html = (tmp_path / "alone" / "fewshot_documents.html").read_text()
    assert 'class="none"' in html
    assert "data:image" not in html


def test_documents_longer_than_the_context_are_left_out(run, tmp_path, capsys):
    long = page(0, 3)
    long["json"] = {"parts": [{"image": 0}, "x" * 120, {"image": 1}, "y"]}
    write_shards([long], tmp_path / "long", "val")
    arguments = ["--run", run, "--data", tmp_path / "long", "--task=documents", "--shots=1"]
    assert call(*arguments, "--out", tmp_path) == 2
    assert "longer than the LM's context of 128" in capsys.readouterr().err


def test_pictures_are_decoded_once_and_only_of_documents_that_are_asked(
    model, tmp_path, monkeypatch
):
    """However often a document shows them."""
    repeated, short, long = page(0, 2), page(1, 1), page(2, 2)
    repeated["json"] = {"parts": [{"image": 0}, "a", {"image": 0}, {"image": 1}, {"image": 0}, "b"]}
    long["json"] = {"parts": [{"image": 0}, "x" * 120, {"image": 1}, "y"]}
    again = page(3, 1) | {"0.png": repeated["1.png"], "json": {"parts": [{"image": 0}, "c"] * 2}}
    write_shards([short, long, repeated, again], tmp_path, "val")
    decoded: list[tuple[str, int]] = []
    decode = fewshot_documents.decode_picture

    def note(raw: Any, document: Any, image: int, *into: Any) -> Any:
        decoded.append((document.key, image))
        return decode(raw, document, image, *into)

    monkeypatch.setattr(fewshot_documents, "decode_picture", note)
    (shard,) = tmp_path.glob("val-*.tar")
    found = DocumentPool.collect(
        [shard], model.vision, model.prompt_encoder(), 9, shots=1, max_length=100
    )
    assert decoded == [("page-0", 0), ("page-0", 1), ("page-3", 0)]
    assert [[c.pictures for c in chunks] for chunks in found.documents] == [
        [[0], [0, 1, 0]],
        [[1], [1]],  # of the other document
    ]
    assert len(found.patches) == 2
    assert found.places == [(0, 0), (0, 1)]
    assert sum(found.skipped.values()) == 2
    assert set(found.thumbnails([shard], 2, 8)) == {0, 1}
    # The query has three pictures of its own.
    prompt = found.prompts(1)[0][0]
    assert (prompt.pictures, prompt.without_demonstrated().pictures) == ([0, 0, 1, 0], [0, 1, 0])


def test_documents_of_one_common_picture_cannot_be_exchanged(run, tmp_path, capsys):
    pages = [page(i, 2) | {"1.png": png(1, "red")} for i in range(3)]
    write_shards(pages, tmp_path, "val")
    options = ["--task=documents", "--shots=0,1", "--out", tmp_path]
    assert call("--run", run, "--data", tmp_path, *options) == 2
    assert "found the same picture" in capsys.readouterr().err
