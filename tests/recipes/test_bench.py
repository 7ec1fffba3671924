"""`bridges bench`: both sides compute the same, nothing is counted that is not there."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from recipes import bench
from recipes.bench_reference import ReferenceStage1, reference_keys
from recipes.bench_stage1 import stage1_workloads
from recipes.bench_step import (
    Batch,
    Case,
    Sizes,
    StepPair,
    build_models,
    caption_lengths,
    gradient_differences,
)
from recipes.memory import LiveBytes, peak_bytes
from recipes.workload import Side, Workload, count_flops, matmul_precision, measure

CPU = torch.device("cpu")
TINY = Sizes(
    patches=7,
    vision_dim=24,
    dim=32,
    depth=3,
    num_heads=2,
    num_queries=4,
    vocab_size=1100,
    max_text=26,
)
ROW = {
    "name": str,
    "shapes": dict,
    "dtype": str,
    "ours_s": float,
    "reference_s": float,
    "ratio": float,
    "ours_peak_bytes": int,
    "reference_peak_bytes": int,
    "ours_flops": int,
    "reference_flops": int,
    "ours_percent_of_peak": float,
    "reference_percent_of_peak": float,
    "max_abs_loss_diff": float,
    "max_rel_grad_diff": float,
    "repeats": int,
    "ours_times": list,
    "reference_times": list,
}
"""What every bench writes of a workload; more is allowed."""


def models(std: float = 0.2):
    """Tiny ones, with weights that tell samples apart."""
    ours, reference = build_models(TINY, CPU)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in ours.parameters():
            if parameter.ndim:  # all but the temperature
                parameter.add_(std * torch.randn(parameter.shape, generator=generator))
    reference.copy_weights(dict(ours.named_parameters()))
    return ours, reference


def stepped(case: Case):
    pair = StepPair(*models(), Batch.of(case, TINY, CPU), case)
    return pair, pair.step_ours(case.dtype), pair.step_reference(case.dtype)


@pytest.mark.parametrize("mean_tokens", [13, None])
def test_losses_and_gradients_agree(mean_tokens: int | None):
    pair, ours, reference = stepped(Case(5, "fp32", mean_tokens))
    assert set(ours) == set(reference) == {"itc", "itm", "itg"}
    for name, loss in reference.items():
        assert abs(loss - ours[name]).item() < 1e-5, name
    differences = gradient_differences(pair.ours, pair.reference)
    assert len(differences) == len(list(pair.ours.parameters()))
    assert max(differences.values()) < 1e-5, max(differences.items(), key=lambda item: item[1])


def test_a_difference_shows():
    pair, *_ = stepped(Case(3, "fp32"))
    flops = {"reference": 0}
    before = pair.checks(flops)
    with torch.no_grad():
        pair.reference.lm_bias[5] += 1.0
    after = pair.checks(flops)
    for key in ("max_abs_loss_diff", "max_rel_grad_diff", "max_abs_loss_diff_fp32"):
        assert after[key] > 1e-4 > before[key], key


def test_bf16_is_checked_in_fp32_too():
    pair, *_ = stepped(Case(3, "bf16"))
    checks = pair.checks({"reference": 0})
    assert checks["max_rel_grad_diff_fp32"] < 1e-5 < checks["max_rel_grad_diff"]
    assert all(p.grad is None for m in (pair.ours, pair.reference) for p in m.parameters())


@pytest.mark.parametrize("kernel", ["eager", "sdpa"])
def test_the_references_mask_does_not_leak(kernel: Any):
    """Text under the UniLM mask depends on its past and on the image, not on what comes."""
    _, reference = models()
    reference.use(kernel)
    batch = Batch.of(Case(2, "fp32"), TINY, CPU)
    ids, mask = batch.text.input_ids, batch.text.attention_mask
    embedded: list[Any] = []
    reference.embeddings.word_embeddings.register_forward_hook(
        lambda _module, _inputs, output: embedded.append(output)
    )
    image = reference.ln_vision(batch.patches).detach().requires_grad_()
    states = reference.itg_states(image, ids, mask)
    for place in range(6):
        reads = torch.autograd.grad(states[:, place].sum(), [embedded[0], image], retain_graph=True)
        seen = reads[0].abs().amax(dim=-1)
        assert (seen[:, : place + 1] > 0).all()
        assert (seen[:, place + 1 :] == 0).all()
        assert (reads[1] != 0).any()
    # The query stream is that of ITC: no text in it.
    length = ids.shape[1]
    full = torch.cat([mask.new_ones(2, TINY.num_queries), mask], dim=1)
    allowed = full[:, None].expand(-1, full.shape[1], -1).clone()
    allowed[:, : TINY.num_queries, TINY.num_queries :] = False
    queries = reference.encode(image, ids, reference.prepared(allowed))[:, :-length]
    torch.testing.assert_close(queries, reference.encode(image))


def test_reference_has_the_same_parameters():
    ours, reference = models()
    names = dict(ours.named_parameters())
    assert sorted(reference_keys(names, TINY.depth).values()) == sorted(
        name for name, _ in reference.named_parameters()
    )
    with pytest.raises(ValueError, match=r"found parameters \['extra.weight'\]"):
        reference_keys(["extra.weight"], TINY.depth)
    del names["qformer.queries"]
    with pytest.raises(ValueError, match="only one side has: \\['queries'\\]"):
        reference.copy_weights(names)


def test_flops_with_cached_queries_are_those_of_text_alone():
    """Counted by hand: what LAVIS's ITG pass computes, forward and backward."""
    case = Case(3, "fp32")
    pair, *_ = stepped(case)
    reference: ReferenceStage1 = pair.reference
    patches, text = pair.batch.patches, pair.batch.text

    def without_itg() -> None:
        image = reference.ln_vision(patches)
        pad = TINY.max_text - text.input_ids.shape[1]
        ids, mask = (
            torch.nn.functional.pad(x, (0, pad)) for x in (text.input_ids, text.attention_mask)
        )
        itc = reference._itc(image, ids, mask)
        (itc + reference._itm(image, ids, mask, pair.batch.negatives)).backward()

    b, n, t, d = 3, TINY.num_queries, TINY.max_text, TINY.dim
    linear = 2 * b * t * (4 * d * d + 2 * 4 * d * d)  # q, k, v, out and the feed-forward
    attention = 2 * 2 * b * t * (n + t) * d
    head = 2 * b * t * (d * d + d * TINY.vocab_size)
    text_alone = 3 * (TINY.depth * (linear + attention) + head)
    whole = count_flops(lambda: pair.step_reference("fp32"))
    assert whole - pair.cached_query_flops() - count_flops(without_itg) == text_alone


def test_flops_of_a_known_product():
    a, b = torch.randn(8, 16, requires_grad=True), torch.randn(16, 4, requires_grad=True)
    assert count_flops(lambda: (a @ b).sum().backward()) == 3 * 2 * 8 * 16 * 4
    q = torch.randn(1, 2, 5, 8)  # the CPU's fused attention is counted as well
    attend = torch.nn.functional.scaled_dot_product_attention
    assert count_flops(lambda: attend(q, q, q)) == 2 * 2 * 2 * 5 * 5 * 8


def test_live_bytes_of_known_tensors():
    there = torch.randn(1000)
    with LiveBytes() as bytes_:
        same = there.view(10, 100)
        assert bytes_.live == 0  # a view of what was there
        first = same + 1
        assert bytes_.live == 4000
        view = first[0]
        del first
        assert bytes_.live == 4000  # the view holds it
        del view
        assert (bytes_.live, bytes_.peak) == (0, 4000)
        second = there.double()
        assert bytes_.live == 8000
        del second
    assert (bytes_.live, bytes_.peak) == (0, 8000)


def test_peak_bytes_counts_activations_and_gradients():
    weight = torch.randn(100, 100, requires_grad=True)
    x = torch.randn(50, 100)

    def step() -> None:
        (x @ weight).relu().sum().backward()

    found = peak_bytes(step, CPU)
    # The most is held in backward: the product's gradient and the weight's.
    assert 0 <= found - (50 * 100 + 100 * 100) * 4 < 100


def test_caption_lengths():
    for batch in (8, 16, 64, 128):
        lengths = caption_lengths(batch, 13, 32)
        assert len(lengths) == batch
        assert 12.5 < sum(lengths) / batch < 13.5
        assert min(lengths) >= 6 and max(lengths) <= 24
    assert caption_lengths(3, None, 32) == [32, 32, 32]


def test_sides_take_turns_and_zeroing_is_not_timed():
    calls: list[str] = []

    def side(name: str) -> Side:
        return Side(lambda: calls.append(name), lambda: calls.append(f"zero {name}"))

    checks = {"max_abs_loss_diff": 0.0, "max_rel_grad_diff": 0.0, "more": 1.0}
    workload = Workload(
        "turns", {}, "fp32", side("a"), side("b"), lambda flops: checks | {"seen": len(flops)}
    )
    ticks: list[None] = []
    row = measure(workload, CPU, repeats=3, peak_gflops=1.0, tick=lambda: ticks.append(None))
    timed = ["zero a", "a", "zero b", "b"]
    assert calls[-14:-2] == timed * 3
    assert len(ticks) == bench.UNTIMED + 3
    assert row["more"] == 1.0 and row["seen"] == 2
    assert len(row["ours_times"]) == len(row["reference_times"]) == 3


def test_command_writes_the_form(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    cases = {"tiny": Case(3, "fp32"), "left-out": Case(2)}
    monkeypatch.setitem(
        bench.BENCHES, "stage1", lambda device: stage1_workloads(device, TINY, cases)
    )
    monkeypatch.setattr("recipes.workload.PEAK_SIZE", {"cpu": 16})
    out = tmp_path / "results" / "stage1.json"
    chosen = '--workloads=["tiny", "negatives-gather-b8"]'
    before = torch.get_float32_matmul_precision()
    bench.main(["stage1", f"--out={out}", "--repeats=2", "--device=cpu", chosen])
    assert torch.get_float32_matmul_precision() == before
    result = json.loads(out.read_text())
    assert result["bench"] == "stage1"
    assert result["command"].startswith("bridges bench stage1 --out=")
    assert set(result["environment"]) >= {
        "torch",
        "transformers",
        "python",
        "device",
        "threads",
        "date",
        "git_revision",
    }
    assert (
        list(result["matmul_peak_gflops"]) == ["fp32"] and result["matmul_peak_gflops"]["fp32"] > 0
    )
    assert [row["name"] for row in result["workloads"]] == ["tiny", "negatives-gather-b8"]
    for row in result["workloads"]:
        assert {key: type(row[key]) for key in ROW} == ROW
        assert row["repeats"] == len(row["ours_times"]) == len(row["reference_times"]) == 2
        assert row["ratio"] == pytest.approx(row["reference_s"] / row["ours_s"])
        assert row["ours_peak_bytes"] > 0
    step, gather = result["workloads"]
    assert 0 < step["ours_flops"] < step["reference_flops_with_cached_queries"]
    assert step["reference_flops_with_cached_queries"] < step["reference_flops"]
    assert gather["max_abs_loss_diff"] == gather["max_rel_grad_diff"] == 0
    assert gather["reference_peak_bytes"] > gather["ours_peak_bytes"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["stage7"], "found bench 'stage7'; expected one of stage1"),
        (["stage1", "--repeats=0"], "found repeats=0; expected at least 1"),
        (["stage1", '--workloads=["nothing"]'], r"found workloads \['nothing'\]; expected"),
    ],
)
def test_wrong_arguments(arguments: list[str], message: str):
    with pytest.raises(ValueError, match=message):
        bench.main([*arguments, "--device=cpu"])


def test_bars_do_not_hide_an_error():
    def broken() -> Workload:
        raise RuntimeError("no such thing")

    with pytest.raises(RuntimeError, match="no such thing"), matmul_precision("medium"):
        bench.run({"broken": broken}, CPU, 1, Console(quiet=True))
    assert torch.get_float32_matmul_precision() == "highest"
