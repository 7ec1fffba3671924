"""The harness of known faults: it counts right, and what goes wrong shows in its numbers."""

import random
from collections import Counter
from dataclasses import replace

import pytest

from recipes import reliability_faults
from recipes.reliability_faults import is_raised, measure, plant, read, score
from recipes.reliability_faults_plants import Damaged, good_samples, plants
from recipes.stream import ShardStream


def of(*names):
    return {name: plants()[name] for name in names}


def whole(samples, key, rng, data):
    """Claims a fault that is not there."""
    return Damaged(data, ("truncated shard",), (key,), frozenset((key,)))


def scored(folder, faults):
    planted = plant(folder / "shards", faults, 2)
    reading = read([one.shard for one in planted], 0, folder / "log")
    return score(planted, [reading], [is_raised(one) for one in planted])


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_every_fault_is_named_and_nothing_is_lost(tmp_path):
    found = measure(tmp_path, quick=True)
    assert found["unnamed"] == []
    assert found["named"] == found["injected"] == len(plants()) == 33
    assert found["good"] > 100
    assert found["good_lost"] == found["miscounted"] == 0
    assert sum(found["by_kind"].values()) > found["injected"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_many_faults(tmp_path):
    found = measure(tmp_path)
    assert found["unnamed"] == []
    assert found["named"] == found["injected"] >= 200
    assert found["good_lost"] == found["miscounted"] == 0


def test_a_fault_that_nothing_notices_shows(tmp_path):
    found = scored(tmp_path, {**of("no picture"), "nothing": whole})
    assert (found["injected"], found["named"], found["miscounted"]) == (4, 2, 1)
    assert {name.split(" (")[0] for name in found["unnamed"]} == {"nothing"}


def test_a_check_that_is_left_out_shows(tmp_path, monkeypatch):
    """Without checksums, flipped bytes are read as if nothing were wrong."""
    raw_of = ShardStream._raw

    def unchecked(self, shard, sample):
        index = self._index(shard)
        start, end = int(index.offsets[sample]), int(index.ends[sample])
        import xxhash

        index.checksums[sample] = xxhash.xxh3_64_intdigest(self._read(shard, start, end - start))
        return raw_of(self, shard, sample)

    monkeypatch.setattr(ShardStream, "_raw", unchecked)
    found = scored(tmp_path, of("byte flipped in a payload, after indexing", "no text"))
    assert found["named"] < found["injected"]


def test_a_good_sample_that_is_dropped_shows(tmp_path, monkeypatch):
    item_of = ShardStream._item

    def neighbour(self, shard, sample, passed):
        return item_of(self, shard, max(sample, 1), passed)

    faults = of("no picture", "symbolic link")
    assert scored(tmp_path / "right", faults)["good_lost"] == 0
    monkeypatch.setattr(ShardStream, "_item", neighbour)
    found = scored(tmp_path / "wrong", faults)
    assert found["good_lost"] == 4
    assert found["good"] == 16


def test_another_pixel_shows(tmp_path):
    planted = plant(tmp_path / "shards", of("no text"), 1)
    reading = read([planted[0].shard], 0, tmp_path / "log")
    place = next(iter(reading.samples))
    pixels, text = reading.samples[place]
    pixels[0, 0, 0] ^= 1
    assert score(planted, [reading], [True])["good_lost"] == 1
    reading.samples[place] = (pixels, text + ".")
    pixels[0, 0, 0] ^= 1
    assert score(planted, [reading], [True])["good_lost"] == 1


def test_a_record_too_many_shows(tmp_path):
    planted = plant(tmp_path / "shards", of("no text"), 1)
    reading = read([planted[0].shard], 0, tmp_path / "log")
    assert score(planted, [reading], [True])["named"] == 1
    assert score(planted, [reading], [False])["named"] == 0
    (records,) = reading.records.values()
    for wrong in (records * 2, [replace(records[0], key="other")], []):
        other = replace(reading, records={records[0].shard: wrong})
        assert score(planted, [reading, other], [True])["named"] == 0
    assert score(planted, [replace(reading, counts=Counter())], [True])["miscounted"] == 1


def test_a_fault_that_is_not_raised_shows(tmp_path, monkeypatch):
    (planted,) = plant(tmp_path / "shards", of("no text"), 1)
    assert is_raised(planted)
    assert not is_raised(replace(planted, damaged=replace(planted.damaged, keys=("other",))))
    stream_of = reliability_faults._stream
    monkeypatch.setattr(reliability_faults, "_stream", lambda shards, _: stream_of(shards, "skip"))
    assert not is_raised(planted)


def test_every_plant_harms_something():
    samples = good_samples(0)
    key = list(samples)[2]
    from recipes.reliability_faults_plants import _members, _tar

    data = _tar(_members(samples))
    for what, harm in plants().items():
        damaged = harm(samples, key, random.Random(0), data)
        assert damaged.data != data, what
        assert samples == good_samples(0), what
