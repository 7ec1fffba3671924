"""Training from the command line: what it writes, that it resumes, what it refuses."""

import json
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import ClassVar

import lightning as L
import pytest
import tiny
import torch
import yaml
from safetensors.torch import load_file

import bridges
from bridges.run import RUN_FILE, WEIGHTS_FILE
from recipes import cli
from recipes.bad_samples import read_bad_samples
from recipes.checkpoints import LAST
from recipes.data import CaptionData
from recipes.train import CONFIGS, train


@pytest.fixture(scope="module")
def run(on_disk, tmp_path_factory) -> Path:
    return train(on_disk.arguments(tmp_path_factory.mktemp("train") / "run"))


def test_a_run_says_what_it_is(run, on_disk):
    provenance = json.loads((run / "provenance.json").read_text())
    assert provenance["steps"] == 4
    assert provenance["seed"] == 0
    assert provenance["packages"]["torch"] == torch.__version__
    assert len(provenance["shards"]) == 4
    assert all(len(digest) == 64 for digest in provenance["shards"].values())
    assert provenance["frozen_parameters"] > 0
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["model"]["lm"]["name"] == str(on_disk.lm)
    assert config["model"]["optimizer"]["betas"] == [0.9, 0.98]
    metrics = (run / "csv-0" / "metrics.csv").read_text()
    assert "val_loss" in metrics
    assert "samples_per_s" in metrics
    assert list((run / "tensorboard").glob("events*"))


def test_checkpoints_hold_the_bridge_alone(run):
    weights = load_file(run / WEIGHTS_FILE)
    assert weights
    assert all(name.startswith("bridge.") for name in weights)
    checkpoint = torch.load(run / LAST, weights_only=True)
    assert checkpoint["state_dict"].keys() == weights.keys()


def test_the_resolved_config_trains_the_same_bridge(run, on_disk, tmp_path):
    again = train([f"--config={run / 'config.yaml'}", f"--run={tmp_path / 'again'}"])
    first, second = load_file(run / WEIGHTS_FILE), load_file(again / WEIGHTS_FILE)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_run_equals_an_uninterrupted_one(on_disk, tmp_path, workers):
    # 30 samples in batches of 4: seven steps an epoch, so that 10 steps end in the second.
    common = [f"--data.num_workers={workers}", "--model.optimizer.warmup_steps=0"]
    schedule = ["--model.optimizer.min_lr=1e-3", *common]  # a constant rate, whatever max_steps
    whole = train(on_disk.arguments(tmp_path / "whole", "--trainer.max_steps=10", *schedule))
    for stop in (3, 7, 8):
        part = tmp_path / f"part{stop}"
        train(on_disk.arguments(part, f"--trainer.max_steps={stop}", *schedule))
        train(on_disk.arguments(part, "--trainer.max_steps=10", "--resume=true", *schedule))
        expected, found = load_file(whole / WEIGHTS_FILE), load_file(part / WEIGHTS_FILE)
        assert all(torch.equal(expected[n], found[n]) for n in expected), stop


@pytest.mark.parametrize(("before", "after"), [(0, 2), (2, 0)])
def test_a_run_resumes_with_another_number_of_workers(on_disk, tmp_path, before, after):
    schedule = ["--model.optimizer.warmup_steps=0", "--model.optimizer.min_lr=1e-3"]
    whole = train(on_disk.arguments(tmp_path / "whole", "--trainer.max_steps=9", *schedule))
    part, workers = tmp_path / "part", "--data.num_workers={}".format
    train(on_disk.arguments(part, "--trainer.max_steps=5", workers(before), *schedule))
    more = ["--trainer.max_steps=9", "--resume=true", workers(after), *schedule]
    train(on_disk.arguments(part, *more))
    expected, found = load_file(whole / WEIGHTS_FILE), load_file(part / WEIGHTS_FILE)
    assert all(torch.equal(expected[n], found[n]) for n in expected)


class Keys(L.Callback):
    """Notes which samples a step is made of."""

    seen: ClassVar[list[tuple[int, list[str]]]] = []

    def on_train_batch_end(self, trainer, module, outputs, batch, index):
        self.seen.append((trainer.current_epoch, [sample["key"] for sample in batch.samples]))


@pytest.mark.parametrize("size", [2, 8])
def test_a_run_stopped_at_an_epochs_end_resumes_with_other_batches(
    on_disk, tmp_path, size, monkeypatch
):
    """The next epoch is whole, though it has more batches than the one that is over, or fewer."""
    monkeypatch.setattr("recipes.train.Throughput", Keys)
    monkeypatch.setattr(Keys, "seen", [])
    part, epochs = tmp_path / "part", ["--trainer.max_epochs=2", "--checkpoint_every=1"]
    train(on_disk.arguments(part, "--trainer.max_steps=7", *epochs))
    assert len(Keys.seen) == 7
    more = [f"--data.batch_size={size}", "--resume=true", "--trainer.max_steps=-1"]
    train(on_disk.arguments(part, *epochs, *more))
    second = [key for epoch, keys in Keys.seen[7:] for key in keys]
    assert [epoch for epoch, _ in Keys.seen[7:]] == [1] * (30 // size)
    assert len(second) == len(set(second)) == 30 // size * size


def test_overfitting_goes_over_the_same_samples(on_disk, tmp_path, monkeypatch):
    monkeypatch.setattr("recipes.train.Throughput", Keys)
    monkeypatch.setattr(Keys, "seen", [])
    more = ["--trainer.overfit_batches=2", "--trainer.max_epochs=3", "--trainer.max_steps=-1"]
    train(on_disk.arguments(tmp_path / "run", *more))
    keys = [keys for _, keys in Keys.seen]
    assert keys[:2] == keys[2:4] == keys[4:]
    assert keys[0] != keys[1]


def test_the_schedule_ends_where_a_limited_run_does(on_disk, tmp_path):
    limits = ["--trainer.limit_train_batches=2", "--trainer.max_epochs=3", "--trainer.max_steps=-1"]
    callbacks = (
        '--trainer.callbacks=[{"class_path": "lightning.pytorch.callbacks.LearningRateMonitor"}]'
    )
    limits.append("--trainer.log_every_n_steps=1")
    run = train(on_disk.arguments(tmp_path / "run", callbacks, *limits))
    rows = (run / "csv-0" / "metrics.csv").read_text().splitlines()
    column = rows[0].split(",").index("lr-AdamW/pg1")
    rates = [float(row.split(",")[column]) for row in rows[1:] if row.split(",")[column]]
    assert rates[-1] < max(rates) / 4


@pytest.mark.parametrize("size", [2, 5, 8])
def test_a_run_resumed_with_other_batches_goes_through_the_rest_of_the_epoch(
    on_disk, tmp_path, size, monkeypatch
):
    """As on another number of ranks: a step holds other samples, an epoch the same."""
    monkeypatch.setattr("recipes.train.Throughput", Keys)
    monkeypatch.setattr(Keys, "seen", [])
    part, epochs = tmp_path / "part", ["--trainer.max_epochs=2", "--checkpoint_every=1"]
    train(on_disk.arguments(part, "--trainer.max_steps=3", *epochs))
    assert len(Keys.seen) == 3
    more = [f"--data.batch_size={size}", "--resume=true", "--trainer.max_steps=-1"]
    train(on_disk.arguments(part, *epochs, *more))
    first = [key for epoch, keys in Keys.seen if not epoch for key in keys]
    # 30 samples, 12 of them before the stop; what is no whole batch is left out.
    assert len(first) == len(set(first)) == 12 + 18 // size * size
    second = [key for epoch, keys in Keys.seen if epoch for key in keys]
    assert len(second) == len(set(second)) == 30 // size * size


def test_skipped_samples_are_named_in_the_run(on_disk, tmp_path):
    """Also those that a worker met, and once each, however many epochs and starts there were."""
    folder = tmp_path / "shards"
    shutil.copytree(on_disk.shards, folder)
    shard = sorted(folder.glob("train-*.tar"))[0]
    with tarfile.open(shard) as tar:
        member = next(m for m in tar if m.name.endswith(".txt"))
    damaged = bytearray(shard.read_bytes())
    damaged[member.offset_data] ^= 1
    shard.write_bytes(damaged)
    more = ["--data.on_error=skip", "--data.num_workers=2", f"--data.shards={folder}"]
    run = train(on_disk.arguments(tmp_path / "run", "--trainer.max_steps=9", *more))
    train(on_disk.arguments(run, "--trainer.max_steps=16", "--resume=true", *more))
    (bad,) = read_bad_samples(run / "skipped-0.jsonl")
    assert (bad.kind, bad.shard) == ("damaged bytes", str(shard))
    assert member.name.startswith(f"{bad.key}.")
    provenance = json.loads((run / "provenance.json").read_text())
    assert provenance["skipped_samples"] == {"damaged bytes": 1}


def test_a_run_by_epochs_resumes_too(on_disk, tmp_path):
    """Killed in mid-epoch: the last checkpoint is older than the last step."""
    by_epochs = ["--trainer.max_steps=-1", "--trainer.max_epochs=2", "--checkpoint_every=3"]
    whole = train(on_disk.arguments(tmp_path / "whole", *by_epochs))

    class Kill(L.Callback):
        def on_train_batch_end(self, trainer, *_):
            if trainer.global_step == 5:
                raise KeyboardInterrupt

    part = tmp_path / "part"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("recipes.train.Throughput", Kill)
        with pytest.raises(SystemExit):  # as Lightning ends on Ctrl-C
            train(on_disk.arguments(part, *by_epochs))
    assert torch.load(part / LAST, weights_only=True)["global_step"] == 3
    assert not (part / RUN_FILE).exists()
    train(on_disk.arguments(part, "--resume=true", *by_epochs))
    expected, found = load_file(whole / WEIGHTS_FILE), load_file(part / WEIGHTS_FILE)
    assert all(torch.equal(expected[n], found[n]) for n in expected)
    provenance = json.loads((part / "provenance.json").read_text())
    assert provenance["steps"] == 14
    assert provenance["first_step"] == 3
    assert [start["first_step"] for start in provenance["earlier_starts"]] == [0]


def test_checkpoints_wait_for_accumulated_gradients(on_disk, tmp_path):
    more = ["--trainer.accumulate_grad_batches=2", "--checkpoint_every=1"]
    saved = []

    def note(self, checkpoint, path, storage_options=None):
        progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]["current"]
        saved.append((checkpoint["global_step"], progress["ready"]))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("recipes.checkpoints.AtomicCheckpointIO.save_checkpoint", note)
        train(on_disk.arguments(tmp_path / "run", *more, "--trainer.max_steps=3"))
    assert saved == [(1, 2), (2, 4), (3, 6)]


def test_bf16_where_the_machine_has_it(on_disk, tmp_path, monkeypatch):
    """The default precision reaches the trainer, and the config tells the truth."""
    for dtype, expected in ((torch.bfloat16, "bf16-mixed"), (torch.float32, "32-true")):
        monkeypatch.setattr("recipes.train.resolve_dtype", lambda _, dtype=dtype: dtype)
        run = tmp_path / expected
        kept = [a for a in on_disk.arguments(run) if "precision" not in a]
        train(kept)
        assert json.loads((run / "provenance.json").read_text())["precision"] == expected
        config = yaml.safe_load((run / "config.yaml").read_text())
        assert config["trainer"]["precision"] == expected


def test_a_users_callback_is_called(on_disk, tmp_path):
    callbacks = (
        '--trainer.callbacks=[{"class_path": "lightning.pytorch.callbacks.LearningRateMonitor"}]'
    )
    run = train(on_disk.arguments(tmp_path / "run", callbacks))
    assert "lr-AdamW" in (run / "csv-0" / "metrics.csv").read_text()


def test_accumulated_gradients_and_feature_cache(on_disk, tmp_path):
    online = train(on_disk.arguments(tmp_path / "a", "--trainer.accumulate_grad_batches=2"))
    cached = train(
        on_disk.arguments(
            tmp_path / "b",
            "--trainer.accumulate_grad_batches=2",
            f"--data.feature_cache={tmp_path / 'features'}",
        )
    )
    assert json.loads((online / "provenance.json").read_text())["steps"] == 4
    first, second = load_file(online / WEIGHTS_FILE), load_file(cached / WEIGHTS_FILE)
    # fp16 features: close, not equal.
    assert all(torch.allclose(first[n], second[n], atol=2e-2) for n in first)


SHIPPED = {path.stem: yaml.safe_load(path.read_text()) for path in CONFIGS.glob("*.yaml")}
# The others are tried in test_stage1.py and test_flamingo_configs.py.
ALONE = sorted(
    name
    for name, config in SHIPPED.items()
    if not {"module", "data_class"} & config.keys() and "init_from" not in config["model"]
)


@pytest.mark.parametrize("config", ALONE)
def test_every_shipped_config_that_starts_alone_trains(on_disk, tmp_path, config):
    """Only the frozen ends are exchanged, and sizes lowered."""
    shipped = SHIPPED[config]
    resampler = shipped["model"]["bridge"]["init_args"]["resampler"]
    small = {"dim": 16, "num_heads": 2, "head_dim": 8, "depth": 1, "num_layers": 1}
    more = [
        f"--model.bridge.init_args.resampler.init_args.{key}={small[key]}"
        for key in resampler.get("init_args", {})
        if key in small
    ]
    one = ["--trainer.max_steps=1", "--trainer.devices=1", "--data.num_workers=0"]
    arguments = on_disk.arguments(tmp_path / "run", *more, *one)
    kept = [a for a in arguments if not a.startswith(("--config", "--model.bridge"))]
    done = train([f"--config={config}", *kept, *more])
    assert (done / RUN_FILE).is_file()


def test_a_third_partys_bridge_trains_and_loads(on_disk, tmp_path):
    run = train(
        [
            a
            for a in on_disk.arguments(tmp_path / "run")
            if not a.startswith(("--config", "--model.bridge"))
        ]
        + [
            "--model.bridge=third_party_bridge.AdapterBridge",
            "--model.bridge.init_args.layers=2",
            "--model.bridge.init_args.resampler=third_party_bridge.BandResampler",
            "--model.bridge.init_args.resampler.init_args.num_bands=2",
            "--trainer.check_val_every_n_epoch=null",
        ]
    )
    model = bridges.load(run)
    assert type(model.bridge).__module__.startswith("third_party_bridge")


def test_lora_trains_beside_the_bridge(on_disk, tmp_path):
    lora = ['--model.lm.lora={"r": 2, "alpha": 4}', "--trainer.max_steps=2"]
    run = train(on_disk.arguments(tmp_path / "run", *lora))
    names = load_file(run / WEIGHTS_FILE).keys()
    assert any("lora_" in name for name in names)
    assert not any("base_layer" in name for name in names)
    before = tiny.causal_lm("llama").state_dict()
    after = bridges.load(run).lm.model.state_dict()
    for name, tensor in before.items():
        candidates = [name, name.replace(".weight", ".base_layer.weight")]
        assert any(n in after and torch.equal(after[n], tensor) for n in candidates), name


def test_held_out_shards_alone_are_not_trained_on(on_disk, tmp_path, capsys):
    folder = tmp_path / "val"
    folder.mkdir()
    shutil.copy(on_disk.shards / "val-000000.tar", folder)
    assert cli.main(["train", *on_disk.arguments(tmp_path / "run", f"--data={folder}")]) == 2
    assert "held-out shards alone (val-000000.tar)" in capsys.readouterr().err


def test_a_world_size_that_is_left_in_the_environment_is_found(
    on_disk, tmp_path, monkeypatch, capsys
):
    data = CaptionData(str(on_disk.shards))
    model = bridges.load(train(on_disk.arguments(tmp_path / "run", "--trainer.max_steps=1")))
    data.connect(model.vision, data.collator(model))
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(ValueError, match="2 ranks by the process group or WORLD_SIZE; expected"):
        data.val_dataloader()


def test_two_ranks_train_one_bridge(on_disk, tmp_path):
    """In processes of their own, as a user starts them; gloo on the CPU."""
    more = ["--trainer.devices=2", "--trainer.strategy=ddp", "--trainer.max_steps=5"]
    cache = f"--data.feature_cache={tmp_path / 'features'}"
    run = tmp_path / "run"
    done = subprocess.run(
        [sys.executable, "-m", "recipes", "train", *on_disk.arguments(run, *more, cache)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("the bridge is in") == 1
    assert json.loads((run / "provenance.json").read_text())["steps"] == 5
    # 30 samples for 2 ranks in batches of 4: three steps an epoch, both ranks alike.
    epochs = torch.load(run / LAST, weights_only=True)["epoch"]
    assert epochs == 1
    assert bridges.load(run)


# --- other modules, other beginnings


@pytest.fixture
def other_module(tmp_path, monkeypatch) -> str:
    """The class path of a module that lies outside this project."""
    code = tmp_path / "code"
    code.mkdir()
    (code / "other_module.py").write_text(
        "from recipes.module import CaptionModule\n\n\n"
        "class Doubled(CaptionModule):\n"
        "    def __init__(self, *args, factor: float = 2.0, **kwargs):\n"
        "        super().__init__(*args, **kwargs)\n"
        "        self.factor = factor\n\n"
        "    def done(self, folder):\n"
        "        return f'doubled by {self.factor}'\n"
    )
    monkeypatch.syspath_prepend(str(code))
    return "other_module.Doubled"


def test_a_module_by_its_class_path(on_disk, tmp_path, other_module, capsys):
    chosen = tmp_path / "chosen.yaml"
    chosen.write_text(yaml.safe_dump({"module": other_module, "model": {"factor": 3.0}}))
    usual = tmp_path / "usual.yaml"
    usual.write_text(yaml.safe_dump({"module": "recipes.module.CaptionModule"}))
    run, one = tmp_path / "run", "--trainer.max_steps=1"
    main = ["train", *on_disk.arguments(run, f"--config={usual}", f"--config={chosen}", one)]
    assert cli.main(main) == 0
    assert "doubled by 3.0" in capsys.readouterr().out
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["module"] == other_module
    again = ["train", f"--config={run / 'config.yaml'}", f"--run={tmp_path / 'again'}"]
    assert cli.main(again) == 0
    assert "doubled by 3.0" in capsys.readouterr().out
    # The command line comes first, wherever it stands.
    named = tmp_path / "named.yaml"
    named.write_text(yaml.safe_dump({"module": other_module}))
    usually = on_disk.arguments(tmp_path / "usual", one, f"--config={named}")
    run = train(["--module", "recipes.module.CaptionModule", *usually])
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["module"] == "recipes.module.CaptionModule"
    explicit = on_disk.arguments(tmp_path / "explicit", one, f"--config={usual}")
    assert cli.main(["train", f"--module={other_module}", *explicit]) == 0
    assert "doubled by 2.0" in capsys.readouterr().out
    config = yaml.safe_load((tmp_path / "explicit" / "config.yaml").read_text())
    assert config["module"] == other_module


@pytest.mark.parametrize(
    "path", ["nowhere.Module", "recipes.module.Nothing", "torch.nn.Linear", "Module", "3"]
)
def test_a_module_that_cannot_be_trained(on_disk, tmp_path, path, capsys):
    message = refused(capsys, "train", *on_disk.arguments(tmp_path / "run", f"--module={path}"))
    assert f"found module '{path}'" in message
    assert "BridgeModule" in message
    assert not (tmp_path / "run").exists()


def test_a_run_starts_from_pretrained_weights(on_disk, tmp_path, monkeypatch):
    given = []

    def load_pretrained(self, path):
        given.append(path)
        with torch.no_grad():
            self.latents.fill_(7.0)

    monkeypatch.setattr("perceiver.PerceiverResampler.load_pretrained", load_pretrained)
    path = tmp_path / "stage1"
    path.mkdir()
    start = [f"--model.init_from={path}", "--model.optimizer.lr=1e-9"]
    run = train(on_disk.arguments(tmp_path / "run", *start, "--trainer.max_steps=1"))
    assert given == [str(path)]
    weights = load_file(run / WEIGHTS_FILE)["bridge.resampler.latents"]
    assert torch.allclose(weights, torch.tensor(7.0), atol=1e-3)
    assert "init_from" not in (run / RUN_FILE).read_text()
    bridges.load(run)
    train(on_disk.arguments(run, *start, "--trainer.max_steps=2", "--resume=true"))
    assert given == [str(path)]


def test_weights_to_start_from_that_do_not_fit(on_disk, tmp_path, capsys):
    """A resampler that takes none; another encoder's are tried in test_stage1.py."""
    (tmp_path / "stage1").mkdir()
    start = f"--model.init_from={tmp_path / 'stage1'}"
    message = refused(capsys, "train", *on_disk.arguments(tmp_path / "run", start))
    assert "stage1; expected" in message and "idefics" in message
    projector = ["--model.bridge.init_args.resampler=bridges.Projector", start]
    message = refused(capsys, "train", *on_disk.arguments(tmp_path / "run", *projector))
    assert "leave init_from out" in message
    assert not (tmp_path / "run").exists()


def test_captions_from_the_command_line(run, on_disk, tmp_path, capsys):
    pictures = []
    for index, mode in enumerate(("RGB", "L", "CMYK")):
        path = tmp_path / f"{index}.jpg"
        tiny.Image.new(mode, (20 + index, 30)).save(path)
        pictures.append(str(path))
    for options in ([], ["--num_beams", "2"], ["--do_sample", "true", "--top_p", "0.9"]):
        command = ["caption", *pictures, "--run", str(run), "--max_new_tokens", "4", *options]
        assert cli.main(command) == 0
        lines = capsys.readouterr().out.splitlines()
        assert [line.split("\t")[0] for line in lines] == pictures


# --- bad input: one message with what was found and what to do, nothing half-written


def refused(capsys, *arguments: str) -> str:
    """The message of a command that must fail with exit code 2."""
    assert cli.main(list(arguments)) == 2
    return capsys.readouterr().err


def test_a_typo_in_a_key(on_disk, tmp_path, capsys):
    for typo in ("--model.bridge.init_args.resampler.init_args.num_latens=3", "--data.bath=3"):
        with pytest.raises(SystemExit):
            train(on_disk.arguments(tmp_path / "run", typo))
        assert typo.split("=")[0].rpartition(".")[2] in capsys.readouterr().err
    config = yaml.safe_load((CONFIGS / "perceiver_small.yaml").read_text())
    config["model"]["optimiser"] = {"lr": 1.0}
    (tmp_path / "typo.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(SystemExit):
        train([f"--config={tmp_path / 'typo.yaml'}"])
    assert "optimiser" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_class_that_is_no_bridge(on_disk, tmp_path, capsys):
    with pytest.raises(SystemExit):
        train(on_disk.arguments(tmp_path / "run", "--model.bridge=torch.nn.Linear"))
    assert "torch.nn.Linear" in capsys.readouterr().err


def test_an_unknown_config_names_the_shipped_ones(capsys):
    message = refused(capsys, "train", "--config", "percever_small")
    assert "perceiver_small" in message


def test_missing_shards(on_disk, tmp_path, capsys):
    arguments = on_disk.arguments(tmp_path / "run", f"--data={tmp_path / 'no-{0..2}.tar'}")
    message = refused(capsys, "train", *arguments)
    assert "no-0.tar" in message
    (tmp_path / "empty").mkdir()
    arguments = on_disk.arguments(tmp_path / "run", f"--data={tmp_path / 'empty'}")
    assert "empty" in refused(capsys, "train", *arguments)
    assert not (tmp_path / "run").exists()


def test_a_finished_run_is_not_overwritten(run, on_disk, capsys):
    before = (run / WEIGHTS_FILE).read_bytes()
    assert "--resume" in refused(capsys, "train", *on_disk.arguments(run))
    assert (run / WEIGHTS_FILE).read_bytes() == before


def test_a_run_of_another_backbone(run, on_disk, tmp_path, capsys):
    other = tmp_path / "run"
    shutil.copytree(run, other)
    tiny.causal_lm("llama", seed=1).save_pretrained(tmp_path / "lm")
    tiny.make_tokenizer(image_token=False).save_pretrained(tmp_path / "lm")
    more = [f"--model.lm.name={tmp_path / 'lm'}", "--resume=true", "--trainer.max_steps=6"]
    message = refused(capsys, "train", *on_disk.arguments(other, *more))
    assert "language model with fingerprint" in message
    spec = json.loads((other / RUN_FILE).read_text())
    spec["lm"]["name"] = str(tmp_path / "lm")
    (other / RUN_FILE).write_text(json.dumps(spec))
    picture = tmp_path / "a.png"
    tiny.Image.new("RGB", (8, 8)).save(picture)
    message = refused(capsys, "caption", str(picture), "--run", str(other))
    assert "language model with fingerprint" in message


def test_no_run_and_no_picture(tmp_path, capsys):
    picture = tmp_path / "a.png"
    tiny.Image.new("RGB", (8, 8)).save(picture)
    assert RUN_FILE in refused(capsys, "caption", str(picture), "--run", str(tmp_path))
    assert "nope.jpg" in refused(capsys, "caption", "nope.jpg", "--run", str(tmp_path))


def test_too_few_samples_for_a_batch(on_disk, tmp_path, capsys):
    message = refused(capsys, "train", *on_disk.arguments(tmp_path / "run", "--data.batch_size=31"))
    assert "data.batch_size" in message
    assert not (tmp_path / "run").exists()


def test_a_caption_longer_than_the_context(on_disk, tmp_path, capsys):
    more = ["--model.bridge.init_args.resampler.init_args.num_latents=200"]
    message = refused(capsys, "train", *on_disk.arguments(tmp_path / "run", *more))
    assert "context length" in message
    assert not (tmp_path / "run").exists()


def test_a_damaged_run(run, on_disk, tmp_path, capsys):
    picture = tmp_path / "a.png"
    tiny.Image.new("RGB", (8, 8)).save(picture)
    for name in (RUN_FILE, WEIGHTS_FILE):
        damaged = tmp_path / name / "run"
        shutil.copytree(run, damaged)
        (damaged / name).write_bytes((damaged / name).read_bytes()[:100])
        assert name in refused(capsys, "caption", str(picture), "--run", str(damaged))


def test_no_end_of_training(on_disk, tmp_path, capsys):
    endless = ["--trainer.max_steps=-1", "--trainer.max_epochs=-1"]
    message = refused(capsys, "train", *on_disk.arguments(tmp_path / "run", *endless))
    assert "trainer.max_steps" in message


def test_an_unknown_command(capsys):
    assert "'trian'" in refused(capsys, "trian")
