"""What a run shows while it goes on."""

import time
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback, RichProgressBar

from recipes.batch import Batch


class StepProgressBar(RichProgressBar):
    """Lightning's bar, for runs that end after so many steps.

    It shows neither a last epoch, which such runs do not have, nor the version of a logger.
    """

    def __init__(self) -> None:
        super().__init__(leave=True)

    def get_metrics(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, Any]:
        """Loss, samples per second, and the step out of all."""
        metrics = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)
        total = f"/{trainer.max_steps}" if trainer.max_steps > 0 else ""
        return {"step": f"{trainer.global_step}{total}", **metrics}

    def _get_train_description(self, current_epoch: int) -> str:
        return f"epoch {current_epoch}"


class Throughput(Callback):
    """Shows samples per second, over all ranks: loading included, validation not."""

    def on_train_start(self, *_: Any) -> None:
        """Starts the clock."""
        self._since = time.perf_counter()

    def on_validation_end(self, *_: Any) -> None:
        """Leaves validation out."""
        self._since = time.perf_counter()

    def on_train_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, batch: Any, index: int
    ) -> None:
        """Logs the rate since the last batch."""
        assert isinstance(batch, Batch)
        now = time.perf_counter()
        rate = len(batch) * trainer.world_size / (now - self._since)
        self._since = now
        module.log("samples_per_s", rate, prog_bar=True, batch_size=len(batch))
