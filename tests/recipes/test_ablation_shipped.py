"""The shipped grids for two cores, between the default models, in a step or two."""

import csv

import pytest

from recipes.ablation_cells import cells_of
from recipes.ablation_grid import read_grid
from recipes.cli import main

SHORT = (
    "trainer.max_steps=2",
    "trainer.val_check_interval=2",
    "trainer.limit_val_batches=1",
    "grid.seeds=[0]",
    "grid.lr=null",
    "grid.evaluate.pictures=4",
    "grid.evaluate.max_new_tokens=4",
    "grid.evaluate.attention=1",
)

FIRST = (
    "first.trainer.max_steps=2",
    "first.trainer.val_check_interval=2",
    "first.trainer.limit_val_batches=1",
)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["flamingo_gates_small", "blip2_stage1_small"])
def test_a_shipped_grid_runs(name, tmp_path):
    """`adapters_small`, which is much like `tokens_small`, is run by tests/test_readme.py."""
    grid = read_grid(name)[1]
    short = (*SHORT, *(FIRST if grid.first else ()))
    assert main(["ablate", name, "--out", str(tmp_path), *short]) == 0
    with (tmp_path / "results.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["cell"] for row in rows] == [cell.name for cell in cells_of(grid)]
    assert [row["error"] for row in rows] == [""] * len(rows)
    assert len({row["sample_order_digest"] for row in rows}) == 1
    assert (tmp_path / "report.html").stat().st_size > 50_000
