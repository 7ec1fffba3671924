"""Which demonstrations each query is given, and whether the prompts fit the LM's context."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from bridges import VisionLanguageModel
from bridges.fewshot import FewShotPrompts, Shot, draw, most_similar
from recipes.fewshot_pool import Example, Pool

Selection = Literal["random", "rices"]


@dataclass(frozen=True)
class Plan:
    """A few-shot prompt in words.

    Attributes:
        query: its place among the queries.
        support: places of the demonstrations in the support set, in order.
        shots: their texts.
        question: the query's, or None.
        images: whether the demonstrations have their pictures.
    """

    query: int
    support: tuple[int, ...]
    shots: tuple[Shot, ...]
    question: str | None
    images: bool


@dataclass(frozen=True)
class Planner:
    """Draws up the prompts of every query.

    Attributes:
        support: where demonstrations come from.
        queries: what is asked.
        shot: text of a demonstration; draws where a sample has several.
        question: of a query.
        zero_shot_texts: text-only demonstrations of a 0-shot prompt. They are drawn at random,
            also for RICES, which looks at the query's picture.

    Source: Flamingo (arXiv 2204.14198) appendix A.2.
    """

    support: Pool
    queries: Pool
    shot: Callable[[Example, random.Random], Shot]
    question: Callable[[Example], str | None]
    zero_shot_texts: int = 2

    def __call__(self, selection: Selection, shots: int, seed: int) -> tuple[Plan, ...]:
        """One prompt for each query; the same of the same seed.

        Raises:
            ValueError: a support set that is too small.
        """
        return tuple(self._plan(row, selection, shots, seed) for row in range(self.count))

    @property
    def count(self) -> int:
        """Number of queries."""
        return len(self.queries.examples)

    def _plan(self, row: int, selection: Selection, shots: int, seed: int) -> Plan:
        query = self.queries.examples[row]
        allowed = self.support.allowed(query)
        if shots and selection == "rices":
            features = self.queries.pooled[row], self.support.pooled
            chosen = most_similar(*features, shots, allowed)
        else:
            chosen = draw(f"{seed}/{query.name}", shots or self.zero_shot_texts, allowed)
        examples = [self.support.examples[place] for place in chosen]
        texts = [
            self.shot(one, random.Random(f"{seed}/{query.name}/{one.name}")) for one in examples
        ]
        return Plan(row, tuple(chosen), tuple(texts), self.question(query), images=shots > 0)


def check_context(
    model: VisionLanguageModel, prompts: FewShotPrompts, shots: Sequence[int], room: int
) -> None:
    """Refuses numbers of shots whose placeholders and template alone do not fit the context.

    Raises:
        ValueError: with the numbers.
    """
    for count in shots:
        check_fits(model, [prompts([Shot("")] * count)], count, room)


def check_fits(
    model: VisionLanguageModel, rows: Sequence[Sequence[int]], shots: int, room: int
) -> None:
    """Refuses prompts that leave the LM's context no room for an answer.

    Args:
        model: the model.
        rows: token ids of the prompts.
        shots: demonstrations in each.
        room: positions of the longest answer.

    Raises:
        ValueError: with the numbers.
    """
    most, longest = model.lm.max_length, max(map(len, rows))
    if most is not None and longest + room > most:
        raise ValueError(
            f"found a prompt of {longest} positions with {shots} shots (an image takes "
            f"{model.bridge.num_tokens}) and an answer of {room}; expected at most {most} in all, "
            "the LM's context length: take fewer shots, or a shorter template or answer"
        )
