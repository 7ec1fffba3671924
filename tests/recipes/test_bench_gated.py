"""`bridges bench gated_xattn` and `decode`: both sides compute the same, and a difference shows."""

import json
import sys
from dataclasses import replace

import pytest
import torch
from torch import nn

from gated_xattn import GatedCrossAttention
from recipes import bench_decode, bench_gated
from recipes.bench_decode import Reprojecting, Writer, decode_workloads
from recipes.bench_gated import Batch, gated_workloads
from recipes.bench_pair import Leaf, Pair, weight_leaves
from recipes.workload import Workload, measure

CPU = torch.device("cpu")
TINY = bench_gated.Sizes(
    width=16, heads=2, memory_dim=12, ff_dim=24, batch=2, text=9, images=3, latents=4
)
SQUARE = replace(TINY, memory_dim=16, ff_dim=32)
TINY_LM = bench_decode.Sizes(
    width=16,
    ff_dim=24,
    layers=3,
    heads=2,
    kv_heads=1,
    vocab=50,
    every=2,
    images=2,
    latents=3,
    batch=2,
    prompt=8,
    new_tokens=4,
)


def workloads() -> dict[str, Workload]:
    return {name: build() for name, build in gated_workloads(CPU, TINY, TINY, SQUARE).items()}


def test_every_workload_of_gated_xattn_computes_the_same_on_both_sides():
    found = workloads()
    assert {"core", "masked", "module", "block"} <= {name.split("-")[0] for name in found}
    for name, workload in found.items():
        assert (workload.dtype == "bf16") == name.endswith("bf16")
        checks = workload.checks({})
        exact = "" if workload.dtype == "fp32" else "_fp32"
        assert checks[f"max_abs_loss_diff{exact}"] < 1e-6, name
        assert checks[f"max_rel_grad_diff{exact}"] < 1e-4, name
        assert checks["max_abs_output_diff"] < (1e-5 if workload.dtype == "fp32" else 0.1), name


@pytest.mark.parametrize("name", ["module", "block", "flamingo_pytorch"])
def test_a_difference_of_a_weight_shows(name: str):
    pair: Pair = getattr(bench_gated, name)(SQUARE, CPU, "fp32")
    before = pair.differences()
    with torch.no_grad():
        next(leaf for leaf in pair.leaves if leaf.name.endswith("v.weight")).reference.mul_(1.5)
    after = pair.differences()
    assert before[0] < 1e-6 < after[0]
    assert before[1] < 1e-4 < after[1]


def test_every_weight_of_both_sides_is_compared():
    for name in ("masked", "module", "block", "flamingo_pytorch"):
        pair: Pair = getattr(bench_gated, name)(SQUARE, CPU, "fp32")
        pair.step(pair.ours)
        names = [leaf.name for leaf in pair.leaves if leaf.ours.grad is not None]
        assert len(names) == len(set(names)) == len(pair.leaves)
        expected = 2 + {"masked": 4, "module": 4, "block": 11, "flamingo_pytorch": 12}[name]
        assert len(names) == expected, name


@pytest.mark.parametrize("bench", ["gated_xattn", "decode"])
def test_a_row_is_measured(bench: str):
    decode = decode_workloads(CPU, {"a": TINY_LM}, {})["a"]
    workload = workloads()["masked-fp32"] if bench == "gated_xattn" else decode()
    row = measure(workload, CPU, repeats=1, peak_gflops=1.0, tick=lambda: None)
    assert row["shapes"]["latents"] == workload.shapes["latents"]
    # Ours computes no scores against all images, and projects them once.
    assert 0 < row["ours_flops"] < row["reference_flops"]
    assert row["ours_peak_bytes"] > 0
    json.dumps(row)


def test_every_text_begins_with_an_image():
    batch = Batch(bench_gated.Sizes(batch=8, text=40, width=64, heads=1, memory_dim=8), CPU)
    assert batch.placeholders[:, 0].all()
    assert batch.placeholders.sum(dim=1).eq(5).all()
    assert batch.mask(2).shape == (8, 1, 40, 10)


def test_a_missing_reference_says_what_to_install(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "flamingo_pytorch", None)
    with pytest.raises(ImportError, match=r"pip install 'bridges\[bench\]'"):
        bench_gated.flamingo_pytorch(SQUARE, CPU, "fp32")


def test_weights_are_paired_by_prefix():
    ours, theirs = nn.Linear(2, 3), nn.ModuleDict({"b": nn.Linear(2, 3)})
    leaves = weight_leaves(ours, theirs, {"weight": "b.weight"})
    assert [leaf.name for leaf in leaves] == ["weight"]
    assert isinstance(leaves[0], Leaf) and torch.equal(ours.weight, leaves[0].reference)


def test_every_workload_of_decode_writes_the_same_on_both_sides():
    for name, build in decode_workloads(
        CPU,
        {"reprojected": TINY_LM, "opt": replace(TINY_LM, family="opt")},
        {"bare": replace(TINY_LM, every=1)},
    ).items():
        checks = build().checks({})
        assert checks["equal_tokens"] == 1.0, name
        assert checks["max_abs_loss_diff"] < 1e-5 > checks["max_abs_logit_diff"], name
        assert checks["max_rel_grad_diff"] is None  # nothing is trained


def test_the_sides_of_decode_do_what_they_say():
    """Ours projects once a layer, the reference at every token, the bare LM never."""
    ours = Writer(TINY_LM, CPU)
    reference = Writer(TINY_LM, CPU, Reprojecting, keep=False)
    bare = Writer(TINY_LM, CPU)
    bare.hooks.remove()
    counts = []
    for writer in (ours, reference, bare):
        calls: list[int] = []
        for block in writer.blocks:
            assert isinstance(block, GatedCrossAttention)
            block.attn.k.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        writer.read_prompt()
        prompt, kept = len(calls), writer.kept_bytes()
        tokens = writer.write()
        counts.append((prompt, len(calls) - prompt, kept))
        assert tokens.shape == (2, TINY_LM.prompt + TINY_LM.new_tokens)
    one_image = 2 * 2 * TINY_LM.latents * 512 * 4  # keys and values, two rows
    assert counts == [(2, 0, 2 * one_image), (2, 2 * TINY_LM.new_tokens, 0), (0, 0, 0)]
    for one, other in zip(ours.lm.parameters(), bare.lm.parameters(), strict=True):
        assert torch.equal(one, other)


def test_open_gates_change_what_is_written():
    logits = []
    for gate in (0.0, 0.5):
        writer = Writer(TINY_LM, CPU, gate=gate)
        writer.read_prompt()
        written = writer.write(return_dict_in_generate=True, output_logits=True)
        logits.append(torch.stack(written.logits))
    assert not torch.allclose(*logits)


def test_decode_has_the_shapes_of_smollm2_and_opt():
    layer = bench_decode._language_model(replace(bench_decode.SMOLLM2, vocab=64, layers=1))
    shapes = {name: tuple(p.shape) for name, p in layer.named_parameters()}
    assert shapes["model.layers.0.self_attn.q_proj.weight"] == (576, 576)
    assert shapes["model.layers.0.self_attn.k_proj.weight"] == (192, 576)
    assert shapes["model.layers.0.mlp.up_proj.weight"] == (1536, 576)
    layer = bench_decode._language_model(replace(bench_decode.OPT, vocab=64, layers=1))
    shapes = {name: tuple(p.shape) for name, p in layer.named_parameters()}
    assert shapes["model.decoder.layers.0.self_attn.k_proj.weight"] == (768, 768)
    assert shapes["model.decoder.layers.0.fc1.weight"] == (3072, 768)
