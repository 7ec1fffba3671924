"""What every evaluation metric keeps: rows, one for each image, gathered from all ranks."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric


class PerImage(Metric, ABC):
    """A metric that also says what each image, or question, got.

    The images are in the order of the updates; across ranks, those of rank 0 come first. A rank
    that has had no image is no obstacle.
    """

    is_differentiable = False
    full_state_update = False

    def __init__(self) -> None:
        super().__init__()
        self._forms: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}

    def add_rows(self, name: str, *width: int, dtype: torch.dtype = torch.float64) -> None:
        """Declares a state that grows with the images.

        Args:
            name: of the attribute.
            width: shape of one row.
            dtype: of the rows.
        """
        self.add_state(name, [], dist_reduce_fx="cat")
        self._forms[name] = (width, dtype)

    def append(self, name: str, rows: Tensor | Sequence[Any]) -> None:
        """Adds rows to a state."""
        width, dtype = self._forms[name]
        added = torch.as_tensor(rows, dtype=dtype, device=self.device).detach()
        getattr(self, name).append(added.reshape(-1, *width))

    def rows(self, name: str) -> Tensor:
        """All rows of a state so far, (N, *width)."""
        state = getattr(self, name)
        found = [*state] if isinstance(state, list) else [state]
        return torch.cat([self._no_rows(name), *found])

    def sync(self, *args: Any, **kwargs: Any) -> None:
        # What torchmetrics gathers from a rank without images is fp32 of one dimension, whatever
        # the others have: gloo raises, or the figures are garbage.
        for name in self._forms:
            if isinstance(getattr(self, name), list) and not getattr(self, name):
                getattr(self, name).append(self._no_rows(name))
        super().sync(*args, **kwargs)

    def per_image(self) -> Tensor:
        """Each image's own figure, of all ranks, (N,) fp64."""
        with self.sync_context():
            return self._each()

    @abstractmethod
    def _each(self) -> Tensor:
        """`per_image` of the states as they stand."""

    def _no_rows(self, name: str) -> Tensor:
        width, dtype = self._forms[name]
        return torch.empty(0, *width, dtype=dtype, device=self.device)


class PerImageMean(PerImage):
    """The mean of what the images got: `update` of a subclass appends to ``scores``."""

    higher_is_better = True

    def __init__(self) -> None:
        super().__init__()
        self.add_rows("scores")

    def compute(self) -> Tensor:
        """The mean over the images, fp64.

        Raises:
            ValueError: no image yet.
        """
        return mean(self._each())

    def _each(self) -> Tensor:
        return self.rows("scores")


def mean(scores: Tensor) -> Tensor:
    """The mean over rows.

    Raises:
        ValueError: there are none.
    """
    return total(scores) / len(scores)


def total(rows: Tensor) -> Tensor:
    """The sum over rows.

    Raises:
        ValueError: there are none.
    """
    if not len(rows):
        raise ValueError("found no image; expected at least one: call update() before compute()")
    return rows.sum(dim=0)


def check_pairs(predictions: Sequence[str], truths: Sequence[Sequence[str]]) -> None:
    """Predictions and what is right for each must belong together.

    Raises:
        ValueError: not as many of one as of the other, or a prediction without any truth.
        TypeError: a string where several are expected: its letters would be taken for truths.
    """
    if len(predictions) != len(truths):
        raise ValueError(
            f"found {len(predictions)} predictions for {len(truths)} lists of right texts; "
            "expected one list for each prediction"
        )
    for index, texts in enumerate(truths):
        if isinstance(texts, str):
            raise TypeError(
                f"found the string {texts!r} as the right texts of prediction {index}; expected a "
                f"list of them: [{texts!r}]"
            )
        if not texts:
            raise ValueError(
                f"found no right text for prediction {index}; expected at least one: leave out "
                "images without any"
            )
