"""`bridges ablate` over a mixture of sources: what is trained on, held out and compared."""

import pytest
import tiny_mixture as mix
import yaml

from recipes import ablate
from recipes.ablation_fair import UnfairError
from recipes.shard_writer import write_shards


def grid_of(on_disk, folder, **changes):
    """Two cells over pairs, documents and clips, of which held-out pictures are none."""
    shards = folder / "shards"
    mix.write_sources(shards)
    for name in ("pairs", "documents"):
        (shards / name / "val-000000.tar").unlink()
        held_out = (mix.SAMPLES[name](f"{name}-val-{k}", 1000 + 7 * k) for k in range(4))
        write_shards(held_out, shards / name, "val")
    config = mix.config(on_disk.vision, on_disk.lm, shards)
    (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    return {
        "base": str(folder / "config.yaml"),
        "cells": {"every 2nd": {}, "no gate": {"model.bridge.init_args.gate": "none"}},
        "seeds": [0],
        "evaluate": {"pictures": 4, "max_new_tokens": 3, "attention": 1},
        **changes,
    }


def test_a_mixture_is_compared(on_disk, tmp_path):
    table = ablate(grid_of(on_disk, tmp_path), tmp_path / "out", devices=1)
    rows = {row["cell"]: row for row in table.rows()}
    assert [row["error"] for row in rows.values()] == [None] * 4, rows
    assert list(rows) == ["every 2nd", "no gate", "blind", "every 2nd (twin)"]
    assert len({row["sample_order_digest"] for row in rows.values()}) == 1
    # Three steps of two samples of each of three sources; held-out pairs are what is scored.
    assert {(row["steps"], row["samples"]) for row in rows.values()} == {(3, 18)}
    assert table.results["data"]["held_out_pictures"] == 4
    shown = [one["captions"] for one in table.results["shown"]]
    assert shown == [[f"colour {1000 + 7 * k}"] for k in range(4)]
    assert rows["blind"]["nll"] == rows["blind"]["nll_shuffled"]
    assert rows["every 2nd"]["nll"] != rows["no gate"]["nll"]


def test_another_weight_of_a_source_is_refused(on_disk, tmp_path):
    cells = {"honest": {}, "cheat": {"data.sources.clips.weight": 1.0}}
    with pytest.raises(UnfairError, match=r"data.sources.clips.weight: 1.0 in the cell 'cheat'"):
        ablate(grid_of(on_disk, tmp_path, cells=cells), tmp_path / "out", devices=1)
