"""Log-likelihoods of several continuations of one prompt, the prompt read once."""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from bridges.contract import Instruction, VisionFeatures
from bridges.loss import token_losses
from bridges.model import VisionLanguageModel
from bridges.prompts import TextBatch

Choices = Sequence[Sequence[int]]
"""Token ids of each continuation of one prompt."""


@dataclass(frozen=True)
class ChoiceScores:
    """How likely each continuation of each prompt is.

    Attributes:
        log_likelihoods: (b, c), summed over the tokens, in nats; -inf past a row's last choice.
        lengths: long (b, c), tokens of each choice; 0 past a row's last one.
    """

    log_likelihoods: Tensor
    lengths: Tensor

    @property
    def per_token(self) -> Tensor:
        """Mean log-likelihood of a token of each choice: (b, c)."""
        return self.log_likelihoods / self.lengths.clamp(min=1)

    def best(self, *, per_token: bool = False) -> Tensor:
        """The likeliest choice of each row: long (b)."""
        return (self.per_token if per_token else self.log_likelihoods).argmax(dim=1)


@torch.no_grad()
def score_choices(
    model: VisionLanguageModel,
    text: TextBatch,
    choices: Sequence[Choices],
    vision: VisionFeatures,
    instruction: Instruction | None = None,
    *,
    max_rows: int = 64,
) -> ChoiceScores:
    """Scores continuations as `VisionLanguageModel.forward` would, each prompt read only once.

    The images are resampled once and the prompts go through the LM once, into a cache, of which
    every choice is given a copy.

    Args:
        model: the model.
        text: prompts, padded on the left; labels are of no meaning.
        choices: for each row at least one continuation of at least one token, see
            `PromptEncoder.document`; rows may differ in how many.
        vision: features of the images.
        instruction: for resamplers that read one.
        max_rows: prompts × choices that go through the LM together, which bounds the copies of
            the cache. One choice of every prompt always does.

    Raises:
        ValueError: no choice or an empty one, an image in a choice, prompts that are padded on
            the right or leave the context no room, or an LM whose cache is not keys and values
            alone.

    Source: Flamingo (arXiv 2204.14198) appendix B.1: close-ended tasks are scored by the
        log-likelihood of each answer.
    """
    _check(model, text, choices)
    lm, rows = model.lm, len(choices)
    longest = max(len(choice) for row in choices for choice in row)
    ids, mask = text.input_ids.to(lm.device), text.attention_mask.to(lm.device)
    found, lengths = [], []
    with model.continuing(ids, mask, vision, instruction, room=longest) as embeddings:
        cache = DynamicCache(config=lm.model.config)
        _check_cache(cache)
        last = lm.hidden(embeddings, mask, cache=cache)[:, -1]
        first = lm.head(last).log_softmax(dim=-1)
        for tokens, length in _groups(choices, max(1, max_rows // rows)):
            tokens, length = tokens.to(lm.device), length.to(lm.device)
            scores = first.gather(1, tokens[..., 0])
            if tokens.shape[2] > 1:
                scores = scores + _rest(model, cache, mask, tokens, length)
            found.append(scores.masked_fill(length == 0, -torch.inf))
            lengths.append(length)
    return ChoiceScores(torch.cat(found, dim=1), torch.cat(lengths, dim=1))


def _rest(
    model: VisionLanguageModel, cache: DynamicCache, mask: Tensor, tokens: Tensor, length: Tensor
) -> Tensor:
    """Log-likelihood of all tokens but the first of each choice: (b, c).

    Args:
        model: continuing the prompts.
        cache: of the prompts; left as it is.
        mask: bool (b, t), of the prompts.
        tokens: long (b, c, l).
        length: long (b, c).
    """
    lm, count = model.lm, tokens.shape[1]
    tokens, length = tokens.flatten(0, 1), length.flatten()
    # The token at j is scored where token j - 1 is read.
    scored = torch.arange(1, tokens.shape[1], device=tokens.device) < length[:, None]
    hidden = lm.hidden(
        lm.embed(tokens[:, :-1]),
        torch.cat([mask.repeat_interleave(count, dim=0), scored], dim=1),
        cache=_repeated(cache, count),
    )
    losses = token_losses(
        lm.head, hidden[scored], tokens[:, 1:][scored], lm.model.config.vocab_size
    )
    each = torch.zeros_like(scored, dtype=losses.dtype).masked_scatter(scored, losses)
    return -each.sum(dim=1).unflatten(0, (-1, count))


def _repeated(cache: DynamicCache, count: int) -> DynamicCache:
    """A cache with every row `count` times in place; the original stays as it is.

    Its layers replace their tensors and never write into them, so that they need not be copied.
    """
    copied = copy.copy(cache)
    copied.layers = [copy.copy(layer) for layer in cache.layers]
    copied.batch_repeat_interleave(count)
    return copied


def _groups(choices: Sequence[Choices], size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """`size` choices of every row at a time: tokens (b, c, l) padded with 0, lengths (b, c)."""
    most = max(map(len, choices))
    for start in range(0, most, size):
        group = [
            [
                row[place] if place < len(row) else ()
                for place in range(start, min(start + size, most))
            ]
            for row in choices
        ]
        lengths = torch.tensor([[len(choice) for choice in row] for row in group])
        tokens = torch.zeros(*lengths.shape, max(1, int(lengths.max())), dtype=torch.long)
        for i, row in enumerate(group):
            for j, choice in enumerate(row):
                tokens[i, j, : len(choice)] = torch.tensor(choice, dtype=torch.long)
        yield tokens, lengths


def _check(model: VisionLanguageModel, text: TextBatch, choices: Sequence[Choices]) -> None:
    if len(choices) != len(text.input_ids):
        raise ValueError(
            f"found choices for {len(choices)} rows and {len(text.input_ids)} prompts; expected "
            "choices for each prompt"
        )
    for row, continuations in enumerate(choices):
        if not continuations or not all(continuations):
            raise ValueError(
                f"row {row}: found {len(continuations)} choices of "
                f"{[len(c) for c in continuations][:8]} tokens; expected at least one, and none "
                "empty: end each with the end of a chunk"
            )
        if any(model.lm.image_token_id in choice for choice in continuations):
            raise ValueError(
                f"row {row}: found {model.lm.image_token!r} in a choice; expected images in the "
                "prompt only: encode choices with PromptEncoder.document"
            )


def _check_cache(cache: DynamicCache) -> None:
    known = (DynamicLayer, DynamicSlidingWindowLayer)
    other = next((type(layer).__name__ for layer in cache.layers if type(layer) not in known), None)
    if other is not None:
        raise ValueError(
            f"found an LM whose cache has a {other}; expected keys and values alone, of which "
            "every choice can be given a copy: score whole sequences with model(...).row_losses()"
        )
