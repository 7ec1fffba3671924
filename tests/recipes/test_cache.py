"""The feature cache: what it answers a sample with that it cannot encode."""

import pytest

from recipes.cache import cache_features
from recipes.samples import SampleError
from recipes.shard_writer import write_shards


def test_a_sample_without_a_picture_is_named(encoder, tmp_path):
    shards = write_shards([{"__key__": "s0", "txt": "x"}], tmp_path / "shards", "train")
    message = (
        r"train-000000.tar: sample 's0' \(members \['txt'\]\): no picture; "
        r"expected one of jpg, jpeg, png, webp;"
    )
    with pytest.raises(SampleError, match=message):
        cache_features(shards, encoder, tmp_path / "cache")
    assert not (tmp_path / "cache").exists() or not any((tmp_path / "cache").iterdir())
