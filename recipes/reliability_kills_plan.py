"""Which runs are killed, and when."""

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from recipes.checkpoints import LAST

Moment = Literal["mid-epoch", "epoch border", "checkpoint write", "after a resume"]
MOMENTS: tuple[Moment, ...] = (
    "mid-epoch",
    "mid-epoch",
    "epoch border",
    "checkpoint write",
    "checkpoint write",
    "after a resume",
)
"""Of the kills of each setting."""

MID_EPOCH: tuple[Moment, ...] = ("mid-epoch", "mid-epoch")
QUICK_MOMENTS: tuple[Moment, ...] = ("epoch border", "checkpoint write")

EPOCHS = 3
CHECKPOINT_EVERY = 3
GLOBAL_BATCH = 4
"""Samples of a step of a single source, over all ranks."""

DELAYS: dict[Moment, float] = {
    "mid-epoch": 0.05,
    "epoch border": 0.05,
    "checkpoint write": 0.02,
    "after a resume": 0.02,
}
"""The kill falls at random within so many seconds of its moment: about a step, or a write."""


@dataclass(frozen=True)
class Setting:
    """How a run is started.

    Attributes:
        data: ``single`` or ``mixture``, or ``even``: a config that the setup wrote.
        workers: of each loader.
        ranks: processes.
    """

    data: str
    workers: int = 0
    ranks: int = 1

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.data}, {self.workers} workers, {self.ranks} ranks"

    def arguments(self, folder: Path, run: Path, log: Path) -> list[str]:
        """Of `bridges train`; a run that has a checkpoint is continued.

        Args:
            folder: of the setup.
            run: of the run.
            log: of its steps.
        """
        size = GLOBAL_BATCH // self.ranks
        batches = {"single": [f"--data.batch_size={size}", f"--data.num_workers={self.workers}"]}
        batches["even"] = batches["single"]
        batches["mixture"] = [
            f"--data.sources.pairs.batch_size={size}",
            f"--data.sources.documents.batch_size={size // 2}",
            *(f"--data.sources.{n}.num_workers={self.workers}" for n in ("pairs", "documents")),
        ]
        callback = {
            "class_path": "recipes.reliability_kills_log.StepLog",
            "init_args": {"path": str(log)},
        }
        return [
            f"--config={folder / self.data}.yaml",
            f"--run={run}",
            f"--trainer.callbacks={json.dumps([callback])}",
            f"--trainer.max_epochs={EPOCHS}",
            f"--checkpoint_every={CHECKPOINT_EVERY}",
            *batches[self.data],
            *(["--trainer.devices=2", "--trainer.strategy=ddp"] if self.ranks == 2 else []),
            *(["--resume=true"] if (run / LAST).is_file() else []),
        ]


SETTINGS = tuple(
    Setting(data, workers, ranks)
    for data in ("single", "mixture")
    for workers in (0, 2)
    for ranks in (1, 2)
)

CHANGES = {
    "workers_changed": [
        [Setting("single", workers) for workers in (0, 2, 0)],
        [Setting("mixture", workers) for workers in (0, 2, 0)],
    ],
    "world_changed": [
        [Setting("even", ranks=ranks) for ranks in (1, 2)],
        [Setting("even", ranks=ranks) for ranks in (2, 1)],
    ],
}
"""Settings of one start after the other. Of changed ranks, each start has its share of the same
steps."""


@dataclass(frozen=True)
class Kill:
    """One SIGKILL.

    Attributes:
        moment: of what kind it is.
        position: batches that must be done, counted from the start of the run.
        delay: seconds from then on.
        rank: which is killed first, where there are two.
    """

    moment: Moment
    position: int
    delay: float
    rank: int


def plan(rng: random.Random, moments: Sequence[Moment], batches: int) -> list[Kill]:
    """Kills at random moments, in the order in which the run comes by them.

    Args:
        rng: draws them.
        moments: one for each kill.
        batches: of an epoch.
    """
    borders = [batches * epoch + before for epoch in range(1, EPOCHS) for before in (0, 1)]
    # Three steps from the end there still is a checkpoint to come, and a step after it.
    last = batches * EPOCHS - 3 * CHECKPOINT_EVERY
    inside = [position for position in range(1, last) if position not in borders]
    kills = []
    for moment in moments:
        position = rng.choice(borders if moment == "epoch border" else inside)
        delay = rng.uniform(0, DELAYS[moment])
        kills.append(Kill(moment, position, delay, rng.randrange(2)))
    kills.sort(key=lambda kill: kill.position)
    # Only a run that was killed before can be killed just after it resumed.
    if kills[0].moment == "after a resume" and len(kills) > 1:
        kills[0], kills[1] = kills[1], kills[0]
    return kills
