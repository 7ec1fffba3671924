"""The feature cache: exact, complete, never stale, and what it does with a bad picture."""

import copy
import errno
import fcntl
import io
import itertools
import json
import logging
import multiprocessing
import os
import signal
import tarfile
from pathlib import Path

import pytest
import tiny
import torch
from PIL import Image

from bridges import VisionEncoder
from bridges.images import open_image
from bridges.preprocess import ExactDecoder
from recipes.cache import cache_features, check_cached, mean_patches
from recipes.cache_form import PICTURES
from recipes.cache_set import FEATURES_FILE, PARTIAL_FILE, FeatureSet, read_description
from recipes.cache_writer import Encoding, write_features
from recipes.data import CaptionData
from recipes.documents import DOCUMENTS, read_document
from recipes.samples import decode_caption_sample
from recipes.shard_files import ShardError
from recipes.shard_manifest import read_manifest
from recipes.shard_store import drop_index
from recipes.shard_writer import write_shards
from recipes.stream import ShardStream
from recipes.video import ClipDecoder, Clips, clip_form


def sample(index: int) -> dict[str, object]:
    png = io.BytesIO()
    Image.new("RGB", (20, 20), (10 * index, 200 - 5 * index, 90)).save(png, "PNG")
    return {"__key__": f"s{index}", "png": png.getvalue(), "txt": f"caption {index}"}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def read(shards):
    stream = ShardStream(shards, decode_caption_sample, seed=0, shuffle=False)
    return list(stream.iterate())


def test_features_are_the_encoders_own(encoder, tmp_path):
    shards = write_shards(map(sample, range(7)), tmp_path / "shards", "train", samples_per_shard=3)
    cached = cache_features(shards, encoder, tmp_path / "cache", batch_size=2)
    samples = read(cached)
    assert [s["captions"] for s in samples] == [[f"caption {i}"] for i in range(7)]
    for index, found in enumerate(samples):
        pixels = encoder.preprocess(open_image(sample(index)["png"]))
        expected = encoder.encode(pixels[None, None]).patches[0, 0]
        torch.testing.assert_close(found["features"].float(), expected, rtol=1e-3, atol=1e-3)
    mean = torch.stack([s["features"].float() for s in samples]).mean(dim=0)
    torch.testing.assert_close(mean_patches(cached), mean)


def test_the_cache_is_complete_on_every_rank(encoder, tmp_path, monkeypatch):
    """A rank that encoded its own share only would train on a part of the pictures."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    shards = write_shards(map(sample, range(7)), tmp_path / "shards", "train")
    assert len(read(cache_features(shards, encoder, tmp_path / "cache"))) == 7


def test_a_changed_shard_or_encoder_is_encoded_anew(encoder, tmp_path):
    shards = write_shards(map(sample, range(3)), tmp_path / "shards", "train")
    first = cache_features(shards, encoder, tmp_path / "cache")
    assert cache_features(shards, encoder, tmp_path / "cache") == first
    assert cache_features(first, encoder, tmp_path / "cache") == first
    other = tiny.vision_encoder("clip", layer=-2)
    assert cache_features(shards, other, tmp_path / "cache") != first
    write_shards(map(sample, range(1, 4)), tmp_path / "shards", "train", overwrite=True)
    assert cache_features(shards, encoder, tmp_path / "cache") != first


def test_features_of_another_encoder_are_refused(encoder, tmp_path):
    shards = write_shards(map(sample, range(3)), tmp_path / "shards", "train")
    cached = cache_features(shards, encoder, tmp_path / "cache")
    check_cached(cached, encoder)
    with pytest.raises(ValueError, match="found features of encoder"):
        check_cached(cached, tiny.vision_encoder("siglip"))


def killed_at(encoder: VisionEncoder, batch: int) -> VisionEncoder:
    """The encoder, in a process that ends at a batch as by SIGKILL."""
    mortal, batches = copy.copy(encoder), itertools.count()

    def encode(pixels: torch.Tensor):
        if next(batches) == batch:
            os.kill(os.getpid(), signal.SIGKILL)
        return VisionEncoder.encode(encoder, pixels)

    object.__setattr__(mortal, "encode", encode)
    return mortal


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_killed_cache_goes_on_after_its_last_whole_shard(encoder, tmp_path):
    shards = write_shards(map(sample, range(9)), tmp_path / "shards", "train", samples_per_shard=3)
    cache = tmp_path / "cache"
    # Two batches a shard: it ends in the middle of the second.
    options = {"cache": cache, "batch_size": 2}
    child = multiprocessing.get_context("fork").Process(
        target=cache_features, args=(shards, killed_at(encoder, 3)), kwargs=options
    )
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    (folder,) = (path for path in cache.iterdir() if path.is_dir())
    assert [path.name for path in folder.glob("*.tar")] == ["train-000000.tar"]
    assert (folder / PARTIAL_FILE).is_file()
    with pytest.raises(ValueError, match=r"not complete .*expected features.json"):
        check_cached(list(folder.glob("*.tar")), encoder)
    kept = (folder / "train-000000.tar").stat()
    cached = cache_features(shards, encoder, **options)
    assert [path.parent for path in cached] == [folder] * 3
    found = (folder / "train-000000.tar").stat()
    assert (found.st_ino, found.st_mtime_ns) == (kept.st_ino, kept.st_mtime_ns)
    assert contents(folder) == contents(cache_features(shards, encoder, tmp_path / "c")[0].parent)
    assert not list(folder.glob(".*"))
    assert len(read(cached)) == 9


def test_a_damaged_feature_shard_is_named(encoder, tmp_path):
    shards = write_shards(map(sample, range(6)), tmp_path / "shards", "train", samples_per_shard=3)
    first, second = cache_features(shards, encoder, tmp_path / "cache")
    folder = first.parent
    whole = contents(folder)
    (folder / FEATURES_FILE).rename(folder / PARTIAL_FILE)
    second.write_bytes(second.read_bytes()[:5000])
    (folder / "shards.json").unlink()
    with pytest.raises(ShardError, match=r"train-000001.tar.*delete it and start again"):
        cache_features(shards, encoder, tmp_path / "cache")
    second.unlink()
    cache_features(shards, encoder, tmp_path / "cache")
    assert contents(folder) == whole


@pytest.mark.parametrize("how", ["gone", "cut off"])
def test_a_shard_that_a_complete_cache_lost_is_made_again(encoder, tmp_path, how, caplog):
    shards = write_shards(map(sample, range(6)), tmp_path / "shards", "train", samples_per_shard=3)
    first, second = cached = cache_features(shards, encoder, tmp_path / "cache")
    folder = first.parent
    whole, kept = contents(folder), first.stat()
    if how == "gone":
        second.unlink()
    else:
        second.write_bytes(second.read_bytes()[:5000])
    features = FeatureSet.of(shards, folder, encoder, PICTURES, "fp16")
    assert not features.begin()
    assert set(read_manifest(folder)) == {first.name}
    assert (folder / PARTIAL_FILE).is_file() and not (folder / FEATURES_FILE).exists()
    assert ("train-000001.tar is damaged" in caplog.text) == (how == "cut off")
    assert cache_features(shards, encoder, tmp_path / "cache") == cached
    assert contents(folder) == whole
    assert first.stat().st_ino == kept.st_ino
    assert features.begin()


def test_a_lost_shard_may_come_back_with_other_bytes(encoder, tmp_path):
    """As of another GPU; also where the run that makes it again was killed before."""
    shards = write_shards(map(sample, range(6)), tmp_path / "shards", "train", samples_per_shard=3)
    _, second = cache_features(shards, encoder, tmp_path / "cache")
    features = FeatureSet.of(shards, second.parent, encoder, PICTURES, "fp16")
    for batch_size in (1, 2):
        second.unlink()
        (second.parent / FEATURES_FILE).rename(second.parent / PARTIAL_FILE)
        assert not features.begin()
        scaled = copy.deepcopy(encoder)
        with torch.no_grad():
            for weight in scaled.model.parameters():
                weight *= 1 + batch_size / 4
        write_features(features, Encoding(scaled, PICTURES))
        assert features.finish()
    assert len(read(features.paths)) == 6


def test_a_file_system_without_locks_takes_a_cache(encoder, tmp_path, monkeypatch):
    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOTSUP, "no locks here")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    shards = write_shards(map(sample, range(3)), tmp_path / "shards", "train")
    assert len(read(cache_features(shards, encoder, tmp_path / "cache"))) == 3


def cut_at_the_start(shard: Path) -> None:
    shard.write_bytes(b"\0" * 100)


def test_shards_without_a_good_sample_are_raised_not_written_empty(encoder, tmp_path):
    shards = write_shards(map(sample, range(6)), tmp_path / "shards", "train", samples_per_shard=3)
    for shard in shards:
        drop_index(shard)
        cut_at_the_start(shard)
    (tmp_path / "shards" / "shards.json").unlink()
    with pytest.raises(ShardError, match=r"found 2 faults in 2 shards.*on_error='skip'"):
        cache_features(shards, encoder, tmp_path / "cache")
    assert not list((tmp_path / "cache").rglob("*.tar"))
    kept = cache_features(shards, encoder, tmp_path / "cache", on_error="skip")
    described = read_description(kept[0].parent / FEATURES_FILE)
    assert [shard["left_out"] for shard in described["shards"]] == [["truncated shard"]] * 2


@pytest.mark.parametrize(
    "bad", [{"txt": "x"}, {"txt": "x", "png": b"no picture"}], ids=["missing", "undecodable"]
)
def test_a_bad_picture_is_named(encoder, tmp_path, caplog, bad):
    samples = [sample(0), {"__key__": "bad", **bad}, sample(1)]
    shards = write_shards(samples, tmp_path / "shards", "train")
    with pytest.raises(ValueError, match=r"train-000000.tar: sample 'bad'.*"):
        cache_features(shards, encoder, tmp_path / "cache")
    assert not list((tmp_path / "cache").rglob("*.tar"))
    assert not list((tmp_path / "cache").rglob(".*"))
    with caplog.at_level(logging.WARNING):
        kept = cache_features(shards, encoder, tmp_path / "cache", on_error="skip")
    assert [s["key"] for s in read(kept)] == ["s0", "s1"]
    assert "sample 'bad'" in caplog.text
    (shard,) = read_description(kept[0].parent / FEATURES_FILE)["shards"]
    assert (shard["samples"], shard["left_out"]) == (2, ["bad"])
    with pytest.raises(ValueError, match=r"without 1 bad samples, first .*000000.tar: bad;"):
        cache_features(shards, encoder, tmp_path / "cache")
    with pytest.raises(ShardError, match=r"found 1 bad among 3 samples"):
        cache_features(
            shards, encoder, tmp_path / "c", on_error="skip", max_bad_fraction=0.3, batch_size=1
        )


@pytest.mark.parametrize(
    "bad",
    [
        {"bad.json": b'{"id": "\\ud800"}'},
        {"bad.json": b"[1]"},
        {"bad.json": b"[" * 9999 + b"]" * 9999},
        {"bad.txt": b"\xff"},
    ],
)
def test_what_could_not_be_written_is_left_out(encoder, tmp_path, caplog, bad):
    png = sample(0)["png"]
    assert isinstance(png, bytes)
    members = {"first.png": png, "first.txt": b"c", "bad.png": png, **bad}
    with tarfile.open(tmp_path / "train-000000.tar", "w") as tar:
        for member, data in members.items():
            info = tarfile.TarInfo(member)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    kept = cache_features(tmp_path, encoder, tmp_path / "cache", on_error="skip")
    assert [s["key"] for s in read(kept)] == ["first"]
    assert "sample 'bad'" in caplog.text


def test_a_cache_is_read_as_what_it_was_made_for(encoder, tmp_path):
    shards = write_shards([document(1), document(2)], tmp_path / "shards", "train")
    cached = cache_features(shards, encoder, tmp_path / "cache", form=DOCUMENTS)
    assert cache_features(cached, encoder, tmp_path / "cache", form=DOCUMENTS) == cached
    with pytest.raises(ValueError, match=r"features of documents .* those of single pictures"):
        cache_features(cached, encoder, tmp_path / "cache")
    with pytest.raises(ValueError, match=r"features of documents .* those of single pictures"):
        CaptionData(str(cached[0])).connect(encoder, None)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("key", ["name", "source", "bytes", "sha256"])
def test_a_description_that_lacks_a_key_is_refused(encoder, tmp_path, key):
    shards = write_shards(map(sample, range(3)), tmp_path / "shards", "train")
    cached = cache_features(shards, encoder, tmp_path / "cache")
    file = cached[0].parent / FEATURES_FILE
    described = json.loads(file.read_text())
    del described["shards"][0][key]
    file.write_text(json.dumps(described))
    with pytest.raises(ValueError, match=r"features.json that this version .*'bridges cache'"):
        check_cached(cached, encoder)
    with pytest.raises(ValueError, match=r"features.json that this version .*'bridges cache'"):
        cache_features(shards, encoder, tmp_path / "cache")


@pytest.mark.parametrize(
    "content",
    ["{", "[]", "[" * 99999, '{"encoder": "x"}', '{"encoder": "x", "shards": {"train.tar": "y"}}'],
)
def test_a_description_of_another_version_is_refused(encoder, tmp_path, content):
    shards = write_shards(map(sample, range(3)), tmp_path / "shards", "train")
    cached = cache_features(shards, encoder, tmp_path / "cache")
    (cached[0].parent / FEATURES_FILE).write_text(content)
    with pytest.raises(ValueError, match=r"features.json that this version .*'bridges cache'"):
        check_cached(cached, encoder)


def test_features_that_nothing_describes_are_refused(encoder, tmp_path):
    shards = write_shards(map(sample, range(3)), tmp_path / "shards", "train")
    cached = cache_features(shards, encoder, tmp_path / "cache")
    check_cached(shards, encoder)
    copied = tmp_path / "copied" / "train-000000.tar"
    copied.parent.mkdir()
    copied.write_bytes(cached[0].read_bytes())
    with pytest.raises(ValueError, match=r"found npy in .*copied.* no features.json beside it"):
        check_cached([copied], encoder)


def test_features_of_pictures_that_have_changed_since_are_refused(encoder, tmp_path):
    shards = write_shards(map(sample, range(6)), tmp_path / "shards", "train", samples_per_shard=3)
    cached = cache_features(shards, encoder, tmp_path / "cache")
    check_cached(cached, encoder)
    # As large as before, and the folder's manifest made anew.
    write_shards(
        map(sample, (0, 1, 2, 6, 7, 8)),
        tmp_path / "shards",
        "train",
        samples_per_shard=3,
        overwrite=True,
    )
    check_cached(cached[:1], encoder)
    with pytest.raises(ValueError, match=r"000001.tar with .* sha256 .*000001.tar was made"):
        check_cached(cached, encoder)
    shards[1].write_bytes(shards[1].read_bytes()[:-512])
    with pytest.raises(ValueError, match=r"found .*shards/train-000001.tar with 9,728 bytes"):
        check_cached(cached, encoder)
    shards[1].unlink()
    check_cached(cached, encoder)


def test_features_of_other_pixels_are_refused(encoder, tmp_path, monkeypatch):
    shards = write_shards(map(sample, range(3)), tmp_path / "shards", "train")
    exact = cache_features(shards, encoder, tmp_path / "cache")
    monkeypatch.setattr(
        VisionEncoder,
        "transform_fingerprint",
        lambda self, decode="exact": {"exact": "exact-1", "fast": "fast-2"}[decode],
    )
    with pytest.raises(ValueError, match=r"pixels made by exact-\w+ in .*; expected exact-1"):
        check_cached(exact, encoder)
    monkeypatch.setattr(
        VisionEncoder, "image_decoder", lambda self, decode: ExactDecoder(self.preprocess)
    )
    fast = cache_features(shards, encoder, tmp_path / "cache", decode="fast")
    assert fast != exact
    check_cached(fast, encoder)
    check_cached(fast, encoder, decode="fast")
    with pytest.raises(ValueError, match=r"made by fast-2 .*expected exact-1: set data.decode to"):
        check_cached(fast, encoder, decode="exact")


def test_keys_may_repeat_from_shard_to_shard(encoder, tmp_path):
    for name in ("train-a", "train-b"):
        write_shards([sample(0)], tmp_path / "shards" / name, "train")
    shards = sorted((tmp_path / "shards").rglob("*.tar"))
    assert len(read(cache_features(shards, encoder, tmp_path / "cache"))) == 2


def document(index: int) -> dict[str, object]:
    """A document of ``index`` pictures."""
    pictures = {f"{k}.png": sample(index + k)["png"] for k in range(index)}
    parts = [part for k in range(index) for part in ({"image": k}, f"text {k}")]
    return {"__key__": f"d{index}", "json": {"parts": ["start", *parts], "style": "x"}, **pictures}


def test_all_pictures_of_a_document_are_encoded_in_their_order(encoder, tmp_path):
    written = [document(index) for index in (3, 0, 5, 1)]
    shards = write_shards(written, tmp_path / "shards", "train")
    cached = cache_features(shards, encoder, tmp_path / "cache", batch_size=4, form=DOCUMENTS)
    stream = ShardStream(cached, read_document, seed=0, shuffle=False)
    for found, expected in zip(stream, written, strict=True):
        count = len(expected) - 2
        assert found.meta == {"style": "x"}
        assert found.parts == ("start", *(p for k in range(count) for p in (k, f"text {k}")))
        assert len(found.images) == count
        for k, features in enumerate(found.images):
            pixels = encoder.preprocess(open_image(expected[f"{k}.png"]))
            own = encoder.encode(pixels[None, None]).patches[0, 0]
            torch.testing.assert_close(features.float(), own, rtol=1e-3, atol=1e-3)
    each = [f.float() for d in stream for f in d.images]
    torch.testing.assert_close(mean_patches(cached), torch.stack(each).mean(dim=0))


def test_a_document_of_too_many_pictures_is_not_cached(encoder, tmp_path, monkeypatch):
    monkeypatch.setattr("recipes.documents.MAX_CACHED", 2)
    written = [document(index) for index in (3, 2)]
    shards = write_shards(written, tmp_path / "shards", "train")
    with pytest.raises(ValueError, match=r"sample 'd3'.*3 pictures; expected at most 2"):
        cache_features(shards, encoder, tmp_path / "cache", form=DOCUMENTS)
    kept = cache_features(shards, encoder, tmp_path / "c", on_error="skip", form=DOCUMENTS)
    stream = ShardStream(kept, read_document, seed=0, shuffle=False)
    assert [found.key for found in stream] == ["d2"]


def test_a_broken_picture_leaves_its_document_out_of_the_cache(encoder, tmp_path, caplog):
    bad = {**document(3), "1.png": b"no picture"}
    shards = write_shards([document(1), bad, document(2)], tmp_path / "shards", "train")
    with pytest.raises(ValueError, match=r"sample 'd3'.*picture 1: "):
        cache_features(shards, encoder, tmp_path / "cache", form=DOCUMENTS)
    kept = cache_features(shards, encoder, tmp_path / "c", on_error="skip", form=DOCUMENTS)
    stream = ShardStream(kept, read_document, seed=0, shuffle=False)
    assert [found.key for found in stream] == ["d1", "d2"]
    assert "sample 'd3'" in caplog.text


@pytest.mark.parametrize("dtype", ["bf16", "int8"])
def test_documents_and_clips_are_read_in_every_dtype(encoder, tmp_path, dtype):
    pictures = {f"{k}.png": sample(k)["png"] for k in range(3)}
    clip = {"__key__": "clip", "txt": "a clip", **pictures}
    clips = Clips(num_frames=2)
    for form, written in ((DOCUMENTS, document(3)), (clip_form(clips), clip)):
        name = str(written["__key__"])
        shards = write_shards([written], tmp_path / name, "train")
        features = FeatureSet.of(shards, tmp_path / f"{name}-{dtype}", encoder, form, dtype)
        features.begin()
        write_features(features, Encoding(encoder, form, dtype))
        assert features.finish()
        check_cached(features.paths, encoder, form)
        (raw,) = ShardStream(features.paths, dict, seed=0, shuffle=False)
        if form is DOCUMENTS:
            assert [image.shape for image in read_document(raw).images] == [(9, 16)] * 3
        else:
            decode = ClipDecoder(encoder.image_decoder(), clips, training=False)
            assert decode(raw)["features"].shape == (2, 9, 16)
