"""What a bridge is asked of each picture: a caption, its likelihood, answers to questions."""

from collections.abc import Sequence
from functools import partial

import torch

from recipes.bootstrap import Sums
from recipes.evaluate import captions
from recipes.evaluate_found import LOOKS, Found, ImpossibleError, Line, Trained, check_captions
from recipes.evaluate_prompts import Asker, mean_picture
from recipes.evaluate_scores import caption_figures, of_rows, score_model
from recipes.fewshot_match import same_text
from recipes.metric_captions import ExactMatch
from recipes.metric_vqa import VqaAccuracy
from recipes.scene_captions import score

ANSWER_TOKENS = 16
"""Of the longest answer to a question."""

SHOWN = 3
"""Questions of a picture on the page."""


def caption(run: Trained) -> Found:
    """Greedy captions against the true ones.

    What is written of another's picture is known already; of the mean picture, one caption.

    Raises:
        ImpossibleError: pictures without captions.
    """
    held_out, options = run.held_out, run.options
    check_captions(held_out)
    write = partial(
        captions,
        run.model,
        batch_size=options.batch_size,
        max_new_tokens=options.max_new_tokens,
    )
    written = write(held_out)
    mean = mean_picture(held_out)
    constant = write(held_out.first(1).blind(mean))
    said = {
        "": written,
        "_shuffled": [written[-1], *written[:-1]],  # as `HeldOut.shuffled`
        "_blind": constant * len(held_out),
    }
    figures = {
        name + look: sums
        for look, texts in said.items()
        for name, sums in caption_figures(texts, held_out.samples).items()
    }
    return Found(
        figures,
        LOOKS,
        {row: _caption_lines(text, run, row) for row, text in enumerate(written)},
        {"written": written, "written_blind": constant[0]},
    )


def _caption_lines(text: str, run: Trained, row: int) -> list[Line]:
    sample = run.held_out.samples[row]
    lines = [
        Line("caption", text, same_text(text, sample["captions"])),
        Line("truth", " · ".join(sample["captions"])),
    ]
    if "objects" in sample["meta"]:
        parts = score(text, sample["meta"])
        lines += [Line("", part, right) for part, right in parts.items() if right is not None]
    return lines


def likelihood(run: Trained) -> Found:
    """Loss per token of the true captions with the right picture, another's, and the mean one.

    Raises:
        ImpossibleError: pictures without captions.
    """
    check_captions(run.held_out)
    mean = mean_picture(run.held_out)
    batch_size = run.options.batch_size
    scored = score_model(
        run.model, run.held_out, mean, captions=False, batch_size=batch_size
    ).figures
    losses = {name: sums.rows[:, 0] / sums.rows[:, 1] for name, sums in scored.items()}
    lines = {
        row: [
            Line(LOOKS[name.removeprefix("nll")], f"{losses[name][row]:.3f} nats")
            for name in losses
        ]
        for row in range(len(run.held_out))
    }
    return Found(scored, LOOKS, lines)


def vqa(run: Trained) -> Found:
    """Answers to the questions of the pictures: VQA accuracy, and exact match.

    Raises:
        ImpossibleError: no questions.
    """
    options, samples = run.options, run.held_out.samples
    asked = [
        (row, question, answers)
        for row, sample in enumerate(samples)
        for question, answers in sample["questions"][: options.questions]
    ]
    if not asked:
        raise ImpossibleError(
            f'found no questions about {len(samples)} pictures; expected a list "qa" of '
            '{"question": "…", "answer": "…"} in the JSON of some'
        )
    asker = Asker.of(run.model, run.held_out, options.batch_size, asks=True)
    pictures = len(samples)
    looks = {
        "": lambda row: row,
        "_shuffled": lambda row: (row - 1) % pictures,
        "_blind": lambda row: asker.mean,
    }
    figures: dict[str, Sums] = {}
    said: dict[str, list[str]] = {}
    for look, place in looks.items():
        said[look] = asker.write(
            [(place(row), question) for row, question, _ in asked],
            ANSWER_TOKENS,
            f"asking, {LOOKS[look]}",
        )
        owners = torch.tensor([row for row, _, _ in asked])
        for name, metric in (("vqa_accuracy", VqaAccuracy()), ("vqa_exact_match", ExactMatch())):
            metric.update(said[look], [answers for _, _, answers in asked])
            figures[name + look] = of_rows(metric.per_image(), owners, pictures)
    lines: dict[int, list[Line]] = {}
    for (row, question, answers), answer, blind in zip(
        asked, said[""], said["_blind"], strict=True
    ):
        if sum(line.label == "question" for line in lines.setdefault(row, [])) < SHOWN:
            lines[row] += _answer_lines(question, answers, answer, blind)
    described = {
        "questions": len(asked),
        "prompt": asker.text.template,
        "answers": [
            [samples[row]["name"], q, a] for (row, q, _), a in zip(asked, said[""], strict=True)
        ],
    }
    return Found(figures, LOOKS, lines, described)


def _answer_lines(question: str, answers: Sequence[str], answer: str, blind: str) -> list[Line]:
    truth = " · ".join(dict.fromkeys(answers))
    return [
        Line("question", question),
        Line("answer", answer or "–", right := same_text(answer, answers)),
        *([] if right else [Line("truth", truth)]),
        Line("mean picture", blind or "–", same_text(blind, answers)),
    ]
