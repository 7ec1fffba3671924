"""What every Lightning module of the recipes has in common, whatever it trains."""

import math
import random
from abc import ABC, abstractmethod
from importlib import import_module
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor

from bridges import VisionEncoder
from recipes.batch import Batch, Collate
from recipes.data import CaptionData
from recipes.mixture import MixtureData, TrainingData
from recipes.optimizer import OptimizerOptions, adamw

__all__ = ["BridgeModule", "OptimizerOptions", "load_data_class", "load_module"]

DEFAULT_MODULE = "recipes.module.CaptionModule"
"""What a config without the key ``module`` trains."""

DEFAULT_DATA = "recipes.data.CaptionData"
"""What a config without the key ``data_class`` trains on."""


class BridgeModule(L.LightningModule, ABC):
    """Something that `bridges train` trains on captioned pictures before a frozen encoder.

    A YAML names the class by ``module: package.Class``; the class's own arguments are the keys of
    ``model``. Weights that are frozen stay out of `state_dict`, and so out of checkpoints.

    Args:
        optimizer: optimiser and schedule.
    """

    takes_mixtures = False
    """Whether `training_step` returns its loss by way of `objective`."""

    def __init__(self, optimizer: OptimizerOptions) -> None:
        super().__init__()
        self.optimizer_options = optimizer
        self._seed = torch.initial_seed()
        self._latest: dict[str, Tensor] = {}

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
    def collator(self, data: CaptionData) -> Collate:
        """Makes a batch of decoded samples, in a worker if there are any.

        Args:
            data: whose task and limits it follows.
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

    def check_mixture(self, data: TrainingData) -> None:
        """Refuses a mixture whose weights a module would not heed.

        Raises:
            ValueError: naming the module.
        """
        if isinstance(data, MixtureData) and not self.takes_mixtures:
            raise ValueError(
                f"found a mixture of data for {type(self).__name__}, which trains on one source; "
                "expected recipes.data.CaptionData: leave data_class out, or choose a module that "
                "takes mixtures"
            )

    def objective(self, loss: Tensor, batch: Batch, batch_idx: int) -> Tensor:
        """Logs the loss of a training batch, and weighs it if its source has a weight.

        Of a mixture, the loss of the batch is logged under its source's name, and as ``loss`` the
        sum of the sources' latest losses, weighed.

        Args:
            loss: of the batch.
            batch: which it is the loss of.
            batch_idx: its place in the epoch.

        Returns:
            What `training_step` must return.
        """
        data: Any = self.trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
        size = len(batch)
        if not isinstance(data, MixtureData):
            self.log("loss", loss, prog_bar=True, batch_size=size)
            return loss
        name = data.source_at(batch_idx)
        self.log(f"loss/{name}", loss, batch_size=size)
        self._latest[name] = loss.detach()
        if len(self._latest) == len(data.sources):
            weighed = [data.sources[name].weight * x for name, x in self._latest.items()]
            self.log("loss", torch.stack(weighed).sum(), prog_bar=True, batch_size=size)
        return loss * data.factor(name)

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """What is drawn in a step depends on its place alone, so that a resumed run draws it too.

        Ranks draw apart.
        """
        place = f"{self._seed}/{self.current_epoch}/{batch_idx}/{self.global_rank}"
        torch.manual_seed(random.Random(place).getrandbits(62))

    def initialise(self) -> None:
        """Puts pretrained weights into what is trained; called for a new run, not a resumed one."""

    def done(self, folder: Path) -> str:
        """What `bridges train` says in the end."""
        return f"the weights are in {folder}"

    def configure_optimizers(self) -> Any:
        """AdamW over the trainable parameters; the schedule steps with the optimiser."""
        optimizer, schedule = adamw(
            self.optimizer_options, self.named_parameters(), self._total_steps
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
            batches, limit = data.batches_per_epoch(), trainer.limit_train_batches
            some = isinstance(limit, float) and limit < 1
            batches = int(batches * limit) if some else min(batches, limit)
            steps = math.ceil(batches / trainer.accumulate_grad_batches)
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
    return _load("module", path, DEFAULT_MODULE, BridgeModule)


def load_data_class(path: str) -> type[TrainingData]:
    """The class of the data that is trained on.

    Raises:
        ValueError: nothing of that name can be imported, or it is neither `CaptionData` nor
            `MixtureData`.
    """
    return _load("data_class", path, DEFAULT_DATA, CaptionData, MixtureData)


def _load(key: str, path: str, example: str, *bases: type) -> Any:
    package, _, name = path.rpartition(".")
    wanted = " or ".join(base.__name__ for base in bases)
    expected = f"expected the class path of a {wanted}, such as {example}"
    try:
        found = getattr(import_module(package), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"found {key} {path!r}, which cannot be imported ({error}); {expected}: check the "
            "spelling, and that its package is installed"
        ) from error
    if not (isinstance(found, type) and issubclass(found, bases)):
        derive = " or ".join(f"{base.__module__}.{base.__name__}" for base in bases)
        raise ValueError(
            f"found {key} {path!r}, which is no {wanted}; {expected}: derive it from {derive}"
        )
    return found
