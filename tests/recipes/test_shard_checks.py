"""`bridges shards index` and `bridges shards verify`."""

import errno
import io
import json
import os
import random
import tarfile
from pathlib import Path

import pytest
from PIL import Image
from rich.console import Console

from recipes.cli import main
from recipes.shard_checks import index_shards, print_check, verify_shards
from recipes.shard_index import scan_shard
from recipes.shard_manifest import manifest_extra, read_manifest
from recipes.shard_store import drop_index, index_path, load_index
from recipes.shard_writer import write_shards


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("BRIDGES_CACHE", str(tmp_path / "cache"))


def jpg(shade: int = 0) -> bytes:
    data = io.BytesIO()
    Image.new("RGB", (16, 16), (shade, 0, 0)).save(data, "JPEG")
    return data.getvalue()


@pytest.fixture
def folder(tmp_path) -> Path:
    samples = [
        {"__key__": f"{n:04}", "jpg": jpg(n), "txt": f"a cat {n}", "json": {"n": n}}
        for n in range(6)
    ]
    write_shards(samples[:4], tmp_path / "shards", "train", samples_per_shard=2)
    write_shards(samples[4:], tmp_path / "shards", "val")
    return tmp_path / "shards"


def found(folder: Path, **options) -> list[tuple[str, str | None, str]]:
    check = verify_shards([folder], progress=False, **options)
    return [(Path(one.shard).name, one.key, one.kind) for one in check.findings]


def test_whole_shards_pass(folder, capsys):
    check = verify_shards([folder], decode=True, workers=2, progress=False)
    assert (check.shards, check.samples, check.findings) == (3, 6, [])
    assert main(["shards", "verify", str(folder), "--decode=true"]) == 0
    assert "No faults." in capsys.readouterr().out


def test_a_flipped_byte_is_found_wherever_it_is_and_its_sample_named(folder):
    shard = folder / "train-000001.tar"
    data, index = shard.read_bytes(), scan_shard(shard)
    rng = random.Random(0)
    for at in sorted(rng.sample(range(len(data)), 150)):
        damaged = bytearray(data)
        damaged[at] ^= 1 << rng.randrange(8)
        shard.write_bytes(damaged)
        hit = next(
            (
                key
                for key, start, end in zip(index.keys, index.offsets, index.ends, strict=True)
                if start <= at < end
            ),
            None,
        )
        check = verify_shards([shard], progress=False)
        assert "changed shard" in check.by_kind, at
        named = {one.key for one in check.findings if one.key is not None}
        assert named == ({hit} if hit else set()), at
        assert check.samples == (1 if hit else 2), at


def test_a_flipped_byte_is_found_without_the_index(folder):
    shard = folder / "train-000001.tar"
    start, _ = scan_shard(shard).members_of(0)["txt"]
    data = bytearray(shard.read_bytes())
    data[start] ^= 1
    shard.write_bytes(data)
    index_path(shard).unlink()
    assert found(folder) == [("train-000001.tar", None, "changed shard")]


def test_each_bad_file_is_named(folder, tmp_path):
    cut = folder / "train-000000.tar"
    cut.write_bytes(cut.read_bytes()[: int(scan_shard(cut).ends[0])])
    (folder / "train-000001.tar").unlink()
    (folder / "extra.tar").write_bytes((folder / "val-000000.tar").read_bytes())
    (folder / "val-000000.tar").write_bytes(b"no tar" * 1000)
    assert sorted(found(folder), key=str) == [
        ("extra.tar", None, "surplus shard"),
        ("train-000000.tar", "0001", "truncated shard"),
        ("train-000000.tar", None, "changed shard"),
        ("train-000000.tar", None, "truncated shard"),
        ("train-000001.tar", None, "missing shard"),
        ("val-000000.tar", None, "unreadable shard"),
    ]


def test_a_folder_that_lost_all_its_shards_is_not_empty(folder):
    for shard in folder.glob("*.tar"):
        shard.unlink()
    assert {kind for _, _, kind in found(folder)} == {"missing shard"}


def test_lost_shards_are_those_of_the_splits_asked_for(folder):
    (folder / "train-000001.tar").unlink()
    train = verify_shards([folder / "train-000000.tar"], progress=False)
    assert train.by_kind == {"missing shard": 1}
    assert verify_shards([folder / "val-000000.tar"], progress=False).findings == []


def add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def test_decoding_names_what_no_run_could_read(tmp_path):
    path = tmp_path / "foreign.tar"
    with tarfile.open(path, "w") as tar:
        for n in range(4):
            add(tar, f"good{n}.jpg", jpg())
            add(tar, f"good{n}.txt", b"a cat")
        add(tar, "empty.jpg", b"")
        add(tar, "empty.txt", b"a cat")
        add(tar, "cut.jpg", jpg()[:300])
        add(tar, "cut.txt", b"a cat")
        add(tar, "latin.jpg", jpg())
        add(tar, "latin.txt", b"\xe9")
        add(tar, "lone.jpg", jpg())
        add(tar, "blind.txt", b"a cat")
        add(tar, "code.jpg", jpg())
        add(tar, "code.txt", b"a cat")
        add(tar, "code.pkl", b"cos\nsystem\n")
    index_shards([path], progress=False)
    assert verify_shards([path], progress=False).findings == []
    check = verify_shards([path], decode=True, progress=False)
    assert {one.key: one.kind for one in check.findings} == {
        "empty": "empty image",
        "cut": "unreadable image",
        "latin": "unreadable caption",
        "lone": "missing caption",
        "blind": "missing image",
        "code": "refused member",
    }


def test_foreign_shards_get_an_index_and_a_manifest(tmp_path, capsys):
    for name in ("data-train-0001.tar", "odd.tar"):
        with tarfile.open(tmp_path / name, "w", format=tarfile.GNU_FORMAT) as tar:
            add(tar, f"{'long' * 40}.jpg", jpg())
            add(tar, "2.txt", b"two")
            add(tar, "2.txt", b"again")
    assert main(["shards", "verify", str(tmp_path)]) == 2
    assert "run 'bridges shards index" in capsys.readouterr().err
    assert main(["shards", "index", str(tmp_path)]) == 1
    shown = capsys.readouterr().out
    assert "duplicate key" in shown
    assert "a run raises these faults" in shown
    assert "indexed before" not in shown
    entries = read_manifest(tmp_path)
    assert entries is not None
    assert {entry.name: entry.split for entry in entries.values()} == {
        "data-train-0001.tar": "data-train",
        "odd.tar": "odd",
    }
    for name, entry in entries.items():
        index = scan_shard(tmp_path / name)
        assert (entry.bytes, entry.sha256) == (index.size, index.sha256)
        assert (entry.samples, entry.keys_sha256) == (2, index.keys_sha256)
        assert load_index(tmp_path / name) is not None


def test_indexing_keeps_what_the_manifest_says_unless_told_otherwise(folder, capsys):
    manifest = folder / "shards.json"
    content = json.loads(manifest.read_text()) | {"skipped": {"missing file": 3}}
    manifest.write_text(json.dumps(content))
    (folder / "train-000001.tar").unlink()
    assert main(["shards", "index", str(folder)]) == 1
    shown = " ".join(capsys.readouterr().out.split())
    assert "missing shard" in shown
    assert "2 shards were indexed before and not read again" in shown
    assert json.loads(manifest.read_text()) == content
    longer = (folder / "train-000000.tar").read_bytes() + bytes(512)
    (folder / "val-000000.tar").write_bytes(longer)
    assert main(["shards", "index", str(folder)]) == 2
    assert "changed since indexed" in capsys.readouterr().err
    assert main(["shards", "index", str(folder), "--overwrite=true"]) == 0
    assert found(folder) == []
    assert manifest_extra(folder) == {"skipped": {"missing file": 3}}
    entries = read_manifest(folder)
    assert entries is not None
    assert {name: entry.split for name, entry in entries.items()} == {
        "train-000000.tar": "train",
        "val-000000.tar": "val",
    }


def test_indexing_a_cut_shard_anew_keeps_its_description(folder):
    shard = folder / "train-000000.tar"
    before = (folder / "shards.json").read_bytes()
    shard.write_bytes(shard.read_bytes()[: int(scan_shard(shard).ends[0])])
    check = index_shards([folder], progress=False)
    assert check.by_kind == {"truncated shard": 1}
    assert (folder / "shards.json").read_bytes() == before


def test_exit_codes_and_the_findings_as_json(folder, tmp_path, capsys):
    (folder / "val-000000.tar").unlink()
    target = tmp_path / "found.json"
    assert main(["shards", "verify", str(folder), f"--json={target}"]) == 1
    content = json.loads(target.read_text())
    assert (content["shards"], content["samples"]) == (2, 4)
    assert content["by_kind"] == {"missing shard": 1}
    assert content["findings"][0]["shard"] == str(folder / "val-000000.tar")
    assert main(["shards", "verify", str(folder), "--workers=0"]) == 2
    assert main(["shards", "verify", str(tmp_path / "none")]) == 2


def test_a_folder_named_index_can_be_given(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "index").mkdir()
    (tmp_path / "index" / "a.jpg").write_bytes(jpg())
    (tmp_path / "index" / "a.txt").write_text("a cat")
    assert main(["shards", "./index", "-", "out", "--val_fraction=0"]) == 0
    assert found(tmp_path / "out", decode=True) == []


def test_names_are_shown_as_they_are_and_not_all_of_them(folder):
    for n in range(8):
        (folder / f"[bold]{n}.tar").write_bytes((folder / "val-000000.tar").read_bytes())
    screen = io.StringIO()
    check = verify_shards([folder], progress=False)
    print_check(check, Console(file=screen, width=200), names=2)
    assert "[bold]0.tar" in screen.getvalue()
    assert "and 6 more" in screen.getvalue()
    assert "[bold]3.tar" not in screen.getvalue()


@pytest.fixture
def read_only(folder, monkeypatch) -> Path:
    """Simulated, for root may write anywhere."""

    def refuse(name):
        real = getattr(os, name)

        def call(path, *arguments, **options):
            if Path(path).parent == folder:
                raise OSError(errno.EROFS, "Read-only file system")
            return real(path, *arguments, **options)

        monkeypatch.setattr(f"os.{name}", call)

    refuse("unlink")
    refuse("replace")
    return folder


def test_a_folder_that_cannot_be_written_is_indexed_in_the_cache(read_only, tmp_path, capsys):
    index = scan_shard(read_only / "val-000000.tar")
    assert main(["shards", "index", str(read_only), "--overwrite=true"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "cannot be written: the indexes are kept in" in shown
    assert "the manifest is as it was" in shown
    assert len(list((tmp_path / "cache" / "indexes").iterdir())) == 3
    kept = load_index(read_only / "val-000000.tar")
    assert kept is not None
    assert kept.sha256 == index.sha256


def test_a_folder_that_cannot_be_written_gets_no_manifest(folder, request, tmp_path, capsys):
    for path in (*folder.glob("*.index"), folder / "shards.json"):
        path.unlink()
    request.getfixturevalue("read_only")
    shards = [folder / "val-000000.tar"]
    for shard in shards:
        drop_index(shard)
    for overwrite in ("false", "true"):
        assert main(["shards", "index", str(folder), f"--overwrite={overwrite}"]) == 0
        shown = " ".join(capsys.readouterr().out.split())
        assert "cannot be written" in shown
        assert "the manifest is not there" in shown
        assert load_index(shards[0]) is not None


@pytest.mark.parametrize("command", ["index", "verify"])
def test_shards_elsewhere_are_checked_there(command, monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("BRIDGES_CACHE", str(tmp_path))
    monkeypatch.setattr("recipes.remote.fetch", lambda *_: (_ for _ in ()).throw(FileNotFoundError))
    assert main(["shards", command, "http://host/a.tar"]) == 2
    assert "found http://host/a.tar, a URL; expected local files" in capsys.readouterr().err


def test_hidden_files_are_not_verified(folder):
    for shard in list(folder.glob("*.tar")):
        shard.rename(folder / f"._{shard.name}")
    assert {kind for _, _, kind in found(folder)} == {"missing shard"}
