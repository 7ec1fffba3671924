"""Shards written: every captions format, what is skipped, the same bytes, all or nothing."""

import contextlib
import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
from dataclasses import asdict
from pathlib import Path

import pytest
from PIL import Image
from rich.console import Console

from bridges.files import file_digest
from recipes.captions_files import read_captions
from recipes.samples import decode_caption_sample
from recipes.shard_files import ShardError
from recipes.shard_index import missing_shards, scan_shard, shard_indexes
from recipes.shard_store import load_index
from recipes.shard_writer import ShardSet, write_shards
from recipes.shards import build_shards, print_report
from recipes.stream import ShardStream

NAMES = ("a.jpg", "b.png", "c.webp", "d.bmp")
EXPECTED = {
    "a.jpg": ["a cat", "a small cat"],
    "b.png": ["a dog, running"],
    "c.webp": ["a bird"],
    "d.bmp": ["a fish"],
}


@pytest.fixture
def images(tmp_path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    for name in NAMES:
        Image.new("RGB", (8, 8), "red").save(folder / name)
    return folder


def samples(count: int, **members):
    for index in range(count):
        sample = {"__key__": f"{index:05d}", "jpg": b"picture", "txt": f"caption {index}"}
        yield {**sample, "json": {"z": index, "a": "é"}, **members}


def read(out: Path, split: str = "train") -> list[dict]:
    return list(ShardStream(f"{out}/{split}-*.tar", decode_caption_sample, seed=0, shuffle=False))


def listing(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def write_captions(folder: Path, format: str) -> Path:
    """The captions of ``EXPECTED`` as a file of the given format."""
    pairs = [(image, text) for image, texts in EXPECTED.items() for text in texts]
    images = [{"id": 10 + index, "file_name": name} for index, name in enumerate(NAMES)]
    ids = {image["file_name"]: image["id"] for image in images}
    contents = {
        "csv": "image,caption\n" + "".join(f'{image},"{text}"\n' for image, text in pairs),
        "tsv": "image\tcaption\n" + "".join(f"{image}\t{text}\n" for image, text in pairs),
        "csv.txt": "image,caption\n" + "".join(f'{image},"{text}"\n' for image, text in pairs),
        "flickr8k.txt": "".join(f"{image}#0\t{text}\n" for image, text in pairs),
        "list.json": [{"image": image, "caption": text} for image, text in pairs],
        "captions.json": [{"image": image, "captions": texts} for image, texts in EXPECTED.items()],
        "mapping.json": EXPECTED,
        "karpathy.json": {
            "images": [
                {
                    "filename": image,
                    "split": "restval",
                    "imgid": ids[image],
                    "sentences": [{"raw": text, "tokens": []} for text in texts],
                }
                for image, texts in EXPECTED.items()
            ]
        },
        "coco.json": {
            "images": images,
            "annotations": [
                {"id": n, "image_id": ids[image], "caption": text}
                for n, (image, text) in enumerate(pairs)
            ],
        },
    }
    content = contents[format]
    suffix = format if "." in format else f"captions.{format}"
    path = folder / suffix
    path.write_text(content if isinstance(content, str) else json.dumps(content), "utf-8-sig")
    return path


FORMATS = ["csv", "tsv", "csv.txt", "flickr8k.txt", "list.json", "captions.json", "mapping.json"]
FORMATS += ["karpathy.json", "coco.json"]


@pytest.mark.parametrize("format", FORMATS)
def test_every_captions_format_gives_the_same_samples(format, images, tmp_path):
    captions = write_captions(tmp_path, format)
    report = build_shards(images, captions, tmp_path / "out", val_fraction=0, progress=False)
    assert report.skipped == {}
    assert report.samples == {"train": 4}
    assert report.captions == 5
    found = read(tmp_path / "out")
    assert {sample["meta"]["image"]: sample["captions"] for sample in found} == EXPECTED
    has_id = format in ("karpathy.json", "coco.json")
    assert [sample["meta"].get("id") for sample in found] == (
        [10, 11, 12, 13] if has_id else [None] * 4
    )


def test_karpathy_splits_and_folders(images, tmp_path):
    (images / "val2014").mkdir()
    (images / "a.jpg").rename(images / "val2014" / "a.jpg")
    items = [
        {
            "filename": "a.jpg",
            "filepath": "val2014",
            "split": "restval",
            "sentences": [{"raw": "x"}],
        },
        {"filename": "b.png", "split": "test", "sentences": [{"raw": "y"}]},
        {"filename": "c.webp", "split": "val", "sentences": []},
    ]
    captions = tmp_path / "dataset_coco.json"
    captions.write_text(json.dumps({"images": items, "dataset": "coco"}))
    report = build_shards(images, captions, tmp_path / "out", progress=False)
    assert report.samples == {"train": 1, "test": 1}
    assert list(report.skipped) == ["no caption"]
    assert read(tmp_path / "out")[0]["key"] == "val2014_a"


def test_original_bytes_are_kept_and_others_become_png(images, tmp_path):
    captions = write_captions(tmp_path, "csv")
    out = tmp_path / "out"
    build_shards(images, captions, out, val_fraction=0, progress=False)
    with tarfile.open(out / "train-000000.tar") as tar:
        members = {member.name: tar.extractfile(member).read() for member in tar}
    assert members["a.txt"] == b"a cat"
    for name in ("a.jpg", "b.png", "c.webp"):
        assert members[name] == (images / name).read_bytes()
    with Image.open(io.BytesIO(members["d.png"])) as image:
        assert image.format == "PNG"
        assert image.getpixel((0, 0)) == (255, 0, 0)


def test_captions_beside_the_pictures(images, tmp_path):
    (images / "a.txt").write_text("from text\n")
    (images / "b.json").write_text('{"caption": "from json"}')
    (images / "c.json").write_text("{")
    report = build_shards(images, None, tmp_path / "out", val_fraction=0, progress=False)
    assert [sample["captions"] for sample in read(report.out)] == [["from text"], ["from json"]]
    assert {kind: len(names) for kind, names in report.skipped.items()} == {
        "unreadable caption": 1,
        "no caption": 1,
    }


def test_questions_beside_the_pictures_are_carried(images, tmp_path):
    qa = [{"question": "what?", "answer": "a cat"}]
    (images / "a.txt").write_text("a cat")
    (images / "a.json").write_text(json.dumps({"qa": qa, "caption": "not this"}))
    (images / "b.json").write_text(json.dumps({"qa": qa}))
    (images / "c.txt").write_text("a bird")
    (images / "c.json").write_text(json.dumps({"qa": [{"question": "why?"}]}))
    report = build_shards(images, None, tmp_path / "out", val_fraction=0, progress=False)
    assert report.captions == 1
    with tarfile.open(report.out / "train-000000.tar") as tar:
        members = {member.name: tar.extractfile(member).read() for member in tar}
    assert sorted(members) == ["a.jpg", "a.json", "a.txt", "b.json", "b.png"]
    assert json.loads(members["a.json"])["qa"] == json.loads(members["b.json"])["qa"] == qa
    assert members["a.txt"] == b"a cat"
    assert {kind: len(names) for kind, names in report.skipped.items()} == {
        "unreadable caption": 1,
        "no caption": 1,
    }


def test_a_manifest_outlives_the_writing_of_another_split(images, tmp_path):
    out = tmp_path / "out"
    build_shards(images, write_captions(tmp_path, "csv"), out, val_fraction=0, progress=False)
    manifest = out / "shards.json"
    before = json.loads(manifest.read_text())
    write_shards(samples(3), out, "val", samples_per_shard=2)
    (out / "val-000001.tar").unlink()
    write_shards(samples(1), out, "val", overwrite=True)
    after = json.loads(manifest.read_text())
    assert after["skipped"] == before["skipped"]
    assert after["shards"][:-1] == before["shards"]
    assert [shard["name"] for shard in after["shards"][1:]] == ["val-000000.tar"]


def test_skipped_rows_are_counted_by_kind_and_named(images, tmp_path):
    (images / "broken.jpg").write_bytes((images / "a.jpg").read_bytes()[:200])
    (tmp_path / "secret.png").write_bytes((images / "b.png").read_bytes())
    rows = [
        ("a.jpg", "a cat", "train"),
        ("a.jpg", "a  cat ", "train"),
        ("./a.jpg", "another", "train"),
        ("a.jpg", "leaks", "val"),
        ("b.png", "  ", "train"),
        ("", "whose?", "train"),
        ("gone.jpg", "gone", "train"),
        ("broken.jpg", "broken", "train"),
        ("../secret.png", "outside", "train"),
        (str(tmp_path / "secret.png"), "outside", "train"),
        ("c.webp", "x", "../val"),
        ("c.webp", "cut, short", "train"),
    ]
    captions = tmp_path / "captions.csv"
    captions.write_text("image,caption,split\n" + "".join(",".join(row) + "\n" for row in rows))
    report = build_shards(images, captions, tmp_path / "out", progress=False)
    assert read(report.out)[0]["captions"] == ["a cat", "another"]
    assert {kind: len(names) for kind, names in report.skipped.items()} == {
        "duplicate caption": 1,
        "image in two splits": 1,
        "empty caption": 1,
        "no image name": 1,
        "missing file": 1,
        "unreadable image": 1,
        "path outside the folder": 2,
        "bad split name": 1,
        "more cells than columns": 1,
    }
    assert report.skipped["duplicate caption"] == ["a.jpg (captions.csv line 3)"]
    assert report.skipped["missing file"] == ["gone.jpg"]
    manifest = json.loads((report.out / "shards.json").read_text())
    assert manifest["skipped"] == {kind: len(names) for kind, names in report.skipped.items()}

    screen = io.StringIO()
    print_report(report, Console(file=screen, width=120))
    for kind in report.skipped:
        assert kind in screen.getvalue()


def test_the_manifest_tells_the_truth(images, tmp_path):
    captions = write_captions(tmp_path, "csv")
    out = tmp_path / "out"
    report = build_shards(
        images, captions, out, samples_per_shard=3, val_fraction=0, progress=False
    )
    manifest = json.loads((out / "shards.json").read_text())
    assert manifest["format"] == 1
    assert manifest["shards"] == [asdict(shard) for shard in report.shards]
    assert [shard.samples for shard in report.shards] == [3, 1]
    keys = [sample["key"] for sample in read(out)]
    for shard, expected in zip(report.shards, (keys[:3], keys[3:]), strict=True):
        path = out / shard.name
        assert scan_shard(path).keys == tuple(expected)
        assert path.stat().st_size == shard.bytes
        assert file_digest(path) == shard.sha256
        digest = hashlib.sha256("".join(f"{key}\n" for key in expected).encode())
        assert shard.keys_sha256 == digest.hexdigest()
        kept = load_index(path)
        assert kept is not None
        assert kept.sha256 == shard.sha256


def test_the_hash_split_is_stable_when_pictures_are_added(images, tmp_path):
    picture = (images / "b.png").read_bytes()
    splits = []
    for count in (40, 60):
        for index in range(count):
            (images / f"{index}.png").write_bytes(picture)
        captions = tmp_path / "captions.json"
        captions.write_text(json.dumps({f"{index}.png": "x" for index in range(count)}))
        out = tmp_path / f"out{count}"
        report = build_shards(images, captions, out, val_fraction=0.3, progress=False)
        assert 0.1 < report.samples["val"] / count < 0.5
        splits.append({sample["meta"]["image"] for sample in read(out, "val")})
    assert splits[0] <= splits[1]


def test_keys_stay_unique_when_names_collide(images, tmp_path):
    for name in ("x.y.png", "x_y.png", "x y.png", "ü.png", "ö.png", f"{'long' * 40}.png"):
        (images / name).write_bytes((images / "b.png").read_bytes())
        (images / name).with_suffix(".txt").write_text("x")
    report = build_shards(images, None, tmp_path / "out", val_fraction=0, progress=False)
    assert len({sample["key"] for sample in read(report.out)}) == 6


def test_any_key_that_can_be_read_can_be_written(tmp_path):
    keys = ["00/1", "a key", "schön", "long" * 60, "__x", "./0", "v1.0/0", "a/b.c/4"]
    write_shards(({"__key__": key, "txt": "x"} for key in keys), tmp_path, "train")
    assert list(ShardStream(tmp_path, lambda r: r["__key__"], seed=0, shuffle=False)) == keys


def test_the_same_samples_give_the_same_bytes(tmp_path, monkeypatch):
    first = write_shards(samples(5), tmp_path / "1", "train", samples_per_shard=2)
    monkeypatch.setattr("time.time", lambda: 12345.0)
    reordered = ({**sample, "json": {"a": "é", "z": n}} for n, sample in enumerate(samples(5)))
    second = write_shards(reordered, tmp_path / "2", "train", samples_per_shard=2)
    assert [path.name for path in first] == [f"train-00000{index}.tar" for index in range(3)]
    assert [file_digest(path) for path in first] == [file_digest(path) for path in second]


def test_a_failure_leaves_nothing_behind(tmp_path):
    def failing():
        yield from samples(5)
        raise RuntimeError("disk on fire")

    with pytest.raises(RuntimeError, match="on fire"):
        write_shards(failing(), tmp_path / "out", "train", samples_per_shard=2)
    assert not (tmp_path / "out").exists()


def test_a_failure_leaves_what_was_there(tmp_path, images, monkeypatch):
    captions = write_captions(tmp_path, "csv")
    out = tmp_path / "out"
    build_shards(images, captions, out, progress=False)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    monkeypatch.setattr("recipes.shard_writer.scan_shard", lambda path: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        build_shards(images, captions, out, overwrite=True, progress=False)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_existing_shards_are_replaced_only_on_request(tmp_path):
    out = tmp_path / "out"
    write_shards(samples(6), out, "train", samples_per_shard=2)
    write_shards(samples(1), out, "val")
    with pytest.raises(ValueError, match=r"already holds 3 shards.*overwrite"):
        write_shards(samples(1), out, "train")
    write_shards(samples(1), out, "train", overwrite=True)
    shards = ["train-000000.tar", "val-000000.tar"]
    assert listing(out) == ["shards.json", *sorted([*shards, *(f"{s}.index" for s in shards)])]
    manifest = json.loads((out / "shards.json").read_text())
    assert {shard["name"]: shard["samples"] for shard in manifest["shards"]} == {
        name: 1 for name in shards
    }


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        ({"__key__": "a.b", "jpg": b""}, "without dots"),
        ({"__key__": "../../x", "jpg": b""}, "without dots"),
        ({"__key__": "/x", "jpg": b""}, "slash"),
        ({"__key__": "a\nb", "jpg": b""}, "control characters"),
        ({"__key__": "a/", "jpg": b""}, "the key 'a/'"),
        ({"__key__": "__a__/b", "jpg": b""}, "the key '__a__/b'"),
        ({"jpg": b""}, "key None"),
        ({"__key__": "a", "pkl": b""}, "member 'pkl'"),
        ({"__key__": "a", "txt": b"bytes"}, "txt is a bytes"),
        ({"__key__": "a", "jpg": "text"}, "jpg is a str"),
        ({"__key__": "00000", "jpg": b""}, "two samples have the key '00000'"),
        ({"__key__": "a"}, "no members"),
    ],
)
def test_bad_samples_are_named(sample, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        write_shards([*samples(1), sample], tmp_path / "out", "train")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("c.csv", "file,text\na,b\n", r"columns \['file', 'text'\]; expected image, caption"),
        ("c.csv", "", "columns"),
        ("c.csv", "image,caption\n", "holds no captions"),
        ("c.json", "{", "not valid JSON"),
        ("c.json", "3", "holds a int; expected a list"),
        ("c.json", '{"images": [{"id": 1}], "annotations": []}', "not .'file_name'"),
        (
            "c.json",
            '{"images": [{"id": 1, "file_name": "a"}], "annotations": [{"image_id": 1}]}',
            "not .'caption'",
        ),
        ("c.txt", "hello\n", "cannot tell the format"),
        ("c.csv", b"image,caption\na,\xff\n", "not UTF-8"),
    ],
)
def test_a_bad_captions_file_is_explained(name, content, message, images, tmp_path):
    captions = tmp_path / name
    captions.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message):
        build_shards(images, captions, tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


def test_a_missing_file_or_format_is_explained(images, tmp_path):
    with pytest.raises(ValueError, match="no captions file"):
        read_captions(tmp_path / "none.csv")
    with pytest.raises(ValueError, match="unknown format 'xml'; expected auto, csv"):
        read_captions(write_captions(tmp_path, "csv"), "xml")
    with pytest.raises(ValueError, match="no folder of images"):
        build_shards(tmp_path / "none", None, tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no pictures in"):
        build_shards(tmp_path / "empty", None, tmp_path / "out")


def test_not_one_usable_picture_is_an_error(images, tmp_path):
    captions = tmp_path / "captions.json"
    captions.write_text('{"gone.jpg": "x", "lone.jpg": "\\ud800"}')
    with pytest.raises(ValueError, match=r"missing file \(1, e.g. gone.jpg\)"):
        build_shards(images, captions, tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("done", range(0, 24, 2))
@pytest.mark.parametrize("count", [2, 3, 6, 9])
def test_a_commit_stopped_anywhere_is_refused_or_complete(done, count, tmp_path, monkeypatch):
    """Wherever a kill comes between two changes to the folder."""
    monkeypatch.setenv("BRIDGES_CACHE", str(tmp_path / "cache"))
    out = tmp_path / "out"
    write_shards(samples(6), out, "train", samples_per_shard=2)
    before = {path.name: path.read_bytes() for path in out.glob("*.tar")}
    steps = 0

    def stopped(real):
        def step(*arguments, **options):
            nonlocal steps
            steps += 1
            if steps > done:
                raise KeyboardInterrupt
            return real(*arguments, **options)

        return step

    new = [sample if n < 2 else sample | {"txt": "new"} for n, sample in enumerate(samples(count))]
    with ShardSet(out, 2, overwrite=True) as shards:
        for sample in new:
            shards.add("train", sample)
        with monkeypatch.context() as patched, contextlib.suppress(KeyboardInterrupt):
            patched.setattr("os.replace", stopped(os.replace))
            patched.setattr("pathlib.Path.unlink", stopped(Path.unlink))
            shards.commit()
    found = sorted(out.glob("*.tar"))
    if {path.name: path.read_bytes() for path in found} == before:
        return
    try:
        assert missing_shards(found) == []
        read_keys = [key for index in shard_indexes(found) for key in index.keys]
    except ShardError as error:
        assert "write the shards again, or if they are meant" in str(error)
        assert "bridges shards index" in str(error)
    except AssertionError:
        return
    else:
        assert read_keys == [sample["__key__"] for sample in new]
        assert texts(out) == [sample["txt"] for sample in new]


def texts(out: Path) -> list[str]:
    stream = ShardStream(out, lambda raw: raw["txt"].decode(), seed=0, shuffle=False)
    return list(stream)


def test_two_writers_in_one_folder_do_not_meet(tmp_path):
    out = tmp_path / "out"
    with ShardSet(out, 10, overwrite=False) as first, ShardSet(out, 10, overwrite=False) as second:
        for one, other in zip(samples(4), samples(4), strict=True):
            first.add("train", one)
            second.add("train", other | {"txt": "other"})
        first.commit()
        with pytest.raises(ValueError, match="already holds 1 shards"):
            second.commit()
    assert texts(out) == [f"caption {n}" for n in range(4)]
    assert listing(out) == ["shards.json", "train-000000.tar", "train-000000.tar.index"]


def test_the_orphans_of_a_killed_writer_go_and_a_living_one_stays(tmp_path):
    code = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from recipes.shard_writer import ShardSet\n"
        "shards = ShardSet(Path(sys.argv[1]), 1, False)\n"
        "for key in 'ab':\n"
        "    shards.add('train', {'__key__': key, 'txt': 'x'})\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    out = tmp_path / "out"
    killed = subprocess.run([sys.executable, "-c", code, str(out)], check=False)
    assert killed.returncode == -signal.SIGKILL
    orphans = set(listing(out))
    assert len(orphans) == 3
    with ShardSet(out, 1, overwrite=False, only="val") as living:
        for sample in samples(2):
            living.add("val", sample)
        assert not orphans & set(listing(out))
        write_shards(samples(1), out, "train")
        living.commit()
    shards = ["train-000000.tar", "val-000000.tar", "val-000001.tar"]
    assert listing(out) == ["shards.json", *sorted([*shards, *(f"{s}.index" for s in shards)])]
