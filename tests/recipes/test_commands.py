"""The small subcommands, and the table that names all of them."""

import json
import random
from pathlib import Path

import pytest
from PIL import Image

from bridges.embedded import ASSETS
from recipes import cli
from recipes.data import split_shards
from recipes.samples import decode_caption_sample
from recipes.scene_captions import questions
from recipes.scene_names import CODE_POINTS
from recipes.scenes import VENDORS, generate
from recipes.stream import ShardStream


@pytest.fixture
def artwork(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache in which black squares are in the place of the emoji."""
    monkeypatch.setenv("BRIDGES_CACHE", str(tmp_path / "cache"))
    for vendor in VENDORS:
        folder = tmp_path / "cache" / f"emoji-{ASSETS['emoji'].version}" / vendor
        folder.mkdir(parents=True)
        for code in CODE_POINTS.values():
            Image.new("RGBA", (8, 8), (0, 0, 0, 255)).save(folder / f"U+{code:X}.png")


@pytest.mark.usefixtures("artwork")
def test_scenes_become_shards_that_training_reads(tmp_path: Path):
    out = tmp_path / "scenes"
    assert cli.main(["scenes", str(out), "--train=7", "--val=3", "--seed=4"]) == 0
    train, val = split_shards(str(out), None)
    for split, shards, n in (("train", train, 7), ("val", val, 3)):
        samples = list(ShardStream(shards, decode_caption_sample, seed=0, shuffle=False))
        assert len(samples) == n
        for k, (sample, scene) in enumerate(zip(samples, generate(n, 4, split), strict=True)):
            assert sample["meta"]["objects"] == [placed.name for placed in scene.objects]
            asking = random.Random(f"4/{split}/{k}/questions")
            assert sample["meta"]["qa"] == questions(scene, asking)
    manifest = json.loads((out / "shards.json").read_text())
    assert [shard["samples"] for shard in manifest["shards"]] == [7, 3]
    assert "CC BY 4.0" in manifest["licence"]


@pytest.mark.usefixtures("artwork")
def test_scenes_do_not_replace_shards_unasked(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    command = ["scenes", str(tmp_path / "scenes"), "--val=1"]
    assert cli.main([*command, "--train=2"]) == 0
    before = (tmp_path / "scenes" / "train-000000.tar").read_bytes()
    assert cli.main([*command, "--train=3"]) == 2
    assert "already holds 2 shards" in capsys.readouterr().err
    assert (tmp_path / "scenes" / "train-000000.tar").read_bytes() == before
    assert cli.main([*command, "--train=3", "--overwrite=true"]) == 0
    assert (tmp_path / "scenes" / "train-000000.tar").read_bytes() != before


@pytest.mark.parametrize(("train", "val"), [(0, 0), (-1, 5)])
def test_a_number_of_scenes_that_cannot_be_drawn_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], train: int, val: int
):
    out = tmp_path / "scenes"
    assert cli.main(["scenes", str(out), f"--train={train}", f"--val={val}"]) == 2
    assert f"found {train} and {val} scenes" in capsys.readouterr().err
    assert not out.exists()


def test_help_lists_every_command_beside_its_text(capsys: pytest.CaptureFixture[str]):
    assert cli.main(["--help"]) == 0
    listed = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()[2:])
    assert listed == {name: text for name, (_, _, text) in cli.COMMANDS.items()}
