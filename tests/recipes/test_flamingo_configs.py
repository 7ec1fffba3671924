"""The Flamingo recipes train as shipped, and each ablation that one names is one override."""

import shlex
from pathlib import Path
from typing import Any

import pytest
import tiny_mixture as mix
import torch
import yaml

import bridges
from bridges import Projector
from gated_xattn import GatedCrossAttention, GatedXAttn
from perceiver import PerceiverResampler
from recipes.module import CaptionModule
from recipes.train import CONFIGS, UNHELPFUL_WARNINGS, train_module

pytestmark = [pytest.mark.filterwarnings(f"ignore:{text}") for text in UNHELPFUL_WARNINGS]

SHIPPED = {
    "flamingo": {"m3w": "documents", "align": "pairs", "ltip": "pairs", "vtp": "clips"},
    "flamingo_small": {"pairs": "pairs", "documents": "documents"},
}
"""Sources of the configs, and the tiny shards in their place."""


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("flamingo")
    mix.write_sources(folder)
    return folder


def arguments(on_disk, shards: Path, run: Path, config: str) -> list[str]:
    """Of one step by a shipped config; only the frozen ends are exchanged, and sizes lowered."""
    given = [f"--config={config}", f"--run={run}"]
    given += [f"--model.vision.name={on_disk.vision}", f"--model.lm.name={on_disk.lm}"]
    given += ["--model.vision.dtype=fp32", "--model.lm.dtype=fp32", "--model.vision.layer=null"]
    small = {"num_heads": 2, "head_dim": 8, "ff_mult": 1}
    given += [f"--model.bridge.init_args.{key}={value}" for key, value in small.items()]
    small = {"num_latents": 4, "dim": 16, "num_heads": 2, "head_dim": 8, "depth": 1}
    resampler = "--model.bridge.init_args.resampler.init_args"
    given += [f"{resampler}.{key}={value}" for key, value in small.items()]
    for name, kind in SHIPPED[config].items():
        options = {"shards": shards / kind, "batch_size": 2, "num_workers": 0}
        options["feature_cache"] = f"{shards / 'features'}" if config == "flamingo_small" else None
        options |= {"max_tokens": 60, "loss_before_image": True} if kind == "documents" else {}
        given += [
            f"--data.sources.{name}.{key}={'null' if value is None else value}"
            for key, value in options.items()
        ]
    given += ["--trainer.max_steps=1", "--trainer.devices=1", "--trainer.accelerator=cpu"]
    given += ["--trainer.precision=32-true", "--trainer.log_every_n_steps=1"]
    return [*given, "--trainer.enable_progress_bar=false"]


def trained(*arguments: str) -> CaptionModule:
    """The module after the steps that the arguments ask for."""
    _, module = train_module(arguments)
    assert isinstance(module, CaptionModule)
    return module


def gated(module: CaptionModule) -> tuple[GatedXAttn, list[GatedCrossAttention]]:
    bridge = module.vlm.bridge
    assert isinstance(bridge, GatedXAttn)
    return bridge, [block for block in bridge.blocks if isinstance(block, GatedCrossAttention)]


@pytest.mark.parametrize("config", SHIPPED)
def test_a_shipped_config_trains(on_disk, shards, tmp_path, config):
    run = tmp_path / "run"
    module = trained(*arguments(on_disk, shards, run, config))
    data: Any = module.trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
    assert list(data.sources) == list(SHIPPED[config])
    assert module.trainer.accumulate_grad_batches == len(data.sources)
    assert module.trainer.global_step == 1
    loaded = bridges.load(run)
    assert loaded.lm.end_of_chunk == "<|endofchunk|>"
    assert "lm.new_tokens.embedding" in loaded.trainable_state()


def test_flamingo_has_the_papers_settings(on_disk, shards, tmp_path):
    module = trained(*arguments(on_disk, shards, tmp_path / "run", "flamingo"))
    data: Any = module.trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
    weights = {name: source.weight for name, source in data.sources.items()}
    assert weights == {"m3w": 1.0, "align": 0.2, "ltip": 0.2, "vtp": 0.03}
    shipped = yaml.safe_load((CONFIGS / "flamingo.yaml").read_text())
    pages, clips = (shipped["data"]["sources"][name] for name in ("m3w", "vtp"))
    assert (pages["task"], pages["max_tokens"], pages["max_images"]) == ("interleaved", 256, 5)
    assert (clips["task"], clips["num_frames"], clips["fps"]) == ("video", 8, 1.0)
    assert shipped["trainer"]["gradient_clip_val"] == 1.0
    bridge = shipped["model"]["bridge"]["init_args"]
    assert bridge["next_image_probability"] == 0.5
    resampler = bridge["resampler"]["init_args"]
    assert {k: resampler[k] for k in ("num_latents", "depth", "dim", "num_heads")} == {
        "num_latents": 64,
        "depth": 6,
        "dim": 1536,
        "num_heads": 16,
    }
    (optimizer,) = module.trainer.optimizers
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            group = groups[id(parameter)]
            decays = parameter.ndim >= 2 and ".resampler." not in name
            assert group["weight_decay"] == (0.1 if decays else 0.0), name
            assert group["initial_lr"] == 1e-4
    schedule = module.lr_schedulers()
    assert isinstance(schedule, torch.optim.lr_scheduler.LambdaLR)
    factor = schedule.lr_lambdas[0]
    assert [factor(step) for step in (0, 2500, 5000, 400000)] == [0.0, 0.5, 1.0, 1.0]


# --- ablations


def documented() -> dict[str, list[str]]:
    """The override of each ablation that `flamingo_small` names in its header."""
    header = (CONFIGS / "flamingo_small.yaml").read_text().split("\nrun:")[0]
    lines = [line.removeprefix("#").strip() for line in header.splitlines()]
    named = [line.partition("  ") for line in lines if "  --" in line]
    return {name: shlex.split(override) for name, _, override in named}


def no_gates(module: CaptionModule) -> bool:
    _, blocks = gated(module)
    return all(block.attn_gate is None and block.ff_gate is None for block in blocks)


def blocks_before(*layers: int):
    return lambda module: [insert.layer for insert in gated(module)[0].inserts()] == list(layers)


def resampler_is(kind: type):
    """Of this class, and of the width given for the other."""

    def check(module: CaptionModule) -> bool:
        resampler = gated(module)[0].resampler
        return type(resampler) is kind and resampler.dim == 16

    return check


def sees(visible: str):
    return lambda module: all(block.visible == visible for block in gated(module)[1])


def steps_of(*sources: str):
    """Whether an optimiser step has these sources."""

    def check(module: CaptionModule) -> bool:
        data: Any = module.trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
        batches = range(module.trainer.accumulate_grad_batches)
        return [data.source_at(index) for index in batches] == list(sources)

    return check


# What is true with the override; and of which "as shipped" is true without it. The tiny LM has
# three blocks.
ABLATIONS = {
    "no tanh gate": no_gates,
    "every block": blocks_before(0, 1, 2),
    "every 2nd block": blocks_before(0, 2),
    "every 4th block": blocks_before(0),
    "MLP, no resampler": resampler_is(Projector),
    "all preceding images": sees("all"),
    "sources in turn": steps_of("pairs"),
    "pairs alone": steps_of("pairs"),
}


def test_every_ablation_is_named():
    assert documented().keys() == ABLATIONS.keys()
    assert all(len(override) == 2 for override in documented().values())


def test_as_shipped(on_disk, shards, tmp_path):
    module = trained(*arguments(on_disk, shards, tmp_path / "run", "flamingo_small"))
    usual = {"every 4th block"}
    assert {name for name, holds in ABLATIONS.items() if holds(module)} == usual
    assert resampler_is(PerceiverResampler)(module)
    assert sees("latest")(module)
    assert steps_of("pairs", "documents")(module)


@pytest.mark.parametrize("name", ABLATIONS)
def test_an_ablation_is_one_override(on_disk, shards, tmp_path, name):
    given = arguments(on_disk, shards, tmp_path / "run", "flamingo_small")
    module = trained(*given, *documented()[name])
    kept = {"every 4th block"} if "block" not in name else set()
    turns = {"sources in turn", "pairs alone"}
    found = {other for other, holds in ABLATIONS.items() if holds(module)}
    assert name in found
    assert found - turns == {name, *kept} - turns  # nothing else is different
    assert bridges.load(tmp_path / "run")
