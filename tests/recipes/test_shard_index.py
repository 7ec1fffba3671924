"""Indexes of shards: webdataset's samples, whatever is damaged named, nothing good lost."""

import io
import json
import os
import random
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import xxhash
from webdataset.tariterators import group_by_keys, tar_file_expander

from recipes.shard_files import ShardError
from recipes.shard_index import missing_shards, scan_shard, shard_indexes
from recipes.shard_manifest import read_manifest
from recipes.shard_store import index_path, load_index, save_index
from recipes.shard_writer import write_shards

BLOCK = 512
KEYS = ("a1", "a2", "b/3", "schön", "long" * 60, "__x", "zz")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("BRIDGES_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def shard(tmp_path) -> Path:
    rng = random.Random(0)
    samples = (
        {"__key__": key, "jpg": rng.randbytes(700), "json": {"n": key}, "txt": f"caption {key}"}
        for key in KEYS
    )
    return write_shards(samples, tmp_path / "shards", "train")[0]


def plain_tar(path: Path, members, format=tarfile.PAX_FORMAT) -> Path:
    """A tar of (name, content); a (type, link) in place of the content is no file."""
    with tarfile.open(path, "w", format=format) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            if isinstance(content, bytes):
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
            else:
                info.type, info.linkname = content
                tar.addfile(info)
    return path


def of_webdataset(data: bytes) -> list[dict]:
    return list(group_by_keys(tar_file_expander([{"url": "x", "stream": io.BytesIO(data)}])))


def assert_agrees(shard: Path) -> None:
    """The index of an intact shard holds what webdataset reads."""
    data, index = shard.read_bytes(), scan_shard(shard)
    expected = of_webdataset(data)
    assert index.faults == ()
    assert list(index.keys) == [sample["__key__"] for sample in expected]
    for row, sample in enumerate(expected):
        found = {
            name: data[start : start + size]
            for name, (start, size) in index.members_of(row).items()
        }
        assert found == {name: sample[name] for name in sample if not name.startswith("__")}
        span = data[int(index.offsets[row]) : int(index.ends[row])]
        assert xxhash.xxh3_64_intdigest(span) == int(index.checksums[row])
        alone = of_webdataset(span)
        assert [one["__key__"] for one in alone] == [sample["__key__"]]


def kinds(index) -> list[tuple[str, str | None]]:
    return [(fault.kind, fault.key) for fault in index.faults]


def test_a_written_shard_is_read_as_webdataset_reads_it(shard):
    assert_agrees(shard)


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_a_foreign_shard_is_read_as_webdataset_reads_it(format, tmp_path):
    long = f"{'folder/' * 12}{'name' * 20}"
    members = [
        ("README", b"no sample's"),
        ("folder", (tarfile.DIRTYPE, "")),
        ("__meta__/x.json", b"{}"),
        ("./1.JPG", b"1" * 700),
        (".DS_Store", b"junk" * 300),
        ("./1.txt", b"one"),
        ("__meta__", b""),
        ("2.0.jpg", b"2" * 512),
        ("2.txt", b""),
        (f"{long}.jpg", b"3"),
        (f"{long}.cls", b"3"),
        ("a/b.c/4.seg.png", b"4"),
        ("last.txt", b"l"),
    ]
    assert_agrees(plain_tar(tmp_path / "foreign.tar", members, format))


def test_a_shard_that_ends_without_padding_is_whole(shard):
    end = int(scan_shard(shard).ends[-1])
    shard.write_bytes(shard.read_bytes()[: end + 2 * BLOCK])
    assert_agrees(shard)


def test_a_cut_anywhere_keeps_what_is_whole_and_is_reported(shard, tmp_path):
    data, whole = shard.read_bytes(), scan_shard(shard)
    end = int(whole.ends[-1]) + 2 * BLOCK
    rng = random.Random(1)
    cut = tmp_path / "cut.tar"
    for length in [*range(0, end, BLOCK), *(rng.randrange(end) for _ in range(150))]:
        cut.write_bytes(data[:length])
        index = scan_shard(cut)
        complete = [key for key, e in zip(whole.keys, whole.ends, strict=True) if e <= length]
        # Of the first sample alone nothing tells how many members it should have.
        assert list(index.keys) in (complete, [KEYS[0]]), length
        assert [fault.kind for fault in index.faults] == ["truncated shard"], length
        key = index.faults[0].key
        assert key is None or key == whole.keys[len(complete)], length


def test_a_cut_shard_has_the_samples_left_of_its_index(shard):
    whole = shard_indexes([shard])[0]
    data = shard.read_bytes()
    for length in (0, 5, int(whole.ends[2]), int(whole.ends[2]) + 600, int(whole.ends[-1])):
        shard.write_bytes(data[:length])
        index = shard_indexes([shard])[0]
        left = int((whole.ends <= length).sum())
        assert index.keys == whole.keys[:left]
        lost = list(whole.keys[left:]) or [None]
        assert kinds(index) == [("truncated shard", key) for key in lost]
        assert [index.members_of(row) for row in range(left)] == [
            whole.members_of(row) for row in range(left)
        ]


def test_a_cut_shard_without_its_index_counts_what_the_manifest_lists(shard):
    whole = scan_shard(shard)
    index_path(shard).unlink()
    shard.write_bytes(shard.read_bytes()[: int(whole.ends[2])])
    index = shard_indexes([shard])[0]
    assert index.keys == whole.keys[:3]
    assert [fault.kind for fault in index.faults] == ["truncated shard"] * 4


def test_a_flipped_header_costs_its_own_sample_only(shard, tmp_path):
    data, whole = shard.read_bytes(), scan_shard(shard)
    flipped = tmp_path / "flipped.tar"
    headers = [
        at
        for row in range(len(whole))
        for at in range(int(whole.offsets[row]), int(whole.ends[row]), BLOCK)
        if data[at + 257 : at + 262] == b"ustar"
    ]
    assert len(headers) == len(KEYS) * 3 + 2 * 3  # two keys have a header before each member's
    for block in headers:
        for byte in (0, 1, 100, 130, 150, 156, 258):
            damaged = bytearray(data)
            damaged[block + byte] ^= 0x21
            flipped.write_bytes(damaged)
            index = scan_shard(flipped)
            hit = next(
                key
                for key, start, end in zip(whole.keys, whole.offsets, whole.ends, strict=True)
                if start <= block < end
            )
            others = [key for key in whole.keys if key != hit]
            assert [key for key in index.keys if key in others] == others, (block, byte)
            assert kinds(index) == [("damaged header", hit)], (block, byte)
            assert hit not in index.keys


def test_overwritten_headers_cost_no_neighbour(shard, tmp_path):
    """Also by zeros, which elsewhere end an archive."""
    whole = scan_shard(shard)
    for filler in (bytes(BLOCK), random.Random(2).randbytes(BLOCK)):
        for row in range(len(whole)):
            for start, _ in whole.members_of(row).values():
                damaged = bytearray(shard.read_bytes())
                damaged[start - BLOCK : start] = filler
                (tmp_path / "x.tar").write_bytes(damaged)
                index = scan_shard(tmp_path / "x.tar")
                kept = [key for key in whole.keys if key != whole.keys[row]]
                assert list(index.keys) == kept
                assert [fault.kind for fault in index.faults] == ["damaged header"]


def test_a_second_occurrence_is_a_fault_and_the_first_stays(tmp_path):
    members = [("1.jpg", b"1"), ("1.txt", b"1"), ("1.jpg", b"x"), ("1.txt", b"x")]
    members += [("2.jpg", b"2"), ("2.txt", b"2"), ("1.txt", b"y"), ("3.jpg", b"3")]
    index = scan_shard(plain_tar(tmp_path / "twice.tar", members))
    assert index.keys == ("1", "2", "3")
    assert kinds(index) == [("duplicate key", "1"), ("duplicate key", "1")]
    assert set(index.members_of(0)) == {"jpg", "txt"}


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, b"V"])
def test_a_link_makes_its_sample_bad(kind, tmp_path):
    members = [("1.jpg", b"1"), ("2.jpg", (kind, "etc/passwd")), ("2.txt", b"2"), ("3.jpg", b"3")]
    index = scan_shard(plain_tar(tmp_path / "link.tar", members))
    assert index.keys == ("1", "3")
    assert kinds(index) == [("link or device", "2")]


@pytest.mark.parametrize(
    "name",
    ["../2.jpg", "a/../2.jpg", "/2.jpg", "a\\2.jpg", "C:2.jpg", "\udcff2.jpg", "2" * 2000 + ".jpg"],
)
def test_an_unsafe_name_makes_its_sample_bad(name, tmp_path):
    path = tmp_path / "unsafe.tar"
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT, errors="surrogateescape") as tar:
        for one in ("1.jpg", name, "3.jpg"):
            tar.addfile(tarfile.TarInfo(one))
    index = scan_shard(path)
    assert index.keys == ("1", "3")
    assert [fault.kind for fault in index.faults] == ["unsafe name"]
    shard_indexes([path])
    assert load_index(path) is not None


def test_a_sparse_member_is_refused(tmp_path):
    path = plain_tar(
        tmp_path / "sparse.tar", [("1.jpg", b"1"), ("2.jpg", (tarfile.GNUTYPE_SPARSE, ""))]
    )
    assert kinds(scan_shard(path)) == [("refused member", "2")]


def test_huge_declared_sizes_and_heaps_of_headers_cost_nothing(tmp_path):
    path = plain_tar(tmp_path / "crafted.tar", [("1.jpg", b"1")])
    good = path.read_bytes()[: 2 * BLOCK]
    huge = tarfile.TarInfo("2.jpg")
    huge.size = 1 << 60
    pax = tarfile.TarInfo("pax")
    pax.type = tarfile.XHDTYPE
    path.write_bytes(good + pax.tobuf() * 5000 + good.replace(b"1.jpg", b"1.txt"))
    assert "1" in scan_shard(path).keys or scan_shard(path).faults
    path.write_bytes(good + huge.tobuf())
    index = scan_shard(path)
    assert index.keys == ("1",)
    assert kinds(index) == [("truncated shard", "2")]
    pax.size = 1 << 40
    path.write_bytes(good + pax.tobuf() + bytes(2 * BLOCK))
    assert [fault.kind for fault in scan_shard(path).faults] == ["damaged header"]


@pytest.mark.parametrize(
    ("mode", "message"), [("w:gz", "gzip"), ("w:bz2", "bzip2"), ("w:xz", "xz")]
)
def test_a_compressed_shard_is_refused(mode, message, tmp_path):
    with tarfile.open(tmp_path / "x.tar", mode) as tar:
        tar.addfile(tarfile.TarInfo("1.jpg"))
    with pytest.raises(ShardError, match=f"found a {message} file.*decompress"):
        scan_shard(tmp_path / "x.tar")


def test_what_is_no_tar_is_refused(tmp_path):
    path = tmp_path / "x.tar"
    path.write_bytes(random.Random(0).randbytes(5000))
    with pytest.raises(ShardError, match="no tar header"):
        scan_shard(path)
    with pytest.raises(ShardError, match="no readable file"):
        shard_indexes([tmp_path / "gone.tar"])


def same(one, other) -> bool:
    plain = ("size", "sha256", "names", "keys", "faults")
    arrays = ("offsets", "ends", "checksums", "members", "starts", "sizes", "extensions")
    return all(getattr(one, name) == getattr(other, name) for name in plain) and all(
        np.array_equal(getattr(one, name), getattr(other, name)) for name in arrays
    )


def test_an_index_is_loaded_as_it_was_saved(shard, tmp_path):
    members = [("1.jpg", b"1"), ("1.jpg", b"1"), ("é.jpg", b"1"), ("../x.jpg", b"")]
    foreign = plain_tar(tmp_path / "foreign.tar", members)
    made = shard_indexes([shard, foreign])
    assert made[1].faults
    assert same(load_index(shard), made[0])
    assert same(load_index(foreign), made[1])
    assert same(made[0], scan_shard(shard))


def test_a_kept_index_is_not_made_again(shard, monkeypatch):
    first = shard_indexes([shard])[0]
    monkeypatch.setattr("recipes.shard_index.scan_shard", lambda shard: 1 / 0)
    assert same(shard_indexes([shard])[0], first)
    index_path(shard).unlink()
    with pytest.raises(ZeroDivisionError):
        shard_indexes([shard])


def test_a_damaged_index_is_made_again(shard):
    first = shard_indexes([shard])[0]
    data = index_path(shard).read_bytes()
    rng = random.Random(0)
    damaged = [data[:length] for length in (0, 7, 100, len(data) - 1)]
    for _ in range(60):
        flipped = bytearray(data)
        flipped[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        damaged.append(bytes(flipped))
    for content in damaged:
        index_path(shard).write_bytes(content)
        assert same(shard_indexes([shard])[0], first)


def test_an_index_that_points_elsewhere_is_made_again(shard):
    first = shard_indexes([shard])[0]
    for name, change in (("starts", -600), ("sizes", 10**6), ("ends", 10**9), ("extensions", 9)):
        save_index(replace(first, **{name: getattr(first, name) + change}), shard)
        assert load_index(shard) is None
        assert same(shard_indexes([shard])[0], first)


def test_where_the_folder_cannot_be_written_the_cache_is(shard, cache, monkeypatch):
    first = shard_indexes([shard])[0]
    index_path(shard).unlink()
    index_path(shard).mkdir()  # root writes wherever it likes, but not over a folder
    assert same(shard_indexes([shard])[0], first)
    assert len(list((cache / "indexes").iterdir())) == 1
    monkeypatch.setattr("recipes.shard_index.scan_shard", lambda shard: 1 / 0)
    assert same(shard_indexes([shard])[0], first)


def test_a_changed_shard_is_refused(shard):
    shard_indexes([shard])
    data = shard.read_bytes()
    fix = "changed since indexed.*bridges shards index .* --overwrite true"
    shard.write_bytes(data + bytes(BLOCK))
    with pytest.raises(ShardError, match=fix):
        shard_indexes([shard])
    index_path(shard).unlink()
    damaged = bytearray(data)
    damaged[BLOCK + 3] ^= 1
    shard.write_bytes(damaged)
    with pytest.raises(ShardError, match=fix):
        shard_indexes([shard])
    shard.write_bytes(data)
    assert shard_indexes([shard])[0].keys == KEYS


def test_the_manifest_names_what_is_lost(tmp_path):
    samples = [{"__key__": str(n), "txt": "x"} for n in range(4)]
    shards = write_shards(samples, tmp_path, "train", samples_per_shard=2)
    write_shards(samples, tmp_path, "val")
    assert missing_shards(shards) == []
    os.unlink(shards[1])
    assert missing_shards(shards[:1]) == [str(shards[1])]
    assert missing_shards([tmp_path / "val-000000.tar"]) == []


def test_a_bad_manifest_is_explained(shard):
    manifest = shard.parent / "shards.json"
    for content in ("{", "[]", '{"format": 2, "shards": []}', '{"shards": [{"name": "x"}]}'):
        manifest.write_text(content)
        with pytest.raises(ShardError, match="expected a manifest of format 1"):
            shard_indexes([shard])
    manifest.write_text(json.dumps({"scenes": 3}))
    assert read_manifest(shard.parent) is None
    assert shard_indexes([shard])[0].keys == KEYS
