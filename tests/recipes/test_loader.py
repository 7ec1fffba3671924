"""Batches of an epoch: the same for any workers, even over ranks, from any place on."""

import logging
import pickle

import pytest
import torch

from recipes.loader import SizedLoader
from recipes.shard_files import ShardError
from recipes.shard_writer import write_shards
from recipes.stream import ShardStream


def numbered(out, samples: int, per_shard: int = 5) -> str:
    members = ({"__key__": f"{n:04d}", "txt": str(n)} for n in range(samples))
    write_shards(members, out, "train", samples_per_shard=per_shard)
    return str(out)


def number_of(raw) -> int:
    return int(raw["txt"])


def odd_only(raw) -> int:
    if int(raw["txt"]) % 10 == 4:
        raise ValueError("a four")
    return int(raw["txt"])


def loader(shards, batch_size=4, *, rank=0, world_size=1, epoch=0, monkeypatch=None, **options):
    decode = options.pop("decode", number_of)
    lenient = {"on_error": "skip", "max_bad_fraction": 1.0} if decode is odd_only else {}
    stream = ShardStream(shards, decode, seed=0, shuffle=True, shuffle_buffer=7, **lenient)
    stream.set_epoch(epoch)
    if world_size > 1:
        monkeypatch.setenv("WORLD_SIZE", str(world_size))
        monkeypatch.setenv("RANK", str(rank))
    return SizedLoader(stream, batch_size, list, **options)


@pytest.mark.parametrize("shards", [1, 2, 3, 5, 7])
@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("drop_last", [True, False])
def test_every_rank_has_as_many_steps(shards, ranks, drop_last, tmp_path, monkeypatch):
    total = shards * 5 - 1
    data = numbered(tmp_path, total)
    batches = []
    for rank in range(ranks):
        options = {"rank": rank, "world_size": ranks, "monkeypatch": monkeypatch}
        own = loader(data, 2, drop_last=drop_last, **options)
        batches.append(list(own))
        assert len(own) == len(batches[-1])
    assert len({tuple(map(len, own)) for own in batches}) == 1
    seen = [number for own in batches for batch in own for number in batch]
    assert len(set(seen)) == len(seen)
    assert total - len(seen) < (2 * ranks if drop_last else ranks)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_batches_do_not_depend_on_workers(tmp_path):
    data = numbered(tmp_path, 53)
    expected = list(loader(data))
    assert len(expected) == 13
    for workers in (1, 2):
        assert list(loader(data, num_workers=workers)) == expected
    assert list(loader(data, epoch=1)) != expected


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("workers", [(0, 0), (0, 2), (2, 0)])
def test_a_loader_goes_on_where_another_stopped(workers, tmp_path):
    data = numbered(tmp_path, 53)
    whole = list(loader(data, epoch=3))
    for done in (0, 1, 7, 13):
        first = loader(data, epoch=3, num_workers=workers[0])
        batches = iter(first)
        assert [next(batches) for _ in range(done)] == whole[:done]
        state = first.state_dict()
        if done == 13:
            with pytest.raises(StopIteration):
                next(batches)
            assert first.state_dict() == state
        second = loader(data, epoch=3, num_workers=workers[1])
        second.load_state_dict(state)
        assert len(second) == 13
        assert list(second) == whole[done:]
        assert list(second) == whole, "and then the epoch from its start"


def test_what_is_done_is_not_read_again(tmp_path):
    read = []
    resumed = loader(numbered(tmp_path, 40), decode=lambda raw: read.append(raw["__key__"]))
    resumed.go_to(9)
    list(resumed)
    assert len(read) == 4


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1), (3, 2), (2, 3)])
def test_another_number_of_ranks_goes_on_with_the_rest(before, after, tmp_path, monkeypatch):
    data = numbered(tmp_path, 61)
    seen, states = [], []
    for rank in range(before):
        first = loader(data, rank=rank, world_size=before, monkeypatch=monkeypatch)
        batches = iter(first)
        seen += [n for _ in range(3) for n in next(batches)]
        states.append(first.state_dict())
    assert all(state == states[0] for state in states)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    lengths = set()
    for rank in range(after):
        second = loader(data, rank=rank, world_size=after, monkeypatch=monkeypatch)
        second.load_state_dict(states[0])
        rest = list(second)
        assert len(second) == 3 + len(rest)
        lengths.add(len(rest))
        seen += [n for batch in rest for n in batch]
    assert len(lengths) == 1
    assert len(seen) == len(set(seen))
    assert 61 - len(seen) < 4 * after


def test_another_epoch_starts_at_its_start(tmp_path):
    data = numbered(tmp_path, 40)
    first = loader(data)
    next(iter(first))
    second = loader(data, epoch=1)
    second.load_state_dict(first.state_dict())
    assert len(list(second)) == 10


@pytest.mark.parametrize("change", ["seed", "shuffle_buffer", "contents"])
def test_a_place_in_another_order_is_refused(change, tmp_path):
    resumed = loader(numbered(tmp_path, 40))
    state = resumed.state_dict() | {change: "another"}
    with pytest.raises(ValueError, match=rf"'{change}': 'another'.*expected.*resume with"):
        resumed.load_state_dict(state)


def test_a_mixtures_place_is_refused(tmp_path):
    with pytest.raises(ValueError, match="checkpoint of a mixture"):
        loader(numbered(tmp_path, 40)).load_state_dict({"sources": {"a": 1}})


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("workers", [0, 2])
def test_what_workers_skip_is_known_to_the_run(workers, tmp_path, caplog):
    data = numbered(tmp_path, 53)
    lenient = loader(data, decode=odd_only, num_workers=workers)
    with caplog.at_level(logging.WARNING):
        batches = list(lenient)
    assert [len(batch) for batch in batches] == [4] * 13
    assert lenient.stream.skipped == {"unreadable sample": 5}
    for key in ("0004", "0014", "0044"):
        assert caplog.text.count(f"sample '{key}'") == 1
    resumed = loader(data, decode=odd_only, num_workers=workers)
    resumed.go_to(6)
    assert list(resumed) == batches[6:]


def test_too_many_bad_samples_found_by_workers_stop_the_run(tmp_path):
    lenient = loader(numbered(tmp_path, 53), decode=odd_only)
    lenient.stream.bad.max_fraction = 0.05
    with pytest.raises(ShardError, match=r"at most 5\.0%"):
        list(lenient)


def test_loading_draws_no_random_number(tmp_path):
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    list(loader(numbered(tmp_path, 20)))
    assert torch.equal(torch.rand(1), expected)


def test_ranks_are_read_from_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="RANK is not set"):
        loader(numbered(tmp_path, 20))


def test_ranks_are_read_from_the_process_group(tmp_path, monkeypatch):
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.get_rank", lambda group=None: 1)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda group=None: 2)
    own = loader(numbered(tmp_path, 20))
    assert (own.rank, own.world_size) == (1, 2)
    monkeypatch.undo()
    assert pickle.loads(pickle.dumps(own.stream)).total_samples == 20
