"""What a few-shot evaluation asks and counts: captions, answers, classes, likelihoods."""

import random
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from bridges.fewshot import FewShotPrompts, Shot
from recipes.fewshot_match import same_text
from recipes.fewshot_pool import Example, Pool
from recipes.fewshot_runner import Prompt, Runner, exchanged
from recipes.scene_captions import score as score_scene

PASSES = 4
"""How often `likelihood` scores each prompt."""

SAID = {
    "nll": " nats a token",
    "nll_exchanged": " exchanged",
    "nll_demos_exchanged": " demonstrations exchanged",
    "nll_text_only": " text only",
}
"""The metrics of `likelihood` on a card."""


@dataclass(frozen=True)
class Outcome:
    """What came out for the queries.

    Attributes:
        metrics: by name.
        answers: what the model said to each query.
        sums: of metrics that are losses per token, by name: nats and tokens of each query, (n, 2)
            in fp64.
    """

    metrics: dict[str, float]
    answers: list[str]
    sums: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Task(ABC):
    """What is asked of a query, what a demonstration shows, and what is counted.

    Attributes:
        text: makes the prompts and the answers.
        passes: how often each prompt goes through the LM.
        axis: what the metrics measure.
    """

    text: FewShotPrompts
    passes: int = 1
    axis: str = "share of queries"

    @abstractmethod
    def run(self, runner: Runner, prompts: Sequence[Prompt], queries: Sequence[Example]) -> Outcome:
        """Answers and metrics of prompts, one for each query."""

    @abstractmethod
    def room(self, queries: Sequence[Example]) -> int:
        """Positions of the longest answer."""

    def shot(self, example: Example, rng: random.Random) -> Shot:
        """The text of a demonstration: its first caption."""
        return Shot(example.captions[0])

    def question(self, example: Example) -> str | None:
        """What is asked of a query; None for a caption."""
        return None

    def truth(self, example: Example) -> str:
        """What should be said, for the page."""
        return example.captions[0]

    def scored(self, queries: Sequence[Example]) -> Sequence[str]:
        """Texts whose likelihood is counted."""
        return ()


@dataclass(frozen=True, kw_only=True)
class Captions(Task):
    """Open-ended: captions, right if one of the picture's own, see `same_text`.

    Of emoji scenes also the shares with the right objects, relation and ground colour.

    Attributes:
        max_new_tokens: longest answer.
        num_beams: 1 is greedy.
        length_penalty: of beam search.
    """

    max_new_tokens: int = 32
    num_beams: int = 1
    length_penalty: float = 1.0

    def run(self, runner: Runner, prompts: Sequence[Prompt], queries: Sequence[Example]) -> Outcome:
        written = self.written(runner, prompts)
        pairs = list(zip(written, queries, strict=True))
        metrics = {
            "exact_match": _share([same_text(text, query.captions) for text, query in pairs])
        }
        if all("objects" in query.meta for query in queries):
            judged = [score_scene(text, query.meta) for text, query in pairs]
            for part in ("object", "relation", "colour"):
                known = [bool(one[part]) for one in judged if one[part] is not None]
                if known:
                    metrics[part] = _share(known)
        return Outcome(metrics, written)

    def room(self, queries: Sequence[Example]) -> int:
        return self.max_new_tokens

    def written(self, runner: Runner, prompts: Sequence[Prompt]) -> list[str]:
        """What the model writes."""
        beams: dict[str, Any] = {"num_beams": self.num_beams}
        if self.num_beams > 1:
            beams["length_penalty"] = self.length_penalty
        return runner.generate(
            prompts, max_new_tokens=self.max_new_tokens, do_sample=False, **beams
        )


@dataclass(frozen=True, kw_only=True)
class Answers(Captions):
    """Open-ended: answers to questions, right if equal to the true one, see `same_text`.

    Of a query the first of its questions is asked; a demonstration shows one drawn at random.
    """

    def run(self, runner: Runner, prompts: Sequence[Prompt], queries: Sequence[Example]) -> Outcome:
        written = [text.split("\n")[0].strip() for text in self.written(runner, prompts)]
        pairs = zip(written, queries, strict=True)
        right = [same_text(text, [self.truth(query)]) for text, query in pairs]
        return Outcome({"exact_match": _share(right)}, written)

    def shot(self, example: Example, rng: random.Random) -> Shot:
        question, answer = rng.choice(example.questions)
        return Shot(answer, question)

    def question(self, example: Example) -> str | None:
        return example.questions[0][0]

    def truth(self, example: Example) -> str:
        return example.questions[0][1]


@dataclass(frozen=True, kw_only=True)
class Classes(Task):
    """Close-ended: which of several names is the likeliest answer, as a whole and by token.

    Attributes:
        names: of the classes.
        labels: what the JSON calls the truth: a name, or a list of names of which each is right.
        end: whether the end after a name is scored too. OpenFlamingo leaves it out, and then
            "car" is at least as likely as "carrot" where that begins with it.
        max_rows: see `bridges.scoring.score_choices`.
    """

    names: Sequence[str]
    labels: str
    end: bool = True
    max_rows: int = 64

    def run(self, runner: Runner, prompts: Sequence[Prompt], queries: Sequence[Example]) -> Outcome:
        choices = [self.text.answer(name, end=self.end) for name in self.names]
        found = runner.score(prompts, [choices] * len(prompts), self.max_rows)
        said = [self.names[int(scores.argmax())] for scores, _ in found]
        by_token = [self.names[int((scores / lengths).argmax())] for scores, lengths in found]
        truths = [labels_of(query, self.labels) for query in queries]
        metrics = {
            name: _share([one in truth for one, truth in zip(names, truths, strict=True)])
            for name, names in {"accuracy": said, "accuracy_per_token": by_token}.items()
        }
        return Outcome(metrics, said)

    def room(self, queries: Sequence[Example]) -> int:
        return max(len(self.text.answer(name)) for name in self.names)

    def shot(self, example: Example, rng: random.Random) -> Shot:
        return Shot(labels_of(example, self.labels)[0])

    def truth(self, example: Example) -> str:
        return " or ".join(labels_of(example, self.labels))

    def scored(self, queries: Sequence[Example]) -> Sequence[str]:
        return self.names


@dataclass(frozen=True, kw_only=True)
class Likelihood(Task):
    """Loss per token of the true caption, its first; see `likelihood` for what is exchanged.

    A caption that is longer than an answer may be is cut, see `FewShotPrompts.cuts`.
    """

    passes: int = PASSES
    axis: str = "loss per token of the true text (nats)"

    def run(self, runner: Runner, prompts: Sequence[Prompt], queries: Sequence[Example]) -> Outcome:
        answers = [self.text.answer(query.captions[0]) for query in queries]
        return likelihood(runner, prompts, answers, "query")

    def room(self, queries: Sequence[Example]) -> int:
        return max(len(self.text.answer(query.captions[0])) for query in queries)

    def scored(self, queries: Sequence[Example]) -> Sequence[str]:
        return [query.captions[0] for query in queries]


def labels_of(example: Example, name: str) -> list[str]:
    """The right classes of a sample, from its JSON.

    Raises:
        ValueError: it names none.
    """
    found = example.meta.get(name)
    labels = [found] if isinstance(found, str) else found
    if not isinstance(labels, list) or not labels or not all(isinstance(x, str) for x in labels):
        raise ValueError(
            f"found {str(found)[:60]!r} as {name!r} in the JSON of sample {example.key!r}; "
            "expected a name or a list of names: choose another key with --labels"
        )
    return labels


def class_names(pools: Iterable[Pool], labels: str) -> list[str]:
    """Every class that some samples have, in alphabetical order."""
    return sorted({x for pool in pools for one in pool.examples for x in labels_of(one, labels)})


def likelihood(
    runner: Runner,
    prompts: Sequence[Prompt],
    answers: Sequence[Sequence[int]],
    wrong: Literal["all", "query"],
) -> Outcome:
    """Loss per token of answers with the right pictures, with other ones, and with fewer.

    ``nll`` has the right ones, ``nll_exchanged`` other ones, ``nll_demos_exchanged`` other ones in
    the demonstrations only: what it is above ``nll`` is what the right ones add there.
    ``nll_text_only`` has demonstrations without pictures: what it is above ``nll`` is what pictures
    add there, be they the right ones or not. These two are ``nll`` itself where no demonstration
    has a picture.

    Args:
        runner: scores; is told of `PASSES` passes of each prompt.
        prompts: at least two.
        answers: token ids after each.
        wrong: which pictures are other ones in ``nll_exchanged``, see `exchanged`.

    Raises:
        ValueError: no other picture, see `other_pictures`.
    """
    settings = {
        "nll": list(prompts),
        "nll_exchanged": exchanged(prompts, wrong),
        "nll_demos_exchanged": exchanged(prompts, "demonstrations"),
        "nll_text_only": [prompt.without_demonstrated() for prompt in prompts],
    }
    sums: dict[str, Tensor] = {}
    each: dict[str, list[float]] = {}
    for name, rows in settings.items():
        if name != "nll" and rows == settings["nll"]:
            sums[name] = sums["nll"]
            runner.advance(len(rows))
            continue
        found = runner.score(rows, [[answer] for answer in answers])
        losses = -torch.cat([scores for scores, _ in found]).double()
        lengths = torch.cat([length for _, length in found])
        sums[name] = torch.stack([losses, lengths.double()], dim=1).cpu()
        each[name] = (losses / lengths).tolist()
    said = [
        ", ".join(f"{loss:.3f}{SAID[name]}" for name, loss in zip(each, row, strict=True))
        for row in zip(*each.values(), strict=True)
    ]
    totals = {name: one.sum(dim=0) for name, one in sums.items()}
    return Outcome({name: float(nats / n) for name, (nats, n) in totals.items()}, said, sums)


def _share(values: Sequence[bool]) -> float:
    return sum(values) / len(values)
