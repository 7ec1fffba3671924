"""The workloads of `bridges bench flamingo_step`: one training step of an LM with gated blocks."""

from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import cache, partial

import torch

from bridges import VisionLanguageModel
from bridges.loss import IGNORE
from recipes.bench_flamingo_models import Sizes, build_models
from recipes.bench_flamingo_reference import ReferenceFlamingo
from recipes.bench_flamingo_step import Batch, Case, StepPair
from recipes.workload import Side, Workload


def _cases(batch: int) -> dict[str, Case]:
    return {
        f"bf16-b{batch}": Case(batch),
        f"bf16-b{batch}-amp": Case(batch, amp=True),
        f"bf16-b{batch}-decoder-gradients": Case(batch, decoder_gradients=True),
        f"bf16-b{batch}-amp-decoder-gradients": Case(batch, amp=True, decoder_gradients=True),
        f"fp32-b{batch}": Case(batch, "fp32"),
    }


CASES = {"cpu": _cases(2), "cuda": _cases(16)}


def flamingo_step_workloads(
    device: torch.device,
    sizes: Sizes | None = None,
    cases: Mapping[str, Case] | None = None,
) -> dict[str, Callable[[], Workload]]:
    """All workloads on a device, by name. They share one pair of models."""
    sizes = sizes or Sizes()
    cases = CASES["cuda" if device.type == "cuda" else "cpu"] if cases is None else cases
    models = cache(lambda: build_models(sizes, device))
    return {
        name: partial(_workload, name, case, sizes, device, models) for name, case in cases.items()
    }


def _workload(
    name: str,
    case: Case,
    sizes: Sizes,
    device: torch.device,
    models: Callable[[], tuple[VisionLanguageModel, ReferenceFlamingo]],
) -> Workload:
    ours, reference = models()
    batch = Batch.of(case.batch, sizes, ours.lm.image_token_id, ours.lm.end_id, device)
    pair = StepPair(ours, reference, batch, case)
    labels = int((batch.labels[:, 1:] != IGNORE).sum())
    return Workload(
        name,
        {
            "batch": case.batch,
            **asdict(sizes),
            "labels": labels,
            "starts_from": "image tokens",
            "reference_amp": case.amp,
            "reference_decoder_gradients": case.decoder_gradients,
        },
        case.dtype,
        ours=Side(pair.step_ours, pair.before),
        reference=Side(pair.step_reference, pair.before),
        checks=pair.checks,
    )
