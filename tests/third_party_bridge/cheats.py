"""What an ablation has to find out: an order of its own, and a process that dies."""

import os
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback

from bridges import VisionShape
from third_party_bridge.bridge import BandResampler


class OtherOrder(Callback):
    """Changes the order of samples behind the config's back."""

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        data: Any = trainer.datamodule
        data._train.seed += 1


class DyingResampler(BandResampler):
    """Ends its process where it is made, as one that needs too much memory."""

    def __init__(self, *, vision: VisionShape) -> None:
        super().__init__(vision=vision)
        os._exit(3)


class StopAt(Callback):
    """Ends a run as an error would."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self.step:
            raise RuntimeError("stop here")


class StopInLastValidation(Callback):
    """Ends a run after its last checkpoint, before anything else is written."""

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.global_step == trainer.max_steps:
            raise RuntimeError("stop here")
