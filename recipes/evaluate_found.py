"""What the tasks of an evaluation are given, and what they find."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from bridges import VisionLanguageModel
from qformer.stage1 import Stage1
from recipes.bootstrap import Sums
from recipes.evaluate import HeldOut

LOOKS = {"": "right picture", "_shuffled": "another's", "_blind": "mean picture"}
"""Endings of figures' names, and what the model was shown. A figure that is as good with another
picture as with the right one is not owed to the picture."""


class ImpossibleError(ValueError):
    """A task that this run cannot do, or not on these data; the message says why."""


class Line(NamedTuple):
    """A line of an example on the page.

    Attributes:
        label: what it is.
        text: what was said or found.
        right: whether that is right; None where it is neither.
    """

    label: str
    text: str
    right: bool | None = None


@dataclass(frozen=True)
class Found:
    """What a task has found.

    Attributes:
        figures: by name; rows in the order of the pictures.
        columns: endings of the figures' names, and what is different there.
        lines: of each picture that has any, for the page.
        described: further values for the JSON.
        chance: of figures, what guessing gives.
    """

    figures: dict[str, Sums]
    columns: Mapping[str, str] = field(default_factory=lambda: {"": "value"})
    lines: dict[int, list[Line]] = field(default_factory=dict)
    described: dict[str, Any] = field(default_factory=dict)
    chance: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Options:
    """The options of an evaluation; see `recipes.evaluate_command.evaluate`."""

    data: str
    labels: str = "colour"
    classes: Path | None = None
    templates: Path | None = None
    descriptions: Path | None = None
    shots: tuple[int, ...] = (0, 4)
    few: int = 32
    questions: int | None = None
    max_new_tokens: int = 32
    batch_size: int = 32
    feature_cache: Path | None = None
    seed: int = 0


@dataclass(frozen=True)
class Trained:
    """A bridge's run with the pictures that it is asked about."""

    model: VisionLanguageModel
    held_out: HeldOut
    options: Options


@dataclass(frozen=True)
class TrainedStage1:
    """A stage-1 run with the pictures that it is asked about.

    Attributes:
        stage1: the model.
        max_text_tokens: to which texts were cut in training.
        held_out: the pictures.
        options: of the evaluation.
    """

    stage1: Stage1
    max_text_tokens: int
    held_out: HeldOut
    options: Options


def check_captions(held_out: HeldOut) -> None:
    """Refuses pictures without a caption.

    Raises:
        ImpossibleError: with the first of them.
    """
    missing = [sample["key"] for sample in held_out.samples if not sample["captions"]]
    if missing:
        raise ImpossibleError(
            f"found no caption of {len(missing)} of {len(held_out)} pictures, first "
            f"{missing[0]!r}; expected one of each: give them a txt, or a json with 'captions'"
        )
