"""Bad samples: counted once, named in a file that survives a kill, and too many are too many."""

import json

import pytest

from recipes.bad_samples import BadSample, BadSamples, read_bad_samples
from recipes.recording import count_skipped
from recipes.shard_files import ShardError

ONE = BadSample("a.tar", "1", "empty image", "no bytes")
TWO = BadSample("a.tar", "2", "empty image", "no bytes")
OTHER = BadSample("b.tar", None, "damaged header", "at byte 5", "0")


def counted(total=10_000, max_fraction=0.5) -> BadSamples:
    return BadSamples(total, max_fraction)


def test_each_is_counted_once():
    bad = counted()
    bad.add([ONE, TWO], 5)
    bad.add([BadSample("a.tar", "1", "empty image", "in other words")], 5)
    assert bad.kinds == {"empty image": 2}


def test_faults_that_hide_the_key_are_told_apart():
    bad = counted()
    bad.add([OTHER, BadSample("b.tar", None, "damaged header", "at byte 9", "1")])
    assert bad.kinds == {"damaged header": 2}


def test_each_is_a_line_in_the_file_also_those_found_before_it_was_named(tmp_path):
    bad, file = counted(), tmp_path / "run" / "skipped-0.jsonl"
    bad.add([OTHER])
    bad.keep(file, {"a.tar", "b.tar"})
    bad.add([ONE, ONE])
    assert read_bad_samples(file) == [OTHER, ONE]
    assert json.loads(file.read_text().splitlines()[1])["key"] == "1"


def test_a_resumed_run_goes_on_counting(tmp_path):
    file = tmp_path / "skipped-0.jsonl"
    first = counted()
    first.keep(file, {"a.tar", "b.tar"})
    first.add([ONE, OTHER])
    file.write_text(file.read_text() + '{"shard": "a.tar", "key": "3", "ki')  # killed here
    second = counted()
    second.add([OTHER])
    second.keep(file, {"a.tar"})
    second.add([ONE, TWO])
    assert second.kinds == {"damaged header": 1, "empty image": 2}
    assert read_bad_samples(file)[-1] == TWO


def test_a_file_of_several_sources_counts_for_each_its_own(tmp_path):
    file = tmp_path / "skipped-0.jsonl"
    first = counted()
    first.keep(file, {"a.tar"})
    first.add([ONE])
    second = counted()
    second.keep(file, {"b.tar"})
    assert not second.kinds


def test_what_two_ranks_met_counts_once(tmp_path):
    for rank, found in enumerate([[ONE, TWO], [ONE, OTHER]]):
        bad = counted()
        bad.keep(tmp_path / f"skipped-{rank}.jsonl", {"a.tar", "b.tar"})
        bad.add(found)
    assert count_skipped(tmp_path) == {"empty image": 2, "damaged header": 1}


@pytest.mark.parametrize(("total", "seen", "met"), [(20, 20, 3), (20, 0, 3), (10_000, 5000, 501)])
def test_more_than_the_fraction_is_an_error(total, seen, met):
    bad = counted(total, max_fraction=0.1)
    found = [BadSample("a.tar", str(n), "empty image", "") for n in range(met)]
    bad.add(found[:-1], seen)
    with pytest.raises(ShardError, match=rf"found {met} bad among .* \({met} empty image\)"):
        bad.add(found[-1:])


def test_faults_of_all_shards_are_weighed_against_all_samples():
    faults = [BadSample("a.tar", str(n), "truncated shard", "") for n in range(95)]
    counted(20_000, max_fraction=0.05).add_faults(faults)
    with pytest.raises(ShardError, match="95 bad among 1,000 samples"):
        counted(1000, max_fraction=0.05).add_faults(faults)


def test_a_sample_with_several_bad_members_is_one_bad_sample():
    both = [ONE, BadSample("a.tar", "1", "refused member", "a pickle")]
    counted(10, max_fraction=0.1).add(both, 10)


def test_the_first_of_many_samples_may_be_bad():
    counted(10_000, max_fraction=0.01).add([ONE], 1)
