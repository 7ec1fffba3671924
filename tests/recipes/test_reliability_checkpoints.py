"""Killed writers of checkpoints leave nothing broken, and the harness would see it."""

from pathlib import Path

import pytest
import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO

from recipes.checkpoints import LAST
from recipes.reliability_checkpoints import KILLS_QUICK, _other_filesystem, kill_writers, measure


def test_the_last_checkpoint_outlives_its_writer(tmp_path):
    found = measure(tmp_path, quick=True)
    assert found["kills"] == KILLS_QUICK == sum(found["by_phase"].values())
    assert found["unloadable"] == found["orphans"] == 0
    names = {path.name for path in (tmp_path / LAST).parent.iterdir()}
    assert names == {"last.ckpt", "last.ckpt.sha256"}


def test_a_writer_in_place_is_found_out(tmp_path):
    in_place = TorchCheckpointIO()
    in_place.save_checkpoint = torch.save  # by reference, so that it gets to the process

    def unloadable(attempt: int) -> int:
        folder = tmp_path / str(attempt)
        (folder / LAST).parent.mkdir(parents=True)
        return kill_writers(folder, in_place, KILLS_QUICK)["unloadable"]

    # Where a kill lands is chance: now and then, all of a few miss the writing.
    assert any(unloadable(attempt) for attempt in range(12))


@pytest.mark.slow
def test_lightnings_own_writer_is_found_out(tmp_path):
    """It stages in $TMPDIR, where a kill leaves files that nobody looks for."""
    assert kill_writers(tmp_path, TorchCheckpointIO(), 40)["orphans"] > 0


def test_temporary_files_go_to_another_file_system_where_there_is_one(tmp_path):
    other = _other_filesystem(tmp_path)
    assert other is None or other.stat().st_dev != tmp_path.stat().st_dev
    assert _other_filesystem(Path("/proc")) is not None
