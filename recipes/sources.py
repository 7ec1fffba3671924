"""One source of a mixture, and its batches without end."""

from collections.abc import Iterator
from typing import Any, final

from recipes.batch import Batch
from recipes.data import CaptionData
from recipes.loader import SizedLoader


@final
class SourceData(CaptionData):
    """One source of a mixture: shards of its own shape, and their weight.

    Args:
        shards: as for `CaptionData`.
        weight: λ, the factor of this source's loss.
        **options: of `CaptionData`.

    Raises:
        ValueError: a weight that is not above 0.
    """

    def __init__(self, shards: str, weight: float = 1.0, **options: Any) -> None:
        if not weight > 0:
            raise ValueError(
                f"found weight {weight} for the source {shards}; expected more than 0: to leave a "
                "source out, set it to null"
            )
        super().__init__(shards, **options)
        self.weight = weight

    def shape(self) -> dict[str, Any]:
        """What the places of batches in this source's epochs depend on."""
        assert self._train is not None
        sizes = {"batch_size": self.batch_size, "ranks": self._world_size}
        return {**sizes, **self._train.shape()}

    def epoch_loader(self, number: int, done: int) -> SizedLoader:
        """The training batches of one of this source's own epochs, but for those that are done."""
        assert self._train is not None
        self._train.set_epoch(number)
        loader = self._loader(self._train, drop_last=True)
        loader.go_to(done)
        return loader


class EndlessBatches:
    """Training batches of a source without end: after its last epoch comes its next one.

    Every rank has as many batches in an epoch, so that all ranks begin the next one together.

    Args:
        source: connected.

    Attributes:
        done: batches handed out since the first of epoch 0.
    """

    def __init__(self, source: SourceData) -> None:
        self.source = source
        self.done = 0
        self._epoch: Iterator[Batch] | None = None

    def go_to(self, done: int) -> None:
        """Continues after so many batches, without a new start where it is there already."""
        if done != self.done:
            self.done = done
            self.close()

    def close(self) -> None:
        """Ends the workers, if there are any; the next batch begins them anew."""
        self._epoch = None

    def __next__(self) -> Batch:
        epoch, place = divmod(self.done, self.source.batches_per_epoch())
        if self._epoch is None or not place:
            self._epoch = iter(self.source.epoch_loader(epoch, place))
        self.done += 1
        return next(self._epoch)
