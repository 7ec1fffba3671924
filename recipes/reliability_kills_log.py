"""What a run under fire writes down of every step, unbuffered, and the resampler that it trains."""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from bridges.contract import Instruction, VisionFeatures
from perceiver import PerceiverResampler
from recipes.batch import Batch

ATTEMPT = "TORCHELASTIC_RESTART_COUNT"
"""torchrun's variable for how often a run was started again."""


@dataclass(frozen=True)
class Step:
    """One training batch of one rank, as its process wrote it down when it was done.

    Attributes:
        rank: whose batch it is.
        epoch: of the run; of a mixture, of the mixture.
        batch: place in the epoch.
        step: optimiser steps done before the one that the batch belongs to.
        loss: of the batch, all bits of it (`float.hex`).
        keys: of the samples, in their order.
    """

    rank: int
    epoch: int
    batch: int
    step: int
    loss: str
    keys: tuple[str, ...]

    @property
    def place(self) -> tuple[int, int, int]:
        """Where the batch belongs, whichever start of the run computes it."""
        return self.epoch, self.batch, self.rank


@dataclass(frozen=True)
class Start:
    """A rank begins to train.

    Attributes:
        attempt: which start of the run this is.
        step: optimiser steps done, by the checkpoint that it resumed from.
    """

    attempt: int
    step: int


@dataclass(frozen=True)
class Saving:
    """Rank 0 is about to write a checkpoint of so many optimiser steps."""

    step: int


Event = Step | Start | Saving
_KINDS: dict[str, type[Step] | type[Start] | type[Saving]] = {
    "step": Step,
    "start": Start,
    "saving": Saving,
}


class StepLog(Callback):
    """Appends a line for each batch; after a SIGKILL all lines that were written are there.

    Args:
        path: of the log, which all ranks and all starts of a run append to.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self._step = 0
        self._file = -1

    def on_train_start(self, trainer: L.Trainer, *_: Any) -> None:
        """The place that training goes on from."""
        self._file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        attempt = int(os.environ.get(ATTEMPT, 0))
        self._write("start", {"attempt": attempt, "step": trainer.global_step})

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        """The optimiser may step within the batch."""
        self._step = trainer.global_step

    def on_train_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, batch: Any, index: int
    ) -> None:
        """One line, by one call of the system, so that no kill leaves half of it."""
        assert isinstance(batch, Batch)
        line = {
            "rank": trainer.global_rank,
            "epoch": trainer.current_epoch,
            "batch": index,
            "step": self._step,
            "loss": float(outputs["loss"]).hex(),
            "keys": [sample["key"] for sample in batch.samples],
        }
        self._write("step", line)

    def on_save_checkpoint(self, trainer: L.Trainer, *_: Any) -> None:
        """The moment to kill during the write."""
        if trainer.is_global_zero:
            self._write("saving", {"step": trainer.global_step})

    def _write(self, kind: str, content: dict[str, Any]) -> None:
        os.write(self._file, (json.dumps({kind: content}) + "\n").encode())


def read_events(path: Path, start: int = 0) -> Iterator[tuple[Event, int]]:
    """The events of a log from a byte on, each with the byte that it ends at.

    Raises:
        ValueError: a line that is no event.
    """
    if not path.exists():
        return
    with path.open("rb") as file:
        file.seek(start)
        for line in file:
            if not line.endswith(b"\n"):
                return
            start += len(line)
            yield _event(line), start


def _event(line: bytes) -> Event:
    try:
        [(kind, content)] = json.loads(line).items()
        if "keys" in content:
            content["keys"] = tuple(content["keys"])
        return _KINDS[kind](**content)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"found the line {line!r} in a step log; expected an event") from error


class NoisyResampler(PerceiverResampler):
    """With dropout, so that a run which resumes with other random numbers shows in its loss."""

    def forward(self, vision: VisionFeatures, text: Instruction | None = None) -> Tensor:
        tokens = super().forward(vision, text)
        return torch.nn.functional.dropout(tokens, 0.2, self.training)
