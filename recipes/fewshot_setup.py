"""The options of `bridges fewshot` as shards, a template and a task."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from jsonargparse import Namespace

from bridges import VisionLanguageModel
from bridges.fewshot import OPENFLAMINGO_CAPTION, OPENFLAMINGO_VQA, FewShotPrompts
from bridges.prompts import QUESTION
from recipes.cache import CacheForm, cache_features, check_cached
from recipes.data import split_shards
from recipes.fewshot_pool import Pool
from recipes.fewshot_tasks import Answers, Captions, Classes, Likelihood, Task, class_names
from recipes.shard_files import expand_shards


class Shards(NamedTuple):
    """Shards as they were given, and as they are read: the feature cache's, if there is one."""

    given: list[Path]
    read: list[Path]


def find_shards(
    model: VisionLanguageModel, options: Namespace, form: CacheForm
) -> tuple[Shards, Shards]:
    """The shards that demonstrate, and those that are asked about; documents do both.

    Raises:
        ValueError: no held-out shards, or features of another encoder or form.
    """
    if options.task == "documents" and options.held_out:  # nothing is trained on or drawn from
        train, held_out = [], expand_shards(options.held_out)
    else:
        train, held_out = split_shards(options.data, options.held_out)
    if not held_out:
        raise ValueError(
            f"found no held-out shards in {options.data} (val-*.tar or dev-*.tar of a folder); "
            "expected some to ask about: name them with --held_out"
        )
    found = []
    for given in ([] if options.task == "documents" else train, held_out):
        check_cached(given, model.vision, form)
        read = given
        if options.feature_cache is not None and given:
            read = cache_features(
                given, model.vision, options.feature_cache, on_error="skip", form=form
            )
        found.append(Shards(given, read))
    return found[0], found[1]


def template_of(model: VisionLanguageModel, options: Namespace) -> str | None:
    """The template that was asked for; None for the model's own prompt.

    A model whose prompt asks nothing is asked questions as OpenFlamingo does.

    Raises:
        ValueError: a template without a question for a task that has them.
    """
    questions = options.task == "vqa"
    if options.template is None and (QUESTION in model.prompt or not questions):
        return None
    if options.template in (None, "openflamingo"):
        return OPENFLAMINGO_VQA if questions else OPENFLAMINGO_CAPTION
    if questions and QUESTION not in options.template:
        raise ValueError(
            f"found --template {options.template!r} for questions; expected {QUESTION!r} in it, "
            f"e.g. {OPENFLAMINGO_VQA!r}"
        )
    return options.template


def task_of(options: Namespace, text: FewShotPrompts, pools: Sequence[Pool]) -> Task:
    """The task.

    Args:
        options: of the command.
        text: makes the prompts.
        pools: all samples, by which the classes are known.

    Raises:
        ValueError: samples without a class, or classes that are not in the file of them.
    """
    if options.task in ("caption", "vqa"):
        kind = Captions if options.task == "caption" else Answers
        return kind(
            text=text,
            max_new_tokens=options.max_new_tokens,
            num_beams=options.num_beams,
            length_penalty=options.length_penalty,
        )
    if options.task == "nll":
        return Likelihood(text=text)
    names = class_names(pools, options.labels)
    if options.classes is not None:
        lines = options.classes.read_text(encoding="utf-8").splitlines()
        given = list(dict.fromkeys(line.strip() for line in lines if line.strip()))
        if unknown := [name for name in names if name not in given]:
            raise ValueError(
                f"found {unknown[:8]} as {options.labels!r} in the data and not in "
                f"{options.classes}; expected every class to have a line there"
            )
        names = given
    if len(names) < 2:
        raise ValueError(
            f"found the classes {names}; expected at least 2 to choose from: give --classes, or "
            "another --labels"
        )
    if len({tuple(text.answer(name)) for name in names}) < len(names):
        raise ValueError(
            "found class names that are equal in their first tokens, where answers are cut; "
            "expected names that differ there: shorten them in a file, --classes"
        )
    return Classes(
        text=text,
        names=names,
        labels=options.labels,
        end=options.score_end,
        max_rows=options.max_rows,
    )
