"""`bridges cache`: the same set from any number of ranks, and a run that trains on it."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import yaml
from tiny_mixture import pair

from bridges import VisionEncoder
from recipes.cache_form import PICTURES
from recipes.cache_set import FEATURES_FILE, PARTIAL_FILE, FeatureSet
from recipes.cache_writer import Encoding, write_features
from recipes.cli import main
from recipes.features import decode_features
from recipes.shard_index import shard_indexes
from recipes.shard_manifest import read_manifest
from recipes.shard_writer import write_shards
from recipes.stream import ShardStream
from recipes.train import train


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def cache(on_disk: Any, out: Path, *more: str) -> int:
    vision = [f"--model.vision.name={on_disk.vision}", "--model.vision.dtype=fp32"]
    return main(["cache", *vision, f"--data={on_disk.shards}", f"--out={out}", *more])


@pytest.fixture
def ranks(monkeypatch):
    def of(rank: int, world_size: int) -> None:
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", str(world_size))

    return of


@pytest.mark.parametrize("world_size", [2, 3])
def test_any_number_of_ranks_makes_the_same_set(on_disk, ranks, tmp_path, world_size, capsys):
    assert cache(on_disk, tmp_path / "one") == 0
    expected = contents(tmp_path / "one")
    assert expected.keys() > {
        *(f"train-00000{k}.tar" for k in range(3)),
        *("val-000000.tar", "val-000000.tar.index", FEATURES_FILE, "shards.json"),
    }
    capsys.readouterr()
    for rank in reversed(range(world_size)):
        ranks(rank, world_size)
        assert cache(on_disk, tmp_path / "many") == 0
        done = (tmp_path / "many" / FEATURES_FILE).exists()
        assert done == (rank == 0)
        assert (tmp_path / "many" / PARTIAL_FILE).exists() != done
        shown = capsys.readouterr().out
        assert ("still to come from other ranks" in shown) != done
        assert f"rank {rank}: encoded" in shown
    assert contents(tmp_path / "many") == expected


def test_a_rank_that_fails_leaves_what_others_have_done(encoder, tmp_path, monkeypatch):
    samples = [pair(f"pair-{k}", k) for k in range(8)]
    shards = write_shards(samples, tmp_path / "shards", "train", samples_per_shard=2)
    features = FeatureSet.of(shards, tmp_path / "out", encoder, PICTURES, "fp16")
    encoding = Encoding(encoder, PICTURES, batch_size=2)
    assert not features.begin()
    write_features(features, encoding, 0, 2)

    def fail(*_: Any) -> None:
        raise OSError("the disk is gone")

    with monkeypatch.context() as broken, pytest.raises(OSError, match="the disk is gone"):
        broken.setattr(VisionEncoder, "encode", fail)
        write_features(features, encoding, 1, 2)
    assert not features.finish()
    kept = {name: data for name, data in contents(features.folder).items() if "tar" in name}
    assert kept.keys() == {f"train-00000{k}.tar{end}" for k in (0, 2) for end in ("", ".index")}
    # Started again, alone.
    assert not features.begin()
    written = write_features(features, encoding)
    assert (written.shards, written.pictures) == (2, 4)
    assert features.finish()
    assert features.begin()
    assert contents(features.folder).items() >= kept.items()


def test_samples_keep_their_keys_and_texts(on_disk, tmp_path):
    assert cache(on_disk, tmp_path / "f", "--dtype=int8") == 0
    for name in ("train-000001.tar", "val-000000.tar"):
        raws = [
            list(ShardStream([folder / name], dict, seed=0, shuffle=False).iterate())
            for folder in (on_disk.shards, tmp_path / "f")
        ]
        for picture, features in zip(*raws, strict=True):
            assert {k for k in features if not k.startswith("__")} == {"safetensors", "txt", "json"}
            for member in ("__key__", "txt"):
                assert picture[member] == features[member]
            assert json.loads(picture["json"]) == json.loads(features["json"])
            assert decode_features(features).shape == (9, 16)
    entries = read_manifest(tmp_path / "f")
    assert entries is not None
    for name, entry in entries.items():
        (index,) = shard_indexes([on_disk.shards / name])
        assert (entry.samples, entry.keys_sha256) == (len(index), index.keys_sha256)
        assert entry.split == name.split("-")[0]


@pytest.mark.parametrize("dtype", ["fp16", "bf16", "int8"])
def test_a_run_trains_on_features_by_one_option(on_disk, tmp_path, dtype):
    assert cache(on_disk, tmp_path / "features", f"--dtype={dtype}") == 0
    arguments = on_disk.arguments(tmp_path / "run")
    place = next(k for k, argument in enumerate(arguments) if argument.startswith("--data="))
    logs = {}
    for name, data in {"online": on_disk.shards, "cached": tmp_path / "features"}.items():
        arguments[place] = f"--data={data}"
        run = train([*arguments, f"--run={tmp_path / name}"])
        lines = (run / "csv-0" / "metrics.csv").read_text().splitlines()
        column = lines[0].split(",").index("loss")
        logs[name] = [float(x) for line in lines[1:] if (x := line.split(",")[column])]
    assert len(logs["online"]) == 4
    # The same samples in the same order: the losses differ by what storing features loses.
    assert logs["cached"] == pytest.approx(logs["online"], rel=1e-2)


def test_the_encoder_and_the_data_come_from_a_recipe(on_disk, tmp_path, capsys):
    recipe = tmp_path / "recipe.yaml"
    vision = {"name": str(on_disk.vision), "layer": -2, "dtype": "fp32"}
    content = {
        "model": {"vision": vision, "lm": {"name": "unused"}},
        "data": {"shards": str(on_disk.shards), "batch_size": 7},
        "trainer": {"max_steps": 1},
    }
    recipe.write_text(yaml.safe_dump(content))
    assert main(["cache", f"--config={recipe}", f"--out={tmp_path / 'f'}"]) == 0
    layer = VisionEncoder.load(**vision).fingerprint
    assert json.loads((tmp_path / "f" / FEATURES_FILE).read_text())["encoder"] == layer
    # What is given goes before the recipe, and another encoder does not mix with the first.
    options = ["--model.vision.layer=null", f"--out={tmp_path / 'f'}"]
    assert main(["cache", "--config", str(recipe), *options]) == 2
    assert "name another folder, or delete this one" in capsys.readouterr().err


def test_a_recipe_of_several_sources_gives_one(on_disk, tmp_path, capsys):
    recipe = tmp_path / "recipe.yaml"
    pairs = {"shards": str(on_disk.shards), "weight": 0.5}
    content = {
        "model": {"vision": {"name": str(on_disk.vision)}},
        "data": {"sources": {"pairs": pairs, "documents": pairs | {"task": "interleaved"}}},
    }
    recipe.write_text(yaml.safe_dump(content))
    options = [f"--config={recipe}", f"--out={tmp_path / 'f'}"]
    assert main(["cache", *options]) == 2
    assert "found --source None for the sources documents, pairs" in capsys.readouterr().err
    assert main(["cache", *options, "--source=pairs"]) == 0
    assert json.loads((tmp_path / "f" / FEATURES_FILE).read_text())["form"] == "single pictures"


@pytest.mark.parametrize(
    ("content", "found"),
    [
        ("data: !!python/object/apply:os.mkdir [MARK]", "no recipe: could not determine"),
        ("data: ${nothing}", "no recipe: .*nothing"),
        ("data: {", "no recipe: while parsing"),
        ("[1]", "found a list"),
    ],
)
def test_what_is_no_recipe_is_refused(tmp_path, capsys, content, found):
    recipe, mark = tmp_path / "recipe.yaml", tmp_path / "mark"
    recipe.write_text(content.replace("MARK", str(mark)))
    assert main(["cache", f"--config={recipe}", f"--out={tmp_path / 'f'}"]) == 2
    assert re.search(found, capsys.readouterr().err)
    assert not mark.exists()


def test_held_out_shards_of_another_folder_are_found_again(on_disk, tmp_path):
    parts = [on_disk.shards / f"{name}-000000.tar" for name in ("train", "val")]
    moved = [tmp_path / name / "00000.tar" for name in ("a", "b")]
    for source, target in zip(parts, moved, strict=True):
        target.parent.mkdir()
        target.write_bytes(source.read_bytes())
    vision = f"--model.vision.name={on_disk.vision}"
    data = [f"--data={moved[0]}", f"--data.val_shards={moved[1]}"]
    assert main(["cache", vision, *data, f"--out={tmp_path / 'f'}"]) == 0
    names = sorted(path.name for path in (tmp_path / "f").glob("*.tar"))
    assert names == ["train-000000.tar", "val-000000.tar"]


def test_bad_samples_are_counted_and_named(on_disk, tmp_path, capsys):
    samples = [
        pair("first", 0),
        {"__key__": "bad", "jpg": b"no picture", "txt": "x"},
        pair("last", 1),
    ]
    write_shards(samples, tmp_path / "shards", "train")
    empty = [{"__key__": "worse", "jpg": b"none", "txt": "x"}]
    write_shards(empty, tmp_path / "shards", "val")
    vision = f"--model.vision.name={on_disk.vision}"
    options = [vision, f"--data={tmp_path / 'shards'}", f"--out={tmp_path / 'f'}"]
    assert main(["cache", *options]) == 2
    assert "sample 'bad'" in capsys.readouterr().err
    assert main(["cache", *options, "--data.on_error=skip"]) == 2
    assert "expected at most 5.0%" in capsys.readouterr().err
    skip = ["--data.on_error=skip", "--data.max_bad_fraction=0.9"]
    assert main(["cache", *options, *skip]) == 0
    assert "2 bad samples were left out, first" in capsys.readouterr().out
    shards = json.loads((tmp_path / "f" / FEATURES_FILE).read_text())["shards"]
    assert [(shard["samples"], shard["left_out"]) for shard in shards] == [
        (2, ["bad"]),
        (0, ["worse"]),
    ]
    assert main(["cache", *options, *skip]) == 0
    assert "encoded 0 pictures in 0 shards" in capsys.readouterr().out


def test_what_is_no_folder_for_features_is_refused(on_disk, tmp_path, capsys):
    assert cache(on_disk, on_disk.shards) == 2
    assert "which no features.json describes" in capsys.readouterr().err
    assert cache(on_disk, tmp_path / "f") == 0
    assert cache(on_disk, tmp_path / "f", "--dtype=bf16") == 2
    assert "'dtype': 'fp16'" in capsys.readouterr().err
    assert cache(on_disk, tmp_path / "g", f"--data={tmp_path / 'f'}") == 2
    assert "expected pictures" in capsys.readouterr().err


def test_features_beyond_fp16_are_refused_with_the_fix(tmp_path):
    shards = write_shards([pair("first", 0)], tmp_path / "shards", "train")
    encoder = tiny.vision_encoder("clip")
    with torch.no_grad():
        encoder.model.post_layernorm.weight.fill_(1e6)  # pyright: ignore
        for module in encoder.model.modules():
            if isinstance(module, torch.nn.LayerNorm):
                module.weight.fill_(1e6)
    for dtype, fine in (("fp16", False), ("bf16", True)):
        features = FeatureSet.of(shards, tmp_path / dtype, encoder, PICTURES, dtype)
        features.begin()
        if fine:
            write_features(features, Encoding(encoder, PICTURES, dtype))
            continue
        with pytest.raises(ValueError, match=r"sample 'first': found features up to .* bf16"):
            write_features(features, Encoding(encoder, PICTURES, dtype))
