"""One Lightning module for every generative bridge."""

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatch
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torchmetrics import MeanMetric
from transformers import get_cosine_with_min_lr_schedule_with_warmup

from bridges import (
    BridgeFactory,
    LanguageModel,
    LanguageSource,
    ModelOutput,
    VisionEncoder,
    VisionLanguageModel,
    VisionSource,
)
from bridges.language import IMAGE_TOKEN
from bridges.run import check_fingerprints
from recipes.batch import CaptionBatch


@dataclass(frozen=True)
class OptimizerOptions:
    """AdamW with linear warm-up and cosine decay.

    Attributes:
        lr: peak learning rate.
        min_lr: learning rate at the end.
        warmup_steps: optimiser steps from 0 to `lr`.
        betas: of Adam; BLIP-2's by default.
        weight_decay: on matrices only; biases, norms and gates have none.
        lr_scale: factor on the learning rate of the parameters whose names match a pattern.
            ``{"*_gate": 20}`` opens zero-initialised gates in a short run: Adam moves a scalar
            by about one learning rate a step, and until it has, its block learns nothing.
    """

    lr: float = 1e-4
    min_lr: float = 0.0
    warmup_steps: int = 0
    betas: tuple[float, float] = (0.9, 0.98)
    weight_decay: float = 0.05
    lr_scale: dict[str, float] = field(default_factory=dict)


class CaptionModule(L.LightningModule):
    """Trains a bridge to caption: cross-entropy on the caption's tokens only.

    Args:
        vision: the frozen encoder.
        lm: the frozen LM.
        bridge: the bridge, by class path; its widths come from the two ends.
        optimizer: optimiser and schedule.
        prompt: what stands before a caption; must hold ``<image>``.
    """

    def __init__(
        self,
        vision: VisionSource,
        lm: LanguageSource,
        bridge: BridgeFactory,
        optimizer: OptimizerOptions = OptimizerOptions(),
        prompt: str = IMAGE_TOKEN,
    ) -> None:
        super().__init__()
        self.optimizer_options = optimizer
        self.vlm = VisionLanguageModel.connect(
            VisionEncoder.load(**vars(vision)),
            LanguageModel.load(**vars(lm)),
            bridge,
            prompt=prompt,
        )
        self.val_nll = MeanMetric()

    def training_step(self, batch: CaptionBatch, _: int) -> Tensor:
        """Caption loss of a batch, in nats per token, plus the bridge's own losses."""
        output = self._forward(batch)
        if not torch.isfinite(output.loss):
            raise RuntimeError(
                f"found a loss of {output.loss.item()} at step {self.global_step}; expected a "
                "finite one: lower model.optimizer.lr, or train in fp32 (trainer.precision: 32)"
            )
        size = len(batch)
        self.log("loss", output.loss, prog_bar=True, batch_size=size)
        for name, loss in output.losses.items():
            self.log(f"loss/{name}", loss, batch_size=size)
        if batch.text.truncated:
            self.log("truncated_captions", float(batch.text.truncated), batch_size=size)
        return output.loss

    def validation_step(self, batch: CaptionBatch, _: int) -> None:
        """Held-out caption loss per token."""
        output = self._forward(batch)
        self.val_nll.update(output.token_losses.mean(), len(output.token_losses))
        self.log("val_loss", self.val_nll, prog_bar=True, batch_size=len(batch))

    def configure_optimizers(self) -> Any:
        """AdamW over the trainable parameters; the schedule steps with the optimiser."""
        options = self.optimizer_options
        groups: dict[tuple[float, float], list[torch.nn.Parameter]] = defaultdict(list)
        for name, parameter in self.named_parameters():
            if parameter.requires_grad:
                decay = options.weight_decay if parameter.ndim >= 2 else 0.0
                groups[options.lr * _scale(name, options.lr_scale), decay].append(parameter)
        optimizer = torch.optim.AdamW(
            [{"params": p, "lr": lr, "weight_decay": d} for (lr, d), p in groups.items()],
            lr=options.lr,
            betas=options.betas,
        )
        schedule = get_cosine_with_min_lr_schedule_with_warmup(
            optimizer,
            options.warmup_steps,
            self._total_steps(),
            min_lr=options.min_lr,
        )
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }

    def _forward(self, batch: CaptionBatch) -> ModelOutput:
        text = batch.text
        features = batch.features(self.vlm.vision)
        return self.vlm(text.input_ids, text.attention_mask, text.labels, features)

    def _total_steps(self) -> int:
        """Optimiser steps of the whole run.

        Not Lightning's estimate: that makes the loader before it knows that a run is resumed,
        and the loader then begins its epoch again.
        """
        trainer = self.trainer
        totals = [trainer.max_steps] if trainer.max_steps > 0 else []
        if trainer.max_epochs is not None and trainer.max_epochs > 0:
            data: Any = trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
            steps = math.ceil(data.batches_per_epoch() / trainer.accumulate_grad_batches)
            totals.append(steps * trainer.max_epochs)
        if not totals:
            raise ValueError(
                "found neither trainer.max_steps nor trainer.max_epochs; expected one of them: "
                "the learning rate falls until then"
            )
        return min(totals)

    def state_dict(self, *_: Any, **__: Any) -> dict[str, Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The trainable part alone: frozen weights stay out of checkpoints."""
        return self.vlm.trainable_state()

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Loads what `state_dict` returned."""
        self.vlm.load_trainable_state(state_dict)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Notes the frozen ends that the checkpoint belongs to."""
        checkpoint["fingerprints"] = {
            "vision": self.vlm.vision.fingerprint,
            "lm": self.vlm.lm.fingerprint,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuses a checkpoint of other frozen ends."""
        check_fingerprints(
            checkpoint.get("fingerprints", {}), self.vlm.vision, self.vlm.lm, "this checkpoint"
        )


def _scale(name: str, scales: Mapping[str, float]) -> float:
    return next((scale for pattern, scale in scales.items() if fnmatch(name, pattern)), 1.0)
