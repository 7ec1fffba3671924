"""`bridges ablate` on the command line."""

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser
from jsonargparse.typing import PositiveFloat, PositiveInt
from omegaconf import OmegaConf
from rich.console import Console

from recipes import ablation_plan as plan
from recipes import ablation_report
from recipes.ablation import ablate, print_plan
from recipes.ablation_cells import cells_of
from recipes.ablation_fair import check_planned
from recipes.ablation_grid import read_grid
from recipes.ablation_plan import SCENES


def main(arguments: Sequence[str]) -> None:
    """Entry of the subcommand."""
    parser = ArgumentParser(
        prog="bridges ablate",
        description="Trains and scores every cell of a grid on the same samples, and writes "
        "report.html, results.csv and results.md. Started again, it goes on where it was stopped.",
    )
    parser.add_argument("grid", type=str, help="a shipped grid's name, or the path of a YAML")
    parser.add_argument("--out", type=Path, required=True, help="folder of the report and the runs")
    parser.add_argument(
        "--data", type=str | None, help=f"shards in place of the grid's; '{SCENES}': emoji scenes"
    )
    parser.add_argument(
        "--devices",
        type=PositiveInt,
        help="runs beside each other, on a GPU each (all by default) or a share of the cores (one "
        "each by default)",
    )
    parser.add_argument(
        "--ray", type=str | None, help="address of a Ray cluster to run on; 'auto', 'local'"
    )
    parser.add_argument("--ray_cpus", type=PositiveFloat, default=1.0, help="of each run on Ray")
    parser.add_argument(
        "--ray_gpus", type=float | None, help="of each run on Ray; one by default, if there are any"
    )
    parser.add_argument(
        "--dry_run", type=bool, default=False, help="say what would be trained, and train nothing"
    )
    parser.add_argument(
        "overrides",
        nargs="*",
        default=[],
        help="KEY=VALUE of the config, for every cell, as trainer.max_steps=50; or of the grid, as "
        "'grid.seeds=[0]'",
    )
    options = parser.parse_args(_ordered(arguments))
    console = Console()
    overrides = _overrides(options.overrides)
    if options.dry_run:
        name, spec = read_grid(options.grid, overrides)
        cells = cells_of(spec)
        check_planned(cells, spec.match)
        print_plan(name, spec, cells, console)
        plan.place_data(cells, options.data or spec.data or "shards", console, draw=False)
        for cell, why in plan.check_configs(cells).items():
            console.print(f"{cell} cannot be trained: {why}", style="red", markup=False)
        return
    table = ablate(
        options.grid,
        options.out,
        data=options.data,
        devices=options.devices,
        ray=options.ray,
        ray_cpus=options.ray_cpus,
        ray_gpus=options.ray_gpus,
        overrides=overrides,
        command=shlex.join(["bridges", "ablate", *map(str, arguments)]),
    )
    ablation_report.print_table(table.results, console)
    console.print(f"open {options.out / 'report.html'}", soft_wrap=True)


def _ordered(arguments: Sequence[str]) -> list[str]:
    """The same with KEY=VALUE first after the grid: argparse takes positionals in one place."""
    moved: list[str] = []
    rest: list[str] = []
    for before, argument in zip(["", *arguments], arguments, strict=False):
        of_option = before.startswith("--") and "=" not in before
        setting = "=" in argument and not argument.startswith("-") and not of_option
        if argument.startswith("--") and "." in argument.partition("=")[0]:
            raise ValueError(
                f"found {argument}; expected a setting of all cells without dashes and with =, "
                "such as trainer.max_steps=50"
            )
        (moved if setting else rest).append(argument)
    place = next((k for k, one in enumerate(rest) if not one.startswith("-")), len(rest)) + 1
    return [*rest[:place], *moved, *rest[place:]]


def _overrides(given: Sequence[str]) -> dict[str, Any]:
    """KEY=VALUE, the value as YAML.

    Raises:
        ValueError: one without a key or a =.
    """
    found: dict[str, Any] = {}
    for one in given:
        key, equals, value = one.partition("=")
        if not key or not equals or key.startswith("-"):
            raise ValueError(f"found {one!r}; expected KEY=VALUE, such as trainer.max_steps=50")
        found[key] = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={value}"]))
    return {key: value["value"] for key, value in found.items()}
