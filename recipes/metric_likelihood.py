"""Likelihood of the captions that people wrote: loss per token and perplexity."""

import torch
from torch import Tensor

from recipes.metric_rows import PerImage, total


class CaptionNLL(PerImage):
    """Negative log-likelihood per token over all tokens, in nats, and its exponential.

    A long caption weighs more than a short one; figures of LMs with different tokenizers do not
    compare.
    """

    higher_is_better = False

    def __init__(self) -> None:
        super().__init__()
        self.add_rows("sums", 2)

    def update(self, token_losses_sum: Tensor, tokens: Tensor) -> None:
        """Adds captions.

        Args:
            token_losses_sum: (b,), the loss of a caption's tokens, added up.
            tokens: (b,), how many tokens those were.

        Raises:
            ValueError: the shapes differ, or a caption has no tokens.
        """
        if token_losses_sum.shape != tokens.shape or tokens.ndim != 1:
            raise ValueError(
                f"found losses of shape {tuple(token_losses_sum.shape)} and token counts of shape "
                f"{tuple(tokens.shape)}; expected (b,) of both: sum the losses of each caption"
            )
        if (tokens < 1).any():
            raise ValueError(
                f"found {int((tokens < 1).sum())} captions of no tokens; expected at least one "
                "each: leave out empty captions"
            )
        self.append("sums", torch.stack([token_losses_sum.double(), tokens.double()], dim=1))

    def compute(self) -> dict[str, Tensor]:
        """``{"nll": …, "perplexity": …}``, fp64.

        Raises:
            ValueError: no caption yet.
        """
        loss, tokens = total(self.rows("sums"))
        return {"nll": loss / tokens, "perplexity": (loss / tokens).exp()}

    def per_image_sums(self) -> Tensor:
        """Loss and tokens of each caption, (N, 2): of rows added up, the ratio is their NLL."""
        with self.sync_context():
            return self.rows("sums")

    def _each(self) -> Tensor:
        """NLL per token of each caption alone."""
        loss, tokens = self.rows("sums").unbind(dim=1)
        return loss / tokens
