"""Files are whole or not there, and what is left of a kill goes away."""

import errno
import os
import re
import resource
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from bridges.files import (
    remove_orphans,
    staged,
    sync_folder,
    write_bytes,
    write_tensors,
    write_text,
)

ORPHAN = ".a.txt.0123abcd.partial"


@pytest.fixture
def one_mebibyte():
    """No file can grow above that: a full disk that the system itself reports."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_file_is_replaced_as_a_whole(tmp_path):
    target = tmp_path / "new" / "a.txt"
    write_text(target, "ä\n")
    with staged(target) as path:
        path.write_bytes(b"half")
        assert path.parent == target.parent
        assert target.read_text(encoding="utf-8") == "ä\n"
    assert target.read_bytes() == b"half"
    with pytest.raises(ZeroDivisionError), staged(target) as path:
        path.write_bytes(b"no")
        raise ZeroDivisionError
    assert target.read_bytes() == b"half"
    assert [path.name for path in target.parent.iterdir()] == ["a.txt"]


def test_the_bytes_are_on_disk_before_the_name_and_the_name_before_the_end(tmp_path, monkeypatch):
    calls = []
    fsync, replace = os.fsync, os.replace

    def note_fsync(descriptor):
        calls.append(
            "folder" if os.path.samestat(os.fstat(descriptor), tmp_path.stat()) else "file"
        )
        fsync(descriptor)

    def note_replace(*paths):
        calls.append("rename")
        replace(*paths)

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(os, "replace", note_replace)
    write_text(tmp_path / "a.txt", "a")
    assert calls == ["file", "rename", "folder"]


def test_a_full_disk_leaves_the_file_and_says_so(tmp_path, one_mebibyte):
    target = tmp_path / "a.bin"
    write_bytes(target, b"before")
    with pytest.raises(OSError) as caught:
        write_bytes(target, bytes(3_000_000))
    assert caught.value.errno == errno.EFBIG
    message = str(caught.value)
    assert re.search(r"found [\d,]+ bytes free for .*a\.bin; expected 3,000,000 ", message)
    assert "(1,048,576 were written); the previous a.bin is kept: free some space" in message
    assert target.read_bytes() == b"before"
    assert list(tmp_path.iterdir()) == [target]


def test_a_full_disk_is_seen_behind_an_error_of_a_library(tmp_path, one_mebibyte):
    target = tmp_path / "a.pt"
    full = pytest.raises(OSError, match=r"expected at least [\d,]+ \(")
    with full as caught, staged(target) as path, path.open("wb") as file:
        torch.save(torch.zeros(1_000_000), file)
    assert isinstance(caught.value.__cause__, RuntimeError | OSError)
    assert "the previous" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_the_disk_may_be_full_at_the_end_only(tmp_path, monkeypatch, call):
    target = tmp_path / "a.txt"
    write_text(target, "before")

    def refuse(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, call, refuse)
    with pytest.raises(OSError, match=r"expected 5 .* the previous a\.txt is kept"):
        write_text(target, "after")
    assert target.read_text() == "before"
    assert list(tmp_path.iterdir()) == [target]


def test_other_errors_stay_what_they_are(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(FileExistsError):
        write_text(tmp_path / "file" / "a.txt", "a")
    with pytest.raises(PermissionError, match=r"^mine$"), staged(tmp_path / "a.txt"):
        raise PermissionError("mine")


def test_orphans_go_and_what_is_being_written_stays(tmp_path):
    kept = [".a.txt.123", ".hidden", ".a.tar.partial", "a.txt.0123abcd.partial"]
    for name in [ORPHAN, *kept]:
        (tmp_path / name).write_text("")
    (tmp_path / "below").mkdir()
    (tmp_path / "below" / ORPHAN).write_text("")
    target = tmp_path / "written.txt"
    with staged(target) as path:
        path.write_text("by one that lives")
        assert remove_orphans(tmp_path) == 1
    assert target.read_text() == "by one that lives"
    expected = {"below", "written.txt", *kept}
    assert {path.name for path in tmp_path.iterdir()} == expected
    assert (tmp_path / "below" / ORPHAN).exists()
    assert remove_orphans(tmp_path / "missing") == 0


def test_what_a_staged_file_is_called_is_an_orphan_once_its_writer_is_gone(tmp_path):
    with staged(tmp_path / "a.txt") as path:
        path.write_text("a")
        name = path.name
    (tmp_path / name).write_text("")
    assert remove_orphans(tmp_path) == 1


def test_a_link_is_no_orphan(tmp_path):
    aim = tmp_path / "aim"
    aim.write_text("mine")
    (tmp_path / ORPHAN).symlink_to(aim)
    assert remove_orphans(tmp_path) == 0
    assert aim.read_text() == "mine"


def test_folders_that_cannot_be_synced_are_written_to(tmp_path, monkeypatch):
    def refuse(code):
        def fsync(_):
            raise OSError(code, os.strerror(code))

        return fsync

    monkeypatch.setattr(os, "fsync", refuse(errno.EINVAL))
    sync_folder(tmp_path)
    monkeypatch.setattr(os, "fsync", refuse(errno.EIO))
    with pytest.raises(OSError, match="Input/output"):
        sync_folder(tmp_path)


def test_tensors_are_written_like_any_other_file(tmp_path):
    tensors = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(2, dtype=torch.bfloat16)}
    write_tensors(tmp_path / "a.safetensors", tensors, {"made": "here"})
    found = load_file(tmp_path / "a.safetensors")
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)
    write_text(tmp_path / "a.txt", "a")
    modes = {path.stat().st_mode for path in tmp_path.iterdir()}
    assert modes == {Path(tmp_path / "a.txt").stat().st_mode}
