"""What pages of the documentation tell a user to type works, in a few steps of small models."""

import json
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import yaml
from PIL import Image

from recipes.ablation_cells import cells_of
from recipes.ablation_grid import read_grid
from recipes.documents import read_document
from recipes.stream import ShardStream

DOCS = Path(__file__).parents[1] / "docs"

FEWER_STEPS = [
    "--trainer.max_steps=2",
    "--trainer.limit_val_batches=1",
    "--trainer.num_sanity_val_steps=0",
]

BLIP2 = {
    "scenes": ["--train=520", "--val=40"],
    "train": [*FEWER_STEPS, "--data.feature_cache=features"],
    "retrieve": ["--top_k=4", "--feature_cache=features"],
    "caption": ["--max_new_tokens=4"],
}

EVALUATION = {
    "scenes": ["--train=520", "--val=40"],
    "train": FEWER_STEPS,
    "evaluate": ["--pictures=4", "--few=2", "--max_new_tokens=4"],
}

FLAMINGO = {
    "scenes": ["--train=60", "--val=24"],
    "train": [*FEWER_STEPS, "--data.sources.documents.max_tokens=64"],
    "fewshot": ["--queries=4"],
}


def commands(page: str) -> list[list[str]]:
    """The commands of a page, in order; those for several GPUs are left out."""
    text = (DOCS / page).read_text(encoding="utf-8")
    blocks = re.findall(r"```sh\n(.*?)```", text, flags=re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").strip().splitlines()
    # Quotes hold JSON or a question: no shell is needed to take them apart.
    split = [re.findall(r"'[^']*'|\"[^\"]*\"|\S+", line) for line in lines]
    words = [[word.strip("'\"") for word in line] for line in split]
    return [line for line in words if "gpu" not in line]


def run_page(page: str, fewer: Mapping[str, Sequence[str]], folder: Path) -> None:
    """Runs every command of a page in a folder, with options that make it short."""
    for line in commands(page):
        program = line[0]
        if program == "bridges":
            program = str(Path(sys.executable).with_name("bridges"))
            line = [*line, *fewer.get(line[1], [])]
        done = subprocess.run(
            [program, *line[1:]], cwd=folder, capture_output=True, text=True, timeout=600
        )
        assert done.returncode == 0, f"{line}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"


def test_the_blip2_page_goes_through_all_recipes():
    lines = commands("blip2.md")
    trained = [line[line.index("--config") + 1] for line in lines if line[1] == "train"]
    assert {"blip2_stage1_small", "blip2_stage2_small", "instructblip_small"} < set(trained)
    assert "minigpt4_small" in trained


def test_the_documents_of_the_flamingo_page(tmp_path, monkeypatch):
    text = (DOCS / "flamingo.md").read_text(encoding="utf-8")
    example = text.split("<!-- test: documents-example -->\n```python\n")[1].split("```")[0]
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (20, 20), "red").save("picture.jpg")
    exec(compile(example, "flamingo.md", "exec"), {})
    stream = ShardStream("own/documents", read_document, seed=0, shuffle=False)
    documents = list(stream)
    assert len(documents) == 100
    assert documents[0].parts == (0, "a red card", 1, "the same card again")


@pytest.mark.slow
def test_the_blip2_page_as_written(tmp_path):
    text = (DOCS / "blip2.md").read_text(encoding="utf-8")
    gated = text.split("```yaml\n# gated.yaml\n")[1].split("```")[0]
    (tmp_path / "gated.yaml").write_text(gated)
    run_page("blip2.md", BLIP2, tmp_path)
    found = json.loads((tmp_path / "runs/blip2_stage1_small/retrieval.json").read_text())
    assert found["images"] == 40
    assert (tmp_path / "attention.html").stat().st_size > 10_000


@pytest.mark.slow
def test_the_pages_about_data_as_written(tmp_path):
    """Shards are checked, features made of them, and a bridge is trained on those."""
    scenes = ["scenes", "OUT", "--train=60", "--val=8"]
    program = str(Path(sys.executable).with_name("bridges"))
    subprocess.run([program, *scenes], cwd=tmp_path, check=True, capture_output=True)
    page = "train-on-your-data.md"
    checks = [line for line in commands(page) if line[:2] == ["bridges", "shards"]]
    checks = [line for line in checks if line[2] in ("index", "verify")]
    assert len(checks) == 2
    for line in checks:
        subprocess.run([program, *line[1:]], cwd=tmp_path, check=True, capture_output=True)
    run_page("feature-shards.md", {"train": FEWER_STEPS}, tmp_path)
    described = json.loads((tmp_path / "features/features.json").read_text())
    assert described["dtype"] == "fp16"
    assert (tmp_path / "runs/mine/bridge.safetensors").is_file()


@pytest.mark.slow
def test_the_evaluation_page_as_written(tmp_path):
    run_page("evaluation.md", EVALUATION, tmp_path)
    found = json.loads((tmp_path / "runs/stage1/evaluation.json").read_text())
    assert set(found["tasks"]) == {"retrieval", "classify"}
    assert (tmp_path / "runs/mine/evaluation.html").stat().st_size > 10_000


def test_the_grid_of_the_page_is_one():
    text = (DOCS / "ablate.md").read_text(encoding="utf-8")
    grid = yaml.safe_load(text.split("```yaml\n# my_grid.yaml\n")[1].split("```")[0])
    cells = cells_of(read_grid(grid)[1])
    names = ["one layer", "two layers", "blind", "two layers (twin)"]
    assert [cell.name for cell in cells] == names


@pytest.mark.slow
def test_the_flamingo_page_as_written(tmp_path):
    run_page("flamingo.md", FLAMINGO, tmp_path)
    run = tmp_path / "runs/flamingo_small"
    assert (run / "gates.svg").is_file() and (run / "fewshot_nll.html").is_file()
    found = json.loads((run / "fewshot_documents.json").read_text())
    assert set(found["shots"]) == {"0", "1", "2", "3", "4"}
    assert (tmp_path / "words.html").stat().st_size > 10_000
