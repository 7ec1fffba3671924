"""Retrieval among the pictures of an evaluation, by ITC and ITM or by an LM's likelihood."""

from collections.abc import Sequence

import torch
from torch import Tensor

from qformer.retrieval import chance_recall, count_duplicates, first
from recipes.evaluate import HeldOut
from recipes.evaluate_found import Found, Line, Trained, TrainedStage1, check_captions
from recipes.evaluate_prompts import Asker
from recipes.evaluate_scores import captions_of, names_of, recall_figures
from recipes.gallery import Gallery
from recipes.retrieve import score

TOP_K = 128
"""Candidates that ITM re-ranks, as BLIP-2 has it."""


def by_stage1(run: TrainedStage1) -> Found:
    """Ranking by ITC, and with the first re-ranked by ITM (``…_itm``), over all pictures.

    Raises:
        ImpossibleError: pictures without captions.
    """
    held_out, options = run.held_out, run.options
    check_captions(held_out)
    texts, owners = captions_of(held_out)
    gallery = Gallery(held_out.features, held_out.grid, texts, owners, names_of(held_out))
    scores = score(run.stage1, gallery, TOP_K, options.batch_size, run.max_text_tokens)
    figures = recall_figures(scores.itc.T, scores.itc, owners)
    reranked = recall_figures(scores.itm_images, scores.itm_texts, owners)
    figures |= {f"{name}_itm": sums for name, sums in reranked.items()}
    return Found(
        figures,
        {"": "ITC", "_itm": "re-ranked by ITM"},
        _lines(scores.itm_texts, texts, owners),
        {"top_k": TOP_K, **_described(held_out, texts, owners)},
        chance=_chance(owners, len(held_out)),
    )


def by_likelihood(run: Trained) -> Found:
    """Ranking by log p(text | picture), over all pairs of the first few pictures.

    It prefers texts that are frequent whatever the picture. ``…_normalised`` subtracts the text's
    log-likelihood after the mean picture: what is left is what the picture does for the text. That
    changes the ranking of texts only; of pictures, a text's own likelihood is the same for all.

    Raises:
        ImpossibleError: pictures without captions.
    """
    held_out = run.held_out.first(run.options.few)
    check_captions(held_out)
    texts, owners = captions_of(held_out)
    asker = Asker.of(run.model, run.held_out, run.options.batch_size)
    scores = asker.score([*range(len(held_out)), asker.mean], texts, "scoring all pairs")
    likely, own = scores[:-1], scores[-1]
    figures = recall_figures(likely.T, likely, owners)
    for name, sums in recall_figures(likely.T, likely - own, owners).items():
        if name.startswith("image"):
            figures[f"{name}_normalised"] = sums
    return Found(
        figures,
        {"": "by likelihood", "_normalised": "less the text's own"},
        _lines(likely - own, texts, owners),
        _described(held_out, texts, owners),
        chance=_chance(owners, len(held_out)),
    )


def _chance(owners: Tensor, pictures: int) -> dict[str, float]:
    to_images = chance_recall(torch.ones_like(owners), pictures)
    to_texts = chance_recall(owners.bincount(minlength=pictures), len(owners))
    return {
        f"{direction}_{name}": value
        for direction, found in (("text_to_image", to_images), ("image_to_text", to_texts))
        for name, value in found.items()
    }


def _described(held_out: HeldOut, texts: Sequence[str], owners: Tensor) -> dict[str, int]:
    return {
        "pictures": len(held_out),
        "texts": len(texts),
        "duplicate_captions": count_duplicates(texts, owners),
    }


def _lines(to_texts: Tensor, texts: Sequence[str], owners: Tensor) -> dict[int, list[Line]]:
    """The text found first for each picture, and the place of the first right one."""
    ranked = first(to_texts, len(texts))
    right = owners[ranked] == torch.arange(len(to_texts))[:, None]
    places = right.int().argmax(dim=1)
    lines = {}
    for row, place in enumerate(places.tolist()):
        found, own = (texts[int(ranked[row, column])] for column in (0, place))
        lines[row] = [Line("found first", found, place == 0)]
        if place:
            same = ", of the same words" if found == own else ""
            lines[row].append(Line("", f"its own{same}: no. {place + 1} of {len(texts)}"))
    return lines
