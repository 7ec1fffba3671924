"""What the layers inserted into the LM know of the images while the LM runs."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor


def image_index(placeholders: Tensor, num_tokens: int) -> Tensor:
    """Index of the latest image at or before each position; -1 where there is none yet.

    Shape: bool (b, t) -> long (b, t).

    Source: Flamingo (arXiv 2204.14198) section 2.3, φ: the number of images so far, minus one.
    Every image owns `num_tokens` consecutive placeholders.
    """
    seen = placeholders.long().cumsum(dim=1)
    return torch.div(seen - 1, num_tokens, rounding_mode="floor")


@dataclass
class Condition:
    """The images of the current forward pass, as inserted layers see them.

    Attributes:
        memory: (b, i, m, d_memory) or None.
        image_mask: bool (b, i).
        index: long (b, t), `image_index` of every column of the whole prompt.
        start: first column that the running LM call computes (more than 0 in cached decoding).
    """

    memory: Tensor | None
    image_mask: Tensor
    index: Tensor
    start: int = 0
    keep_projections: bool = False
    _kept: dict[object, tuple[Tensor, ...]] = field(default_factory=dict)

    def image_index(self, hidden: Tensor) -> Tensor:
        """Image index of the columns of `hidden`; columns past the prompt repeat its last one.

        Shape: hidden (b', t', d) -> long (b', t'), where b' = b × beams.
        """
        columns = torch.arange(self.start, self.start + hidden.shape[1], device=self.index.device)
        index = self.index[:, columns.clamp(max=self.index.shape[1] - 1)]
        return self._expand(index, hidden.shape[0])

    def visible_images(self, hidden: Tensor) -> Tensor:
        """Which images each position reads: the latest preceding one, if it is real.

        Shape: hidden (b', t', d) -> bool (b', t', i).
        """
        mask = self._expand(self.image_mask, hidden.shape[0])[:, None]
        # The text counts real images only, wherever padding images stand among them.
        ordinals = mask.long().cumsum(dim=-1) - 1
        return (self.image_index(hidden)[..., None] == ordinals) & mask

    def project(
        self, owner: object, hidden: Tensor, projection: Callable[[Tensor], tuple[Tensor, ...]]
    ) -> tuple[Tensor, ...]:
        """`projection(memory)`, repeated for beams; computed once per generation.

        Only a generation keeps projections (the condition lives as long as it does): training
        must compute them anew in every forward or their weights would get no gradient.
        """
        if self.memory is None:
            raise ValueError("this inserted layer reads memory, but the bridge returned none")
        kept = self._kept.get(owner)
        if kept is None or kept[0].shape[0] != hidden.shape[0]:
            kept = tuple(self._expand(x, hidden.shape[0]) for x in projection(self.memory))
            if self.keep_projections:
                self._kept[owner] = kept
        return kept

    @staticmethod
    def _expand(x: Tensor, batch: int) -> Tensor:
        """Beam search and several returned sequences repeat each row in place."""
        if x.shape[0] == batch:
            return x
        if batch % x.shape[0]:
            raise ValueError(
                f"found {batch} rows in the LM for {x.shape[0]} conditioned samples; expected a "
                "multiple (beams). Run the LM through the VisionLanguageModel"
            )
        return x.repeat_interleave(batch // x.shape[0], dim=0)
