"""Mixtures of sources: what a step is made of, in which order, and that a run can be resumed."""

import csv
import json
import multiprocessing
from collections import Counter
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny_mixture as mix
import torch
import yaml
from safetensors.torch import load_file

from bridges.run import RUN_FILE, WEIGHTS_FILE
from recipes import cli
from recipes.checkpoints import LAST
from recipes.mixture import MixtureData
from recipes.sources import EndlessBatches, SourceData
from recipes.train import UNHELPFUL_WARNINGS, train, train_module

pytestmark = [pytest.mark.filterwarnings(f"ignore:{text}") for text in UNHELPFUL_WARNINGS]

NAMES = list(mix.SIZES)


@pytest.fixture(scope="module")
def folder(on_disk, tmp_path_factory) -> Path:
    """Shards of three sources, and the config of a run on them."""
    folder = tmp_path_factory.mktemp("mixture")
    mix.write_sources(folder / "shards")
    config = mix.config(on_disk.vision, on_disk.lm, folder / "shards")
    (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    return folder


@pytest.fixture(scope="module")
def run(folder, tmp_path_factory) -> Path:
    """Three steps of accumulated gradients."""
    return train(mix.arguments(folder, tmp_path_factory.mktemp("mixture") / "run"))


def rows(run: Path) -> list[dict[str, str]]:
    """Of the logs."""
    with (run / "csv-0" / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


# --- what a step is made of


def sum_of_gradients(module: Any, batches: list[Any], factors: list[float]) -> dict[str, Any]:
    """Σ factor · ∇loss over some batches, by names as the module has them."""
    module.zero_grad(set_to_none=True)
    for batch, factor in zip(batches, factors, strict=True):
        (factor * module._forward(batch).loss).backward()
    return {n: p.grad for n, p in module.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("turn", [1, 2])
def test_an_accumulated_step_is_the_weighed_sum_over_the_sources(folder, tmp_path, turn):
    more = ["--model.optimizer.lr=0", f"--trainer.accumulate_grad_batches={turn}"]
    _, module = train_module(
        mix.arguments(folder, tmp_path / "run", *more, "--trainer.max_steps=2")
    )
    assert isinstance(module, mix.Recorder)
    assert mix.sources(module.seen) == 2 * [name for name in NAMES for _ in range(turn)]
    size = len(NAMES) * turn
    for step, gradients in enumerate(module.gradients):
        batches = slice(step * size, (step + 1) * size)
        weights = [mix.WEIGHTS[name] / turn for name in mix.sources(module.seen[batches])]
        expected = sum_of_gradients(module, module.batches[batches], weights)
        torch.testing.assert_close(gradients, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("turn", [1, 2])
def test_sources_take_turns(folder, tmp_path, turn):
    more = ["--model.optimizer.lr=0", f"--trainer.accumulate_grad_batches={turn}"]
    more += ["--data.mixing=round_robin", "--trainer.max_steps=4"]
    _, module = train_module(mix.arguments(folder, tmp_path / "run", *more))
    assert isinstance(module, mix.Recorder)
    named = [name for name in (*NAMES, NAMES[0]) for _ in range(turn)]
    assert mix.sources(module.seen) == named
    for step, gradients in enumerate(module.gradients):
        batches = slice(step * turn, (step + 1) * turn)
        weights = [mix.WEIGHTS[name] / turn for name in named[batches]]
        expected = sum_of_gradients(module, module.batches[batches], weights)
        torch.testing.assert_close(gradients, expected, rtol=1e-5, atol=1e-7)


def test_every_source_alone_gives_all_parameters_a_gradient(folder, tmp_path):
    """Also a batch of texts without a picture: no rank may find a parameter unused."""
    more = ["--data.mixing=round_robin", "--trainer.max_steps=45"]
    _, module = train_module(mix.arguments(folder, tmp_path / "run", *more))
    assert isinstance(module, mix.Recorder)
    assert any(not batch["images"] for batch in module.seen)
    assert all(batch["without_gradient"] == [] for batch in module.seen)


def test_losses_are_logged_by_source(run):
    steps = [row for row in rows(run) if row["loss"]]
    assert len(steps) == 3
    for row in steps:
        weighed = [mix.WEIGHTS[name] * float(row[f"loss/{name}"]) for name in NAMES]
        assert float(row["loss"]) == pytest.approx(sum(weighed), rel=1e-5)
    assert len({row["loss/pairs"] for row in steps}) == 3
    (held_out,) = [row for row in rows(run) if row["val_loss"]]
    weighed = [mix.WEIGHTS[name] * float(held_out[f"val_loss/{name}"]) for name in NAMES[:2]]
    assert float(held_out["val_loss"]) == pytest.approx(sum(weighed), rel=1e-5)
    assert "val_loss/clips" not in held_out  # it has no held-out shards
    assert "samples_per_s" in held_out


def test_steps_are_what_the_trainer_counts(run, folder, tmp_path):
    """Validation every n batches of one source, checkpoints every n steps, epochs of rounds."""
    assert torch.load(run / LAST, weights_only=True)["global_step"] == 3
    more = ["--trainer.max_steps=-1", "--trainer.max_epochs=2", "--trainer.val_check_interval=5"]
    done = train(mix.arguments(folder, tmp_path / "run", *more, "--data.rounds_per_epoch=4"))
    assert json.loads((done / "provenance.json").read_text())["steps"] == 8
    held_out = [int(row["step"]) for row in rows(done) if row["val_loss"]]
    assert held_out == [4]  # after the fifth step


def test_a_run_names_the_shards_of_all_sources(run, folder):
    provenance = json.loads((run / "provenance.json").read_text())
    shards = {str(path.relative_to(folder)) for path in (folder / "shards").rglob("*.tar")}
    assert {str(Path(path).relative_to(folder)) for path in provenance["shards"]} == shards
    assert len(shards) == 8
    assert provenance["data_seed"] == 0


# --- the order


@pytest.fixture(scope="module")
def samples(folder) -> dict[str, SourceData]:
    """The sources, whose batches are lists of keys."""

    class Keys:
        def __call__(self, samples):
            return [sample["key"] for sample in samples]

        def decoder(self, preprocess, *, training):
            return lambda raw: {"key": raw["__key__"]}

    encoder: Any = SimpleNamespace(
        image_decoder=lambda mode: None, parameters=lambda: iter([torch.zeros(1)])
    )
    made = {}
    for name in NAMES:
        made[name] = SourceData(str(folder / "shards" / name), batch_size=2)
        made[name].connect(encoder, Keys())  # pyright: ignore[reportArgumentType]
    return made


def mixture(samples: dict[str, SourceData], accumulated: int = 3, **options: Any) -> MixtureData:
    data = MixtureData(samples, **options)
    data.endless = {name: EndlessBatches(source) for name, source in samples.items()}
    data.trainer = SimpleNamespace(accumulate_grad_batches=accumulated, current_epoch=0)  # pyright: ignore[reportAttributeAccessIssue]
    return data


def epochs(data: MixtureData, count: int, start: dict[str, Any] | None = None) -> list[list[str]]:
    """Batches of the mixture's epochs, from a saved state on."""
    batches = []
    trainer: Any = data.trainer
    for epoch in range(start["epoch"] if start else 0, count):
        trainer.current_epoch = epoch
        loader = data.train_dataloader()
        if start:
            loader.load_state_dict(start)
        batches += [*loader]
    return batches


def test_a_source_that_runs_dry_begins_its_own_next_epoch(samples):
    data = mixture(samples)
    assert data.batches_per_epoch() == 10 * 3  # as many rounds as give the largest its epoch
    batches = epochs(data, 2)
    for name, size in mix.SIZES.items():
        own = [batch for batch in batches if batch[0].startswith(name)]
        assert len(own) == 20
        per_epoch = size // 2
        passes = [[*chain(*own[at : at + per_epoch])] for at in range(0, 20, per_epoch)]
        # Each once in an epoch of the source, whatever the mixture's; another order in the next.
        assert all(len(set(keys)) == len(keys) for keys in passes)
        assert passes[0] != passes[1]


def test_readers_live_on_from_epoch_to_epoch(samples, monkeypatch):
    """A source that is in the midst of its epoch is not read from its start again."""
    begun = Counter()
    plain = SourceData.epoch_loader

    def counting(self, number, done):
        begun[self.weight, number] += 1
        return plain(self, number, done)

    monkeypatch.setattr(SourceData, "epoch_loader", counting)
    epochs(mixture({"pairs": samples["pairs"]}, 1, rounds_per_epoch=3), 5)
    assert begun == {(1.0, 0): 1, (1.0, 1): 1}


@pytest.mark.parametrize("mixing", ["accumulate", "round_robin"])
@pytest.mark.parametrize("turn", [1, 2])
def test_any_place_can_be_returned_to(samples, mixing, turn):
    accumulated = turn * (3 if mixing == "accumulate" else 1)
    options = {"accumulated": accumulated, "mixing": mixing, "rounds_per_epoch": 4}
    whole = epochs(mixture(samples, **options), 3)
    length = 4 * 3 * turn
    assert len(whole) == 3 * length
    for done in range(0, 3 * length, accumulated):
        data = mixture(samples, **options)
        state = data.train_dataloader().state_dict()
        state |= {"epoch": done // length, "batches": done % length}
        assert epochs(data, 3, state) == whole[done:]


def test_the_state_is_what_was_handed_out(samples):
    data = mixture(samples)
    loader = data.train_dataloader()
    batches = iter(loader)
    seen = [next(batches) for _ in range(7)]
    state = loader.state_dict()
    place = {key: state[key] for key in ("epoch", "batches", "mixing", "turn", "rounds")}
    assert place == {"epoch": 0, "batches": 7, "mixing": "accumulate", "turn": 1, "rounds": 10}
    assert list(state["sources"]) == NAMES
    assert state["sources"]["pairs"] == {
        "batch_size": 2, "ranks": 1, **samples["pairs"]._train.shape()
    }  # fmt: skip
    data = mixture(samples)
    assert [*seen, *epochs(data, 1, state)] == epochs(mixture(samples), 1)
    # A checkpoint of the end of an epoch: the next one starts at its start.
    assert epochs(data, 2, {**state, "epoch": 1, "batches": 0}) == epochs(data, 2)[30:]


def test_seeds_change_the_order(folder):
    seeds = []
    for more in ({}, {"seed": 1}):
        source = SourceData(str(folder / "shards" / "pairs"), seed=3)
        MixtureData({"pairs": source}, **more)
        seeds.append(source.seed)
    assert seeds[1] == seeds[0] + 1


def test_sources_of_one_shape_have_orders_of_their_own(folder):
    sources = {name: SourceData(str(folder / "shards" / "pairs")) for name in ("one", "other")}
    MixtureData(sources)
    assert sources["one"].seed != sources["other"].seed


# --- a run that is interrupted


def found(run: Path) -> dict[str, Any]:
    return torch.load(f"{run}.pt", weights_only=True)


@pytest.mark.parametrize(
    ("mixing", "workers", "stops"), [("accumulate", 0, (4,)), ("round_robin", 2, (5,))]
)
def test_a_resumed_run_equals_an_uninterrupted_one(folder, tmp_path, mixing, workers, stops):
    """Every source goes on where it was, the clips in their third epoch, the others in theirs."""
    options = [f"--data.mixing={mixing}", "--data.rounds_per_epoch=3", "--checkpoint_every=1"]
    options += [f"--data.sources.{name}.num_workers={workers}" for name in NAMES]
    options += ["--model.bridge.init_args.next_image_probability=0.5"]  # drawn in every step

    def trained(run: Path, steps: int, *more: str) -> list[dict[str, Any]]:
        more = (*more, f"--trainer.max_steps={steps}", f"--model.out={run}.pt")
        train(mix.arguments(folder, run, *options, *more))
        assert not multiprocessing.active_children()
        return found(run)["seen"]

    whole = trained(tmp_path / "whole", 7)
    for stop in stops:
        part = tmp_path / f"part{stop}"
        seen = trained(part, stop)
        # The readers of one source change: with them changes who reads what, and no batch.
        other = f"--data.sources.pairs.num_workers={2 - workers}"
        seen += trained(part, 7, "--resume=true", other)
        assert seen == whole  # keys, and what was drawn
        expected, weights = found(tmp_path / "whole")["weights"], found(part)["weights"]
        assert all(torch.equal(expected[n], weights[n]) for n in expected)


def test_another_mixture_does_not_resume(run, folder, capsys):
    for more in (
        "--data.sources.clips=null",
        "--data.mixing=round_robin",
        "--data.sources.pairs.batch_size=1",
        "--data.sources.clips.seed=5",
        f"--data.sources.clips.shards={folder / 'shards' / 'documents'}",
        "--trainer.accumulate_grad_batches=2",
        "--data.rounds_per_epoch=4",
    ):
        arguments = mix.arguments(folder, run, more, "--resume=true", "--trainer.max_steps=5")
        message = refused(capsys, *arguments)
        assert "resume with the sources and the mixing" in message


def test_a_mixture_and_a_single_source_do_not_resume_each_other(samples):
    whole, single = mixture(samples).train_dataloader(), samples["pairs"].epoch_loader(0, 0)
    with pytest.raises(ValueError, match=r"checkpoint of a mixture of .*data_class"):
        single.load_state_dict(whole.state_dict())
    with pytest.raises(ValueError, match=r"checkpoint of a single source.*data_class"):
        whole.load_state_dict(single.state_dict())


# --- the command line


def test_overrides_of_one_source(folder, tmp_path):
    more = [
        "--data.sources.clips=null",
        "--data.sources.pairs.weight=0.5",
        "--data.sources.documents.batch_size",
        "3",
        f"--data.sources.more.shards={folder / 'shards' / 'pairs'}",
        "--data.sources.more.batch_size=4",
        "--data.mixing",
        "round_robin",
    ]
    run = train(mix.arguments(folder, tmp_path / "run", *more))
    config = yaml.safe_load((run / "config.yaml").read_text())
    sources = config["data"]["sources"]
    assert config["data"]["mixing"] == "round_robin"
    assert sources["clips"] is None
    assert sources["pairs"]["weight"] == 0.5
    assert (sources["documents"]["batch_size"], sources["documents"]["weight"]) == (3, 1.0)
    assert sources["more"]["batch_size"] == 4
    assert {"loss/pairs", "loss/documents", "loss/more"} <= rows(run)[0].keys()
    assert "loss/clips" not in rows(run)[0]
    again = train([f"--config={run / 'config.yaml'}", f"--run={tmp_path / 'again'}"])
    first, second = load_file(run / WEIGHTS_FILE), load_file(again / WEIGHTS_FILE)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_one_folder_for_all_sources(folder, tmp_path):
    shards = tmp_path / "elsewhere"
    (folder / "shards").rename(shards)
    try:
        for form in ([f"--data={shards}"], ["--data", str(shards)]):
            more = [*form, "--data.sources.clips=null", "--trainer.max_steps=1"]
            run = train(mix.arguments(folder, tmp_path / f"run{len(form)}", *more))
            sources = yaml.safe_load((run / "config.yaml").read_text())["data"]["sources"]
            assert sources["pairs"]["shards"] == str(shards / "pairs")
            assert sources["clips"] is None
    finally:
        shards.rename(folder / "shards")


def test_data_of_one_source_by_the_command_line(on_disk, folder, tmp_path):
    """`--data_class` comes before the config's, as `--module` does."""
    config = yaml.safe_load((folder / "config.yaml").read_text())
    config["data"] = {"shards": str(on_disk.shards), "batch_size": 4}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    one = ["--data_class=recipes.data.CaptionData", "--module=recipes.module.CaptionModule"]
    run = train(mix.arguments(tmp_path, tmp_path / "run", *one, "--trainer.max_steps=1"))
    assert yaml.safe_load((run / "config.yaml").read_text())["data_class"] == one[0].split("=")[1]


# --- the optimiser


def test_constant_rate_and_exceptions_from_decay(folder, tmp_path):
    options = ["--model.optimizer.warmup_steps=2", '--model.optimizer.no_decay=["*.resampler.*"]']
    monitor = (
        '--trainer.callbacks=[{"class_path": "lightning.pytorch.callbacks.LearningRateMonitor"}]'
    )
    more = [*options, monitor, "--model.optimizer.weight_decay=0.1", "--trainer.max_steps=5"]
    run, module = train_module(mix.arguments(folder, tmp_path / "run", *more))
    rates = [float(r["lr-AdamW/pg1"]) for r in rows(run) if r.get("lr-AdamW/pg1")]
    assert rates[:: len(NAMES)] == pytest.approx([0.0, 0.005, 0.01, 0.01, 0.01])
    (optimizer,) = module.trainer.optimizers
    decays = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    named = [(n, decays[id(p)], p.ndim) for n, p in module.named_parameters() if id(p) in decays]
    assert {decay for name, decay, _ in named if ".resampler." in name} == {0.0}
    matrices = {decay for name, decay, ndim in named if ".resampler." not in name and ndim >= 2}
    assert matrices == {0.1}


# --- bad input


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The message of a run that must fail with exit code 2."""
    assert cli.main(["train", *arguments]) == 2
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--data.sources.pairs.batch_size=50"], ["source 'pairs'", "batch_size"]),
        (["--data.sources.clips.shards=nowhere-{0..1}.tar"], ["nowhere-0.tar"]),
        (["--data=nowhere"], ["nowhere/pairs"]),
        (["--data.sources.clip=null"], ["--data.sources.clip null", "clips, documents, pairs"]),
        (["--data.sources.clip", "null"], ["--data.sources.clip null", "clips, documents, pairs"]),
        (["--data_class=torch.nn.Linear"], ["found data_class 'torch.nn.Linear'", "MixtureData"]),
        (["--data_class=recipes.mixture.Nothing"], ["cannot be imported"]),
        (["--data"], ["without a path"]),
        (["--data.sources.pairs.task=instruction"], ["data.task: instruction"]),
    ],
)
def test_what_does_not_fit_is_refused(folder, tmp_path, capsys, more, words):
    message = refused(capsys, *mix.arguments(folder, tmp_path / "run", *more))
    assert all(word in message for word in words), message
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--data.sources.pairs.weight=0"], ["found weight 0.0"]),
        (["--data.sources.pairs.bath=3"], ["bath"]),
        ([f"--data.sources.{name}=null" for name in NAMES], ["data.sources []"]),
        (["--data.rounds_per_epoch=0"], ["data.rounds_per_epoch"]),
        (["--data.mixing=sometimes"], ["sometimes"]),
    ],
)
def test_what_cannot_be_parsed_is_refused(folder, tmp_path, capsys, more, words):
    arguments = mix.arguments(folder, tmp_path / "run", *more)
    try:
        assert cli.main(["train", *arguments]) == 2
    except SystemExit as exit:
        assert exit.code == 2
    message = capsys.readouterr().err
    assert all(word in message for word in words), message
    assert not (tmp_path / "run").exists()


def test_a_mixture_without_sources_in_a_config(on_disk, tmp_path, capsys):
    arguments = [a for a in on_disk.arguments(tmp_path / "run") if "batch_size" not in a]
    message = refused(capsys, *arguments, "--data_class=recipes.mixture.MixtureData")
    assert "--data.sources.NAME.shards" in message


def test_a_module_that_would_not_heed_the_weights(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(mix.Recorder, "takes_mixtures", False)
    message = refused(capsys, *mix.arguments(folder, tmp_path / "run"))
    assert "a mixture of data for Recorder" in message
    assert not (tmp_path / "run" / RUN_FILE).exists()


def test_a_name_that_is_no_word(samples):
    for name in ("val.set", "a-b", ""):
        with pytest.raises(ValueError, match="named by a word"):
            MixtureData({name: samples["pairs"]})


def test_a_trainer_that_accumulates_too_little(samples):
    with pytest.raises(ValueError, match="accumulate_grad_batches: 2 for 3 sources"):
        mixture(samples, 2).batches_per_epoch()
