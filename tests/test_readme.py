"""What the README tells a user to type works."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from recipes.train import CONFIGS

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_make_targets_and_configs_that_are_named_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"make (\w+)", README):
        if target != "sure":
            assert f"\n{target}:" in makefile, target
    for config in CONFIGS.glob("*.yaml"):
        assert f"`{config.stem}`" in README, config.stem


def test_links_lead_somewhere():
    for link in re.findall(r"\]\(([^)#]+)", README):
        assert link.startswith("https://arxiv.org/") or (ROOT / link).exists(), link


@pytest.mark.slow
def test_the_library_example_runs():
    """Needs the default models in the cache, where `make demo` puts them."""
    example = README.split("<!-- test: library-example -->\n```python\n")[1].split("```")[0]
    assert len(example.strip().splitlines()) <= 16
    done = subprocess.run(
        [sys.executable, "-c", example],
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.split()[0]) > 0


@pytest.mark.slow
def test_shards_train_and_caption_as_written(tmp_path):
    """The three commands on the user's own pictures, with the default models."""
    from PIL import Image

    pictures = tmp_path / "pictures"
    pictures.mkdir()
    rows = ["image,caption"]
    for index in range(40):
        colour = ("red", "green", "blue")[index % 3]
        Image.new("RGB", (64, 48), colour).save(pictures / f"{index}.jpg")
        rows.append(f"{index}.jpg,a {colour} card")
    (tmp_path / "captions.csv").write_text("\n".join(rows) + "\n")
    block = README.split("bridges shards IMAGES CAPTIONS OUT\n")[1].split("```")[0]
    commands = ["bridges shards IMAGES CAPTIONS OUT", *block.strip().splitlines()]
    assert len(commands) == 3
    names = {
        "IMAGES": "pictures",
        "CAPTIONS": "captions.csv",
        "OUT": "shards",
        "IMAGE": "pictures/0.jpg",
    }
    for command in commands:
        words = [names.get(word, word) for word in command.split()]
        if words[1] == "train":  # two steps instead of 300
            words += ["--trainer.max_steps", "2"]
        program = Path(sys.executable).with_name(words[0])
        done = subprocess.run([program, *words[1:]], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("pictures/0.jpg\t")


@pytest.mark.slow
def test_the_comparison_runs_as_written(tmp_path):
    """With one seed of two steps in place of half an hour."""
    (line,) = re.findall(r"^bridges ablate .*$", README, flags=re.MULTILINE)
    short = ["trainer.max_steps=2", "trainer.val_check_interval=2", "grid.seeds=[0]"]
    short += ["grid.lr=null", "grid.evaluate.pictures=4", "grid.evaluate.max_new_tokens=4"]
    program, *words = line.split()
    done = subprocess.run(
        [Path(sys.executable).with_name(program), *words, *short],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows = (tmp_path / "runs/adapters_small/results.csv").read_text().splitlines()
    assert len(rows) == 1 + 8
    assert (tmp_path / "runs/adapters_small/report.html").is_file()


def test_nothing_is_left_to_be_filled_in():
    assert "_HERE" not in README
