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
from safetensors import safe_open
from safetensors.numpy import save
from webdataset.tariterators import group_by_keys, tar_file_expander

from recipes.shard_faults import read_name
from recipes.shard_files import ShardError, expand_shards
from recipes.shard_index import missing_shards, scan_shard, shard_indexes
from recipes.shard_manifest import Entry, read_manifest, write_manifest
from recipes.shard_scan import MAX_FAULTS
from recipes.shard_store import _digest, drop_index, index_path, load_index, save_index
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


@pytest.mark.parametrize("indexed", [True, False])
def test_a_shard_replaced_by_a_smaller_one_is_refused(indexed, shard, tmp_path):
    shard_indexes([shard])
    if not indexed:
        index_path(shard).unlink()
    plain = [(f"{key}.txt", b"other") for key in KEYS]
    plain_tar(shard, plain, tarfile.GNU_FORMAT)
    fix = "changed since indexed.*write the shards again.*bridges shards index .* --overwrite true"
    with pytest.raises(ShardError, match=fix):
        shard_indexes([shard])


def test_a_shard_replaced_by_a_smaller_one_without_a_manifest_is_refused(shard):
    shard_indexes([shard])
    (shard.parent / "shards.json").unlink()
    plain_tar(shard, [(f"{key}.txt", b"other") for key in KEYS])
    with pytest.raises(ShardError, match="not cut short"):
        shard_indexes([shard])


def test_a_cut_in_zeros_is_a_cut(tmp_path):
    members = [("1.npy", b"1" * 600), ("2.npy", bytes(9000)), ("3.npy", b"3")]
    path = plain_tar(tmp_path / "zeros.tar", members)
    whole = shard_indexes([path])[0]
    data = path.read_bytes()
    path.write_bytes(data[: int(whole.starts[1]) + 6 * BLOCK])
    assert kinds(shard_indexes([path])[0]) == [("truncated shard", "2"), ("truncated shard", "3")]
    # In the zeros after the mark of the end: nothing is lost, with the index or the manifest.
    for left in (data[: int(whole.ends[-1]) + 2 * BLOCK], data[: int(whole.ends[-1]) + 1500]):
        path.write_bytes(left)
        assert shard_indexes([path])[0].keys == whole.keys
    write_manifest(tmp_path, [Entry.of(path.name, whole)], {})
    index_path(path).unlink()
    assert shard_indexes([path])[0].keys == whole.keys


def test_hidden_files_belong_to_no_sample(tmp_path):
    members = [("./._a", b"x"), ("src/._000.jpg", b"x"), ("src/.DS_Store", b"x")]
    members += [("src/000.jpg", b"0"), ("src/._000.txt", b"x"), ("src/000.txt", b"0")]
    index = scan_shard(plain_tar(tmp_path / "mac.tar", members))
    assert (index.keys, index.faults) == (("src/000",), ())
    assert set(index.members_of(0)) == {"jpg", "txt"}


def test_hidden_files_are_no_shards(shard):
    (shard.parent / f"._{shard.name}").write_bytes(b"resource fork" * 99)
    assert expand_shards(shard.parent) == [shard]


def sparse_tar(path: Path, version: str, name: str) -> Path:
    """A sparse file between two plain ones, in the headers that GNU tar writes."""
    records = {
        "0.0": {"GNU.sparse.size": "8192", "GNU.sparse.numblocks": "1", "GNU.sparse.offset": "4096"}
        | {"GNU.sparse.numbytes": "512"},
        "0.1": {"GNU.sparse.size": "8192", "GNU.sparse.numblocks": "1", "GNU.sparse.name": name}
        | {"GNU.sparse.map": "4096,512"},
        "1.0": {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.name": name}
        | {"GNU.sparse.realsize": "8192"},
    }[version]
    data = b"x" * 512
    if version == "1.0":
        data = b"1\n4096\n512\n".ljust(BLOCK, b"\0") + data
    folder, _, last = name.rpartition("/")
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        tar.addfile(tarfile.TarInfo("0.txt"))
        info = tarfile.TarInfo(name if version == "0.0" else f"{folder}/GNUSparseFile.7/{last}")
        info.size, info.pax_headers = len(data), records
        tar.addfile(info, io.BytesIO(data))
        tar.addfile(tarfile.TarInfo("4.txt"))
    return path


@pytest.mark.parametrize("version", ["0.0", "0.1", "1.0"])
@pytest.mark.parametrize("name", ["a/2.jpg", "long" * 40 + "/2.jpg", "schön/2.jpg"])
def test_a_sparse_member_of_any_version_is_refused(version, name, tmp_path):
    index = scan_shard(sparse_tar(tmp_path / "sparse.tar", version, name))
    assert index.keys == ("0", "4")
    assert kinds(index) == [("refused member", name[:-4])]


def test_the_long_map_of_a_sparse_member_costs_no_neighbour(tmp_path):
    path = plain_tar(tmp_path / "s.tar", [("1.txt", b""), ("2.txt", (tarfile.GNUTYPE_SPARSE, ""))])
    with tarfile.open(path) as tar:
        at = tar.getmember("2.txt").offset
    header = bytearray(path.read_bytes()[at : at + BLOCK])
    header[482] = 1
    header[148:156] = b" " * 8
    header[148:156] = f"{sum(header):06o}\0 ".encode()
    rest = plain_tar(tmp_path / "rest.tar", [("3.txt", b"3"), ("4.txt", b"4")]).read_bytes()
    extended = bytes(range(1, 200)).ljust(504, b"1")
    path.write_bytes(
        path.read_bytes()[:at] + header + extended + b"\1" + bytes(7) + extended + bytes(8) + rest
    )
    index = scan_shard(path)
    assert index.keys == ("1", "3", "4")
    assert kinds(index) == [("refused member", "2")]


@pytest.mark.parametrize("value", ["1e9", "Infinity", "-1", "true", "null", '"5"', "1e400"])
@pytest.mark.parametrize("field", ["bytes", "samples"])
def test_a_manifest_of_impossible_numbers_is_refused(field, value, shard):
    manifest = shard.parent / "shards.json"
    content = json.loads(manifest.read_text())
    content["shards"][0][field] = "VALUE"
    manifest.write_text(json.dumps(content).replace('"VALUE"', value))
    with pytest.raises(ShardError, match="expected a manifest of format 1"):
        read_manifest(shard.parent)


def test_a_manifest_of_more_samples_than_fit_is_refused(shard):
    entry = (read_manifest(shard.parent) or {})[shard.name]
    write_manifest(shard.parent, [replace(entry, samples=entry.bytes // 512 + 1)])
    with pytest.raises(ShardError, match="samples in"):
        read_manifest(shard.parent)


def test_the_faults_of_a_shard_that_should_be_huge_are_summed_up(shard):
    entry = (read_manifest(shard.parent) or {})[shard.name]
    write_manifest(shard.parent, [replace(entry, samples=10**12, bytes=10**16)])
    index_path(shard).unlink()
    shard.write_bytes(shard.read_bytes()[: int(scan_shard(shard).ends[2])])
    faults = shard_indexes([shard])[0].faults
    assert len(faults) == 1 + MAX_FAULTS + 1
    lost = 10**12 - 3 - 1
    assert f"{lost - MAX_FAULTS:,} more samples are lost" in faults[-1].problem


def test_a_manifest_is_parsed_once_and_anew_when_it_changes(shard, monkeypatch):
    first = read_manifest(shard.parent) or {}
    with monkeypatch.context() as patched:
        patched.setattr("recipes.shard_manifest.json.loads", lambda text: 1 / 0)
        assert read_manifest(shard.parent) == first
        with pytest.raises(TypeError):
            first["x"] = first[shard.name]  # pyright: ignore[reportIndexIssue]
    write_manifest(shard.parent, [replace(first[shard.name], split="other")])
    assert (read_manifest(shard.parent) or {})[shard.name].split == "other"


def test_members_are_not_searched_one_by_one(tmp_path, monkeypatch):
    class Counted(str):
        compared = 0

        def __eq__(self, other):
            Counted.compared += 1
            return str.__eq__(self, other)

        __hash__ = str.__hash__

    def read(member):
        key, extension, fault = read_name(member)
        return key, Counted(extension), fault

    monkeypatch.setattr("recipes.shard_scan.read_name", read)
    members = [(f"1.{n}.jpg", b"") for n in range(1000)]
    index = scan_shard(plain_tar(tmp_path / "many.tar", members, tarfile.USTAR_FORMAT))
    assert len(index.members_of(0)) == 1000
    assert Counted.compared < 50_000


def test_a_sample_of_too_many_members_is_a_fault(tmp_path, monkeypatch):
    monkeypatch.setattr("recipes.shard_scan._MAX_MEMBERS", 5)
    members = [(f"1.{n}.jpg", b"") for n in range(5)] + [(f"2.{n}.jpg", b"") for n in range(7)]
    index = scan_shard(plain_tar(tmp_path / "many.tar", [*members, ("3.jpg", b"")]))
    assert index.keys == ("1", "3")
    assert kinds(index) == [("refused member", "2")]
    assert "more than 5 members" in index.faults[0].problem


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("keys", ["\ud800", *KEYS[1:]]),
        ("names", ["\ud800", "jpg", "txt"]),
        ("faults", [[1, 2, 3]]),
        ("faults", [["kind", 5, "problem"]]),
        ("faults", [["kind", "key", None]]),
        ("sha256", "0"),
        ("size", True),
        ("size", 1e400),
    ],
)
def test_a_crafted_index_is_made_again(name, value, shard):
    first = shard_indexes([shard])[0]
    with safe_open(index_path(shard), "numpy") as file:
        arrays = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    described = json.loads(arrays["text"].tobytes()) | {name: value}
    arrays["text"] = np.frombuffer(json.dumps(described).encode(), np.uint8)
    index_path(shard).write_bytes(save(arrays, {"digest": _digest(arrays)}))
    assert load_index(shard) is None
    assert same(shard_indexes([shard])[0], first)


def test_an_index_of_types_numpy_lacks_is_made_again(shard):
    first = shard_indexes([shard])[0]
    header = json.dumps({"offsets": {"dtype": "F8_E4M3", "shape": [8], "data_offsets": [0, 8]}})
    header = header.ljust(-(-len(header) // 8) * 8)
    index_path(shard).write_bytes(len(header).to_bytes(8, "little") + header.encode() + bytes(8))
    assert load_index(shard) is None
    assert same(shard_indexes([shard])[0], first)


def test_what_is_wrong_with_the_order_is_said(tmp_path):
    members = [("1.jpg", b"1"), ("2.jpg", b"2"), ("1.txt", b"1"), ("2.jpg", b"2"), ("2.jpg", b"2")]
    faults = scan_shard(plain_tar(tmp_path / "mixed.tar", members)).faults
    assert ["tar --sort=name" in fault.problem for fault in faults] == [True, True, False]
    one = plain_tar(tmp_path / "1.tar", [("1.jpg", b"1"), ("2.jpg", b"1")])
    other = plain_tar(tmp_path / "2.tar", [("3.jpg", b"1"), ("4.jpg", b"1")])
    one.write_bytes(one.read_bytes() + other.read_bytes())
    index = scan_shard(one)
    assert index.keys == ("1", "2", "3", "4")
    assert "a second archive follows" in index.faults[0].problem


def test_names_that_are_numbers_are_of_one_split(shard):
    index = scan_shard(shard)
    names = ("00000.tar", "10000.tar", "train-00000.tar", "1-00000.tar", "odd.tar")
    assert [Entry.of(name, index).split for name in names] == ["shards"] * 2 + ["train", "1", "odd"]


def test_a_stale_index_beside_a_shard_loses_to_one_that_fits(shard):
    first = shard_indexes([shard])[0]
    stale = index_path(shard).read_bytes()
    with tarfile.open(shard, "a") as tar:
        for n in range(30):
            tar.addfile(tarfile.TarInfo(f"new{n}.txt"))
    (shard.parent / "shards.json").unlink()
    index_path(shard).unlink()
    index_path(shard).mkdir()
    newer = shard_indexes([shard])[0]
    index_path(shard).rmdir()
    index_path(shard).write_bytes(stale)
    assert len(load_index(shard) or ()) == len(newer) == len(first) + 30
    drop_index(shard)
    assert load_index(shard) is None
