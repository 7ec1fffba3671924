"""What an ablation measures of a run does not change the run, and survives a resume."""

import json

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.attention import SDPBackend, sdpa_kernel

from recipes.ablation_measure import MEASURED_FILE, Measure
from recipes.train import train, train_module
from recipes.workload import count_flops


def measuring(run, order_samples=0):
    spec = {
        "class_path": "recipes.ablation_measure.Measure",
        "init_args": {"folder": str(run), "order_samples": order_samples},
    }
    return f"--trainer.callbacks={json.dumps([spec])}"


def read(run):
    return json.loads((run / MEASURED_FILE).read_text())


def test_measuring_changes_nothing(on_disk, tmp_path):
    plain, measured = tmp_path / "plain", tmp_path / "measured"
    train(on_disk.arguments(plain))
    train(on_disk.arguments(measured, measuring(measured)))
    before, after = (load_file(run / "bridge.safetensors") for run in (plain, measured))
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_flops_are_those_of_a_step(on_disk, tmp_path):
    run = tmp_path / "run"
    more = ("--trainer.max_steps=1", "--trainer.limit_val_batches=0")
    _, module = train_module(on_disk.arguments(run, measuring(run), *more))
    noted = read(run)
    assert (noted["steps"], noted["samples"]) == (1, 4)
    assert noted["seconds_per_step"] is None and noted["samples_per_s"] is None
    batch = next(iter(module.trainer.datamodule.train_dataloader()))

    def step():
        with sdpa_kernel(SDPBackend.MATH):
            module._forward(batch).loss.backward()

    # Counted in another way; another batch, whose captions may be some letters longer.
    assert noted["flops_per_step"] == pytest.approx(count_flops(step), rel=0.01)
    assert noted["peak_bytes"] > 2 * sum(p.numel() * 4 for p in module.vlm.bridge.parameters())


def test_the_order_is_that_of_the_samples(on_disk, tmp_path):
    runs = {
        name: tmp_path / name for name in ("long", "short", "other_batch", "other_seed", "other")
    }
    steps = "--trainer.max_steps=2"
    train(on_disk.arguments(runs["long"], measuring(runs["long"], 8)))
    train(on_disk.arguments(runs["short"], measuring(runs["short"], 8), steps))
    train(
        on_disk.arguments(
            runs["other_batch"],
            measuring(runs["other_batch"], 8),
            "--data.batch_size=8",
            "--trainer.max_steps=1",
        )
    )
    train(
        on_disk.arguments(
            runs["other_seed"], measuring(runs["other_seed"], 8), steps, "--seed_everything=7"
        )
    )
    train(on_disk.arguments(runs["other"], measuring(runs["other"], 8), steps, "--data.seed=7"))
    digests = {name: read(run)["sample_order_digest"] for name, run in runs.items()}
    same = digests["long"]
    assert digests["short"] == digests["other_batch"] == digests["other_seed"] == same
    assert digests["other"] != same
    assert read(runs["long"])["order_digest"] != read(runs["short"])["order_digest"]


def test_a_resumed_run_goes_on_measuring(on_disk, tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    train(on_disk.arguments(whole, measuring(whole, 12)))
    config = ("--checkpoint_every=2", measuring(cut, 12))
    with pytest.raises(RuntimeError, match="stop here"):
        stop = {"class_path": "third_party_bridge.StopAt", "init_args": {"step": 3}}
        both = [*json.loads(config[1].partition("=")[2]), stop]
        train(
            on_disk.arguments(
                cut, "--checkpoint_every=2", f"--trainer.callbacks={json.dumps(both)}"
            )
        )
    train(on_disk.arguments(cut, *config, "--resume=true"))
    for key in ("samples", "order_digest", "sample_order_digest", "flops_per_step", "peak_bytes"):
        assert read(cut)[key] == read(whole)[key], key


def test_the_state_is_plain():
    measure = Measure("run")
    assert json.loads(json.dumps(measure.state_dict())) == measure.state_dict()
