"""BLIP-2 from the command line: stage 1, what starts from it, resume, ranks, what is refused."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import tiny_run
import torch
import transformers as hf
import yaml
from safetensors.torch import load_file

import bridges
from qformer.runs import WEIGHTS_FILE, load_stage1
from recipes import cli
from recipes.checkpoints import LAST
from recipes.train import CONFIGS, train

SIZES = {"num_queries": 3, "dim": 16, "depth": 2, "num_heads": 2, "ff_dim": 24}


@pytest.fixture(scope="module")
def bert(tmp_path_factory) -> Path:
    """Folder of a tiny BERT with its tokenizer."""
    folder = tmp_path_factory.mktemp("bert")
    tiny_run.save_tokenizer(folder)
    words = len(hf.AutoTokenizer.from_pretrained(folder))
    config = hf.BertConfig(
        vocab_size=words,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=40,
    )
    tiny.randomise(hf.BertForMaskedLM(config)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def arguments(on_disk, bert):
    """Of `bridges train` for a config of stage 1, on tiny models."""

    def make(run: Path, *more: str, config: str = "blip2_stage1_small") -> list[str]:
        return [
            f"--config={config}",
            f"--data={on_disk.shards}",
            f"--run={run}",
            f"--model.vision.name={on_disk.vision}",
            "--model.vision.dtype=fp32",
            f"--model.bert={bert}",
            f"--model.qformer.init_args.tokenizer={bert}",
            *(f"--model.qformer.init_args.{name}={size}" for name, size in SIZES.items()),
            "--model.qformer.init_args.max_text=40",
            "--model.embed_dim=8",
            "--model.optimizer.warmup_steps=0",
            "--model.optimizer.lr=1e-3",
            "--model.optimizer.min_lr=1e-3",
            "--data.batch_size=4",
            "--data.num_workers=0",
            "--trainer.devices=1",
            "--trainer.precision=32-true",
            "--trainer.max_steps=4",
            "--trainer.log_every_n_steps=1",
            "--trainer.val_check_interval=2",
            "--trainer.enable_progress_bar=false",
            "--trainer.accelerator=cpu",
            *more,
        ]

    return make


@pytest.fixture(scope="module")
def run(arguments, tmp_path_factory) -> Path:
    return train(arguments(tmp_path_factory.mktemp("stage1") / "run"))


def logged(run: Path) -> list[dict[str, str]]:
    with next(run.glob("csv-*/metrics.csv")).open() as file:
        return list(csv.DictReader(file))


def test_a_run_says_what_it_learnt(run):
    rows = logged(run)
    for name in ("loss/itc", "loss/itm", "loss/itg", "val_loss", "val_loss/itc", "val_recall@1"):
        assert any(row[name] for row in rows), name
    first = next(row for row in rows if row["loss"])
    parts = sum(float(first[f"loss/{name}"]) for name in ("itc", "itm", "itg"))
    assert float(first["loss"]) == pytest.approx(parts, rel=1e-5)
    described = json.loads((run / "run.json").read_text())
    assert described["kind"] == "blip2_stage1"
    assert described["max_text_tokens"] == 32
    vision, stage1 = load_stage1(run)
    assert described["fingerprints"]["vision"] == vision.fingerprint
    assert stage1.dec_token_id == stage1.qformer.tokenizer.bos_token_id


def test_it_starts_from_bert(arguments, bert, tmp_path):
    still = train(
        arguments(tmp_path / "run", "--model.optimizer.lr=1e-30", "--model.optimizer.min_lr=0")
    )
    state, source = load_file(still / WEIGHTS_FILE), load_file(bert / "model.safetensors")
    theirs = source["bert.encoder.layer.1.intermediate.dense.weight"]
    for branch in ("query_ff", "text_ff"):
        assert torch.equal(state[f"qformer.layers.1.{branch}.up.weight"], theirs)
    dense = source["cls.predictions.transform.dense.weight"]
    assert torch.equal(state["lm_head.dense.weight"], dense)


@pytest.mark.parametrize("momentum", [False, True])
def test_a_resumed_run_equals_an_uninterrupted_one(arguments, tmp_path, momentum):
    more = ["--model.momentum={queue_size: 6, momentum: 0.5}"] if momentum else []
    whole = train(arguments(tmp_path / "whole", "--trainer.max_steps=9", *more))
    train(arguments(tmp_path / "part", "--trainer.max_steps=3", *more))
    train(arguments(tmp_path / "part", "--trainer.max_steps=9", "--resume=true", *more))
    expected, found = (load_file(tmp_path / p / WEIGHTS_FILE) for p in ("whole", "part"))
    assert whole.is_dir()
    assert all(torch.equal(expected[n], found[n]) for n in expected)


def test_chunks_train_the_same(arguments, tmp_path, monkeypatch):
    # Of "medium", newer CPUs make bf16: chunks of other sizes then differ by its rounding.
    monkeypatch.setattr(torch, "set_float32_matmul_precision", lambda _: None)
    whole = train(arguments(tmp_path / "whole"))
    chunked = train(arguments(tmp_path / "run", "--model.chunk_size=3"))
    expected, found = (load_file(folder / WEIGHTS_FILE) for folder in (whole, chunked))
    for name in expected:
        # Adam turns the sign of a rounding error into a whole step where a gradient is 0.
        if not name.endswith((".k.bias", "lm_head.bias")):
            torch.testing.assert_close(found[name], expected[name], atol=1e-4, rtol=1e-3)


def test_a_loss_that_is_left_out(arguments, tmp_path):
    folder = train(arguments(tmp_path / "run", "--model.weights={itg: 0}", "--model.bert=null"))
    row = next(row for row in logged(folder) if row["loss"])
    assert "loss/itg" not in row
    assert float(row["loss"]) == pytest.approx(
        float(row["loss/itc"]) + float(row["loss/itm"]), rel=1e-5
    )


def test_two_ranks(arguments, tmp_path):
    """In processes of their own; gloo on the CPU. 30 samples: three steps an epoch for each."""
    folder = tmp_path / "run"
    more = ["--trainer.devices=2", "--trainer.strategy=ddp", "--trainer.max_steps=5"]
    done = subprocess.run(
        [sys.executable, "-m", "recipes", "train", *arguments(folder, *more)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("the Q-Former is in") == 1
    assert json.loads((folder / "provenance.json").read_text())["steps"] == 5
    assert load_stage1(folder)


def stage2(on_disk, folder: Path, config: str, *more: str) -> list[str]:
    """Of `bridges train` for a config that starts from stage 1."""
    kept = [
        argument
        for argument in on_disk.arguments(folder)
        if not argument.startswith(("--config", "--model.bridge"))
    ]
    prefix = "--model.bridge.init_args.resampler.init_args."
    sizes = [f"{prefix}{name}={size}" for name, size in SIZES.items()]
    one = ["--trainer.max_steps=1", "--trainer.devices=1", "--data.num_workers=0"]
    patches = ["--model.vision.layer=null", "--model.vision.drop_prefix=true"]
    return [f"--config={config}", *kept, *sizes, *one, *patches, *more]


STAGE2 = [c for c in sorted(CONFIGS.glob("*.yaml")) if "init_from" in c.read_text()]


@pytest.mark.parametrize("config", [c.stem for c in STAGE2 if "stage1" not in c.stem])
def test_every_shipped_config_that_starts_from_stage_1(run, on_disk, bert, tmp_path, config):
    shipped = yaml.safe_load((CONFIGS / f"{config}.yaml").read_text())
    resampler = shipped["model"]["bridge"]["init_args"]["resampler"]["init_args"]
    prefix = "--model.bridge.init_args.resampler.init_args."
    more = [f"--model.init_from={run}", "--model.optimizer.lr=1e-30", "--model.optimizer.min_lr=0"]
    if "ln_vision_eps" in resampler:  # of the checkpoint that it starts from
        more.append(f"{prefix}ln_vision_eps=1e-5")
    if "tokenizer" in resampler:
        more += [f"{prefix}tokenizer={bert}", f"{prefix}max_text=40"]
    done = train(stage2(on_disk, tmp_path / "run", config, *more))
    trained, source = load_file(done / bridges.run.WEIGHTS_FILE), load_file(run / WEIGHTS_FILE)
    for name in ("queries", "layers.1.query_ff.up.weight", "ln_vision.weight"):
        found = trained[f"bridge.resampler.{name}"]
        assert torch.equal(found, source[f"qformer.{name}"]), name
    has_text = any("text_ff" in name for name in trained)
    assert has_text == ("tokenizer" in resampler)
    assert "init_from" not in (done / "run.json").read_text()
    assert bridges.load(done)


def test_minigpt4_trains_the_linear_layer_alone(run, on_disk, tmp_path):
    more = [f"--model.init_from={run}", "--trainer.max_steps=3"]
    done = train(stage2(on_disk, tmp_path / "run", "minigpt4_small", *more))
    checkpoint = torch.load(done / LAST, weights_only=True)["state_dict"]
    source = load_file(run / WEIGHTS_FILE)
    frozen = [name for name in checkpoint if name.startswith("bridge.resampler.")]
    assert len(frozen) > 10
    for name in frozen:
        source_name = name.replace("bridge.resampler.", "qformer.")
        assert torch.equal(checkpoint[name], source[source_name]), name
    provenance = json.loads((done / "provenance.json").read_text())
    width = tiny.CONFIGS["llama"]().hidden_size
    assert provenance["trainable_parameters"] == SIZES["dim"] * width + width + 2 * width


def test_gated_cross_attention_reads_a_trained_qformer(run, on_disk, tmp_path):
    bridge = {
        "class_path": "gated_xattn.GatedXAttn",
        "init_args": {"resampler": {"class_path": "qformer.QFormer", "init_args": SIZES}},
    }
    kept = [a for a in on_disk.arguments(tmp_path / "run") if not a.startswith("--model.bridge")]
    still = ["--model.optimizer.lr=1e-30", f"--model.init_from={run}"]
    done = train([*kept, f"--model.bridge={json.dumps(bridge)}", *still])
    trained, source = load_file(done / bridges.run.WEIGHTS_FILE), load_file(run / WEIGHTS_FILE)
    assert torch.equal(trained["bridge.resampler.queries"], source["qformer.queries"])


def test_the_hub_sized_config_has_no_unknown_key(arguments, tmp_path):
    """Only the sources are exchanged, and sizes lowered."""
    assert train(arguments(tmp_path / "run", "--trainer.max_steps=1", config="blip2_stage1"))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--model.weights={itc: 0, itm: 0, itg: 0}"], "not all of them 0"),
        (["--model.qformer.init_args.tokenizer=null"], "with a tokenizer"),
        (["--data.max_caption_tokens=41"], "expected 3 to 40"),
        (["--data.task=instruction"], "stage 1 learns from captions"),
        (["--model.init_from=."], "found both model.bert and model.init_from"),
        (["--model.init_from=elsewhere"], "found nothing at model.init_from"),
        (["--model.momentum={queue_size: 0}"], "found queue_size=0"),
        (["--model.momentum={}", "--model.weights={itc: 0}"], "expected ITC for the teacher"),
        (["--model.qformer.init_args.dim=32"], "expected the sizes of the BERT"),
    ],
)
def test_what_is_refused(arguments, tmp_path, capsys, more, message):
    assert cli.main(["train", *arguments(tmp_path / "run", *more)]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_stage_1_run_is_no_bridge(run, tmp_path, capsys):
    picture = tmp_path / "a.png"
    tiny.Image.new("RGB", (8, 8)).save(picture)
    assert cli.main(["caption", str(picture), "--run", str(run)]) == 2
    assert "stage-1" in capsys.readouterr().err


def test_a_frozen_qformer_of_ones_own_stage_2(run, on_disk, tmp_path):
    """MiniGPT-4's comes from a finished stage 2."""
    first = train(stage2(on_disk, tmp_path / "a", "blip2_stage2_small", f"--model.init_from={run}"))
    more = [f"--model.init_from={first}", "--model.optimizer.lr=1e-30"]
    second = train(stage2(on_disk, tmp_path / "b", "minigpt4_small", *more))
    trained, again = (load_file(f / bridges.run.WEIGHTS_FILE) for f in (first, second))
    names = [name for name in trained if name.startswith("bridge.resampler.")]
    assert names
    assert all(torch.equal(trained[name], again[name]) for name in names)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["num_heads=4"], "'num_heads': 4"),
        (["ln_vision_eps=1e-6"], "'ln_vision_eps': 1e-06"),
        (["depth=3"], "do not fit this QFormer"),
    ],
)
def test_a_qformer_of_other_settings(run, on_disk, tmp_path, capsys, more, message):
    prefix = "--model.bridge.init_args.resampler.init_args."
    options = [f"--model.init_from={run}", *(f"{prefix}{option}" for option in more)]
    assert (
        cli.main(["train", *stage2(on_disk, tmp_path / "a", "blip2_stage2_small", *options)]) == 2
    )
    assert message in capsys.readouterr().err
    assert not (tmp_path / "a").exists()


def test_another_encoder_than_stage_1s(run, on_disk, tmp_path, capsys):
    options = [f"--model.init_from={run}", "--model.vision.layer=-2"]
    assert (
        cli.main(["train", *stage2(on_disk, tmp_path / "a", "blip2_stage2_small", *options)]) == 2
    )
    assert "was trained with" in capsys.readouterr().err
    assert not (tmp_path / "a").exists()


def test_a_bert_whose_words_have_other_ids(arguments, bert, tmp_path, capsys):
    other = tmp_path / "other"
    words = (bert / "vocab.txt").read_text().split() if (bert / "vocab.txt").is_file() else None
    vocabulary = hf.AutoTokenizer.from_pretrained(bert).get_vocab()
    words = words or sorted(vocabulary, key=vocabulary.__getitem__)
    words[6], words[7] = words[7], words[6]
    hf.BertTokenizer(vocab={word: place for place, word in enumerate(words)}).save_pretrained(other)
    options = [f"--model.qformer.init_args.tokenizer={other}"]
    assert cli.main(["train", *arguments(tmp_path / "run", *options)]) == 2
    assert "found 2 words" in capsys.readouterr().err


def test_resuming_with_another_teacher(run, arguments, capsys):
    more = ["--resume=true", "--trainer.max_steps=5", "--model.momentum={queue_size: 6}"]
    assert cli.main(["train", *arguments(run, *more)]) == 2
    assert "model.momentum" in capsys.readouterr().err
