"""One thing that is measured: our way and a reference way, step by step in turn."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from bridges.precision import Precision, resolve_dtype
from recipes.memory import peak_bytes

PEAK_SIZE = {"cpu": 2048, "cuda": 8192}
"""Rows and columns of the matrices whose product counts as the machine's peak.

On a GPU a small product is over before its launch is.
"""

UNTIMED = 2
"""Parts of a measurement before its timed rounds: FLOPs; checks and memory."""


@dataclass(frozen=True)
class Side:
    """One way to do the work.

    Attributes:
        step: what is timed.
        before: what must happen before each step and is not timed.
    """

    step: Callable[[], object]
    before: Callable[[], object]

    def seconds(self, device: torch.device) -> float:
        """Wall time of one step."""
        self.before()
        _wait(device)
        start = time.perf_counter()
        self.step()
        _wait(device)
        return time.perf_counter() - start


@dataclass(frozen=True)
class Workload:
    """Two ways to do the same work.

    Attributes:
        name: of the workload.
        shapes: everything that says how large it is.
        dtype: in which matrices are multiplied.
        ours: our way.
        reference: the way it is compared with.
        checks: how far the two differ, given the FLOPs of a step by side; must give
            ``max_abs_loss_diff`` and ``max_rel_grad_diff`` (None where nothing is trained), and
            may give more for the row.
    """

    name: str
    shapes: dict[str, Any]
    dtype: Precision
    ours: Side
    reference: Side
    checks: Callable[[Mapping[str, int]], Mapping[str, float | None]]


def measure(
    workload: Workload,
    device: torch.device,
    *,
    repeats: int,
    peak_gflops: float,
    tick: Callable[[], object],
) -> dict[str, Any]:
    """The row of a workload: medians of steps that take turns (ours, reference, ours, …).

    Args:
        workload: what to measure.
        device: where it computes.
        repeats: timed steps of each side.
        peak_gflops: of a matrix product in the workload's dtype.
        tick: called `UNTIMED` + `repeats` times.
    """
    sides = {"ours": workload.ours, "reference": workload.reference}
    flops, memory = {}, {}
    for name, side in sides.items():
        side.before()
        flops[name] = count_flops(side.step)
    tick()
    # It runs both sides as they are timed, and so compiles them and warms them up.
    checks = workload.checks(flops)
    for name, side in sides.items():
        side.before()
        memory[name] = peak_bytes(side.step, device)
    tick()
    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(repeats):
        for name, side in sides.items():
            times[name].append(side.seconds(device))
        tick()
    for side in sides.values():
        side.before()
    seconds = {name: median(found) for name, found in times.items()}
    row: dict[str, Any] = {
        "name": workload.name,
        "shapes": workload.shapes,
        "dtype": workload.dtype,
        **{f"{name}_s": seconds[name] for name in sides},
        "ratio": seconds["reference"] / seconds["ours"],
        **{f"{name}_peak_bytes": memory[name] for name in sides},
        **{f"{name}_flops": flops[name] for name in sides},
    }
    for name in sides:
        rate = flops[name] / seconds[name] / 1e9
        row[f"{name}_percent_of_peak"] = 100 * rate / peak_gflops
    return (
        row | dict(checks) | {"repeats": repeats} | {f"{name}_times": times[name] for name in sides}
    )


def count_flops(step: Callable[[], object]) -> int:
    """Floating-point operations of the matrix products and attentions of a step.

    Attention is counted by its two products (and the four of their backward) whatever the kernel:
    torch's counter does not know the CPU's fused one. Nor does it see into compiled code: that
    runs uncompiled here.
    """
    counter = FlopCounterMode(display=False)
    with torch.compiler.set_stance("force_eager"), sdpa_kernel(SDPBackend.MATH), counter:
        step()
    return counter.get_total_flops()


def matmul_peak(device: torch.device, dtype: Precision, repeats: int = 10) -> float:
    """GFLOP/s of a large square matrix product, the fastest of several."""
    torch_dtype = resolve_dtype(dtype)
    size = PEAK_SIZE.get(device.type, PEAK_SIZE["cpu"])
    a, b = torch.randn(2, size, size, device=device).to(torch_dtype)
    product = Side(lambda: a @ b, lambda: None)
    product.seconds(device)
    return 2 * size**3 / min(product.seconds(device) for _ in range(repeats)) / 1e9


@contextmanager
def matmul_precision(precision: str) -> Iterator[None]:
    """Sets `torch.set_float32_matmul_precision` for a while."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
