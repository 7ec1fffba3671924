"""Which shards are trained on and which are held out."""

from pathlib import Path

import pytest

from recipes.data import split_shards
from recipes.shard_files import ShardError
from recipes.shard_writer import write_shards


def write(folder: Path, split: str, count: int) -> list[Path]:
    samples = ({"__key__": f"{split}{n}", "jpg": b"x", "txt": "c"} for n in range(count))
    return write_shards(samples, folder, split, samples_per_shard=1)


def names(shards: list[Path]) -> list[str]:
    return [shard.stem for shard in shards]


def test_a_folder_has_its_splits(tmp_path):
    for split in ("train", "val", "test"):
        write(tmp_path, split, 1)
    train, held_out = split_shards(str(tmp_path), None)
    assert (names(train), names(held_out)) == (["train-000000"], ["val-000000"])


def test_of_a_folder_what_is_held_out_is_not_trained_on(tmp_path, caplog):
    write(tmp_path, "data", 4)
    caplog.set_level("INFO")
    # Also under another name.
    (tmp_path / "other").symlink_to(tmp_path)
    train, held_out = split_shards(str(tmp_path), str(tmp_path / "other" / "data-00000[13].tar"))
    assert names(train) == ["data-000000", "data-000002"]
    assert names(held_out) == ["data-000001", "data-000003"]
    assert "2 of 4 shards" in caplog.text
    with pytest.raises(ShardError, match="found 4 of 4 shards to train on held out, too"):
        split_shards(str(tmp_path), str(tmp_path))


def test_a_shard_that_is_named_for_both_is_refused(tmp_path):
    write(tmp_path, "data", 4)
    named, held_out = str(tmp_path / "data-{000000..000003}.tar"), str(tmp_path / "data-000003.tar")
    with pytest.raises(ShardError, match=r"1 of 4 shards .*: .*data-000003\.tar; expected others"):
        split_shards(named, held_out)
