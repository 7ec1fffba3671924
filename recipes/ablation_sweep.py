"""The jobs of an ablation, one kind after another, and what becomes of each cell."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from bridges.files import remove_orphans
from recipes import ablation_plan as plan
from recipes.ablation_cells import LR, Cell, baseline_of
from recipes.ablation_fair import check_run
from recipes.ablation_grid import GridSpec
from recipes.ablation_job import RESULT_FILE, read_outcome, read_result
from recipes.ablation_match import PER_STEP, STEPS, check_size, solve_steps
from recipes.ablation_plan import Planned
from recipes.ablation_pool import Finished
from recipes.config_keys import get_key, set_key

Result = dict[str, Any]
Runner = Callable[[Sequence[Path], Finished], None]
"""Runs the jobs of some folders, see `run_local`."""


class Sweep:
    """Trains the cells of a grid: trials, first stages, learning rates, and the runs themselves.

    Args:
        grid: the grid.
        cells: its cells, the data in their configs.
        out: folder of all jobs.
        runner: runs them.
        console: for what happens.

    Attributes:
        lost: by cell, why it could not be trained at all.
        failed: by cell and seed, why that run failed.
        solved: by cell, keys that were solved for, with their values.
        rates: by cell, learning rate -> loss; None where that trial failed.
        planned: the runs that are compared, by cell and seed.
        runs: results of those that were finished.
    """

    def __init__(
        self, grid: GridSpec, cells: Sequence[Cell], out: Path, runner: Runner, console: Console
    ) -> None:
        self.grid = grid
        self.cells = cells
        self.out = out
        self.console = console
        self.lost: dict[str, str] = {}
        self.failed: dict[tuple[str, int], str] = {}
        self.solved: dict[str, dict[str, Any]] = {}
        self.rates: dict[str, dict[float, float | None]] = {}
        self.planned: dict[tuple[str, int], Planned] = {}
        self.runs: dict[tuple[str, int], Result] = {}
        self._runner = runner

    def match(self) -> None:
        """Gives every cell as much of what is matched as the baseline has.

        Raises:
            ValueError: a size that cannot be solved, or a baseline whose trial failed.
        """
        baseline = baseline_of(self.grid, list(self.cells))
        if self.grid.match == "params":
            self.solved, lost = plan.solve_sizes(self._left(), baseline, self.grid)
            self.lost |= lost
        if self.grid.match not in PER_STEP:
            return
        trials = plan.trials(self._left(), self.grid, self.out)
        # One after the other, so that all are timed alike.
        each = [[one] for one in trials.values()]
        together = each if self.grid.match == "time" else [list(trials.values())]
        found: dict[Path, Result] = {}
        for jobs in together:
            found |= self._run("trials", jobs)
        measured = {name: found[one.folder] for name, one in trials.items()}
        for name, result in measured.items():
            if "error" in result:
                self.lost[name] = result["error"]
        if baseline.name in self.lost:
            raise ValueError(
                f"found a baseline that cannot be trained ({self.lost[baseline.name]}); expected "
                "one to take the budget from: mend it, or choose another"
            )
        key = PER_STEP[self.grid.match]
        steps = get_key(baseline.config, STEPS)
        if self.grid.budget is None and (not isinstance(steps, int) or steps < 1):
            raise ValueError(
                f"found {STEPS}: {steps} in the baseline; expected its number of steps: the budget "
                f"of match: {self.grid.match} is what they cost"
            )
        budget = self.grid.budget or measured[baseline.name][key] * steps
        for cell in self._left():
            solved = solve_steps(budget, measured[cell.twin_of or cell.name][key])
            for other in ("max_epochs", "max_time"):
                cell.config["trainer"].pop(other, None)
            set_key(cell.config, STEPS, solved)
            self.solved[cell.name] = {STEPS: solved}

    def train(self) -> None:
        """First stages, learning rates, and the runs that are compared.

        Raises:
            UnfairError: runs that were not given the same.
        """
        firsts = plan.firsts(self._left(), self.out)
        begun = self._run("first stages", firsts.values(), check=self._check)
        for key, one in firsts.items():
            if "error" in begun[one.folder]:
                self.failed[key] = f"its first stage: {begun[one.folder]['error']}"
        self._choose_rates(firsts)
        self.planned = plan.mains(self._left(), self.grid, firsts, self.out, self.failed)
        found = self._run("runs", self.planned.values(), check=self._check)
        for key, one in self.planned.items():
            result = found[one.folder]
            if "error" in result:
                self.failed[key] = result["error"]
            else:
                before = begun[firsts[key].folder] if key in firsts else {}
                self.runs[key] = result | {
                    cost: result[cost] + before.get(cost, 0) for cost in ("train_flops", "seconds")
                }

    def _choose_rates(self, firsts: Mapping[tuple[str, int], Planned]) -> None:
        if self.grid.lr is None:
            return
        for cell in self._left():
            if (cell.name, cell.seeds[0]) in self.failed and cell.twin_of is None:
                self.lost[cell.name] = self.failed[cell.name, cell.seeds[0]]
        trials = plan.sweeps(self._left(), self.grid, firsts, self.out)
        found = self._run("learning rates", trials.values())
        for (cell, lr), one in trials.items():
            self.rates.setdefault(cell, {})[lr] = final_loss(found[one.folder])
        for cell in self._left():
            if cell.twin_of is not None:
                if cell.twin_of in self.lost:
                    self.lost[cell.name] = self.lost[cell.twin_of]
                    continue
                self.rates[cell.name] = self.rates[cell.twin_of]
            known = {r: x for r, x in self.rates[cell.name].items() if x is not None}
            if known:
                set_key(cell.config, LR, min(known, key=known.__getitem__))
            else:
                errors = [found[o.folder].get("error") for (c, _), o in trials.items()
                          if c in (cell.name, cell.twin_of)]  # fmt: skip
                self.lost[cell.name] = f"no learning rate: {errors[0] or 'losses not finite'}"

    def _left(self) -> list[Cell]:
        return [cell for cell in self.cells if cell.name not in self.lost]

    def _run(
        self,
        title: str,
        planned: Iterable[Planned],
        check: Callable[[Iterable[Result]], None] = lambda results: None,
    ) -> dict[Path, Result]:
        """Runs what is not finished yet; returns results by the folder of the job."""
        jobs = {one.folder: one.job for one in planned}
        results: dict[Path, Result] = {}
        todo: list[Path] = []
        for folder, job in jobs.items():
            kept = read_result(folder, job)
            if kept is not None:
                results[folder] = kept
                continue
            (folder / RESULT_FILE).unlink(missing_ok=True)
            remove_orphans(folder)
            job.write(folder)
            todo.append(folder)
        check(results.values())
        if results:
            self.console.print(f"{title}: {len(results)} of {len(jobs)} are finished already")
        if not todo:
            return results
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[done]}/{task.fields[jobs]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        # The bar counts steps, for jobs differ in length; they come in whole jobs.
        length = {folder: max(1, get_key(jobs[folder].config, STEPS) or 1) for folder in todo}
        with Progress(*columns, console=self.console, speed_estimate_period=3600) as progress:
            total = sum(length.values())
            bar = progress.add_task(title, total=total, done=0, jobs=len(todo))

            def finished(folder: Path) -> None:
                results[folder] = result = read_outcome(folder)
                done = len([one for one in todo if one in results])
                progress.update(bar, advance=length[folder], done=done)
                said = result.get("error") or f"{result['seconds']:.0f} s"
                style = "red" if "error" in result else ""
                progress.console.print(
                    escape(f"{result['name']}: {said}"), style=style, soft_wrap=True
                )
                check(results.values())

            self._runner(todo, finished)
        return results

    def _check(self, results: Iterable[Result]) -> None:
        """Refuses finished runs that were not given the same; failed ones say nothing.

        Raises:
            UnfairError: see `check_run`.
        """
        whole = {one["name"]: one for one in results if "error" not in one}
        same = ["sample_order_digest"]
        if self.grid.match in ("steps", "params"):
            same += ["steps", "samples", "order_digest"]
        references: dict[str, tuple[str, Result]] = {}
        for name, run in whole.items():
            other, first = references.setdefault("", (name, run))
            check_run(name, run, {key: first[key] for key in same}, other)
            # Features of another encoder are other features.
            other, alike = references.setdefault(run["fingerprints"]["vision"], (name, run))
            check_run(name, run, {"features_digest": alike["features_digest"]}, other)
            if "scored" in run:
                other, first = references.setdefault("scored", (name, run))
                shown = {"held-out pictures": first["scored"]["images"]}
                check_run(name, {"held-out pictures": run["scored"]["images"]}, shown, other)
            if self.grid.match == "params" and "scored" in run:
                check_size(name, run["trainable_parameters"], other, first["trainable_parameters"])
            wanted = run["planned_steps"]
            if wanted is not None:
                check_run(name, run, {"steps": wanted}, "its plan")


def final_loss(result: Mapping[str, Any]) -> float | None:
    """Mean training loss of the last quarter of a run; None of one that failed or diverged."""
    curve = [loss for _, loss in result.get("curve", ())]
    last = curve[-max(1, len(curve) // 4) :]
    if not last or not all(map(math.isfinite, last)):
        return None
    return sum(last) / len(last)
