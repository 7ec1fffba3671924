"""Steps whose loss or gradients are not finite: left out, counted, and too many are an error."""

from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor


class SkipNonFinite(Callback):
    """Leaves out an optimiser step whose loss or gradients are not finite.

    All ranks decide alike, by one all-reduce a step. They go through backward as ever, so that
    none waits for another; then every gradient is dropped, and the optimiser, which finds none,
    changes neither a weight nor a moment. The schedule and the step count go on.

    With accumulated gradients one bad batch spoils its whole step: its gradients are summed with
    the others' already.

    Args:
        limit: steps left out in a row at which training stops.

    Raises:
        ValueError: a limit below 1.
    """

    def __init__(self, limit: int) -> None:
        if limit < 1:
            raise ValueError(f"found max_skipped_in_a_row={limit}; expected at least 1")
        self.limit = limit
        self.skipped = 0
        self.in_a_row = 0
        self._finite: Tensor | None = None

    def on_before_backward(self, _: L.Trainer, pl_module: L.LightningModule, loss: Tensor) -> None:
        """Notes, on the device, whether the loss is finite."""
        finite = loss.detach().isfinite()
        self._finite = finite if self._finite is None else self._finite & finite

    def on_before_optimizer_step(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        optimizer: torch.optim.Optimizer,
    ) -> None:
        """Drops all gradients unless they are finite on every rank; comes before clipping.

        Raises:
            RuntimeError: as many steps in a row as the limit, on all ranks alike.
        """
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        finite = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        finite = finite.isfinite() if self._finite is None else finite.isfinite() & self._finite
        self._finite = None
        if trainer.strategy.reduce_boolean_decision(bool(finite)):
            self.in_a_row = 0
        else:
            for parameter in parameters:
                parameter.grad = None
            self.skipped += 1
            self.in_a_row += 1
        if self.skipped:
            pl_module.log("skipped_steps", float(self.skipped))
        if self.in_a_row >= self.limit:
            raise RuntimeError(
                f"found a loss or gradients that are not finite in {self.in_a_row} steps in a row, "
                f"the last of them step {trainer.global_step}; expected finite ones: lower "
                "model.optimizer.lr, raise model.optimizer.warmup_steps, set "
                "trainer.gradient_clip_val, or train in fp32 (trainer.precision: 32-true)"
            )

    def state_dict(self) -> dict[str, Any]:
        """The counts, for a run that is resumed."""
        return {"skipped": self.skipped, "in_a_row": self.in_a_row}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on counting."""
        self.skipped, self.in_a_row = state_dict["skipped"], state_dict["in_a_row"]
