"""Payloads: each does execute where it is let, and nowhere in this project."""

import contextlib
import io
import json
import pickle
import re
import subprocess
from pathlib import Path

import av
import numpy as np
import pytest
import torch
import webdataset as wds
import yaml
from PIL import Image

from recipes import reliability_payloads
from recipes.cli import main
from recipes.reliability_payloads import DOORS, measure, watched
from recipes.reliability_payloads_made import (
    PROGRAMS,
    config_payloads,
    member_payloads,
    name_payloads,
    object_npy,
    object_npz,
    payload_shard,
    pickles,
    playlist,
    postscript,
    relative,
    yaml_call,
)
from recipes.train import train

ROOT = Path(__file__).parents[2]
PACKAGES = ("bridges", "qformer", "perceiver", "gated_xattn", "recipes")


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_nothing_executes_in_this_process_and_in_forked_workers(tmp_path):
    found = measure(tmp_path, quick=True)
    assert found["found"] == []
    assert found["executed"] == 0
    assert found["tried"] == sum(found["by_door"].values()) > 500
    made = len(member_payloads(""))
    assert found["by_door"]["stream"] == found["by_door"]["forked workers"] == made


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_nothing_executes_at_any_door(tmp_path):
    found = measure(tmp_path)
    assert found["found"] == []
    assert found["by_door"].keys() == DOORS.keys()
    assert found["by_door"]["spawned workers"] == len(member_payloads(""))


# --- the payloads are live, and the harness sees them


def test_webdatasets_own_reader_executes_them(tmp_path, monkeypatch):
    """What this project would execute, were shards read as webdataset reads them by default."""
    monkeypatch.delenv("WDS_SECURE", raising=False)

    def unsafe(place):
        shard, count = place.shard()
        ignored = {"handler": wds.handlers.ignore_and_continue}
        samples = wds.WebDataset(str(shard), shardshuffle=False).decode(**ignored)
        seen = sum(1 for _ in samples)
        assert seen
        pipe = f"pipe:touch {place.markers / 'pipe'}"
        list(wds.WebDataset(pipe, shardshuffle=False, empty_check=False, **ignored))
        return count

    monkeypatch.setattr(reliability_payloads, "DOORS", {"webdataset": unsafe})
    found = measure(tmp_path)
    assert {"webdataset/pyd", "webdataset/pickle", "webdataset/pipe"} <= set(found["found"])
    assert found["executed"] == len(found["found"]) >= 3


@pytest.mark.filterwarnings("ignore")
def test_every_pickle_is_live(tmp_path):
    for number, (kind, data) in enumerate(pickles(tmp_path / "marker")):
        marker = tmp_path / "marker"
        assert not marker.exists()
        file = tmp_path / f"{number}.pth"
        file.write_bytes(data)
        if kind in ("gz", "tar"):
            continue
        with contextlib.suppress(RuntimeError):  # what it made is no checkpoint
            torch.load(file, weights_only=False)
        assert marker.exists(), kind
        marker.unlink()


def test_other_payloads_are_live(tmp_path):
    def fires(action) -> bool:
        action()
        fired = marker.exists()
        marker.unlink(missing_ok=True)
        return fired

    marker = tmp_path / "marker"
    assert fires(lambda: np.load(io.BytesIO(object_npy(marker)), allow_pickle=True))
    npz = np.load(io.BytesIO(object_npz(marker)), allow_pickle=True)
    assert fires(lambda: npz["features"])
    assert fires(lambda: yaml.unsafe_load(yaml_call(marker)).close())
    tagged = [text for text in config_payloads(marker) if "!!python" in text]
    assert len(tagged) == 3
    assert fires(lambda: yaml.unsafe_load(tagged[0])["data"].close())
    assert fires(lambda: yaml.unsafe_load(tagged[2])["data"]["shards"].wait())
    for name, make in member_payloads("http://x").items():
        if name in ("pkl", "pyd", "jpg", "0.jpg", "safetensors"):
            assert fires(lambda make=make: pickle.loads(make(marker))), name
    commands = [n for n in name_payloads("http://x", marker) if n.startswith("pipe:touch")]
    assert len(commands) == 2
    for name in commands:
        assert fires(lambda name=name: subprocess.run(["sh", "-c", name[5:]], capture_output=True))


def test_programs_and_fetches_are_seen(tmp_path):
    with watched(tmp_path) as url:
        marks = tmp_path / "markers"
        (marks / "here").mkdir()
        with pytest.raises(OSError):
            Image.open(io.BytesIO(postscript(marks / "x"))).load()
        fetched = playlist(f"{url}/{relative(marks / 'here' / 'list')}")
        for form in ("hls", None):
            try:
                # Allowed what FFmpeg refuses by itself: the payload is live, whoever refuses it.
                allowed = {"protocol_whitelist": "http,tcp,file", "allowed_extensions": "ALL"}
                allowed["extension_picky"] = "0"
                with av.open(io.BytesIO(fetched), format=form, options=allowed) as container:
                    list(container.decode(video=0))
            except (OSError, ValueError, IndexError, av.error.FFmpegError):
                pass
        found = {str(path.relative_to(marks)) for path in marks.rglob("*") if path.is_file()}
    assert "programs/gs" in found
    assert "here/list-asked" in found
    assert set(PROGRAMS) == {path.name for path in (tmp_path / "programs").iterdir()}


def test_each_payload_has_a_sample_of_its_own(tmp_path):
    count = payload_shard(tmp_path / "x.tar", tmp_path, "http://x")
    assert count == len(member_payloads("http://x"))
    left = payload_shard(tmp_path / "x.tar", tmp_path, "http://x", leave=("npy",))
    assert left == count - 3


# --- whole runs, and the code itself


def test_a_malicious_checkpoint_is_not_resumed_from(on_disk, tmp_path, capsys):
    run = tmp_path / "run"
    train(on_disk.arguments(run, "--trainer.max_steps=1"))
    last = run / "checkpoints" / "last.ckpt"
    whole = last.read_bytes()
    for kind, data in pickles(tmp_path / "marker"):
        for beside in last.parent.glob("*"):
            beside.unlink()
        last.write_bytes(data)
        assert main(["train", *on_disk.arguments(run, "--resume=true")]) == 2, kind
        assert "error: " in capsys.readouterr().err
    assert not (tmp_path / "marker").exists()
    last.write_bytes(whole)
    assert main(["train", *on_disk.arguments(run, "--resume=true")]) == 0


def test_a_malicious_run_is_not_loaded(on_disk, tmp_path):
    import bridges

    train(on_disk.arguments(tmp_path / "run", "--trainer.max_steps=1"))
    for kind, data in pickles(tmp_path / "marker"):
        (tmp_path / "run" / "bridge.safetensors").write_bytes(data)
        with pytest.raises(ValueError, match="damaged"):
            bridges.load(tmp_path / "run")
        assert not (tmp_path / "marker").exists(), kind
    described = json.loads((tmp_path / "run" / "run.json").read_text())
    call = {"file": str(tmp_path / "marker"), "mode": "w"}
    described["bridge"] = {"class_path": "builtins.open", "init_args": call}
    (tmp_path / "run" / "run.json").write_text(json.dumps(described))
    with pytest.raises(ValueError, match="cannot be built"):
        bridges.load(tmp_path / "run")
    assert not (tmp_path / "marker").exists()


def code() -> dict[str, str]:
    return {
        str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
        for package in PACKAGES
        for path in (ROOT / package).rglob("*.py")
        if not path.name.startswith("reliability_payloads")
    }


@pytest.mark.parametrize(
    "forbidden",
    [
        r"trust_remote_code",
        r"weights_only\s*=\s*False",
        r"allow_pickle\s*=\s*True",
        r"pickle\.(?:loads?|Unpickler)\b",
        r"yaml\.(?:unsafe_load|full_load|load)\(",
        r"\bos\.(?:system|popen)\(|shell\s*=\s*True",
        r"(?<![\w.])(?:eval|exec)\(",
    ],
)
def test_no_line_of_the_code_lets_data_execute(forbidden):
    found = [name for name, text in code().items() if re.search(forbidden, text)]
    assert found == []


def test_torch_load_is_given_weights_only():
    calls = [call for text in code().values() for call in re.findall(r"torch\.load\([^)]*\)", text)]
    assert len(calls) >= 3
    assert all("weights_only=True" in call for call in calls)
