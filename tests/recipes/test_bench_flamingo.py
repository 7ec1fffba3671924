"""`bridges bench flamingo_step`: both sides make one step of the same model."""

import json
import sys
from functools import cache

import pytest
import torch

from bridges.loss import IGNORE
from recipes import bench
from recipes.bench_flamingo import flamingo_step_workloads
from recipes.bench_flamingo_models import Sizes, build_models
from recipes.bench_flamingo_step import Batch, Case, StepPair
from recipes.workload import count_flops

pytest.importorskip("flamingo_pytorch")

CPU = torch.device("cpu")
TINY = Sizes(vocab_size=207, words=200, dim=32, depth=2, num_heads=2, text=40, images=3, latents=5)
CASES = {
    "bf16": Case(2),
    "fp32": Case(2, "fp32"),
    "amp": Case(2, amp=True),
    "wasteful": Case(2, decoder_gradients=True),
}


@cache
def models():
    return build_models(TINY, CPU)


def pair_of(name: str) -> StepPair:
    ours, reference = models()
    batch = Batch.of(CASES[name].batch, TINY, ours.lm.image_token_id, ours.lm.end_id, CPU)
    return StepPair(ours, reference, batch, CASES[name])


def test_losses_and_gradients_agree():
    pair = pair_of("fp32")
    losses, gradients = pair.gradients("fp32")
    assert abs(losses[0] - losses[1]) < 1e-5
    for name, (ours, reference) in gradients.items():
        assert ours.shape == reference.shape, name
        scale = reference.abs().max()
        assert scale > 0, name
        assert ((ours - reference).abs().max() / scale) < 1e-5, name


def test_everything_that_ours_trains_is_compared():
    pair = pair_of("fp32")
    _, gradients = pair.gradients("fp32")
    trained = {n: p for n, p in pair.ours.named_parameters() if p.requires_grad}
    assert sum(p.numel() for p in trained.values()) == sum(
        ours.numel() for name, (ours, _) in gradients.items() if name != "media"
    )


def test_a_difference_shows():
    pair = pair_of("fp32")
    assert pair.checks({})["max_rel_grad_diff"] < 1e-5
    gate = pair.reference.blocks[1].attn_gate
    with torch.no_grad():
        gate.add_(0.1)
    try:
        found = pair.checks({})
    finally:
        with torch.no_grad():
            gate.sub_(0.1)
    assert all(difference > 1e-5 for difference in found.values()), found


def test_bf16_is_checked_in_fp32_too_and_changes_no_weight():
    pair = pair_of("bf16")
    pair.before()
    before = {n: t.clone() for n, t in pair.ours.state_dict().items()}
    checks = pair.checks({})
    assert checks["max_rel_grad_diff_fp32"] < 1e-5 < checks["max_rel_grad_diff"] < 0.1
    after = pair.ours.state_dict()
    assert all(
        torch.equal(before[n], after[n]) and before[n].dtype == after[n].dtype for n in after
    )
    assert all(p.grad is None for m in (pair.ours, pair.reference) for p in m.parameters())
    frozen = [*pair.ours.lm.model.parameters(), *pair.reference.lm_parameters()]
    assert {p.dtype for p in frozen} == {torch.bfloat16}
    assert {p.dtype for p in pair.ours.bridge.parameters()} == {torch.float32}
    assert {p.dtype for block in pair.reference.blocks for p in block.parameters()} == {
        torch.float32
    }


def test_under_amp_the_references_lm_stays_in_fp32():
    pair = pair_of("amp")
    pair.before()
    assert {p.dtype for p in pair.reference.lm_parameters()} == {torch.float32}
    assert {p.dtype for p in pair.ours.lm.model.parameters()} == {torch.bfloat16}
    checks = pair.checks({})
    assert checks["max_rel_grad_diff_fp32"] < 1e-5 < checks["max_rel_grad_diff"] < 0.1


def test_ours_gives_frozen_weights_no_gradient_and_the_reference_masks_its_own():
    pair = pair_of("fp32")
    pair.before()
    pair.step_ours()
    assert all(p.grad is None for p in pair.ours.lm.model.parameters())
    pair.step_reference()
    gradient = pair.reference.embedding.grad
    assert gradient is not None and gradient.shape == (TINY.vocab_size, TINY.dim)
    rows = gradient.abs().amax(dim=1).nonzero().flatten().tolist()
    assert rows == [pair.ours.lm.image_token_id, pair.ours.lm.end_id]
    with_gradient = [p for p in pair.reference.lm_parameters() if p.grad is not None]
    assert len(with_gradient) == 1 and with_gradient[0] is pair.reference.embedding
    pair.before()


def test_the_wasteful_reference_computes_every_weight_gradient_of_its_decoder():
    """Each weight matrix of the decoder once more: as many products as its forward has."""
    flops = {}
    for name in ("bf16", "wasteful"):
        pair = pair_of(name)
        pair.before()
        flops[name] = count_flops(pair.step_reference)
        pair.before()
    tokens, d = 2 * TINY.text, TINY.dim
    assert flops["wasteful"] - flops["bf16"] == TINY.depth * 2 * tokens * 12 * d * d


def test_texts_are_full_of_images():
    batch = pair_of("fp32").batch
    assert batch.places.sum(dim=1).tolist() == [3, 3]
    ours, _ = models()
    ends = batch.input_ids == ours.lm.end_id
    # A chunk ends right before the next image; the last one ends the text.
    assert torch.equal(ends[:, 1:-1], batch.places[:, 2:])
    assert ends[:, -1].all()
    assert torch.equal(batch.labels == IGNORE, batch.places)
    assert (batch.labels == ours.lm.end_id).sum() == 6


def test_the_command_writes_every_row(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(
        bench.BENCHES,
        "flamingo_step",
        lambda device: flamingo_step_workloads(device, TINY, CASES),
    )
    out = tmp_path / "step.json"
    bench.main(["flamingo_step", f"--out={out}", "--repeats=1", "--device=cpu"])
    rows = json.loads(out.read_text())["workloads"]
    assert [row["name"] for row in rows] == list(CASES)
    for row in rows:
        assert row["ratio"] == row["reference_s"] / row["ours_s"] > 0
        assert len(row["ours_times"]) == row["repeats"] == 1
        assert row["max_rel_grad_diff_fp32"] < 1e-5
        assert row["shapes"]["starts_from"] == "image tokens"
        assert row["shapes"]["labels"] == 2 * (TINY.text - 1 - TINY.images)
        assert row["ours_flops"] < row["reference_flops"]
        assert row["ours_peak_bytes"] < row["reference_peak_bytes"]
    capsys.readouterr()


def test_it_is_registered_with_opts_sizes():
    assert set(bench.BENCHES["flamingo_step"](CPU)) == {
        "bf16-b2",
        "bf16-b2-amp",
        "bf16-b2-decoder-gradients",
        "bf16-b2-amp-decoder-gradients",
        "fp32-b2",
    }
    assert Sizes() == Sizes(50272, 50265, 768, 12, 12, 256, 5, 64)


def test_without_flamingo_pytorch_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "flamingo_pytorch", None)
    with pytest.raises(ImportError, match=r"bridges\[bench\]"):
        build_models(TINY, CPU)
