"""What docs/blip2.md tells a user to type works, with the default models and a few steps."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "blip2.md").read_text(encoding="utf-8")

FEWER = {
    "scenes": ["--train=520", "--val=40"],
    "train": [
        "--trainer.max_steps=2",
        "--trainer.limit_val_batches=1",
        "--trainer.num_sanity_val_steps=0",
        "--data.feature_cache=features",
    ],
    "retrieve": ["--top_k=4", "--feature_cache=features"],
    "caption": ["--max_new_tokens=4"],
}


def commands() -> list[list[str]]:
    """The commands of the page, in order; those for several GPUs are left out."""
    blocks = re.findall(r"```sh\n(.*?)```", PAGE, flags=re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").strip().splitlines()
    # Quotes hold JSON or a question: no shell is needed to take them apart.
    split = [re.findall(r"'[^']*'|\"[^\"]*\"|\S+", line) for line in lines]
    words = [[word.strip("'\"") for word in line] for line in split]
    return [line for line in words if "gpu" not in line]


def test_the_page_goes_through_all_recipes():
    trained = [line[line.index("--config") + 1] for line in commands() if line[1] == "train"]
    assert {"blip2_stage1_small", "blip2_stage2_small", "instructblip_small"} < set(trained)
    assert "minigpt4_small" in trained


@pytest.mark.slow
def test_the_page_as_written(tmp_path):
    gated = PAGE.split("```yaml\n# gated.yaml\n")[1].split("```")[0]
    (tmp_path / "gated.yaml").write_text(gated)
    for line in commands():
        program = line[0]
        if program == "bridges":
            program = str(Path(sys.executable).with_name("bridges"))
            line = [*line, *FEWER.get(line[1], [])]
        done = subprocess.run(
            [program, *line[1:]], cwd=tmp_path, capture_output=True, text=True, timeout=600
        )
        assert done.returncode == 0, f"{line}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
    found = json.loads((tmp_path / "runs/blip2_stage1_small/retrieval.json").read_text())
    assert found["images"] == 40
    assert (tmp_path / "attention.html").stat().st_size > 10_000
