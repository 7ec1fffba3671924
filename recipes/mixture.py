"""Several sources of samples in one run, each with its own weight in the loss."""

import math
import re
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import lightning as L

from bridges import VisionEncoder
from recipes.batch import Batch, Collate
from recipes.data import CaptionData, epoch_of
from recipes.loader import SizedLoader
from recipes.sources import EndlessBatches, SourceData

Mixing = Literal["accumulate", "round_robin"]


class MixtureLoader:
    """One epoch of a mixture: batches of its sources in turn.

    Lightning saves and restores its state, the batches done. From them follows the place of every
    source, in whichever of its own epochs it is.

    Args:
        data: the mixture.
        epoch: of the mixture.
    """

    def __init__(self, data: "MixtureData", epoch: int) -> None:
        self.data = data
        self.epoch = epoch
        self.done = 0
        self._start = 0

    def __len__(self) -> int:
        return self.data.batches_per_epoch()

    def __iter__(self) -> Iterator[Batch]:
        start, self._start = self._start, 0
        self.done = start
        for name, batches in self.data.endless.items():
            batches.go_to(self.data.batches_before(name, self.epoch, start))
        for index in range(start, len(self)):
            batch = next(self.data.endless[self.data.source_at(index)])
            self.done += 1
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """The epoch, the batches of it that were handed out, and how they were mixed."""
        return {"epoch": self.epoch, "batches": self.done, **self._mixture()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Starts after the batches that are done; another epoch starts at its start.

        Raises:
            ValueError: the checkpoint belongs to data that are no mixture, to other sources, or
                to another way to mix them: from the batches done would follow other places.
        """
        if "sources" not in state:
            raise ValueError(
                "found a checkpoint of a single source; expected one of a mixture: resume with "
                "the data_class that the run began with"
            )
        expected = self._mixture()
        other = [key for key in expected if state.get(key) != expected[key]]
        if other:
            found = {key: state.get(key) for key in other}
            wanted = {key: expected[key] for key in other}
            raise ValueError(
                f"found a checkpoint of the mixture {found}; expected {wanted}: resume with the "
                "sources and the mixing that the run began with, each with its shards, seed, "
                "shuffle_buffer and batch_size, and with its trainer.devices, "
                "trainer.accumulate_grad_batches and data.rounds_per_epoch"
            )
        if state["epoch"] == self.epoch:
            self._start = state["batches"]

    def _mixture(self) -> dict[str, Any]:
        return {
            "sources": {name: source.shape() for name, source in self.data.sources.items()},
            "mixing": self.data.mixing,
            **self.data.turns(),
        }


class MixtureData(L.LightningDataModule):
    """Several sources, each with shards, shape of samples, batch size and weight λ of its own.

    With ``accumulate``, one optimiser step sums the gradients of a batch of every source:
    Σ λ_m ∇L_m, Flamingo's objective, with one graph at a time in memory. With ``round_robin``,
    the sources take turns, one optimiser step each, with the gradient λ_m ∇L_m.

    A *round* is one turn of every source: one optimiser step, or as many as there are sources. A
    source that runs dry begins its own next epoch, in another order, and goes on; the epochs of
    the mixture, which ``trainer.max_epochs`` counts, are merely so many rounds.
    ``trainer.accumulate_grad_batches`` is the number of batches of a turn;
    ``trainer.val_check_interval`` counts batches of one source where gradients are accumulated.

    A YAML says ``data_class: recipes.mixture.MixtureData``. On the command line,
    ``--data.sources.NAME.weight 0.5`` (or any other key of a source) changes one source,
    ``--data.sources.NAME null`` leaves it out, ``--data.sources.NAME.shards PATH`` adds one, and
    ``--data FOLDER`` takes the shards of every source from ``FOLDER/NAME``.

    Args:
        sources: by name. The training loss of each is logged as ``loss/NAME``, that of its
            held-out shards as ``val_loss/NAME``; ``loss`` and ``val_loss`` are the sums weighed
            by λ.
        mixing: what an optimiser step is made of.
        rounds_per_epoch: so many as give the largest source its whole epoch, by default.
        seed: added to the seeds of all sources, each of which also depends on the source's name.

    Raises:
        ValueError: no source, or a name that is no word.

    Source: Flamingo (arXiv 2204.14198) section 2.4 and table 3 (iii).
    """

    def __init__(
        self,
        sources: Mapping[str, SourceData | None],
        mixing: Mixing = "accumulate",
        rounds_per_epoch: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.sources = {name: source for name, source in sources.items() if source is not None}
        named = [name for name in self.sources if re.fullmatch(r"[A-Za-z0-9_]+", name)]
        if not self.sources or len(named) != len(self.sources):
            raise ValueError(
                f"found data.sources {list(self.sources)}; expected at least one, each named by a "
                "word of letters, digits and _: rename them"
            )
        if rounds_per_epoch is not None and rounds_per_epoch < 1:
            raise ValueError(
                f"found data.rounds_per_epoch: {rounds_per_epoch}; expected at least 1, or null"
            )
        self.mixing: Mixing = mixing
        self.rounds_per_epoch = rounds_per_epoch
        self.seed = seed
        for name, source in self.sources.items():
            # Or two sources of one shape would have one order: the same pictures, as captions and
            # as questions, would always meet in a step.
            source.seed += seed + zlib.crc32(name.encode())
        self.endless: dict[str, EndlessBatches] = {}

    def connect(
        self,
        vision: VisionEncoder,
        collator: Callable[[CaptionData], Collate],
        world_size: int = 1,
    ) -> None:
        """Fits every source to what reads it, see `CaptionData.connect`.

        Args:
            vision: the frozen encoder.
            collator: makes the collator of a source, a module's `collator`.
            world_size: number of ranks that share the training samples.

        Raises:
            ValueError: as `CaptionData.connect`, with the name of the source.
        """
        for name, source in self.sources.items():
            try:
                source.connect(vision, collator(source), world_size)
            except ValueError as error:
                raise ValueError(f"source {name!r}: {error}") from error
        self.endless = {name: EndlessBatches(s) for name, s in self.sources.items()}

    def factor(self, name: str) -> float:
        """What a source's loss is multiplied by, so that its gradient counts λ times.

        Lightning takes the mean over the batches whose gradients it accumulates, where those of
        the sources are to be summed.
        """
        weight = self.sources[name].weight
        return weight * len(self.sources) if self.mixing == "accumulate" else weight

    def source_at(self, index: int) -> str:
        """Name of the source whose turn the batch `index` of an epoch is."""
        names = list(self.sources)
        return names[index // self._turn() % len(names)]

    def batches_before(self, name: str, epoch: int, index: int) -> int:
        """Batches of a source, over all epochs, before the batch `index` of an epoch."""
        turn, names = self._turn(), list(self.sources)
        rounds, rest = divmod(index, turn * len(names))
        begun = min(max(rest - turn * names.index(name), 0), turn)
        return (epoch * self._rounds() + rounds) * turn + begun

    def batches_per_epoch(self) -> int:
        """Batches, of all sources together, in an epoch of the mixture on each rank."""
        return self._rounds() * self._turn() * len(self.sources)

    def turns(self) -> dict[str, int]:
        """Batches of a source's turn, and rounds of turns in an epoch."""
        return {"turn": self._turn(), "rounds": self._rounds()}

    def trainer_options(self, accumulate: int, val_check: Any) -> dict[str, Any]:
        """Options of the trainer, which counts the batches of all sources.

        Args:
            accumulate: batches of a turn.
            val_check: Lightning's ``val_check_interval``; a whole number is of one source's batches
                where gradients are accumulated.
        """
        batches = len(self.sources) if self.mixing == "accumulate" else 1
        whole = isinstance(val_check, int) and not isinstance(val_check, bool)
        return {
            "accumulate_grad_batches": accumulate * batches,
            "val_check_interval": val_check * batches if whole else val_check,
        }

    def train_dataloader(self) -> MixtureLoader:
        """The rest of the current epoch; asked for anew before each."""
        assert self.trainer is not None
        return MixtureLoader(self, epoch_of(self.trainer))

    def val_dataloader(self) -> list[SizedLoader]:
        """The held-out samples of each source that has any, in the order of `held_out`."""
        loaders = [self.sources[name].val_dataloader() for name in self.held_out]
        return [loader for loader in loaders if isinstance(loader, SizedLoader)]

    def teardown(self, stage: str) -> None:
        """Ends the workers of all sources: left to the garbage, each would take seconds."""
        for batches in self.endless.values():
            batches.close()

    def on_exception(self, exception: BaseException) -> None:
        """Likewise."""
        self.teardown("fit")

    @property
    def held_out(self) -> list[str]:
        """Names of the sources with held-out shards."""
        return [name for name, source in self.sources.items() if source.held_out_shards]

    def keep_skipped(self, file: Path) -> None:
        """Names the skipped samples of all sources in a file, see `CaptionData.keep_skipped`."""
        for source in self.sources.values():
            source.keep_skipped(file)

    @property
    def skipped(self) -> dict[str, int]:
        """Bad samples by source and kind, of this process."""
        return {
            f"{name}: {kind}": count
            for name, source in self.sources.items()
            for kind, count in source.skipped.items()
        }

    def _rounds(self) -> int:
        longest = max(source.batches_per_epoch() for source in self.sources.values())
        return self.rounds_per_epoch or math.ceil(longest / self._turn())

    def _turn(self) -> int:
        """Batches that a source gives before it is another's turn."""
        assert self.trainer is not None
        accumulated = self.trainer.accumulate_grad_batches
        if self.mixing == "round_robin":
            return accumulated
        turn, rest = divmod(accumulated, len(self.sources))
        if rest or not turn:
            raise ValueError(
                f"found trainer.accumulate_grad_batches: {accumulated} for {len(self.sources)} "
                "sources; expected a multiple of their number: see MixtureData.trainer_options"
            )
        return turn


TrainingData = CaptionData | MixtureData
"""What `bridges train` can be given as ``data_class``, or a class derived from one."""


def sources_of(data: TrainingData) -> Sequence[CaptionData]:
    """The sources of a mixture; data that is none is its own only source."""
    return list(data.sources.values()) if isinstance(data, MixtureData) else [data]
