"""`bridges bench perceiver`: both sides compute the same from the same weights."""

import json
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

from recipes import bench
from recipes.bench_pair import Pair
from recipes.bench_perceiver import Sizes, flamingo_pytorch, hugging_face, perceiver_workloads
from recipes.workload import matmul_precision

CPU = torch.device("cpu")
IMAGES = Sizes(media=3, frames=1, patches=7, dim=24, depth=2, heads=2, head_dim=10, latents=4)
CLIPS = Sizes(media=2, frames=3, patches=5, dim=24, depth=2, heads=2, head_dim=10, latents=4)
PAIRS = [(hugging_face, IMAGES), (hugging_face, CLIPS), (flamingo_pytorch, CLIPS)]
NAMES = ["hf-images", "hf-8-frames", "flamingo-pytorch-8-frames"]


@pytest.mark.parametrize(("build", "sizes"), PAIRS)
def test_both_sides_agree(build, sizes: Sizes):
    pair: Pair = build(sizes, CPU, "fp32")
    assert pair.largest_difference() < 1e-5
    loss, gradient = pair.differences()
    assert loss < 1e-5 and gradient < 1e-5


@pytest.mark.parametrize(("build", "sizes"), PAIRS)
def test_every_parameter_is_compared(build, sizes: Sizes):
    pair: Pair = build(sizes, CPU, "fp32")
    names = [leaf.name for leaf in pair.leaves]
    # Latents, the last norm, layers; the time embedding.
    expected = 1 + 2 + 12 * sizes.depth + (build is flamingo_pytorch)
    assert len(names) == len(set(names)) == expected
    pair.zero()
    pair.step(pair.ours)
    # Norms do not start as if they had no scale and shift.
    for leaf in pair.leaves:
        assert leaf.ours.grad is not None and leaf.ours.grad.any(), leaf.name
        if leaf.name.endswith("norm.bias"):
            assert leaf.ours.any()


@pytest.mark.parametrize(("build", "sizes"), PAIRS)
def test_a_difference_shows(build, sizes: Sizes):
    pair: Pair = build(sizes, CPU, "fp32")
    with torch.no_grad():
        pair.leaves[0].reference.add_(0.1 * torch.randn_like(pair.leaves[0].reference))
    assert pair.largest_difference() > 1e-3
    assert pair.differences()[1] > 1e-3


def test_workloads_of_each_device():
    cpu = perceiver_workloads(CPU)
    assert list(cpu) == [f"{name}-{dtype}" for name in NAMES for dtype in ("fp32", "bf16")]
    assert list(perceiver_workloads(torch.device("cuda"))) == [f"{name}-bf16" for name in NAMES]


def test_what_is_missing_is_said(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "flamingo_pytorch", None)
    with pytest.raises(ImportError, match=r"pip install 'bridges\[bench\]'"):
        flamingo_pytorch(CLIPS, CPU, "fp32")


def test_command_writes_the_form(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    tiny = partial(perceiver_workloads, images=IMAGES, long_clip=CLIPS, clips=CLIPS)
    monkeypatch.setitem(bench.BENCHES, "perceiver", tiny)
    monkeypatch.setattr("recipes.workload.PEAK_SIZE", {"cpu": 16})
    # Of "medium", newer CPUs make bf16: both sides then differ by its rounding.
    monkeypatch.setattr(bench, "matmul_precision", lambda _: matmul_precision("highest"))
    out = tmp_path / "perceiver.json"
    bench.main(["perceiver", f"--out={out}", "--repeats=1", "--device=cpu"])
    result = json.loads(out.read_text())
    assert result["bench"] == "perceiver"
    for row in result["workloads"]:
        exact = "" if row["dtype"] == "fp32" else "_fp32"
        assert row[f"max_rel_grad_diff{exact}"] < 1e-4
        assert row["ours_flops"] < row["reference_flops"]
        assert row["shapes"]["depth"] == 2
