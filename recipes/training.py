"""What every Lightning module of the recipes has in common, whatever it trains."""

import math
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatch
from importlib import import_module
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor
from transformers import get_cosine_with_min_lr_schedule_with_warmup

from bridges import VisionEncoder
from recipes.batch import Collate
from recipes.data import CaptionData

DEFAULT_MODULE = "recipes.module.CaptionModule"
"""What a config without the key ``module`` trains."""


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


class BridgeModule(L.LightningModule, ABC):
    """Something that `bridges train` trains on captioned pictures before a frozen encoder.

    A YAML names the class by ``module: package.Class``; the class's own arguments are the keys of
    ``model``. Weights that are frozen stay out of `state_dict`, and so out of checkpoints.

    Args:
        optimizer: optimiser and schedule.
    """

    def __init__(self, optimizer: OptimizerOptions) -> None:
        super().__init__()
        self.optimizer_options = optimizer

    @property
    @abstractmethod
    def vision(self) -> VisionEncoder:
        """The frozen encoder, whose preprocessing and features the data are fitted to."""

    @abstractmethod
    def fingerprints(self) -> dict[str, str]:
        """The frozen parts by name (``vision``, …), which a checkpoint belongs to."""

    @abstractmethod
    def check_fingerprints(self, belongs: dict[str, str], where: str) -> None:
        """Refuses weights that were trained with other frozen parts.

        Args:
            belongs: what `fingerprints` said in that run.
            where: names the weights in the error.

        Raises:
            ValueError: naming the part, with both fingerprints.
        """

    @abstractmethod
    def collator(self, max_tokens: int) -> Collate:
        """Makes a batch of decoded samples, in a worker if there are any.

        Args:
            max_tokens: longer captions are cut, ``data.max_caption_tokens``.
        """

    @abstractmethod
    def save(self, folder: Path, config: dict[str, Any]) -> None:
        """Writes ``run.json`` and the trained weights into the run directory.

        Args:
            folder: the run directory.
            config: the resolved ``model`` part of the configuration.
        """

    @abstractmethod
    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The trainable part alone: frozen weights stay out of checkpoints."""

    @abstractmethod
    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Loads what `state_dict` returned."""

    def check_data(self, data: CaptionData) -> None:
        """Refuses options of the data that do not fit; called before anything is written.

        Raises:
            ValueError: what does not fit, and the key to change.
        """

    def initialise(self) -> None:
        """Puts pretrained weights into what is trained; called for a new run, not a resumed one."""

    def done(self, folder: Path) -> str:
        """What `bridges train` says in the end."""
        return f"the weights are in {folder}"

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

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Notes the frozen parts that the checkpoint belongs to."""
        checkpoint["fingerprints"] = self.fingerprints()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuses a checkpoint of other frozen parts."""
        self.check_fingerprints(checkpoint.get("fingerprints", {}), "this checkpoint")

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


def load_module(path: str) -> type[BridgeModule]:
    """The class that is trained.

    Raises:
        ValueError: nothing of that name can be imported, or it is no `BridgeModule`.
    """
    package, _, name = path.rpartition(".")
    expected = f"expected the class path of a BridgeModule, such as {DEFAULT_MODULE}"
    try:
        found = getattr(import_module(package), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"found module {path!r}, which cannot be imported ({error}); {expected}: check the "
            "spelling, and that its package is installed"
        ) from error
    if not (isinstance(found, type) and issubclass(found, BridgeModule)):
        raise ValueError(
            f"found module {path!r}, which is no BridgeModule; {expected}: derive it from "
            "recipes.training.BridgeModule"
        )
    return found


def _scale(name: str, scales: Mapping[str, float]) -> float:
    return next((scale for pattern, scale in scales.items() if fnmatch(name, pattern)), 1.0)
