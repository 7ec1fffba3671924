"""`bridges evaluate`: a trained run on held-out pictures, in figures with intervals and a page."""

import shlex
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser
from rich.console import Console

import bridges
from bridges.files import write_json, write_text
from qformer.runs import is_stage1_run, load_stage1, read_stage1
from recipes import (
    evaluate_classify,
    evaluate_fewshot,
    evaluate_page,
    evaluate_retrieval,
    evaluate_tasks,
)
from recipes.bootstrap import interval
from recipes.evaluate_found import Found, ImpossibleError, Options, Trained, TrainedStage1
from recipes.evaluate_pictures import Pictures
from recipes.evaluate_scores import most_of

BRIDGE_TASKS: dict[str, Callable[[Trained], Found]] = {
    "caption": evaluate_tasks.caption,
    "likelihood": evaluate_tasks.likelihood,
    "vqa": evaluate_tasks.vqa,
    "retrieval": evaluate_retrieval.by_likelihood,
    "fewshot": evaluate_fewshot.fewshot,
    "classify": evaluate_classify.by_likelihood,
}
"""What a bridge can be asked."""

STAGE1_TASKS: dict[str, Callable[[TrainedStage1], Found]] = {
    "retrieval": evaluate_retrieval.by_stage1,
    "classify": evaluate_classify.by_stage1,
}
"""What a stage-1 run can be asked, which has no LM."""


def main(arguments: Sequence[str]) -> None:
    """Entry of the subcommand."""
    parser = ArgumentParser(
        prog="bridges evaluate",
        description="Asks a trained run about held-out pictures (captions, their likelihood, "
        "questions, retrieval, few-shot, classes), each figure with its 95 % interval over the "
        "pictures, and writes evaluation.json and evaluation.html.",
    )
    parser.add_argument("run", type=Path, help="run directory of a bridge or of a stage 1")
    parser.add_function_arguments(evaluate, skip={"run", "command"}, fail_untyped=False)
    options = vars(parser.parse_args(list(arguments)))
    out = options["out"] or options["run"]
    command = shlex.join(["bridges", "evaluate", *map(str, arguments)])
    result = evaluate(options.pop("run"), command=command, **options)
    console = Console()
    for table in evaluate_page.tables(result):
        console.print(table)
    for task, reason in result["left_out"].items():
        console.print(f"{task} is left out: {reason}", soft_wrap=True)
    if result["skipped"]:
        console.print(f"skipped: {len(result['skipped'])} samples, named in evaluation.json")
    console.print(f"open {out / 'evaluation.html'}", soft_wrap=True)


def evaluate(
    run: str | Path,
    data: str,
    *,
    tasks: str | None = None,
    pictures: int | None = None,
    out: Path | None = None,
    labels: str = "colour",
    classes: Path | None = None,
    templates: Path | None = None,
    descriptions: Path | None = None,
    shots: str = "0,4",
    few: int = 32,
    questions: int | None = None,
    max_new_tokens: int = 32,
    batch_size: int = 32,
    feature_cache: Path | None = None,
    device: str | None = None,
    seed: int = 0,
    resamples: int = 2000,
    command: str = "",
) -> dict[str, Any]:
    """Evaluates a run; returns what ``evaluation.json`` holds.

    Args:
        run: run directory of a bridge or of a stage 1.
        data: folder with ``val-*.tar`` or ``dev-*.tar``, or the held-out shards themselves;
            few-shot takes demonstrations out of its ``train-*.tar``.
        tasks: such as ``caption,vqa``: of caption, likelihood, vqa, retrieval, fewshot, classify
            (of a stage 1: retrieval, classify); all that the run and the data allow, by default.
        pictures: the first so many; all by default.
        out: folder of ``evaluation.json`` and ``evaluation.html``; that of the run by default.
        labels: classify: key of the truth in the JSON, a name or a list of right names.
        classes: classify: file of names, one a line; else all that occur.
        templates: classify: file of prompts with ``{}`` for the name, one a line; else CLIP's 80
            (7 of them for a bridge).
        descriptions: classify: JSON, class -> sentences about it; in place of prompts, or beside
            ``templates``.
        shots: fewshot: numbers of demonstrations.
        few: pictures, the first, of tasks that take long for each: fewshot, and retrieval by
            likelihood, which scores all their pairs with texts.
        questions: vqa: most questions of a picture; all by default.
        max_new_tokens: longest caption.
        batch_size: pictures, or texts, that go through a model together.
        feature_cache: folder in which the encoder's features are kept.
        device: the GPU if there is one, by default.
        seed: of demonstrations and of the draws of pictures for the intervals.
        resamples: such draws.
        command: what was typed, for the record.

    Raises:
        ValueError: a task that is unknown, or was asked for and cannot be done; a number below 1;
            fewer than two good pictures.
    """
    run = Path(run)
    sizes = {"pictures": pictures, "few": few, "questions": questions, "batch_size": batch_size}
    for name, size in (sizes | {"max_new_tokens": max_new_tokens}).items():
        if size is not None and size < 1:
            raise ValueError(f"found --{name} {size}; expected at least 1")
    options = Options(
        data=data,
        labels=labels,
        classes=classes,
        templates=templates,
        descriptions=descriptions,
        shots=_shots(shots),
        few=few,
        questions=questions,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        feature_cache=feature_cache,
        seed=seed,
    )
    possible: Mapping[str, Callable[[Any], Found]] = BRIDGE_TASKS
    if is_stage1_run(run):
        possible = STAGE1_TASKS
    asked = _tasks(tasks, possible, run)
    collect = partial(
        Pictures.collect,
        data,
        limit=pictures,
        feature_cache=feature_cache,
        batch_size=batch_size,
    )
    subject: Any
    if possible is STAGE1_TASKS:
        vision, stage1 = load_stage1(run, device=device)
        found = collect(vision)
        cut = read_stage1(run).max_text_tokens
        subject = TrainedStage1(stage1, cut, found.held_out, options)
    else:
        model = bridges.load(run, device=device)
        found = collect(model.vision)
        subject = Trained(model, found.held_out, options)
    results: dict[str, Found] = {}
    left_out: dict[str, str] = {}
    for task in asked or possible:
        try:
            results[task] = possible[task](subject)
        except ImpossibleError as error:
            if asked:
                raise ValueError(f"task {task}: {error}") from error
            left_out[task] = str(error)
    result = {
        "run": str(run),
        "data": data,
        "pictures": len(found.held_out),
        "tasks": {
            task: {"metrics": _metrics(one, resamples, seed), "chance": one.chance}
            | {"columns": dict(one.columns)}
            | one.described
            for task, one in results.items()
        },
        "left_out": left_out,
        "skipped": found.skipped,
        "command": command,
        "resamples": resamples,
        "seed": seed,
    }
    folder = out or run
    write_json(folder / "evaluation.json", result)
    lines = {task: one.lines for task, one in results.items()}
    write_text(folder / "evaluation.html", evaluate_page.render(result, lines, found))
    return result


def _metrics(found: Found, resamples: int, seed: int) -> dict[str, dict[str, float | None]]:
    """Each figure with its interval, or None for both ends where there is none."""
    metrics: dict[str, dict[str, float | None]] = {}
    for name, sums in found.figures.items():
        metrics[name] = {"value": sums.value(), "low": None, "high": None}
        if sums.rows.any(axis=1).sum() > 1:  # one picture cannot say how pictures differ
            _, low, high = interval([sums], resamples=resamples, seed=seed)
            # The interval is symmetric: where it passes the end of the scale, nothing is.
            metrics[name] |= {"low": max(0.0, low), "high": min(high, most_of(name))}
    return metrics


def _tasks(tasks: str | None, possible: Mapping[str, object], run: Path) -> list[str]:
    """The tasks that were asked for; none for all."""
    asked = [] if tasks is None else [task.strip() for task in tasks.split(",")]
    for task in asked:
        if task not in possible:
            kind = "a stage-1 run, which has no LM" if possible is STAGE1_TASKS else "a bridge"
            raise ValueError(
                f"found task {task!r} for {run}, {kind}; expected some of {', '.join(possible)}"
            )
    return list(dict.fromkeys(asked))


def _shots(text: str) -> tuple[int, ...]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdigit() for part in parts):
        raise ValueError(f"found --shots {text!r}; expected numbers with commas between, as 0,4")
    return tuple(sorted({int(part) for part in parts}))
