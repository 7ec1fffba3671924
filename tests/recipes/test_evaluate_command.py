"""`bridges evaluate` from a run to figures and a page."""

import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import tiny_run
import torch
from PIL import Image

from recipes import cli
from recipes.bootstrap import interval
from recipes.evaluate_command import BRIDGE_TASKS, STAGE1_TASKS, evaluate
from recipes.evaluate_page import NAMES, grid
from recipes.evaluate_scores import of_rows
from recipes.shard_writer import write_shards
from recipes.train import train

PICTURES = 6
COLOURS = {"red": (200, 30, 30), "green": (30, 160, 60), "blue": (40, 70, 200)}
FEW = ("--shots=0,1", "--few=4", "--max_new_tokens=4", "--resamples=200")


def scene(split: str, index: int) -> dict[str, Any]:
    """A picture of its own with a caption, a question and a colour."""
    colour = list(COLOURS)[index % 3]
    noise = torch.randint(-25, 25, (12, 12, 3), generator=torch.Generator().manual_seed(index))
    pixels = (torch.tensor(COLOURS[colour]) + noise).clamp(0, 255).byte().numpy()
    Image.fromarray(pixels).save(png := io.BytesIO(), "PNG")
    meta = {
        "captions": [f"cat {index} on {colour}"],
        "objects": ["cat", "dog"][: 1 + index % 2],
        "relation": [None, "above"][index % 2],
        "colour": colour,
        "qa": [{"question": "hue?", "answer": colour}],
    }
    return {"__key__": f"{split}-{index}", "png": png.getvalue(), "json": meta}


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    write_shards((scene("train", i) for i in range(20)), folder, "train")
    write_shards((scene("val", i + 20) for i in range(PICTURES)), folder, "val")
    return folder


@pytest.fixture(scope="module")
def run(on_disk, tmp_path_factory) -> Path:
    return train(on_disk.arguments(tmp_path_factory.mktemp("evaluate") / "run"))


@pytest.fixture(scope="module")
def stage1(on_disk, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("stage1")
    tiny_run.save_stage1_run(folder, on_disk.vision)
    return folder


def call(*arguments: object) -> int:
    return cli.main(["evaluate", *map(str, arguments), "--device=cpu"])


def check_page(folder: Path) -> str:
    page = (folder / "evaluation.html").read_text()
    HTMLParser().feed(page)
    # Self-contained: nothing is fetched.
    assert not re.search(r"""(src|href)=["'](?!data:|#)""", page)
    return page


def test_a_bridge_does_every_task(run, shards, tmp_path, capsys):
    assert call(run, "--data", shards, "--out", tmp_path, *FEW) == 0
    result = json.loads((tmp_path / "evaluation.json").read_text())
    assert list(result["tasks"]) == list(BRIDGE_TASKS)
    assert result["left_out"] == {} and result["skipped"] == []
    assert (result["run"], result["data"], result["pictures"]) == (str(run), str(shards), PICTURES)
    assert result["command"].startswith(f"bridges evaluate {run} --data")
    assert result["resamples"] == 200
    for task in result["tasks"].values():
        for figure, found in task["metrics"].items():
            assert 0 <= found["low"] <= found["value"] <= found["high"], figure
            if not figure.startswith(("nll", "cider")):
                assert found["high"] <= 1
        shown = [c for row in grid(task)["rows"] for c in row["cells"] if c is not None]
        chances = sum(name in task["chance"] for name in task["metrics"])
        assert len(shown) == len(task["metrics"]) + chances
    likely = result["tasks"]["likelihood"]["metrics"]
    assert set(likely) == {"nll", "nll_shuffled", "nll_blind"}
    assert result["tasks"]["classify"]["classes"] == ["blue", "green", "red"]
    assert result["tasks"]["retrieval"]["pictures"] == 4
    assert {"cider_d_0_shots", "cider_d_1_shots", "nll_1_shots"} < set(
        result["tasks"]["fewshot"]["metrics"]
    )
    page = check_page(tmp_path)
    assert page.count("data:image/jpeg;base64,") == page.count('class="card"') == PICTURES
    assert all(name in page for name in NAMES.values())
    assert "Zero-shot classes" in capsys.readouterr().out


def test_few_shot_figures_are_those_of_the_few_shot_command(run, shards, tmp_path):
    assert call(run, "--data", shards, "--out", tmp_path, "--tasks=fewshot", *FEW) == 0
    found = json.loads((tmp_path / "evaluation.json").read_text())["tasks"]["fewshot"]["metrics"]
    options = ["--shots=0,1", "--queries=4", "--batch_size=32", "--device=cpu"]
    compared = {"caption": ["exact_match", "colour"], "nll": ["nll", "nll_text_only"]}
    for task, names in compared.items():
        more = ["--max_new_tokens=4"] if task == "caption" else []
        arguments = ["--run", str(run), "--data", str(shards), f"--task={task}"]
        assert cli.main(["fewshot", *arguments, *options, *more, "--out", str(tmp_path)]) == 0
        curve = json.loads((tmp_path / f"fewshot_{task}.json").read_text())["shots"]
        for name in names:
            for shots in ("0", "1"):
                expected = curve[shots]["random"][name]["mean"]
                assert found[f"{name}_{shots}_shots"]["value"] == pytest.approx(expected)


def test_the_same_twice_to_the_bit_and_with_cached_features(run, shards, tmp_path):
    tasks = "--tasks=caption,likelihood,vqa,classify"
    cache = [f"--feature_cache={tmp_path / 'cache'}"]
    found = []
    for name, more in {"a": [], "b": [], "cached": cache}.items():
        out = tmp_path / name
        assert call(run, "--data", shards, "--out", out, tasks, *FEW, *more) == 0
        found.append(json.loads((out / "evaluation.json").read_text())["tasks"])
    assert found[0] == found[1]
    for name in ("nll", "nll_shuffled", "nll_blind"):
        now, cached = (one["likelihood"]["metrics"][name]["value"] for one in found[1:])
        assert cached == pytest.approx(now, abs=1e-2)
    assert check_page(tmp_path / "cached").count("data:image") == PICTURES


def test_a_stage1_run_ranks_and_classifies(stage1, shards, tmp_path, capsys):
    assert call(stage1, "--data", shards, "--out", tmp_path, "--resamples=200") == 0
    result = json.loads((tmp_path / "evaluation.json").read_text())
    assert list(result["tasks"]) == list(STAGE1_TASKS)
    metrics = result["tasks"]["retrieval"]["metrics"]
    assert {"text_to_image_recall@1", "image_to_text_recall@10_itm"} < set(metrics)
    assert result["tasks"]["retrieval"]["chance"]["text_to_image_recall@5"] == pytest.approx(5 / 6)
    assert {"accuracy@1", "accuracy@1_blind"} < set(result["tasks"]["classify"]["metrics"])
    check_page(tmp_path)
    assert call(stage1, "--data", shards, "--out", tmp_path, "--tasks=caption") == 2
    assert "has no LM; expected some of retrieval, classify" in capsys.readouterr().err


def test_what_cannot_be_done_is_left_out_or_refused(run, tmp_path, capsys):
    """Named shards have none beside them to demonstrate with; these have no question, no class."""
    plain = [scene("val", i) for i in range(4)]
    for one in plain:
        one["json"] = {"captions": one["json"]["captions"]}
    write_shards(plain, tmp_path / "shards", "val")
    data = tmp_path / "shards" / "val-000000.tar"
    arguments = [run, "--data", data, "--out", tmp_path, *FEW]
    assert call(*arguments) == 0
    result = json.loads((tmp_path / "evaluation.json").read_text())
    assert list(result["tasks"]) == ["caption", "likelihood", "retrieval"]
    assert set(result["left_out"]) == {"vqa", "fewshot", "classify"}
    assert "left out" in check_page(tmp_path)
    assert "vqa is left out: found no questions" in capsys.readouterr().out
    for task, reason in {"vqa": "qa", "fewshot": "train-", "classify": "--labels"}.items():
        assert call(*arguments, f"--tasks=caption,{task}") == 2
        error = capsys.readouterr().err
        assert f"task {task}: found" in error and reason in error
    assert call(*arguments, "--tasks=paint") == 2
    assert "found task 'paint'" in capsys.readouterr().err
    assert call(*arguments, "--shots=many") == 2
    assert "--shots 'many'" in capsys.readouterr().err
    assert call(*arguments, "--batch_size=0") == 2
    assert "--batch_size 0; expected at least 1" in capsys.readouterr().err


def test_skipped_samples_are_named(run, tmp_path):
    samples = [scene("val", i) for i in range(5)]
    samples[2]["png"] = b"no picture"
    write_shards(samples, tmp_path / "shards", "val")
    result = evaluate(
        run, str(tmp_path / "shards"), tasks="likelihood", pictures=3, out=tmp_path, device="cpu"
    )
    assert result["pictures"] == 3
    (skipped,) = result["skipped"]
    assert skipped["sample"].endswith("val-2")
    assert json.loads((tmp_path / "evaluation.json").read_text()) == result
    assert "1 samples were skipped" in check_page(tmp_path)


def test_an_interval_is_of_the_pictures_that_have_a_part(run, shards, tmp_path):
    """The interval is the bootstrap's own; a figure of one picture has none."""
    options = {"tasks": "caption", "out": tmp_path, "device": "cpu", "max_new_tokens": 4}
    result = evaluate(run, str(shards), pictures=2, **options)
    # Of the first two scenes one has a relation.
    found = result["tasks"]["caption"]["metrics"]["relation"]
    assert (found["low"], found["high"]) == (None, None)
    likely = evaluate(run, str(shards), **{**options, "tasks": "likelihood"})
    found = likely["tasks"]["likelihood"]["metrics"]["nll"]
    assert found["high"] - found["value"] == pytest.approx(found["value"] - found["low"])
    values = torch.tensor([0.0, 1.0, 1.0, 0.0])
    sums = of_rows(values, torch.tensor([0, 0, 1, 2]), 4)
    assert sums.rows.tolist() == [[1, 2], [1, 1], [0, 1], [0, 0]]
    assert interval([sums]).value == 0.5
