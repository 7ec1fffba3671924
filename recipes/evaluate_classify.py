"""Zero-shot classification: which class's prompts belong to a picture."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from qformer.retrieval import first, itc_similarity
from recipes.bootstrap import Sums
from recipes.evaluate import HeldOut
from recipes.evaluate_found import (
    LOOKS,
    Found,
    ImpossibleError,
    Line,
    Options,
    Trained,
    TrainedStage1,
)
from recipes.evaluate_prompts import Asker, mean_picture
from recipes.evaluate_scores import TOP, embed_pictures, embed_texts
from recipes.fewshot_pool import Example
from recipes.fewshot_tasks import labels_of
from recipes.metric_templates import CLIP_SIMPLE_TEMPLATES, CLIP_TEMPLATES
from recipes.metric_zero_shot import class_embeddings, read_class_prompts, read_templates


def by_likelihood(run: Trained) -> Found:
    """The class whose prompts are the likeliest captions, by their mean log-likelihood.

    ``normalised_…`` subtracts the class's log-likelihood after the mean picture, since a frequent
    or a short name is likely whatever the picture.

    Raises:
        ImpossibleError: pictures without a class.
    """
    held_out = run.held_out
    truth, classes = _truth(held_out, run.options)
    prompts = _prompts(classes, run.options, CLIP_SIMPLE_TEMPLATES)
    asker = Asker.of(run.model, held_out, run.options.batch_size)
    texts = [text for several in prompts.values() for text in several]
    each = asker.score([*range(len(held_out)), asker.mean], texts, "scoring classes")
    sizes = [len(several) for several in prompts.values()]
    scores = torch.stack([part.mean(dim=1) for part in each.split(sizes, dim=1)], dim=1)
    likely, own = scores[:-1], scores[-1:]
    figures = {
        **_figures("", likely, own, truth),
        **_figures("normalised_", likely - own, None, truth),
    }
    return _found(figures, likely - own, truth, prompts)


def by_stage1(run: TrainedStage1) -> Found:
    """The class whose mean prompt is most like the picture, by ITC.

    Raises:
        ImpossibleError: pictures without a class.
    """
    held_out, batch_size = run.held_out, run.options.batch_size
    truth, classes = _truth(held_out, run.options)
    prompts = _prompts(classes, run.options, CLIP_TEMPLATES)

    def encode(texts: Sequence[str]) -> Tensor:
        return embed_texts(run.stage1, texts, batch_size, run.max_text_tokens)

    columns = class_embeddings(encode, prompts)
    blind = held_out.first(1).blind(mean_picture(held_out))
    scores, own = (
        itc_similarity(embed_pictures(run.stage1, pictures, batch_size), columns)
        for pictures in (held_out, blind)
    )
    return _found(_figures("", scores, own, truth), scores, truth, prompts)


def _truth(held_out: HeldOut, options: Options) -> tuple[Tensor, list[str]]:
    """Which classes are right for each picture, bool (n, classes), and their names."""
    try:
        labels = [
            labels_of(
                Example(s["name"], s["key"], "", s["captions"], [], s["meta"]), options.labels
            )
            for s in held_out.samples
        ]
    except ValueError as error:
        raise ImpossibleError(str(error)) from error
    found = {name for names in labels for name in names}
    classes = sorted(found)
    if options.classes is not None:
        lines = options.classes.read_text(encoding="utf-8").splitlines()
        classes = list(dict.fromkeys(line.strip() for line in lines if line.strip()))
        if unknown := sorted(found - set(classes)):
            raise ValueError(
                f"found {unknown[:8]} as {options.labels!r} in the data and not in "
                f"{options.classes}; expected every class to have a line there"
            )
    if len(classes) < 2:
        raise ImpossibleError(
            f"found the classes {classes}; expected at least 2 to choose from: give --classes, or "
            "another --labels"
        )
    return torch.tensor([[name in names for name in classes] for names in labels]), classes


def _prompts(
    classes: Sequence[str], options: Options, templates: Sequence[str]
) -> dict[str, list[str]]:
    """The prompts of each class: descriptions alone where they are given and templates are not."""
    if options.templates is not None:
        templates = read_templates(options.templates)
    elif options.descriptions is not None:
        templates = ()
    return read_class_prompts(classes, templates, options.descriptions)


def _figures(prefix: str, scores: Tensor, own: Tensor | None, truth: Tensor) -> dict[str, Sums]:
    """Accuracy with the right pictures, others, and none.

    Args:
        prefix: of the figures' names.
        scores: (n, classes).
        own: (1, classes), of the mean picture; None where it has none.
        truth: bool (n, classes).
    """
    looks = {"": scores, "_shuffled": scores.roll(1, dims=0)}
    if own is not None:
        looks["_blind"] = own.expand_as(scores)
    figures = {}
    for look, seen in looks.items():
        right = truth.gather(1, first(seen, max(TOP)))
        for k in TOP:
            if k == 1 or k < truth.shape[1]:
                hits = right[:, :k].any(dim=1)
                figures[f"{prefix}accuracy@{k}{look}"] = Sums.mean_of(hits.double().tolist())
    return figures


def _found(
    figures: dict[str, Sums],
    scores: Tensor,
    truth: Tensor,
    prompts: Mapping[str, Sequence[str]],
) -> Found:
    classes = list(prompts)
    chosen = first(scores, 1)[:, 0].tolist()
    lines = {
        row: [
            Line("class", classes[column], bool(truth[row, column])),
            Line(
                "truth", " or ".join(n for n, one in zip(classes, truth[row], strict=True) if one)
            ),
        ]
        for row, column in enumerate(chosen)
    }
    described: dict[str, Any] = {
        "classes": classes,
        "prompts": {name: list(texts) for name, texts in prompts.items()},
    }
    # Of several right names any will do.
    chance = float(truth.double().mean(dim=1).mean())
    named = {"accuracy@1": chance, "normalised_accuracy@1": chance}
    return Found(figures, LOOKS, lines, described, chance=named)
