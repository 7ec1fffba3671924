"""Shards read: who gets which sample in which order, and what bad input is answered with."""

import errno
import io
import itertools
import json
import os
import pickle
import random
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from bridges.preprocess import ExactDecoder
from recipes.order import EpochOrder
from recipes.samples import SampleError, decode_caption_sample
from recipes.shard_files import ShardError, expand_shards
from recipes.shard_writer import write_shards
from recipes.stream import ShardStream


def key_of(raw: dict) -> str:
    return raw["__key__"]


def seed_of(raw: dict) -> str:
    return raw["__seed__"]


def write_tar(path: Path, members: dict[str, bytes] | list[tuple[str, bytes]]) -> Path:
    pairs = members.items() if isinstance(members, dict) else members
    with tarfile.open(path, "w") as tar:
        for name, data in pairs:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def write_numbered(out: Path, shards: int, per_shard: int = 5) -> str:
    """``shards`` shards of ``per_shard`` samples, the last one sample short."""
    count = shards * per_shard - 1
    samples = ({"__key__": f"{n:04d}", "jpg": b"x", "txt": str(n)} for n in range(count))
    write_shards(samples, out, "train", samples_per_shard=per_shard)
    return str(out)


def stream(shards, decode=key_of, *, seed=0, shuffle=True, **options) -> ShardStream:
    return ShardStream(shards, decode, seed=seed, shuffle=shuffle, **options)


def picture(format: str = "PNG") -> bytes:
    data = io.BytesIO()
    Image.new("RGB", (4, 4), "red").save(data, format)
    return data.getvalue()


def array_bytes(array: np.ndarray, allow_pickle: bool = False) -> bytes:
    data = io.BytesIO()
    np.save(data, array, allow_pickle=allow_pickle)
    return data.getvalue()


# --- order


def order(shards: str, seed: int = 0, epoch: int = 0, **options) -> tuple[str, ...]:
    found = stream(shards, seed=seed, **options)
    found.set_epoch(epoch)
    return tuple(found)


def test_in_order_each_sample_comes_once(tmp_path):
    keys = list(stream(write_numbered(tmp_path, 3), shuffle=False))
    assert keys == [f"{n:04d}" for n in range(14)]


@pytest.mark.parametrize("shuffle_buffer", [1, 3, 1000])
def test_the_order_is_a_function_of_seed_and_epoch(shuffle_buffer, tmp_path):
    shards = write_numbered(tmp_path, 4)
    orders = {
        (seed, epoch): order(shards, seed, epoch, shuffle_buffer=shuffle_buffer)
        for seed in (0, 1)
        for epoch in (0, 1, 2)
    }
    assert len(set(orders.values())) == 6
    assert {tuple(sorted(keys)) for keys in orders.values()} == {
        tuple(f"{n:04d}" for n in range(19))
    }
    random.seed(5)
    torch.manual_seed(5)
    assert orders == {
        which: order(shards, *which, shuffle_buffer=shuffle_buffer) for which in orders
    }


def test_the_order_stays_the_same_for_ever():
    """A checkpoint of an older version holds a place in it."""
    found = EpochOrder([3, 2, 4], seed=1, epoch=2, block=4)
    expected = [(2, 0), (2, 1), (0, 2), (2, 2), (1, 0), (1, 1), (0, 0), (2, 3), (0, 1)]
    assert [found[position] for position in range(9)] == expected


def test_the_shards_themselves_are_permuted(tmp_path):
    data = stream(write_numbered(tmp_path, 4), shuffle_buffer=1)
    followers = set()
    for epoch in range(20):
        data.set_epoch(epoch)
        followers |= set(itertools.pairwise(data))
    assert len({second for first, second in followers if first == "0004"}) > 1


def test_other_samples_of_a_single_shard_are_mixed_in_other_epochs(tmp_path):
    one = stream(write_numbered(tmp_path, 1, per_shard=20), shuffle_buffer=5)
    firsts = set()
    for epoch in range(20):
        one.set_epoch(epoch)
        firsts |= set(itertools.islice(one, 5))
    assert len(firsts) > 15


def test_a_block_holds_neighbours_only():
    """What is read together lies together: a block of 10 of one ring touches three shards."""
    found = EpochOrder([5] * 40, seed=0, epoch=0, block=10)
    for block in range(20):
        assert len({found[block * 10 + place][0] for place in range(10)}) <= 3


def test_what_comes_next_is_known():
    found = EpochOrder([2] * 5, seed=0, epoch=0, block=1)
    line = list(dict.fromkeys(found[position][0] for position in range(10)))
    after = found.following(line[1], 2)
    assert after == line[2:4]
    assert len(found.following(line[1], 9)) == 4


def test_a_position_is_found_without_those_before_it(tmp_path):
    decoded = []
    data = stream(write_numbered(tmp_path, 20), lambda raw: decoded.append(raw["__key__"]))
    whole = order(str(tmp_path))
    for position in (98, 0, 57):
        data[position]
        assert decoded.pop() == whole[position]
        assert not decoded
    with pytest.raises(IndexError, match="99"):
        data[99]


def test_a_stream_survives_being_sent_to_a_worker(tmp_path):
    data = stream(write_numbered(tmp_path, 3))
    data.set_epoch(2)
    expected = list(data)
    assert list(pickle.loads(pickle.dumps(data))) == expected


def test_only_so_many_files_stay_open(tmp_path, monkeypatch):
    monkeypatch.setattr("recipes.stream._OPEN_FILES", 2)
    monkeypatch.setattr("recipes.stream._INDEXES", 2)
    data = stream(write_numbered(tmp_path, 6), shuffle_buffer=1000)
    assert len(set(data)) == 29
    assert len(data._files) == len(data._indexes) == 2


def test_the_augmentation_seed_belongs_to_the_sample(tmp_path):
    data = stream(write_numbered(tmp_path, 2), seed_of)
    first = list(data)
    assert len(set(first)) == 9
    assert data[4].item == first[4]
    data.set_epoch(1)
    assert not set(data) & set(first)


# --- finding shards


def test_shards_are_found_by_braces_globs_folders_and_lists(tmp_path):
    write_numbered(tmp_path, 3)
    paths = [tmp_path / f"train-00000{index}.tar" for index in range(3)]
    assert expand_shards(f"{tmp_path}/train-{{000000..000002}}.tar") == paths
    assert expand_shards(f"{tmp_path}/train-*.tar") == paths
    assert expand_shards(str(tmp_path)) == expand_shards(tmp_path) == paths
    assert expand_shards(f"{tmp_path}/train-*") == paths  # the indexes are beside them
    assert expand_shards([str(paths[2]), paths[0]]) == [paths[2], paths[0]]
    (tmp_path / "{odd}").mkdir()
    odd = paths[0].rename(tmp_path / "{odd}" / "[1].tar")
    assert expand_shards(odd) == [odd]


def test_missing_shards_are_each_named(tmp_path):
    write_numbered(tmp_path, 2)
    with pytest.raises(ShardError, match=r"000002.tar, .*000003.tar; expected .*bridges shards"):
        expand_shards(f"{tmp_path}/train-{{000000..000003}}.tar")
    with pytest.raises(ShardError, match="val-"):
        expand_shards([f"{tmp_path}/train-*.tar", f"{tmp_path}/val-*.tar"])
    with pytest.raises(ShardError, match="no shards"):
        expand_shards([])
    with pytest.raises(ShardError, match=r"more than once: .*000001.tar"):
        expand_shards([str(tmp_path), f"{tmp_path}/train-000001.tar"])
    with pytest.raises(ShardError, match="unbalanced braces"):
        expand_shards("train-{0..7.tar")


@pytest.mark.parametrize("spec", ["pipe:touch {}/hit", "ftp://x/y.tar", "data:,x", "memory://k"])
def test_commands_and_other_schemes_are_refused(spec, tmp_path):
    with pytest.raises(ShardError, match=r"expected .*https?:"):
        stream(spec.format(tmp_path))
    assert not list(tmp_path.iterdir())


# --- bad shards


def test_truncated_shards_are_refused_wherever_they_are_cut(tmp_path):
    write_numbered(tmp_path, 2)
    shard = tmp_path / "train-000000.tar"
    data = shard.read_bytes()
    for cut in range(0, len(data) - 1024, 512):
        shard.write_bytes(data[:cut])
        with pytest.raises(ShardError, match=r"train-000000.tar"):
            stream(str(tmp_path))


def test_of_a_truncated_shard_what_is_whole_is_read(tmp_path, caplog):
    write_numbered(tmp_path, 2)
    shard = tmp_path / "train-000000.tar"
    data = shard.read_bytes()
    with tarfile.open(shard) as tar:
        third = tar.getmember("0002.jpg").offset
    shard.write_bytes(data[: third + 700])
    kept = stream(str(tmp_path), on_error="skip", shuffle=False, max_bad_fraction=1)
    assert list(kept) == ["0000", "0001", "0005", "0006", "0007", "0008"]
    assert kept.skipped == {"truncated shard": 3}
    assert all(f"'{key}'" in caplog.text for key in ("0002", "0003", "0004"))


def test_a_flipped_byte_costs_its_sample_and_no_other(tmp_path, caplog):
    write_numbered(tmp_path, 2)
    shard = tmp_path / "train-000000.tar"
    data = bytearray(shard.read_bytes())
    with tarfile.open(shard) as tar:
        at = tar.getmember("0002.txt").offset_data
    data[at] ^= 1
    shard.write_bytes(data)
    with pytest.raises(SampleError, match=r"'0002': its .* bytes .* are not those that were") as e:
        list(stream(str(tmp_path)))
    assert e.value.kind == "damaged bytes"
    kept = stream(str(tmp_path), on_error="skip", shuffle=False, max_bad_fraction=1)
    assert list(kept) == [f"{n:04d}" for n in range(9) if n != 2]
    assert kept.skipped == {"damaged bytes": 1}


@pytest.mark.parametrize(
    "names",
    [
        ["a.jpg", "a.jpg"],
        ["a.jpg", "a.JPG"],
        ["a.jpg", "b.jpg", "a.txt"],
        ["a.jpg", "b.jpg", "a.jpg"],
    ],
)
def test_a_key_that_occurs_twice_is_refused(names, tmp_path):
    shard = write_tar(tmp_path / "x.tar", [(name, b"") for name in names])
    with pytest.raises(ShardError, match=r"duplicate key.*'a'"):
        stream(shard)
    kept = stream(shard, on_error="skip", max_bad_fraction=1)
    assert set(kept) == {"a", "b"} & {name[0] for name in names}
    assert kept.skipped == {"duplicate key": 1}


def test_what_is_no_sample_is_passed_over(tmp_path):
    members = {
        "__meta__/x.txt": b"",
        "00/1.jpg": b"",
        "00/1.cls": b"3",
        "00/README": b"",
        "._2.jpg": b"",
        "2.TXT": b"",
    }
    shard = write_tar(tmp_path / "x.tar", members)
    assert list(stream(shard, shuffle=False)) == ["00/1", "2"]
    with pytest.raises(ShardError, match="no samples in 1 shards"):
        stream(write_tar(tmp_path / "none.tar", {"README": b"hello"}))


def test_long_names_are_read_from_where_their_header_begins(tmp_path):
    keys = [f"{'long' * 50}{index}" for index in range(4)]
    shard = write_tar(tmp_path / "x.tar", {f"{key}.txt": b"" for key in keys})
    assert list(stream(shard, shuffle=False)) == keys


def test_a_shard_that_the_manifest_lists_and_is_gone_is_missed(tmp_path):
    write_numbered(tmp_path, 3)
    (tmp_path / "train-000001.tar").unlink()
    with pytest.raises(ShardError, match=r"found no .*train-000001.tar, which the manifest"):
        stream(str(tmp_path), on_error="skip")


def test_a_shard_rewritten_in_mid_run_is_not_read_on(tmp_path, monkeypatch):
    monkeypatch.setattr("recipes.stream._INDEXES", 1)
    write_numbered(tmp_path, 3)
    data = stream(str(tmp_path), shuffle=False)
    samples = ({"__key__": f"{n:04d}", "jpg": b"other", "txt": str(n)} for n in range(14))
    write_shards(samples, tmp_path, "train", samples_per_shard=5, overwrite=True)
    data._files.clear()
    with pytest.raises(ShardError, match="has changed while in use"):
        data[7]


def test_a_sector_that_cannot_be_read_costs_its_sample_and_no_other(tmp_path, monkeypatch):
    data = stream(write_numbered(tmp_path, 1), shuffle=False, on_error="skip", max_bad_fraction=1)
    whole, read = list(data), ShardStream._read
    bad = int(data._index(0).offsets[2])

    def failing(self, shard, start, length):
        if start == bad:
            raise OSError(errno.EIO, "Input/output error")
        return read(self, shard, start, length)

    monkeypatch.setattr(ShardStream, "_read", failing)
    assert list(data) == [key for key in whole if key != "0002"]
    assert data.skipped == {"unreadable bytes": 1}


def test_a_file_system_that_gives_less_than_asked_for_is_asked_again(tmp_path, monkeypatch):
    data = stream(write_numbered(tmp_path, 1), shuffle=False)
    plain = os.preadv
    monkeypatch.setattr(os, "preadv", lambda file, buffers, at: plain(file, [buffers[0][:700]], at))
    assert list(data) == ["0000", "0001", "0002", "0003"]


def test_a_width_of_the_shuffle_that_would_take_seconds_is_refused(tmp_path):
    with pytest.raises(ValueError, match="expected 1 to 1,000,000"):
        stream(write_numbered(tmp_path, 1), shuffle_buffer=10_000_000)


def test_what_lies_between_members_is_measured_before_it_is_read(tmp_path):
    members = {"a.jpg": b"x", "README": bytes(5 << 20), "a.txt": b"x", "b.txt": b"x"}
    data = stream(write_tar(tmp_path / "x.tar", members), on_error="skip", max_bad_fraction=1)
    assert list(data) == ["b"]
    assert data.skipped == {"member too large": 1}


def test_a_shard_that_changes_while_in_use_is_no_other_sample(tmp_path):
    shard = write_tar(tmp_path / "x.tar", {f"{n}.txt": b"" for n in range(4)})
    data = stream(shard)
    write_tar(shard, {"0.txt": b"other"})
    with pytest.raises(SampleError, match="are not those that were indexed"):
        list(data)


# --- bad samples


GOOD = {"png": picture(), "txt": b"a red square"}
BAD = {
    "unreadable image": {"jpg": b"not a picture", "txt": b"x"},
    "missing caption": {"png": picture()},
    "missing image": {"txt": b"x"},
    "unreadable json": {"png": picture(), "json": b"{", "txt": b"x"},
    "unreadable caption": {"png": picture(), "txt": b"\xff"},
    "unreadable features": {"npy": array_bytes(np.zeros(9))[:-1], "txt": b"x"},
}


def lenient(shard: Path, **options) -> ShardStream:
    options = {"max_bad_fraction": 1.0, **options}
    return stream(shard, decode_caption_sample, on_error="skip", **options)


def write_samples(path: Path, *samples: dict[str, bytes]) -> Path:
    members = [
        (f"s{index}.{extension}", data)
        for index, sample in enumerate(samples)
        for extension, data in sample.items()
    ]
    return write_tar(path, members)


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_sample_is_named_or_counted(kind, tmp_path, caplog):
    shard = write_samples(tmp_path / "x.tar", GOOD, BAD[kind], GOOD)
    data = stream(shard, decode_caption_sample, shuffle=False)
    with pytest.raises(SampleError, match=r"x.tar: sample 's1' \(members .*on_error") as error:
        list(data)
    assert error.value.kind == kind

    data = lenient(shard, shuffle=False)
    for _ in range(2):  # counted once, however often it comes round
        assert [sample["key"] for sample in data] == ["s0", "s2"]
        assert data.skipped == {kind: 1}
    assert "x.tar: sample 's1'" in caplog.text


def test_another_sample_stands_in_for_a_bad_one(tmp_path):
    samples = [GOOD, *BAD.values(), *[GOOD] * 9]
    shard = write_samples(tmp_path / "x.tar", *samples)
    data, again = lenient(shard), lenient(shard)
    found = [data[position] for position in range(len(samples))]
    bad = {f"s{n + 1}": kind for n, kind in enumerate(BAD)}
    assert {one.key: one.kind for read in found for one in read.bad} == bad
    assert not {read.item["key"] for read in found} & set(bad)
    # From its position alone, whatever was read before.
    for position in (12, 3, 7):
        assert again[position].item["key"] == found[position].item["key"]
    assert sum(len(read.bad) > 0 for read in found) == len(BAD)


def test_nothing_but_bad_samples_ends_in_an_error(tmp_path):
    shard = write_samples(tmp_path / "x.tar", *BAD.values())
    with pytest.raises(ShardError, match="100 bad samples in a row"):
        lenient(shard)[0]


def test_too_many_bad_samples_end_in_an_error(tmp_path):
    shard = write_samples(tmp_path / "x.tar", *[GOOD] * 9, *[BAD["missing caption"]])
    assert len(list(lenient(shard, max_bad_fraction=0.1))) == 9
    with pytest.raises(ShardError, match=r"1 bad among 10 .*\(1 missing caption\).* at most 5.0%"):
        list(lenient(shard, max_bad_fraction=0.05))
    with pytest.raises(ValueError, match="0 to 1"):
        lenient(shard, max_bad_fraction=5)


def test_a_member_is_measured_before_it_is_read(tmp_path, monkeypatch):
    shard = write_samples(tmp_path / "x.tar", GOOD, {**GOOD, "txt": b"x" * 5000}, GOOD)
    monkeypatch.setattr("recipes.stream.size_limit", lambda extension: 4000)
    data = lenient(shard, shuffle=False)
    assert [sample["key"] for sample in data] == ["s0", "s2"]
    assert data.skipped == {"member too large": 1}


def test_a_value_error_of_any_decoder_is_a_bad_sample_and_a_bug_is_a_bug(tmp_path):
    shard = write_samples(tmp_path / "x.tar", GOOD)
    with pytest.raises(SampleError, match=r"x.tar: sample 's0': invalid literal"):
        list(stream(shard, lambda raw: int(raw["txt"])))
    with pytest.raises(KeyError):
        list(stream(shard, lambda raw: raw["nothing"], on_error="skip"))


@pytest.mark.parametrize("on_error", ["raise", "skip"])
def test_a_stop_iteration_in_a_decoder_does_not_end_the_epoch_silently(on_error, tmp_path):
    shard = write_samples(tmp_path / "x.tar", GOOD, GOOD)
    with pytest.raises(RuntimeError, match=r"'s.': StopIteration"):
        stream(shard, lambda raw: next(iter(())), on_error=on_error)[0]


class Payload:
    """Unpickled, it would create a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("extension", ["pkl", "pyd", "pickle", "pth", "pt", "b.jpg"])
def test_pickled_members_are_refused_and_never_run(extension, tmp_path):
    hit = tmp_path / "hit"
    pickled = pickle.dumps(Payload(hit))
    shard = write_samples(tmp_path / "x.tar", {**GOOD, extension: pickled})
    with pytest.raises(SampleError, match=f"'s0' has members .'{extension}'.; only") as error:
        list(stream(shard, decode_caption_sample))
    assert error.value.kind == "refused member"
    data = lenient(shard)
    assert [sample["captions"] for sample in data] == [["a red square"]]
    assert data.skipped == {"refused member": 1}
    assert list(stream(shard, set, on_error="skip", max_bad_fraction=1)) == [
        {"png", "txt", "__key__", "__shard__", "__seed__"}
    ]
    assert not hit.exists()
    pickle.loads(pickled)
    assert hit.exists()


@pytest.mark.parametrize("extension", ["0.jpg", "7.png", "12.webp", "3.JPEG", "mp4"])
def test_numbered_pictures_and_videos_are_members(extension, tmp_path):
    (found,) = stream(write_samples(tmp_path / "x.tar", {extension: b"x"}), set)
    assert found == {extension.lower(), "__key__", "__shard__", "__seed__"}


@pytest.mark.parametrize("extension", ["00.jpg", "-1.jpg", "1.gif", "1.2.jpg", "1.txt", "0.mp4"])
def test_what_is_nearly_a_numbered_picture_is_refused(extension, tmp_path):
    shard = write_samples(tmp_path / "x.tar", {"txt": b"x", extension: b"x"})
    with pytest.raises(SampleError, match=r"has members .*numbered pictures such as 0\.jpg"):
        list(stream(shard, set))
    with pytest.raises(ValueError, match=rf"has the member '{extension}'; expected"):
        write_shards([{"__key__": "a", extension: b"x"}], tmp_path, "train")


def test_numbered_pictures_are_written_and_read(tmp_path):
    members = {"0.jpg": b"a", "10.png": b"b", "mp4": b"c", "txt": "d"}
    write_shards([{"__key__": "k", **members}], tmp_path, "train")
    (raw,) = stream(str(tmp_path), dict)
    assert {name: raw[name] for name in members} == {**members, "txt": b"d"}


def test_a_picture_of_several_is_not_taken_for_a_caption_sample(tmp_path):
    for number, members in enumerate(({"0.png": picture()}, {"mp4": b"x"})):
        shard = write_samples(tmp_path / f"{number}.tar", {"txt": b"x", **members})
        with pytest.raises(SampleError, match=r"no picture; .*data\.task: video reads mp4"):
            list(stream(shard, decode_caption_sample))


def test_features_of_several_pictures_are_not_taken_for_one(tmp_path):
    shard = write_samples(
        tmp_path / "x.tar", {"txt": b"x", "npy": array_bytes(np.zeros((2, 3, 4), np.float16))}
    )
    with pytest.raises(SampleError, match=r"npy of shape \(2, 3, 4\); expected 2 axes"):
        list(stream(shard, decode_caption_sample))


def test_a_pickle_inside_npy_is_never_run(tmp_path):
    hit = tmp_path / "hit"
    array = np.empty(1, object)
    array[0] = Payload(hit)
    data = array_bytes(array, allow_pickle=True)
    shard = write_samples(tmp_path / "x.tar", {"npy": data, "txt": b"x"})
    with pytest.raises(SampleError, match="npy: found object"):
        list(stream(shard, decode_caption_sample))
    assert not hit.exists()


# --- decoding


def decode(rng=None, transform=None, **members: bytes) -> dict:
    raw = {"__key__": "k", "__shard__": "s.tar", "png": picture(), **members}
    return decode_caption_sample(raw, rng=rng, transform=transform)


def as_json(**content) -> bytes:
    return json.dumps(content).encode()


def test_the_fullest_source_of_captions_wins():
    assert decode(txt=b" text\n")["captions"] == ["text"]
    assert decode(txt=b"text", json=as_json(caption="one"))["captions"] == ["one"]
    both = as_json(caption="one", captions=["two", " ", "three", None])
    assert decode(txt=b"text", json=both)["captions"] == ["two", "three"]
    assert decode(txt=b"text", json=as_json(captions=[], caption=None))["captions"] == ["text"]


@pytest.mark.parametrize(
    ("meta", "expected"),
    [
        (b'{"caption": "half \\ud800 a pair"}', "surrogates not allowed"),
        (b'{"caption": "c", "more": [{"\\udc00": 1}]}', "surrogates not allowed"),
        (b'{"caption": "c", "more": ' + 200 * b"[" + 200 * b"]" + b"}", "deeper than 100"),
        (b'{"caption": "c", "more": ' + 9999 * b"[" + 9999 * b"]" + b"}", "deeper than 100"),
    ],
)
def test_json_that_nothing_could_write_is_a_bad_sample(meta, expected):
    """No tokenizer takes it, no file, and no queue of a loader's worker."""
    with pytest.raises(SampleError, match=expected) as error:
        decode(json=meta)
    assert error.value.kind == "unreadable json"
    assert decode(json=b'{"caption": "\\ud83d\\ude00"}')["captions"] == ["\U0001f600"]


def test_a_caption_with_half_a_surrogate_pair_is_a_bad_sample():
    with pytest.raises(SampleError, match="not UTF-8") as error:
        decode(txt=b"half \xed\xa0\x80 a pair")
    assert error.value.kind == "unreadable caption"


def test_meta_image_and_transform():
    sample = decode(txt=b"x", json=as_json(id=3))
    assert sample["meta"] == {"id": 3}
    assert sample["image"].mode == "RGB"
    size = ExactDecoder(lambda image: torch.tensor(image.size))
    assert decode(txt=b"x", transform=size)["image"].tolist() == [4, 4]


def test_features_take_the_place_of_the_picture():
    array = np.arange(6, dtype=np.float16).reshape(2, 3)
    sample = decode(txt=b"x", npy=array_bytes(array))
    assert "image" not in sample
    torch.testing.assert_close(sample["features"], torch.from_numpy(array))


def test_rng_shuffles_the_captions_reproducibly():
    captions = as_json(captions=list("abcdef"))
    first = {decode(rng=random.Random(seed), json=captions)["captions"][0] for seed in range(40)}
    assert first == set("abcdef")
    again = [decode(rng=random.Random("seed"), json=captions)["captions"] for _ in range(2)]
    assert again[0] == again[1]
    assert sorted(again[0]) == list("abcdef")
