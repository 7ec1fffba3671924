"""`bridges ablate`: what is compared, what is refused, what is kept, what is reported."""

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny_grid import MLP, PERCEIVER, RESAMPLER, tiny_grid, write_scenes
from tiny_run import save_tokenizer

from recipes import ablate
from recipes.ablation_fair import UnfairError
from recipes.ablation_plan import slug
from recipes.ablation_sweep import final_loss
from recipes.ablation_table import AblationTable
from recipes.cli import main
from recipes.run_log import read_log

FIGURES = ("nll", "nll_shuffled", "nll_blind", "cider_d", "bleu_4", "rouge_l")


@pytest.fixture(scope="session")
def shards(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("distinct") / "shards"
    write_scenes(folder)
    return folder


@pytest.fixture(scope="session")
def swept(tmp_path_factory, on_disk, shards) -> AblationTable:
    """Two resamplers × two readers, blind and twin, two seeds."""
    return ablate(tiny_grid(on_disk, shards), tmp_path_factory.mktemp("swept"), devices=1)


def small(on_disk, shards, **changes: Any) -> dict[str, Any]:
    """A grid of one cell."""
    return tiny_grid(on_disk, shards, **({"axes": {}, "controls": [], "seeds": [0]} | changes))


def figures(table: AblationTable) -> dict[tuple[str, int], dict[str, float]]:
    return {
        (row["cell"], row["seed"]): {name: row[name] for name in FIGURES} for row in table.rows()
    }


def results_of(out: Path) -> dict[Path, dict[str, Any]]:
    return {p: json.loads(p.read_text()) for p in sorted(out.glob("*/*/*/result.json"))}


def test_every_cell_and_seed_has_a_row(swept):
    with (swept.out / "results.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    names = {
        "soft_prefix, mlp",
        "soft_prefix, perceiver",
        "gated_xattn, mlp",
        "gated_xattn, perceiver",
        "blind",
    }
    seen = {(row["cell"], int(row["seed"])) for row in rows}
    twins = {("soft_prefix, mlp (twin)", 1000), ("soft_prefix, mlp (twin)", 1001)}
    assert seen == {(name, seed) for name in names for seed in (0, 1)} | twins
    assert len({row["sample_order_digest"] for row in rows}) == 1
    assert {row["steps"] for row in rows} == {"4"} and {row["samples"] for row in rows} == {"16"}
    assert all(float(row["train_flops"]) > 0 and float(row["peak_bytes"]) > 0 for row in rows)
    assert len(swept) == len(rows) == 12
    tokens = {row["cell"]: row["visual_tokens"] for row in rows}
    assert tokens["soft_prefix, mlp"] == tokens["gated_xattn, mlp"] == tokens["blind"] == "9"
    assert tokens["gated_xattn, perceiver"] == "3"


def test_the_table_goes_to_pandas(swept):
    frame = swept.to_pandas()
    assert len(frame) == 12
    assert set(frame.groupby("cell").nll.count()) == {2}
    assert frame.equals(type(frame)(list(swept)))


def test_the_report_stands_alone(swept):
    page = (swept.out / "report.html").read_text()
    assert not re.findall(r"""\b(?:src|href)=["'](?!data:|#)[^"']*""", page)
    for cell in swept.results["cells"]:
        assert cell["name"] in page
    assert "| " in (swept.out / "results.md").read_text()
    # A perceiver's attention can be drawn, a blind one's has nothing to show.
    drawn = {cell["name"]: cell["attention"] for cell in swept.results["cells"]}
    assert drawn["soft_prefix, perceiver"][0].startswith("data:image/jpeg")
    assert drawn["blind"] == []
    assert len(swept.results["shown"]) == 6
    gates = {cell["name"]: set(cell["runs"][0]["gates"]) for cell in swept.results["cells"]}
    assert gates["gated_xattn, mlp"] == {"attn.0", "ff.0", "attn.2", "ff.2"}
    assert gates["soft_prefix, mlp"] == set()


def test_a_blind_bridge_says_the_same_of_every_picture(swept):
    blind = next(cell for cell in swept.results["cells"] if cell["kind"] == "blind")
    for run in blind["runs"]:
        assert run["metrics"]["nll"] == run["metrics"]["nll_shuffled"]
        assert run["metrics"]["nll"] == run["metrics"]["nll_blind"]
        assert run["metrics"]["picture_gain"] == 0
    assert len(set(blind["captions"])) == 1


def test_a_twin_is_the_baseline_with_other_seeds(swept):
    twin = next(cell for cell in swept.results["cells"] if cell["kind"] == "twin")
    assert twin["twin_of"] == swept.results["baseline"] == "soft_prefix, mlp"
    own = figures(swept)
    assert own["soft_prefix, mlp", 0] != own["soft_prefix, mlp (twin)", 1000]
    for comparison in twin["against_baseline"].values():
        assert comparison["p_adjusted"] > 0.05


def test_the_same_grid_gives_the_same_numbers_to_the_bit(swept, on_disk, shards, tmp_path):
    axes = {"resampler": {"mlp": {RESAMPLER: MLP}, "perceiver": {RESAMPLER: PERCEIVER}}}
    grid = tiny_grid(on_disk, shards, axes=axes, controls=["twin"])
    # Other neighbours, another order, two processes beside each other.
    again = figures(ablate(grid | {"seeds": [1, 0]}, tmp_path, devices=2))
    before = figures(swept)
    assert len(again) == 6
    for (cell, seed), found in again.items():
        assert found == before[f"soft_prefix, {cell}", seed]


def test_identical_cells_do_not_differ(on_disk, shards, tmp_path):
    grid = small(on_disk, shards, axes={}, cells={"one": {}, "other": {}})
    table = ablate(grid, tmp_path, devices=1)
    (other,) = (cell for cell in table.results["cells"] if cell["name"] == "other")
    assert {c["p"] for c in other["against_baseline"].values()} == {1.0}
    assert {c["difference"] for c in other["against_baseline"].values()} == {0.0}


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ({"data.seed": 1}, "data.seed: 1 in the cell 'cheat'.*same samples in the same order"),
        ({"data.shuffle_buffer": 2}, "data.shuffle_buffer: 2 .*same order"),
        ({"data.batch_size": 5}, "data.batch_size: 5 .*expected 4"),
        ({"trainer.max_steps": 5}, "trainer.max_steps: 5 .*expected 4.*train as long"),
    ],
)
def test_a_cheat_in_the_grid_is_refused(setting, says, on_disk, shards, tmp_path, capsys):
    grid = small(on_disk, shards, cells={"honest": {}, "cheat": setting})
    with pytest.raises(UnfairError, match=says):
        ablate(grid, tmp_path / "out", devices=1)
    path = tmp_path / "grid.yaml"
    path.write_text(yaml.safe_dump(grid, sort_keys=False))
    assert main(["ablate", str(path), "--out", str(tmp_path / "out")]) == 2
    assert "'cheat'" in capsys.readouterr().err
    assert not (tmp_path / "out" / "report.html").exists()


@pytest.mark.parametrize(
    ("key", "value"),
    [("sample_order_digest", "0" * 16), ("steps", 3), ("features_digest", "other"), ("samples", 1)],
)
def test_a_run_that_was_given_something_else_is_refused(key, value, swept, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(swept.out, out)
    # The cells of a grid lie where their configs say, so that they are found again.
    path = out / "cells" / slug("gated_xattn, mlp") / "seed-1" / "result.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    name = "gated_xattn, mlp, seed 1"
    grid = json.loads((swept.out / "grid.json").read_text())
    with pytest.raises(UnfairError, match=f"found {key} {value!r} in {name!r}"):
        ablate(grid, out, devices=1)
    assert not list(out.glob("re*.*")), "an earlier report would be taken for this one's"


def test_an_order_that_only_training_shows_is_refused(on_disk, shards, tmp_path):
    cheat = {"trainer.callbacks": [{"class_path": "third_party_bridge.OtherOrder"}]}
    grid = small(on_disk, shards, cells={"honest": {}, "cheat": cheat, "never begun": {}})
    with pytest.raises(UnfairError, match=r"found sample_order_digest .* in 'cheat, seed 0'"):
        ablate(grid, tmp_path, devices=1)
    assert not list(tmp_path.rglob("never-begun*/*/result.json"))


def test_a_refused_start_leaves_the_report_of_another(swept, on_disk, shards, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(swept.out, out, ignore=shutil.ignore_patterns("cells"))
    before = {path: path.read_bytes() for path in out.glob("re*.*")}
    assert len(before) == 4
    with pytest.raises(UnfairError):
        ablate(small(on_disk, shards, cells={"a": {}, "b": {"data.seed": 1}}), out, devices=1)
    assert {path: path.read_bytes() for path in out.glob("re*.*")} == before


def test_held_out_pictures_that_are_trained_on_are_refused(on_disk, tmp_path):
    shards = tmp_path / "shards"
    write_scenes(shards, leak=True)
    with pytest.raises(UnfairError, match=r"found 1 held-out samples .* other-name of val-"):
        ablate(small(on_disk, shards), tmp_path / "out", devices=1)
    assert not list((tmp_path / "out").rglob("result.json"))


def test_a_failed_cell_is_reported(on_disk, shards, tmp_path):
    broken = PERCEIVER | {"init_args": PERCEIVER["init_args"] | {"num_latents": -1}}
    cells: Mapping[str, Any] = {
        "whole": {},
        "broken": {RESAMPLER: broken},
        "killed": {RESAMPLER: {"class_path": "third_party_bridge.DyingResampler"}},
        "unknown": {RESAMPLER: {"class_path": "nowhere.Resampler"}},
    }
    grid = small(on_disk, shards, cells=cells)
    path = tmp_path / "grid.yaml"
    path.write_text(yaml.safe_dump(grid, sort_keys=False))
    assert main(["ablate", str(path), "--out", str(tmp_path / "out"), "--devices=1"]) == 0
    with (tmp_path / "out" / "results.csv").open(newline="") as file:
        rows = {row["cell"]: row for row in csv.DictReader(file)}
    assert rows["whole"]["error"] == "" and float(rows["whole"]["nll"]) > 0
    assert "ended with code 3" in rows["killed"]["error"]
    assert "nowhere" in rows["unknown"]["error"]
    assert rows["broken"]["error"] and not rows["broken"]["nll"]
    page = (tmp_path / "out" / "report.html").read_text()
    assert "ended with code 3" in page


def test_a_grid_of_which_nothing_can_be_trained_is_an_error(on_disk, shards, tmp_path):
    grid = small(on_disk, shards)
    grid["overrides"]["model.bridge"] = {"class_path": "nowhere.Bridge"}
    with pytest.raises(ValueError, match="found not one run that could be finished"):
        ablate(grid, tmp_path, devices=1)


def test_a_killed_sweep_goes_on(swept, on_disk, shards, tmp_path):
    grid = tmp_path / "grid.yaml"
    grid.write_text(yaml.safe_dump(tiny_grid(on_disk, shards), sort_keys=False))
    out = tmp_path / "out"
    command = [sys.executable, "-m", "recipes", "ablate", str(grid), "--out", str(out)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [*command, "--devices=1"],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert process.stdout is not None
    done = 0
    while done < 2:
        line = process.stdout.readline()
        assert line, "it ended before it was killed"
        done += re.search(r"seed \d+: \d+ s", line) is not None
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    kept = results_of(out)
    assert 2 <= len(kept) < 12
    times = {path: path.stat().st_mtime_ns for path in kept}
    table = ablate(str(grid), out, devices=1)
    assert {path: path.stat().st_mtime_ns for path in kept} == times
    assert figures(table) == figures(swept)


@pytest.mark.slow
def test_a_run_that_was_killed_at_its_very_end_is_trained_again(on_disk, shards, tmp_path):
    """Its last checkpoint has all steps: nothing is left to train, and nothing says how it was."""
    grid = small(on_disk, shards)
    before = figures(ablate(grid, tmp_path / "whole", devices=1))
    last = {"class_path": "third_party_bridge.StopInLastValidation"}
    with pytest.raises(ValueError, match="stop here"):
        ablate(grid, tmp_path / "cut", devices=1, overrides={"trainer.callbacks": [last]})
    job = tmp_path / "cut" / "cells" / slug("base") / "seed-0"
    assert (job / "run" / "checkpoints" / "last.ckpt").is_file()
    # As if that same job had been killed there.
    whole = tmp_path / "whole" / "cells" / slug("base") / "seed-0"
    (job / "begun").write_text((whole / "begun").read_text())
    assert figures(ablate(grid, tmp_path / "cut", devices=1)) == before


@pytest.mark.slow
def test_a_run_that_was_killed_goes_on_from_its_checkpoint(on_disk, shards, tmp_path):
    grid = small(on_disk, shards)
    grid["overrides"] |= {"trainer.max_steps": 24, "trainer.val_check_interval": 5}
    before = figures(ablate(grid, tmp_path / "whole", devices=1))
    stop = {"class_path": "third_party_bridge.StopAt", "init_args": {"step": 15}}
    with pytest.raises(ValueError, match="stop here"):
        ablate(grid, tmp_path / "cut", devices=1, overrides={"trainer.callbacks": [stop]})
    job, whole = (tmp_path / n / "cells" / slug("base") / "seed-0" for n in ("cut", "whole"))
    (job / "begun").write_text((whole / "begun").read_text())
    assert figures(ablate(grid, tmp_path / "cut", devices=1)) == before
    provenance = json.loads((job / "run" / "provenance.json").read_text())
    assert provenance["first_step"] == 12
    digests = {
        json.loads((one / "result.json").read_text())["order_digest"] for one in (job, whole)
    }
    assert len(digests) == 1


def test_loaders_with_workers(on_disk, shards, tmp_path):
    """A forked worker closes the standard input that the process of a job is asked by."""
    grid = small(on_disk, shards)
    before = figures(ablate(grid, tmp_path / "without", devices=1))
    grid["overrides"]["data.num_workers"] = 1
    assert figures(ablate(grid, tmp_path / "with", devices=1)) == before


def test_a_first_stage(on_disk, shards, tmp_path):
    save_tokenizer(tmp_path / "tokenizer")
    queries = {"num_queries": 3, "dim": 16, "depth": 3, "num_heads": 2}
    text = {"tokenizer": str(tmp_path / "tokenizer"), "max_text": 40}
    vision = {"name": str(on_disk.vision), "dtype": "fp32"}
    trainer = {"max_steps": 2, "accelerator": "cpu", "precision": "32-true", "log_every_n_steps": 1}
    grid = small(on_disk, shards, first="blip2_stage1_small", controls=["blind", "twin"])
    grid["overrides"] |= {
        RESAMPLER: {"class_path": "qformer.QFormer", "init_args": queries},
        "first.model": {
            "vision": vision,
            "qformer": {"class_path": "qformer.QFormer", "init_args": queries | text},
        },
        "first.trainer": trainer,
        "first.data.batch_size": 4,
        "first.data.max_caption_tokens": 20,
        "first.data.feature_cache": str(shards / "features"),
    }
    grid["cells"] = {
        "after": {},
        "after the same": {"model.bridge.init_args.match_embedding_scale": False},
        "without": {"first": None},
    }
    table = ablate(grid, tmp_path / "out", devices=1)
    rows = {row["cell"]: row for row in table.rows()}
    assert all(row["error"] is None for row in rows.values()), rows
    # One first stage for both cells, and one for the twin's seed.
    assert len(list((tmp_path / "out" / "first").iterdir())) == 2
    assert rows["after"]["nll"] != rows["without"]["nll"]
    assert rows["after"]["train_flops"] > 1.2 * rows["without"]["train_flops"]
    assert rows["blind"]["nll"] == rows["blind"]["nll_shuffled"]
    # Moved, it keeps what is finished, though its configs name the first stage's folder.
    moved = (tmp_path / "out").rename(tmp_path / "moved")
    times = {path: path.stat().st_mtime_ns for path in moved.rglob("result.json")}
    assert figures(ablate(grid, moved, devices=1)) == figures(table)
    assert {path: path.stat().st_mtime_ns for path in moved.rglob("result.json")} == times
    # A changed first stage changes what comes after it.
    grid["overrides"]["first.model.optimizer.lr"] = 0.01
    again = {r["cell"]: r["nll"] for r in ablate(grid, moved, devices=1).rows()}
    assert again["after"] != rows["after"]["nll"] and again["without"] == rows["without"]["nll"]


@pytest.mark.slow
def test_a_stage_1_run_is_compared_by_recall(on_disk, shards, tmp_path):
    save_tokenizer(tmp_path / "tokenizer")
    queries = {"num_queries": 3, "dim": 16, "depth": 3, "num_heads": 2, "max_text": 40}
    queries["tokenizer"] = str(tmp_path / "tokenizer")
    grid = {
        "base": "blip2_stage1_small",
        "data": str(shards),
        "controls": ["twin"],
        "seeds": [0],
        "overrides": {
            "model": {
                "vision": {"name": str(on_disk.vision), "dtype": "fp32"},
                "qformer": {"class_path": "qformer.QFormer", "init_args": queries},
            },
            "data.batch_size": 4,
            "data.max_caption_tokens": 20,
            "data.feature_cache": str(shards / "features"),
            "trainer": {"max_steps": 2, "accelerator": "cpu", "precision": "32-true"},
        },
        "cells": {"all": {}, "itc": {"model.weights": {"itm": 0.0, "itg": 0.0}}},
        "evaluate": {"pictures": 6},
    }
    table = ablate(grid, tmp_path / "out", devices=1)
    assert next(iter(table.results["metrics"])) == "text_to_image_recall@1"
    assert [row["error"] for row in table.rows()] == [None] * 3
    assert {row["visual_tokens"] for row in table.rows()} == {3}


@pytest.mark.slow
def test_a_changed_config_is_trained_anew(on_disk, shards, tmp_path):
    first = ablate(small(on_disk, shards), tmp_path, devices=1)
    grid = small(on_disk, shards)
    second = ablate(grid, tmp_path, devices=1, overrides={"model.optimizer.lr": 0.01})
    assert figures(first) != figures(second)
    assert second.results["cells"][0]["lr"] == 0.01


def test_learning_rates_are_chosen_by_training_loss(on_disk, shards, tmp_path):
    grid = small(on_disk, shards, lr={"values": [1e-3, 1e9], "steps": 4}, controls=["twin"])
    table = ablate(grid, tmp_path, devices=1)
    base, twin = table.results["cells"]
    tried = dict(map(tuple, base["lr_sweep"]))
    assert base["lr"] == twin["lr"] == min(tried, key=lambda lr: tried[lr] or float("inf"))
    assert len(list(tmp_path.glob("sweeps/*/*"))) == 2, "a twin has its cell's"
    run = tmp_path / "sweeps" / slug("base") / "lr-0.001" / "run"
    logged = read_log(run, "loss".__eq__)["loss"]
    assert tried[1e-3] == pytest.approx(logged[max(logged)])


def test_the_loss_of_a_trial_is_its_last_quarter():
    assert final_loss({"curve": [[k, float(k)] for k in range(8)]}) == 6.5
    assert final_loss({"curve": [[0, float("nan")]]}) is None
    assert final_loss({"error": "x"}) is None


def test_flops_are_matched_by_steps(on_disk, shards, tmp_path):
    axes = {"resampler": {"mlp": {RESAMPLER: MLP}, "perceiver": {RESAMPLER: PERCEIVER}}}
    grid = tiny_grid(on_disk, shards, axes=axes, controls=[], seeds=[0], match="flops")
    grid["overrides"]["trainer.max_steps"] = 8
    mlp, perceiver = ablate(grid, tmp_path, devices=1).rows()
    assert mlp["steps"] == 8 and perceiver["steps"] != 8
    assert perceiver["train_flops"] == pytest.approx(mlp["train_flops"], rel=0.1)
    assert mlp["sample_order_digest"] == perceiver["sample_order_digest"]


@pytest.mark.slow
def test_seconds_are_matched_by_steps(on_disk, shards, tmp_path):
    grid = small(on_disk, shards, match="time", cells={"one": {}, "other": {}})
    table = ablate(grid, tmp_path, devices=1)
    solved = {cell["name"]: cell["solved"] for cell in table.results["cells"]}
    for row in table.rows():
        assert row["steps"] == solved[row["cell"]]["trainer.max_steps"] >= 1


def test_parameters_are_matched_by_size(on_disk, shards, tmp_path):
    axes = {"resampler": {"mlp": {RESAMPLER: MLP}, "perceiver": {RESAMPLER: PERCEIVER}}}
    grid = tiny_grid(on_disk, shards, axes=axes, seeds=[0], match="params", controls=["blind"])
    table = ablate(grid | {"baseline": "perceiver"}, tmp_path, devices=1)
    sizes = {row["cell"]: row["trainable_parameters"] for row in table.rows()}
    assert sizes["mlp"] == pytest.approx(sizes["perceiver"], rel=0.05)
    assert sizes["blind"] == pytest.approx(sizes["perceiver"], rel=0.05)
    (mlp,) = (cell for cell in table.results["cells"] if cell["name"] == "mlp")
    assert list(mlp["solved"]) == [f"{RESAMPLER}.init_args.dim"]


@pytest.mark.slow
def test_a_ray_cluster_gives_the_same_numbers(swept, on_disk, shards, tmp_path):
    grid = tiny_grid(on_disk, shards, controls=[], seeds=[0])
    found = figures(ablate(grid, tmp_path, ray="local"))
    before = figures(swept)
    assert len(found) == 4
    assert all(found[key] == before[key] for key in found)
