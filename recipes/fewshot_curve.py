"""A few-shot evaluation: every number of shots, selection and seed, and what came out."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from jsonargparse import Namespace
from rich.progress import Progress

from bridges import VisionLanguageModel
from bridges.fewshot import FewShotPrompts, Shot
from recipes.cache import PICTURES
from recipes.documents import DOCUMENTS
from recipes.fewshot_documents import DocumentPool
from recipes.fewshot_exchange import Exchange, exchange_pictures
from recipes.fewshot_plans import Plan, Planner, Selection, check_context, check_fits
from recipes.fewshot_pool import Pool
from recipes.fewshot_runner import Prompt, Runner
from recipes.fewshot_setup import find_shards, task_of, template_of
from recipes.fewshot_tasks import PASSES, Classes, Likelihood, Outcome, likelihood
from recipes.gallery import thumbnails

Advance = Callable[[int], object]
"""Told of so many prompts that went through the LM."""

KeyT = TypeVar("KeyT")
ItemT = TypeVar("ItemT")
ResultT = TypeVar("ResultT")

EXCHANGED = 2
"""Pictures at the end of a document that are exchanged, one at a time."""

SHOWN = 6
"""Queries on the page."""

SIDE = 160
"""Pixels of the longer side of a picture on the page."""


@dataclass(frozen=True)
class Card:
    """A query on the page.

    Attributes:
        picture: of the query, as data URI; empty where there are features only.
        asked: its question; empty for none.
        truth: what should be said.
        answers: what was said, by setting.
        demonstrations: pictures and texts by selection, in the order of the prompt.
    """

    picture: str
    asked: str
    truth: str
    answers: dict[str, str]
    demonstrations: dict[str, list[tuple[str, str]]]


@dataclass(frozen=True)
class Evaluation:
    """What was found.

    Attributes:
        outcomes: by shots and selection, one for each seed; the same object for seeds that ask
            the same.
        axis: what the metrics measure.
        described: the setting, for the JSON.
        cards: examples for the page.
    """

    outcomes: dict[tuple[int, str], list[Outcome]]
    axis: str
    described: dict[str, Any]
    cards: list[Card]

    def summary(self) -> dict[str, dict[str, dict[str, dict[str, Any]]]]:
        """Shots -> selection -> metric -> mean, std over the seeds, values of the seeds.

        The std is None of one seed, and where seeds change nothing (RICES without questions).
        """
        found: dict[str, dict[str, dict[str, dict[str, Any]]]] = {}
        for (shots, selection), outcomes in self.outcomes.items():
            metrics = {}
            measured = len({id(outcome) for outcome in outcomes}) > 1
            for name in outcomes[0].metrics:
                values = [outcome.metrics[name] for outcome in outcomes]
                spread = statistics.stdev(values) if measured else None
                metrics[name] = {"mean": statistics.fmean(values), "std": spread, "values": values}
            found.setdefault(str(shots), {})[selection] = metrics
        return found


def of_pictures(model: VisionLanguageModel, options: Namespace) -> Evaluation:
    """Demonstrations out of the training shards, queries out of the held-out ones.

    Raises:
        ValueError: too many shots for the LM's context or for the support set; data that do not
            hold what the task asks for.
    """
    text = FewShotPrompts.of(model, template_of(model, options), bos=options.bos)
    check_context(model, text, options.shots, room=1)
    train, held_out = find_shards(model, options, PICTURES)
    asks = options.task == "vqa"
    collect = partial(Pool.collect, vision=model.vision, questions=asks)
    support = collect(train.read, limit=options.support, title="encoding the support set")
    queries = collect(held_out.read, limit=options.queries, title="encoding the queries")
    task = task_of(options, text, [support, queries])
    planner = Planner(support, queries, task.shot, task.question, options.zero_shot_texts)
    selections: list[Selection] = (
        ["random", "rices"] if options.selection == "both" else [options.selection]
    )
    plans = {
        (shots, selection, seed): planner(selection, shots, seed)
        for shots in options.shots
        for selection in selections
        for seed in options.seeds
    }

    first: dict[str, int] = {}  # equal pictures have the same place
    samples = (*support.examples, *queries.examples)
    places = [first.setdefault(one.digest, place) for place, one in enumerate(samples)]

    def prompt(plan: Plan) -> Prompt:
        ids = text(plan.shots, plan.question, images=plan.images)
        shown = [*(plan.support if plan.images else ()), len(support.examples) + plan.query]
        text_only = text(plan.shots, plan.question, images=False) if plan.images else None
        return Prompt(ids, [places[k] for k in shown], plan.question, text_only)

    # What a seed does not change (RICES without questions), or a selection (0 shots), is run once.
    prompts = {chosen: [prompt(plan) for plan in chosen] for chosen in plans.values()}
    room = task.room(queries.examples)
    for chosen, rows in prompts.items():
        check_fits(model, [row.ids for row in rows], len(chosen[0].shots), room)
    patches = [*support.patches, *queries.patches]

    def run(rows: Sequence[Prompt], advance: Advance) -> Outcome:
        runner = Runner(model, patches, options.batch_size, advance)
        return task.run(runner, rows, queries.examples)

    found = _each(prompts, run, task.passes * len(queries.examples))
    outcomes: dict[tuple[int, str], list[Outcome]] = {}
    for (shots, selection, _), chosen in plans.items():
        outcomes.setdefault((shots, selection), []).append(found[chosen])
    demonstrated_texts = {s.answer for chosen in prompts for p in chosen for s in p.shots}
    described = {
        "template": text.template,
        "bos": text.bos,
        "zero_shot_texts": options.zero_shot_texts,
        "support": len(support.examples),
        "queries": len(queries.examples),
        **({"classes": list(task.names)} if isinstance(task, Classes) else {}),
        "skipped": {"support": support.skipped, "queries": queries.skipped},
        "cut": {
            "scored": sum(map(text.cuts, task.scored(queries.examples))),
            "demonstrations": sum(map(text.cuts, demonstrated_texts)),
        },
    }
    last = {s: plans[options.shots[-1], s, options.seeds[0]] for s in selections}
    shown = _spread(len(queries.examples))
    wanted = {
        support.examples[place].name: place
        for chosen in last.values()
        for row in shown
        for place in chosen[row].support
    }
    demonstrated = thumbnails(train.given, wanted, SIDE)
    asked = thumbnails(held_out.given, {queries.examples[r].name: r for r in shown}, SIDE)
    cards = [
        Card(
            asked.get(row, ""),
            task.question(queries.examples[row]) or "",
            task.truth(queries.examples[row]),
            _answers(outcomes, row),
            {
                selection: [
                    (demonstrated.get(k, "") if plan[row].images else "", _shown(shot))
                    for k, shot in zip(plan[row].support, plan[row].shots, strict=True)
                ]
                for selection, plan in last.items()
            },
        )
        for row in shown
    ]
    return Evaluation(outcomes, task.axis, described, cards)


def of_documents(model: VisionLanguageModel, options: Namespace) -> Evaluation:
    """The last text of held-out documents, after so many pairs of picture and text before it.

    With at least one pair before it, also what each of the last two texts owes to each picture,
    see `exchange_pictures`.

    Raises:
        ValueError: no document with so many pairs that fits the LM's context.
    """
    encode, most = model.prompt_encoder(), options.shots[-1]
    _, held_out = find_shards(model, options, DOCUMENTS)
    pool = DocumentPool.collect(
        held_out.read,
        model.vision,
        encode,
        options.queries,
        shots=most,
        max_length=model.lm.max_length,
    )
    prompts = {shots: pool.prompts(shots) for shots in options.shots}
    patches = list(pool.patches)

    def run(asked: tuple[list[Prompt], list[list[int]]], advance: Advance) -> Outcome:
        return likelihood(Runner(model, patches, options.batch_size, advance), *asked, "all")

    def exchange(images: int, advance: Advance) -> Exchange:
        return exchange_pictures(Runner(model, patches, options.batch_size, advance), pool, images)

    rows = len(pool.documents)
    found = _each(prompts, run, PASSES * rows)
    outcomes = {(shots, "document"): [outcome] for shots, outcome in found.items()}
    described = {"queries": rows, "skipped": {"queries": pool.skipped}}
    if most + 1 >= EXCHANGED:
        measured = _each({"exchange": EXCHANGED}, exchange, (1 + EXCHANGED) * rows)
        described |= {name: one.summary() for name, one in measured.items()}

    thumbnails = pool.thumbnails(held_out.given, SHOWN, SIDE)
    cards = []
    for row, chunks in enumerate(pool.documents[:SHOWN]):
        texts = [encode.tokenizer.decode(c.answer, skip_special_tokens=True) for c in chunks]
        pictures = [thumbnails.get(chunk.pictures[-1], "") for chunk in chunks]
        before = list(zip(pictures, texts, strict=True))[:-1]
        answers = _answers(outcomes, row)
        cards.append(Card(pictures[-1], "", texts[-1], answers, {"document": before}))
    return Evaluation(outcomes, Likelihood.axis, described, cards)


def _each(
    todo: Mapping[KeyT, ItemT], run: Callable[[ItemT, Advance], ResultT], prompts: int
) -> dict[KeyT, ResultT]:
    """Runs each, with a progress bar over all of them; a run advances it by `prompts`."""
    with Progress(transient=True) as progress:
        bar = progress.add_task("asking", total=prompts * len(todo))
        advance = partial(progress.advance, bar)
        return {key: run(item, advance) for key, item in todo.items()}


def _answers(outcomes: Mapping[tuple[int, str], Sequence[Outcome]], row: int) -> dict[str, str]:
    """What was said to a query, by setting, of the first seed."""
    said: dict[str, str] = {}
    for (shots, selection), found in outcomes.items():
        which = f", {selection}" if shots and selection != "document" else ""
        said[f"{shots} shots{which}"] = found[0].answers[row]
    return said


def _shown(shot: Shot) -> str:
    return shot.answer if shot.question is None else f"{shot.question} {shot.answer}"


def _spread(total: int) -> list[int]:
    """Some of so many queries, evenly spread: nobody has chosen them."""
    return sorted({round(step * (total - 1) / (SHOWN - 1)) for step in range(SHOWN)})
