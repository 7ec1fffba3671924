"""The workloads of `bridges bench stage1`: BLIP-2's stage 1, from frozen image features."""

from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import cache, partial

import torch
from torch import Tensor

from qformer.stage1 import Stage1
from recipes.bench_reference import ReferenceStage1
from recipes.bench_step import Batch, Case, Sizes, StepPair, build_models
from recipes.workload import Side, Workload

CPU_CASES = {
    "bf16-b8": Case(8),
    "fp32-b4": Case(4, "fp32"),
    "bf16-b8-full-text": Case(8, mean_tokens=None),
    "bf16-b16": Case(16),
}

CUDA_CASES = {
    f"bf16-b{batch}{'-compile' if compiled else ''}": Case(batch, compiled=compiled)
    for compiled in (False, True)
    for batch in (64, 128)
}

GATHERS = {"negatives-gather-b8": 8, "negatives-gather-b64": 64}


def stage1_workloads(
    device: torch.device,
    sizes: Sizes | None = None,
    cases: Mapping[str, Case] | None = None,
) -> dict[str, Callable[[], Workload]]:
    """All workloads on a device, by name. They share one pair of models."""
    sizes = sizes or Sizes()
    if cases is None:
        cases = CUDA_CASES if device.type == "cuda" else CPU_CASES
    models = cache(lambda: build_models(sizes, device))
    steps = {
        name: partial(_step, name, case, sizes, device, models) for name, case in cases.items()
    }
    gathers = {name: partial(_gather, name, b, sizes, device) for name, b in GATHERS.items()}
    return steps | gathers


def _step(
    name: str,
    case: Case,
    sizes: Sizes,
    device: torch.device,
    models: Callable[[], tuple[Stage1, ReferenceStage1]],
) -> Workload:
    batch = Batch.of(case, sizes, device)
    pair = StepPair(*models(), batch, case)
    lengths = batch.text.attention_mask.sum(dim=1).float()
    return Workload(
        name,
        {
            "batch": case.batch,
            **asdict(sizes),
            "mean_tokens": float(lengths.mean()),
            "longest_text": int(lengths.max()),
            "reference_attention": pair.kernel,
            "compiled": case.compiled,
        },
        case.dtype,
        ours=Side(lambda: pair.step_ours(case.dtype), pair.zero_ours),
        reference=Side(lambda: pair.step_reference(case.dtype), pair.zero_reference),
        checks=pair.checks,
    )


def _gather(name: str, batch: int, sizes: Sizes, device: torch.device) -> Workload:
    """Negative images, forward and backward: one indexed gather, and a stack of single selects."""
    random = torch.Generator().manual_seed(0)
    shape = (batch, sizes.patches, sizes.vision_dim)
    images, wanted = (torch.randn(shape, generator=random).to(device) for _ in range(2))
    images.requires_grad_()
    places = (torch.arange(batch) + 1) % batch
    single, places = places.tolist(), places.to(device)

    def gathered() -> Tensor:
        return images.index_select(0, places)

    def stacked() -> Tensor:
        return torch.stack([images[place] for place in single])

    def side(gather: Callable[[], Tensor]) -> Side:
        return Side(lambda: gather().backward(wanted), zero)

    def zero() -> None:
        images.grad = None

    def checks(_: Mapping[str, int]) -> dict[str, float]:
        gradients = []
        for gather in (gathered, stacked):
            zero()
            gather().backward(wanted)
            assert images.grad is not None
            gradients.append(images.grad)
        ours, reference = gradients
        return {
            "max_abs_loss_diff": float((gathered() - stacked()).detach().abs().max()),
            "max_rel_grad_diff": float((ours - reference).abs().max() / reference.abs().max()),
        }

    shapes = {"batch": batch, "patches": sizes.patches, "vision_dim": sizes.vision_dim}
    return Workload(name, shapes, "fp32", side(gathered), side(stacked), checks)
