"""The checkpoint to resume from: whole at every moment, checked, and never code."""

import errno
import hashlib
import logging
import os
import resource
import shutil
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bridges import files
from recipes import checkpoints
from recipes.checkpoints import (
    AtomicCheckpointIO,
    CheckpointError,
    LastCheckpoint,
    read_checkpoint,
    save_checkpoint,
)


def content(step: int) -> dict[str, object]:
    return {"step": step, "state_dict": {"weight": torch.full((1000,), float(step))}}


def listed(path: Path) -> list[str]:
    return [line.split()[0] for line in digest_file(path).read_text().splitlines()]


def digest_file(path: Path) -> Path:
    return path.with_name("last.ckpt.sha256")


@pytest.fixture
def last(tmp_path) -> Path:
    return tmp_path / "checkpoints" / "last.ckpt"


def test_a_checkpoint_has_its_digest_beside_it(last):
    AtomicCheckpointIO().save_checkpoint(content(1), last)
    save_checkpoint(content(2), last)
    digest = hashlib.sha256(last.read_bytes()).hexdigest()
    assert digest_file(last).read_text() == f"{digest}  last.ckpt\n"  # as of sha256sum
    assert len(list(last.parent.iterdir())) == 2
    found = AtomicCheckpointIO().load_checkpoint(last)
    assert found["step"] == 2
    assert torch.equal(found["state_dict"]["weight"], torch.full((1000,), 2.0))


@pytest.mark.parametrize("before", ["digest", "none", "killed"])
def test_a_kill_at_any_call_leaves_one_that_loads(last, tmp_path, monkeypatch, before, caplog):
    """The folder is copied at every fsync and rename: what a kill there would leave."""
    save_checkpoint(content(1), last)
    if before == "none":
        digest_file(last).unlink()  # as of an older version
    elif before == "killed":  # between the digests and the rename
        files.write_text(
            digest_file(last), f"{'0' * 64}  last.ckpt\n{digest_file(last).read_text()}"
        )
    copies = []

    def copying(function):
        def call(*args):
            copies.append(tmp_path / f"copy{len(copies)}")
            shutil.copytree(last.parent, copies[-1])
            return function(*args)

        return call

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", copying(os.fsync))
        patch.setattr(os, "replace", copying(os.replace))
        save_checkpoint(content(2), last)
    assert len(copies) == 9  # three files, each: synced, renamed, its folder synced
    caplog.clear()
    steps = [read_checkpoint(copy / "last.ckpt")["step"] for copy in copies]
    assert steps == [1, 1, 1, 1, 1, 2, 2, 2, 2]
    assert bool(caplog.records) == (before == "none")
    assert files.remove_orphans(copies[0]) == 2  # the checkpoint's and the digest's
    for copy in copies:
        files.remove_orphans(copy)
        assert {path.name for path in copy.iterdir()} <= {"last.ckpt", "last.ckpt.sha256"}
        # The next write goes on from what the kill left.
        save_checkpoint(content(3), copy / "last.ckpt")
        assert read_checkpoint(copy / "last.ckpt")["step"] == 3
        assert len(listed(copy / "last.ckpt")) == 1


def test_a_flipped_bit_is_refused(last):
    save_checkpoint(content(1), last)
    whole = last.read_bytes()
    where = whole.index(torch.full((1000,), 1.0).numpy().tobytes())
    last.write_bytes(whole[:where] + bytes([whole[where] ^ 1]) + whole[where + 1 :])
    assert torch.load(last, weights_only=True)["state_dict"]["weight"][0] != 1  # torch sees nothing
    with pytest.raises(CheckpointError) as caught:
        read_checkpoint(last)
    message = str(caught.value)
    found = hashlib.sha256(last.read_bytes()).hexdigest()
    assert f"with SHA-256 {found}; expected {listed(last)[0]}, of last.ckpt.sha256" in message
    assert "copy both files again" in message


def test_an_empty_list_of_digests_admits_nothing(last):
    save_checkpoint(content(1), last)
    digest_file(last).write_bytes(b"\xff")
    with pytest.raises(CheckpointError, match="expected any listed"):
        read_checkpoint(last)


def test_one_without_a_digest_is_read_with_a_warning_and_gets_one(last, caplog):
    save_checkpoint(content(1), last)
    digest_file(last).unlink()
    with caplog.at_level(logging.WARNING):
        assert read_checkpoint(last)["step"] == 1
        assert read_checkpoint(last)["step"] == 1
    assert len(caplog.records) == 1
    assert "last.ckpt.sha256; expected the digest" in caplog.text
    save_checkpoint(content(2), last)
    assert len(listed(last)) == 1
    assert read_checkpoint(last)["step"] == 2


@pytest.mark.parametrize("keep", [0, 100, 3000])
def test_a_truncated_one_without_a_digest_is_refused(last, keep):
    save_checkpoint(content(1), last)
    digest_file(last).unlink()
    last.write_bytes(last.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match="found what torch cannot read"):
        read_checkpoint(last)


class Payload:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("with_digest", [True, False])
def test_code_in_a_checkpoint_does_not_run(last, tmp_path, zipped, with_digest):
    last.parent.mkdir()
    mark = tmp_path / "executed"
    torch.save(content(1) | {"epoch": Payload(mark)}, last, _use_new_zipfile_serialization=zipped)
    if with_digest:
        digest_file(last).write_text(f"{files.file_digest(last)}  last.ckpt\n")
    with pytest.raises(CheckpointError, match=r"found the Python object \w+\.mkdir .* nothing in"):
        AtomicCheckpointIO().load_checkpoint(last, weights_only=False)
    assert not mark.exists()
    torch.load(last, weights_only=False)
    assert mark.exists()  # it would have


def test_what_is_no_dict_is_refused(last):
    last.parent.mkdir()
    torch.save(torch.ones(2), last)
    with pytest.raises(CheckpointError, match="found a Tensor in"):
        read_checkpoint(last)
    with pytest.raises(FileNotFoundError):
        read_checkpoint(last.with_name("missing.ckpt"))


def test_a_file_is_hashed_once_until_it_or_its_digest_changes(last, monkeypatch):
    hashed = []

    def note(path):
        hashed.append(path)
        return files.file_digest(path)

    monkeypatch.setattr(checkpoints, "file_digest", note)
    save_checkpoint(content(1), last)
    read_checkpoint(last)
    read_checkpoint(last)
    assert len(hashed) == 1
    save_checkpoint(content(2), last)
    read_checkpoint(last)
    assert len(hashed) == 2
    digest_file(last).write_text("")
    with pytest.raises(CheckpointError):
        read_checkpoint(last)


def test_a_full_disk_leaves_the_previous_checkpoint(last):
    save_checkpoint(content(1), last)
    big = content(2) | {"more": torch.zeros(1 << 20)}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
    try:
        with pytest.raises(OSError) as caught:
            save_checkpoint(big, last)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caught.value.errno == errno.EFBIG
    assert read_checkpoint(last)["step"] == 1
    assert len(list(last.parent.iterdir())) == 2
    save_checkpoint(big, last)
    expected = f"bytes free for {last}; expected {last.stat().st_size:,} ("
    assert expected in str(caught.value)
    assert "the previous last.ckpt is kept" in str(caught.value)


@pytest.mark.parametrize("call", ["fsync", "replace"])
@pytest.mark.parametrize("failing", range(1, 4))
def test_a_full_disk_at_any_call_leaves_one_that_loads(last, monkeypatch, call, failing):
    save_checkpoint(content(1), last)
    calls = []
    function = getattr(os, call)

    def refuse(*args):
        calls.append(args)
        if len(calls) == failing:
            raise OSError(errno.ENOSPC, "No space left on device")
        return function(*args)

    with monkeypatch.context() as patch:
        patch.setattr(os, call, refuse)
        with pytest.raises(OSError, match="No space left on device: found"):
            save_checkpoint(content(2), last)
    renamed = call == "replace" and failing == 3
    assert read_checkpoint(last)["step"] == (2 if renamed else 1)
    assert len(list(last.parent.iterdir())) == 2


class Rank:
    """A trainer of one of two ranks, whose collectives give up after a while."""

    def __init__(self, rank: int, shared: SimpleNamespace, failure: Exception | None) -> None:
        self.rank, self.shared, self.failure = rank, shared, failure
        self.strategy = self
        self.global_step = self.max_steps = self.max_epochs = 1
        self.current_epoch, self.is_last_batch = 0, False

    def barrier(self) -> None:
        self.shared.barrier.wait()

    def reduce_boolean_decision(self, decision: bool) -> bool:
        self.shared.decisions[self.rank] = decision
        self.shared.barrier.wait()
        return all(self.shared.decisions.values())

    def save_checkpoint(self, path: Path) -> None:
        """As Lightning's: the first rank writes, then all wait for it."""
        if self.rank == 0 and self.failure is not None:
            raise self.failure
        self.barrier()


@pytest.mark.parametrize("failure", [None, OSError(errno.ENOSPC, "full")])
def test_all_ranks_end_where_the_first_cannot_write(failure):
    shared = SimpleNamespace(barrier=threading.Barrier(2, timeout=10), decisions={})
    raised: dict[int, BaseException | None] = {}

    def run(rank: int) -> None:
        callback = LastCheckpoint(Path("last.ckpt"), every=1)
        try:
            callback.on_train_batch_end(Rank(rank, shared, failure))
            raised[rank] = None
        except BaseException as error:
            raised[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert raised[0] is failure
    if failure is None:
        assert raised[1] is None
    else:
        assert isinstance(raised[1], RuntimeError)
        assert "rank 0 without a checkpoint at last.ckpt" in str(raised[1])
