"""The frozen LM by itself, over all families."""

from collections.abc import Callable
from typing import Any

import tiny
import torch

from bridges import LanguageModel


@torch.no_grad()
def test_the_head_gives_the_models_own_logits(
    family: str, language_models: Callable[[str], LanguageModel], bare_lms: Callable[[str], Any]
):
    lm = language_models(family)
    ids = torch.randint(4, 99, (2, 12), generator=torch.Generator().manual_seed(0))
    expected = bare_lms(family)(input_ids=ids).logits
    hidden = lm.hidden(lm.embed(ids), torch.ones_like(ids, dtype=torch.bool))
    torch.testing.assert_close(lm.head(hidden), expected, rtol=0, atol=1e-5)


@torch.no_grad()
def test_left_padding_equals_right_padding_equals_none(
    family: str, language_models: Callable[[str], LanguageModel]
):
    lm = language_models(family)
    ids = torch.randint(4, 99, (1, 12), generator=torch.Generator().manual_seed(0))
    whole = torch.ones(1, 12, dtype=torch.bool)
    expected = lm.hidden(lm.embed(ids), whole)
    padding = torch.zeros(1, 5, dtype=torch.long)
    nothing = torch.zeros(1, 5, dtype=torch.bool)
    left = lm.hidden(lm.embed(torch.cat([padding, ids], 1)), torch.cat([nothing, whole], 1))
    right = lm.hidden(lm.embed(torch.cat([ids, padding], 1)), torch.cat([whole, nothing], 1))
    assert left.isfinite().all()
    torch.testing.assert_close(left[:, 5:], expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(right[:, :-5], expected, rtol=0, atol=1e-5)


def test_the_embedding_scale_is_measured(
    family: str, language_models: Callable[[str], LanguageModel]
):
    lm = language_models(family)
    embedded = lm.embed(torch.arange(tiny.VOCABULARY)[None])
    rows = torch.arange(tiny.VOCABULARY) != lm.image_token_id
    assert abs(embedded[0, rows].std().item() / lm.shape.embedding_std - 1) < 0.05
