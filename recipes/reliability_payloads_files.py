"""Doors by which configs, checkpoints, weights and runs come in."""

from __future__ import annotations

import json
from typing import Any

import bridges
from bridges.files import file_digest
from bridges.official import read_pickle
from bridges.run import RUN_FILE, WEIGHTS_FILE, read_weights
from recipes.checkpoints import DIGEST_SUFFIX, AtomicCheckpointIO, read_checkpoint
from recipes.cli import main
from recipes.reliability_payloads_made import config_payloads, pickles
from recipes.reliability_payloads_place import Place, attempt


def configs(place: Place) -> int:
    """YAML files, for `bridges train` and `bridges cache`."""
    tried = 0
    for number, text in enumerate(config_payloads(place.markers / "config")):
        config = place.folder / f"{number}.yaml"
        config.write_text(text)
        run = place.folder / f"run-{number}"
        shards = place.folder / "none-000000.tar"
        shards.write_bytes(bytes(1024))
        train = ["train", "--config=perceiver_small", f"--config={config}", f"--run={run}"]
        for command in (
            [*train, f"--data={shards}"],
            ["cache", f"--config={config}", f"--data={shards}", f"--out={run}"],
        ):
            tried += attempt(lambda command=command: main(command))
    return tried


def checkpoints(place: Place) -> int:
    """What a run resumes from, with and without the digest that belongs to it."""
    tried = 0
    for kind, data in pickles(place.markers / "checkpoint"):
        for listed in (False, True):
            path = place.folder / f"{kind}-{listed}.ckpt"
            path.write_bytes(data)
            if listed:
                digest = file_digest(path)
                digests = path.with_name(path.name + DIGEST_SUFFIX)
                digests.write_text(f"{digest}  {path.name}\n")
            tried += attempt(lambda path=path: read_checkpoint(path))
            load = AtomicCheckpointIO().load_checkpoint
            tried += attempt(lambda path=path, load=load: load(path, weights_only=False))
    return tried


def weights(place: Place) -> int:
    """Foreign weights to start from, as ``.pth``, and in place of a run's."""
    tried = 0
    for kind, data in pickles(place.markers / "weights"):
        path = place.folder / f"{kind}.pth"
        path.write_bytes(data)
        tried += attempt(lambda path=path: read_pickle(path, inside="model", expected="weights"))
        tried += attempt(lambda path=path: read_weights(path))
    return tried


def runs(place: Place) -> int:
    """`bridges.load`: a run that names classes, models of which the files are pickles, weights."""
    marker = str(place.markers / "run")
    calls: list[Any] = [
        {"class_path": "builtins.open", "init_args": {"file": marker, "mode": "w"}},
        {"class_path": "subprocess.Popen", "init_args": {"args": ["touch", marker]}},
        {"class_path": "subprocess.check_call", "init_args": [["touch", marker]]},
        {"class_path": "pathlib.Path.touch", "init_args": {"self": marker}},
        {"class_path": "bridges.SoftPrefix", "init_args": {"resampler": {
            "class_path": "subprocess.Popen", "init_args": {"args": ["touch", marker]}}}},
        f"!!python/object/apply:builtins.open ['{marker}', 'w']",
    ]  # fmt: skip
    tried = 0
    good = {"class_path": "bridges.Projector", "init_args": {}}
    for kind, data in pickles(place.markers / "frozen"):
        model = place.folder / f"model-{kind}"
        model.mkdir()
        named = {"auto_map": {"AutoModel": "code.Evil", "AutoConfig": "code.Evil"}}
        (model / "config.json").write_text(json.dumps({"model_type": "vit", **named}))
        (model / "code.py").write_text(f"open({marker + '-code'!r}, 'w')\nclass Evil: pass\n")
        for name in ("pytorch_model.bin", "model.safetensors", "tokenizer.json"):
            (model / name).write_bytes(data)
        tried += attempt(lambda model=model: bridges.VisionEncoder.load(str(model)))
        tried += attempt(lambda model=model: bridges.LanguageModel.load(str(model)))
    for number, bridge in enumerate([*calls, good]):
        run = place.folder / f"run-{number}"
        run.mkdir()
        (run / WEIGHTS_FILE).write_bytes(next(pickles(place.markers / "run"))[1])
        ends = {"vision": {"name": str(place.folder / "model-zip")}}
        ends["lm"] = {**ends["vision"], "lora": None}  # pyright: ignore[reportArgumentType]
        described = {"format": 1, **ends, "bridge": bridge, "prompt": "", "fingerprints": {}}
        (run / RUN_FILE).write_text(json.dumps(described))
        tried += attempt(lambda run=run: bridges.load(run))
    return tried
