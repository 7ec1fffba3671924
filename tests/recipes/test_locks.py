"""Locks: who is held off, who is not, and that none outlives its process."""

import errno
import fcntl
import multiprocessing
import os
import signal
import time
from multiprocessing.connection import Connection
from pathlib import Path

import filelock
import pytest

from recipes.locks import RUN_LOCK, claim_run, locked

FORK = multiprocessing.get_context("fork")

pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")


def hold(folder: Path, ours: Connection) -> None:
    """Trains, so to speak, with a loader's worker that outlives it."""
    with claim_run(folder):
        worker = os.fork()
        if not worker:
            time.sleep(60)
            os._exit(0)
        ours.send(worker)
        signal.pause()


def test_one_process_at_a_time_trains_in_a_run_and_a_kill_ends_its_claim(tmp_path):
    theirs, ours = FORK.Pipe()
    child = FORK.Process(target=hold, args=(tmp_path / "run", ours))
    child.start()
    worker = theirs.recv()
    try:
        with (
            pytest.raises(ValueError, match=rf"trains in .*run \(process {child.pid} on .*--run"),
            claim_run(tmp_path / "run"),
        ):
            pytest.fail("claimed twice")
        with claim_run(tmp_path / "other"):
            pass
        child.kill()
        child.join()
        os.kill(worker, 0)  # it lives, with all the files that were open when it was forked
        with claim_run(tmp_path / "run"):
            assert (tmp_path / "run" / RUN_LOCK).read_text().startswith(f"process {os.getpid()} ")
    finally:
        os.kill(worker, signal.SIGKILL)
        child.kill()
        child.join()


def no_locks(*_):
    raise OSError(errno.ENOTSUP, "no locks here")


def test_where_there_are_no_locks_nobody_is_held_off(tmp_path, monkeypatch):
    monkeypatch.setattr(fcntl, "lockf", no_locks)
    monkeypatch.setattr(fcntl, "flock", no_locks)
    done = []
    with claim_run(tmp_path), locked(tmp_path / "a" / "lock"):
        done.append(1)
    with pytest.raises(KeyError), locked(tmp_path / "lock"):
        raise KeyError
    assert done


def test_a_lock_is_held_and_given_back(tmp_path):
    path = tmp_path / "a" / "lock"
    with locked(path), pytest.raises(filelock.Timeout):
        filelock.FileLock(path).acquire(timeout=0)
    filelock.FileLock(path).acquire(timeout=0)
