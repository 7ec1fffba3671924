"""`bridges bench`: ours beside a reference, in one process."""

import platform
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from jsonargparse import ArgumentParser
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from bridges.files import write_json
from recipes.bench_data import data_workloads
from recipes.bench_decode import decode_workloads
from recipes.bench_flamingo import flamingo_step_workloads
from recipes.bench_gated import gated_workloads
from recipes.bench_packing import packing_workloads
from recipes.bench_perceiver import perceiver_workloads
from recipes.bench_stage1 import stage1_workloads
from recipes.recording import git_revision
from recipes.workload import UNTIMED, Workload, matmul_peak, matmul_precision, measure

Builders = Mapping[str, Callable[[], Workload]]
"""Workloads by name, each built only when its turn comes."""

BENCHES: dict[str, Callable[[torch.device], Builders]] = {
    "stage1": stage1_workloads,
    "gated_xattn": gated_workloads,
    "decode": decode_workloads,
    "perceiver": perceiver_workloads,
    "flamingo_step": flamingo_step_workloads,
    "packing": packing_workloads,
    "data": data_workloads,
}


def main(arguments: Sequence[str]) -> None:
    """`bridges bench NAME --out FILE.json`."""
    parser = ArgumentParser(
        prog="bridges bench",
        description="Measures time, memory and FLOPs of ours beside a reference, step by step in "
        "turn, and shows that both compute the same.",
    )
    parser.add_argument("bench", type=str, help=f"what to measure: {', '.join(BENCHES)}")
    parser.add_argument("--out", type=Path | None, help="JSON file for the results")
    parser.add_argument("--repeats", type=int, default=5, help="timed steps of each side")
    parser.add_argument("--device", type=str, default="auto", help="auto, cpu, cuda, cuda:1, …")
    parser.add_argument("--workloads", type=list[str] | None, help="names; all by default")
    options = parser.parse_args(list(arguments))
    if options.bench not in BENCHES:
        raise ValueError(f"found bench {options.bench!r}; expected one of {', '.join(BENCHES)}")
    if options.repeats < 1:
        raise ValueError(f"found repeats={options.repeats}; expected at least 1")
    found = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(found if options.device == "auto" else options.device)
    builders = _chosen(BENCHES[options.bench](device), options.workloads)
    console = Console()
    with matmul_precision("medium"):
        peaks, rows = run(builders, device, options.repeats, console)
    print_rows(rows, console)
    if options.out is not None:
        result = {
            "bench": options.bench,
            "command": shlex.join(["bridges", "bench", *arguments]),
            "environment": environment(device),
            "matmul_peak_gflops": peaks,
            "workloads": rows,
        }
        write_json(options.out, result)
        console.print(f"written to {options.out}")


def run(
    builders: Builders, device: torch.device, repeats: int, console: Console
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Matmul peaks by dtype, and the row of each workload, with a progress bar."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeRemainingColumn(),
    )
    peaks: dict[str, float] = {}
    rows = []
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=len(builders) * (UNTIMED + repeats))
        for name, build in builders.items():
            progress.update(task, description=name)
            workload = build()
            if workload.dtype not in peaks:
                peaks[workload.dtype] = matmul_peak(device, workload.dtype)
            row = measure(
                workload,
                device,
                repeats=repeats,
                peak_gflops=peaks[workload.dtype],
                tick=lambda: progress.advance(task),
            )
            rows.append(row)
    return peaks, rows


def environment(device: torch.device) -> dict[str, Any]:
    """What a number depends on beside the code."""
    cuda = device.type == "cuda"
    return {
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name(device) if cuda else _cpu_name(),
        "threads": torch.get_num_threads(),
        "float32_matmul_precision": "medium",
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "git_revision": git_revision(),
    }


def print_rows(rows: Iterable[Mapping[str, Any]], console: Console) -> None:
    """The medians, and what stands beside them, as a table on the terminal."""
    table = Table(title="medians: ours / reference")
    table.add_column("workload", overflow="fold")
    for column in ("seconds", "ratio", "peak MiB", "GFLOP", "% of peak", "loss diff", "grad diff"):
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(
            row["name"],
            _pair(row, "s", 1, ".3f"),
            f"[bold]{row['ratio']:.2f}[/]",
            _pair(row, "peak_bytes", 2**20, ".0f"),
            _pair(row, "flops", 1e9, ".0f"),
            _pair(row, "percent_of_peak", 1, ".0f"),
            f"{row['max_abs_loss_diff']:.1e}",
            "–" if row["max_rel_grad_diff"] is None else f"{row['max_rel_grad_diff']:.1e}",
        )
    console.print(table)


def _pair(row: Mapping[str, Any], key: str, unit: float, form: str) -> str:
    ours, reference = (format(row[f"{side}_{key}"] / unit, form) for side in ("ours", "reference"))
    return f"{ours} / {reference}"


def _chosen(builders: Builders, names: Sequence[str] | None) -> Builders:
    unknown = sorted(set(names or ()) - set(builders))
    if unknown:
        raise ValueError(f"found workloads {unknown}; expected some of {', '.join(builders)}")
    return {name: builders[name] for name in names or builders}


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
