"""`bridges bench packing`: packed and padded rows give the same step."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from recipes import bench
from recipes.bench_packing import CASES, Sizes, packing_workloads
from recipes.workload import matmul_precision

TINY = Sizes(
    batch=6, median=10.0, longest=40, width=32, ff_dim=48, layers=2, heads=4, kv_heads=2, vocab=60,
    latents=3, patches=2, vision_dim=16,
)  # fmt: skip


def test_command_writes_the_form(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    cases = {kind: replace(TINY, bridge=kind) for kind in ("prefix", "gated")}
    monkeypatch.setitem(bench.BENCHES, "packing", lambda device: packing_workloads(device, cases))
    monkeypatch.setattr("recipes.workload.PEAK_SIZE", {"cpu": 16})
    # Of "medium", newer CPUs make bf16: both sides then differ by its rounding.
    monkeypatch.setattr(bench, "matmul_precision", lambda _: matmul_precision("highest"))
    out = tmp_path / "packing.json"
    bench.main(["packing", f"--out={out}", "--repeats=1", "--device=cpu"])
    rows = json.loads(out.read_text())["workloads"]
    assert [row["name"] for row in rows] == list(cases)
    for row in rows:
        shapes = row["shapes"]
        assert row["max_abs_loss_diff"] < 1e-5
        assert row["max_rel_grad_diff"] < 1e-4
        assert shapes["padded_rows"] == 6
        assert shapes["packed_rows"] < 6
        assert shapes["packed_fill"] > shapes["padded_fill"]
        assert row["ours_flops"] < row["reference_flops"]


def test_workloads():
    assert list(packing_workloads(torch.device("cpu"))) == list(CASES)
    assert {sizes.bridge for sizes in CASES.values()} == {"prefix", "gated"}
