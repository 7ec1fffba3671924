"""Training that is killed again and again, and whether it goes on as if it had not been.

For each setting a run is left alone; a second one, by the same command line, is killed by SIGKILL
at random moments and resumed until it is done. Every batch that either computes is written down
with all bits of its loss and the keys of its samples.
"""

import random
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from recipes.reliability_kills_compare import Comparison, compare
from recipes.reliability_kills_log import Step
from recipes.reliability_kills_plan import (
    CHANGES,
    MID_EPOCH,
    MOMENTS,
    QUICK_MOMENTS,
    SETTINGS,
    Kill,
    Moment,
    Setting,
    plan,
)
from recipes.reliability_kills_process import fork_server
from recipes.reliability_kills_run import Run, run_killed
from recipes.reliability_kills_setup import write_all

SEED = 0
"""Of the planned moments; where in a step a kill then falls is chance."""

COLUMNS = (
    TextColumn("{task.description}"),
    BarColumn(),
    MofNCompleteColumn(),
    TextColumn("starts, left:"),
    TimeRemainingColumn(),
)

Result = dict[str, Any]


def measure(folder: Path, *, quick: bool = False) -> Result:
    """Kills training and counts what it makes of it.

    Args:
        folder: an empty one; logs, outputs and weights of all runs stay in it.
        quick: one setting and two kills.

    Returns:
        ``runs``, the kills after which a run was resumed; ``identical``, those of them whose run
        ended with every step, of whichever start, and the final weights equal to the reference's,
        bit for bit; ``lost`` and ``repeated``, samples that the steps which made the final weights
        have less often in an epoch, or more often, than the reference. Beside these counts,
        ``by_setting``, ``workers_changed`` and ``world_changed`` hold the single runs (the last
        two count in ``lost`` and ``repeated`` only), ``moments`` how often was killed when,
        ``writing`` the kills that left an unfinished checkpoint, ``hung`` the kills of one rank
        that the other did not follow, and ``failures`` what differs, in words.

    Raises:
        RuntimeError: a run fails that nothing disturbed.
    """
    moments = QUICK_MOMENTS if quick else MOMENTS
    plans: dict[str, list[list[Setting]]] = {
        "by_setting": [[setting] for setting in (SETTINGS[:1] if quick else SETTINGS)],
        **({} if quick else CHANGES),
    }
    write_all(folder)
    found: dict[str, list[Result]] = {}
    with Progress(*COLUMNS) as progress:
        # A start for the reference, which those with changes share, and one after each kill.
        single = len(plans["by_setting"]) * (len(moments) + 2)
        changed = [chain for chains in plans.values() for chain in chains if len(chain) > 1]
        total = single + sum(map(len, changed)) + len({c[0] for c in changed} - {*SETTINGS})
        task = progress.add_task("", total=total)
        harness = _Harness(folder, lambda: progress.advance(task))
        for name, chains in plans.items():
            found[name] = []
            for chain in chains:
                progress.update(task, description=f"kills: {_title(chain)}")
                kinds = moments if len(chain) == 1 else MID_EPOCH[: len(chain) - 1]
                found[name].append(harness.row(chain, kinds))
    rows = found["by_setting"]
    every = [row for group in found.values() for row in group]
    return {
        "runs": sum(row["kills"] for row in rows),
        "identical": sum(row["identical"] for row in rows),
        "lost": sum(row["lost"] for row in every),
        "repeated": sum(row["repeated"] for row in every),
        "hung": sum(row["hung"] for row in every),
        "writing": sum(row["writing"] for row in every),
        "moments": dict(sum((Counter(row["moments"]) for row in every), Counter())),
        "failures": [failure for row in every for failure in row["failures"]],
        "seed": SEED,
        **found,
    }


class _Harness:
    """Runs in one folder, each beside its reference, which is made when it is first needed."""

    def __init__(self, folder: Path, tick: Callable[[], None]) -> None:
        self.folder = folder
        self.tick = tick
        self.context = fork_server()
        self.references: dict[Setting, Run] = {}
        self.killed = 0

    def row(self, chain: Sequence[Setting], moments: Sequence[Moment]) -> Result:
        """What becomes of a run that is killed at such moments.

        Args:
            chain: settings of one start after the other; the last of them of all that follow.
            moments: of the kills.
        """
        reference = self.reference(chain[0])
        title = _title(chain)
        batches = 1 + max(e.batch for e in reference.events if isinstance(e, Step))
        kills = plan(random.Random(f"{SEED}/{title}"), moments, batches)
        self.killed += 1
        run = self.run(f"killed-{self.killed}", chain, kills, batches)
        same_ranks = len({setting.ranks for setting in chain}) == 1
        result = compare(reference.events, run.events, losses=same_ranks)
        if same_ranks and run.weights != reference.weights:
            result.differences.append("the final weights differ")
        return summarise(title, run, result)

    def reference(self, setting: Setting) -> Run:
        """The run of a setting that nothing disturbs."""
        if setting not in self.references:
            run = self.run(f"reference-{len(self.references)}", [setting], [], 0)
            if run.failure:
                raise RuntimeError(f"found a run that fails without a kill: {run.failure}")
            self.references[setting] = run
        return self.references[setting]

    def run(self, name: str, chain: Sequence[Setting], kills: Sequence[Kill], batches: int) -> Run:
        """Trains to the end, whatever comes."""
        return run_killed(
            self.context, self.folder, name, chain, kills, batches=batches, tick=self.tick
        )


def summarise(title: str, run: Run, result: Comparison) -> Result:
    """The row of a run.

    Args:
        title: what was run.
        run: what became of it.
        result: how it differs from its reference.
    """
    failures = [*([run.failure] if run.failure else []), *result.differences]
    hung = run.seconds_alone.count(None)
    whole = not (failures or hung or result.lost or result.repeated)
    return {
        "setting": title,
        "kills": len(run.kills),
        "identical": len(run.kills) if whole else 0,
        "lost": result.lost,
        "repeated": result.repeated,
        "hung": hung,
        "most_seconds_alone": max((s for s in run.seconds_alone if s is not None), default=None),
        "writing": run.writing,
        "moments": Counter(kill.moment for kill in run.kills),
        "failures": [f"{title}: {failure}" for failure in failures[:10]],
    }


def _title(chain: Sequence[Setting]) -> str:
    return " → ".join(setting.name for setting in chain)
