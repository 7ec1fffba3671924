"""Few-shot captions and likelihood, by the machinery of `bridges fewshot`."""

from jsonargparse import Namespace

from recipes.bootstrap import Sums
from recipes.data import split_shards
from recipes.evaluate_found import Found, ImpossibleError, Line, Trained, check_captions
from recipes.evaluate_scores import caption_figures
from recipes.fewshot_curve import of_pictures

SUPPORT = 1000
"""Training pictures that may demonstrate, the first."""


def fewshot(run: Trained) -> Found:
    """Captions, and the loss of the true ones, after so many demonstrations out of training.

    Of the first few pictures.

    Raises:
        ImpossibleError: pictures without captions, no training shards to demonstrate with, or
            prompts that do not fit the LM's context.
    """
    options = run.options
    asked = run.held_out.first(options.few)
    check_captions(asked)
    if not split_shards(options.data, None)[1]:
        raise ImpossibleError(
            f"found no training beside held-out shards in {options.data}; expected a folder with "
            "train-*.tar, which demonstrate, and val-*.tar or dev-*.tar"
        )
    figures: dict[str, Sums] = {}
    lines: dict[int, list[Line]] = {}
    try:
        captions = of_pictures(run.model, _options(run, "caption"))
        likely = of_pictures(run.model, _options(run, "nll"))
    except ValueError as error:
        raise ImpossibleError(str(error)) from error
    for (shots, _), outcomes in captions.outcomes.items():
        (outcome,) = outcomes
        for name, sums in caption_figures(outcome.answers, asked.samples).items():
            figures[f"{name}_{shots}_shots"] = sums
        for row, text in enumerate(outcome.answers):
            lines.setdefault(row, []).append(Line(f"{shots} shots", text))
    for (shots, _), outcomes in likely.outcomes.items():
        (outcome,) = outcomes
        for name, sums in outcome.sums.items():
            figures[f"{name}_{shots}_shots"] = Sums("ratio", sums.numpy())
    columns = {f"_{shots}_shots": f"{shots} shots" for shots in options.shots}
    return Found(figures, columns, lines, captions.described)


def _options(run: Trained, task: str) -> Namespace:
    """The options of `bridges fewshot`, as they are by default."""
    options = run.options
    return Namespace(
        task=task,
        data=options.data,
        held_out=None,
        template=None,
        bos=True,
        shots=list(options.shots),
        selection="random",
        seeds=[options.seed],
        zero_shot_texts=2,
        support=SUPPORT,
        queries=options.few,
        max_new_tokens=options.max_new_tokens,
        num_beams=1,
        length_penalty=1.0,
        batch_size=options.batch_size,
        feature_cache=options.feature_cache,
    )
