"""Trained rows for new tokens beside a frozen vocabulary."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


class NewTokens(nn.Module):
    """Embeddings and output rows of a few tokens, in the place of those that a frozen LM has.

    The LM's own matrices stay frozen and bit-identical: no row of them is written, none gets a
    gradient, and nothing masks a gradient afterwards, which would break where the matrix is
    sharded (FSDP). Public forward hooks on the two modules put the rows in, so that HF's
    ``generate`` reads and writes the tokens too. Their ids may lie past the end of the
    vocabulary; logits then are as wide as the largest id asks for, and ids that nobody owns get
    -inf.

    Args:
        model: an HF causal LM.
        ids: of the tokens, all different.

    Attributes:
        embedding: (n, d), fp32.
        head: (n, d), fp32; the same parameter as `embedding` where the LM ties the two.

    Source: Flamingo (arXiv 2204.14198) has one such token, ``<EOC>``; OpenFlamingo trains a full
    matrix with a gradient mask in its place, IDEFICS-1 decouples its embedding like this.
    """

    def __init__(self, model: Any, ids: Sequence[int]) -> None:
        super().__init__()
        if len(set(ids)) != len(ids):
            raise ValueError(f"found new tokens with ids {list(ids)}; expected each one once")
        embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
        tied = head.weight is embedding.weight
        self.vocabulary = embedding.weight.shape[0]
        self.width = max(self.vocabulary, max(ids) + 1)
        self.embedding = nn.Parameter(_start(embedding.weight, len(ids)))
        self.head = self.embedding if tied else nn.Parameter(_start(head.weight, len(ids)))
        bias = getattr(head, "bias", None)
        self.head_bias = None if bias is None else nn.Parameter(torch.zeros(len(ids)))
        self.scale = _scale(embedding)
        self.register_buffer("ids", torch.tensor(list(ids)), persistent=False)
        embedding.register_forward_pre_hook(self._known, with_kwargs=True)
        embedding.register_forward_hook(self._embed, with_kwargs=True)
        head.register_forward_hook(self._score)
        self._asked: Tensor | None = None

    def _known(
        self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Row 0 for what the frozen matrix does not have."""
        ids = self._asked = args[0] if args else kwargs["input"]
        assert ids is not None
        return (ids.masked_fill(ids >= self.vocabulary, 0),), {}

    def _embed(
        self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
    ) -> Tensor:
        asked, self._asked = self._asked, None
        assert asked is not None
        which = asked[..., None] == self._ids(asked)
        rows = self.scale * self.embedding[which.int().argmax(dim=-1)]
        # Both sides always take part, so that a batch without new tokens gives them a zero
        # gradient rather than none: ranks must agree on what has one.
        return torch.where(which.any(dim=-1, keepdim=True), rows.to(output.dtype), output)

    def _score(self, _: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        scores = nn.functional.linear(
            args[0].to(self.head.dtype),
            self.head,
            self.head_bias,
        ).to(output.dtype)
        if self.width > output.shape[-1]:
            missing = output.new_full(
                (*output.shape[:-1], self.width - output.shape[-1]), -torch.inf
            )
            output = torch.cat([output, missing], dim=-1)
        # In place: the head's output is nobody else's yet, and as wide as the vocabulary.
        return output.index_copy_(-1, self._ids(output), scores)

    def _ids(self, like: Tensor) -> Tensor:
        assert isinstance(self.ids, Tensor)
        return self.ids.to(like.device)


@torch.no_grad()
def _scale(embedding: nn.Module) -> float:
    """What an embedding multiplies its rows by (Gemma: the root of the width)."""
    assert isinstance(embedding.weight, Tensor)
    rows = embedding.weight[:1024].float()
    row, column = divmod(int(rows.abs().argmax()), rows.shape[1])  # the row of padding is zero
    looked_up = embedding(torch.tensor([row], device=rows.device))[0, column]
    return float(looked_up / rows[row, column])


def _start(weight: Tensor, rows: int) -> Tensor:
    """Rows about the mean of those there are, a tenth as far from it as they are."""
    # Some thousands of rows tell both; all of them in fp32 may take gigabytes.
    sample = weight.detach()[:: max(1, len(weight) // 8192)].float()
    mean, std = sample.mean(dim=0), sample.std(dim=0)
    return mean + 0.1 * std * torch.randn(rows, weight.shape[1], device=weight.device)
