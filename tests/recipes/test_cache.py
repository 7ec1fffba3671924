"""The feature cache: exact, complete, never stale, and what it does with a bad picture."""

import hashlib
import io
import json
import logging
import tarfile

import pytest
import tiny
import torch
from PIL import Image

from bridges.images import open_image
from recipes.cache import FEATURES_FILE, PICTURES, cache_features, check_cached, mean_patches
from recipes.data import CaptionData
from recipes.documents import DOCUMENTS, read_document
from recipes.samples import decode_caption_sample
from recipes.shard_files import shard_digest
from recipes.shard_writer import write_shards
from recipes.stream import ShardStream


def sample(index: int) -> dict[str, object]:
    png = io.BytesIO()
    Image.new("RGB", (20, 20), (10 * index, 200 - 5 * index, 90)).save(png, "PNG")
    return {"__key__": f"s{index}", "png": png.getvalue(), "txt": f"caption {index}"}


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


def test_an_interrupted_cache_is_filled_again(encoder, tmp_path):
    shards = write_shards(map(sample, range(3)), tmp_path / "shards", "train")
    cached = cache_features(shards, encoder, tmp_path / "cache")
    described = cached[0].parent / FEATURES_FILE
    assert json.loads(described.read_text())["encoder"] == encoder.fingerprint
    described.unlink()
    cached[0].write_bytes(b"half a shard")
    assert len(read(cache_features(shards, encoder, tmp_path / "cache"))) == 3


@pytest.mark.parametrize(
    "bad", [{"txt": "x"}, {"txt": "x", "png": b"no picture"}], ids=["missing", "undecodable"]
)
def test_a_bad_picture_is_named(encoder, tmp_path, caplog, bad):
    samples = [sample(0), {"__key__": "bad", **bad}, sample(1)]
    shards = write_shards(samples, tmp_path / "shards", "train")
    with pytest.raises(ValueError, match=r"train-000000.tar: sample 'bad'.*"):
        cache_features(shards, encoder, tmp_path / "cache")
    left = [path for path in (tmp_path / "cache").rglob("*") if path.suffix != ".lock"]
    assert left == []
    with caplog.at_level(logging.WARNING):
        kept = cache_features(shards, encoder, tmp_path / "cache", on_error="skip")
    assert [s["key"] for s in read(kept)] == ["00000-s0", "00000-s1"]
    assert "sample 'bad'" in caplog.text


@pytest.mark.parametrize(
    "bad",
    [
        {"bad.json": b'{"id": "\\ud800"}'},
        {"bad.json": b"[1]"},
        {"bad.json": b"[" * 9999 + b"]" * 9999},
        {"bad.txt": b"\xff"},
        {"a.b/bad.txt": b"a dot in the key"},
    ],
)
def test_what_could_not_be_written_is_left_out(encoder, tmp_path, caplog, bad):
    png = sample(0)["png"]
    assert isinstance(png, bytes)
    name = next(iter(bad)).rpartition(".")[0]
    members = {"first.png": png, "first.txt": b"c", f"{name}.png": png, **bad}
    with tarfile.open(tmp_path / "train-000000.tar", "w") as tar:
        for member, data in members.items():
            info = tarfile.TarInfo(member)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    kept = cache_features(tmp_path, encoder, tmp_path / "cache", on_error="skip")
    assert [s["key"] for s in read(kept)] == ["00000-first"]
    assert f"sample '{name}'" in caplog.text


def test_a_cache_is_read_as_what_it_was_made_for(encoder, tmp_path):
    shards = write_shards([document(1), document(2)], tmp_path / "shards", "train")
    cached = cache_features(shards, encoder, tmp_path / "cache", form=DOCUMENTS)
    assert cache_features(cached, encoder, tmp_path / "cache", form=DOCUMENTS) == cached
    with pytest.raises(ValueError, match=r"features of documents .* those of single pictures"):
        cache_features(cached, encoder, tmp_path / "cache")
    with pytest.raises(ValueError, match=r"features of documents .* those of single pictures"):
        CaptionData(str(cached[0])).connect(encoder, None)  # pyright: ignore[reportArgumentType]
    # Earlier versions cached single pictures only, and named no form.
    described = cached[0].parent / FEATURES_FILE
    content = json.loads(described.read_text())
    assert content.pop("form") == "documents"
    described.write_text(json.dumps(content))
    check_cached(cached, encoder, PICTURES)
    with pytest.raises(ValueError, match=r"features of single pictures .* those of documents"):
        check_cached(cached, encoder, DOCUMENTS)


def test_keys_may_repeat_from_shard_to_shard(encoder, tmp_path):
    for name in ("train-a", "train-b"):
        write_shards([sample(0)], tmp_path / "shards" / name, "train")
    shards = sorted((tmp_path / "shards").rglob("*.tar"))
    assert len(read(cache_features(shards, encoder, tmp_path / "cache"))) == 2


def test_caches_of_single_pictures_keep_their_names(encoder, tmp_path):
    """Renamed, those of earlier versions would all be computed again."""
    shards = write_shards(map(sample, range(3)), tmp_path / "shards", "train")
    content = "\n".join([encoder.fingerprint, "raise", *map(shard_digest, shards)])
    name = hashlib.sha256(content.encode()).hexdigest()[:16]
    assert cache_features(shards, encoder, tmp_path / "cache")[0].parent.name == name


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
    assert [found.key for found in stream] == ["00000-d2"]


def test_a_broken_picture_leaves_its_document_out_of_the_cache(encoder, tmp_path, caplog):
    bad = {**document(3), "1.png": b"no picture"}
    shards = write_shards([document(1), bad, document(2)], tmp_path / "shards", "train")
    with pytest.raises(ValueError, match=r"sample 'd3'.*picture 1: "):
        cache_features(shards, encoder, tmp_path / "cache", form=DOCUMENTS)
    kept = cache_features(shards, encoder, tmp_path / "c", on_error="skip", form=DOCUMENTS)
    stream = ShardStream(kept, read_document, seed=0, shuffle=False)
    assert [found.key for found in stream] == ["00000-d1", "00000-d2"]
    assert "sample 'd3'" in caplog.text
