"""The batches of all ranks as one: who is whose negative, and where negatives come from."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from bridges.contract import Instruction
from qformer.gather import gather, longest, rank, world_size


@dataclass(frozen=True)
class JoinedBatch:
    """g samples of all ranks; b of them, beginning at `first`, are this rank's.

    Attributes:
        ids: long (g, t), texts.
        mask: bool (g, t).
        image_ids: long (g), equal where images are.
        text_ids: long (g), equal where captions are.
        first: place of this rank's first sample.
        size: b.
    """

    ids: Tensor
    mask: Tensor
    image_ids: Tensor
    text_ids: Tensor
    first: int
    size: int

    @classmethod
    def of(cls, text: Instruction, image_ids: Tensor | None) -> "JoinedBatch":
        """Gathers texts and image ids; every rank must have equally many.

        Args:
            text: this rank's captions.
            image_ids: long (b); all images are different by default.
        """
        b, device = len(text.input_ids), text.input_ids.device
        first = rank() * b
        if image_ids is None:
            image_ids = torch.arange(b, device=device) + first
        pad = longest(text.input_ids.shape[1], device) - text.input_ids.shape[1]
        ids, mask = (F.pad(x, (0, pad)) for x in (text.input_ids, text.attention_mask.long()))
        ids, mask = gather(ids * mask), gather(mask).bool()
        return cls(ids, mask, gather(image_ids), caption_ids(ids), first, b)

    @property
    def own(self) -> Tensor:
        """Places of this rank's samples: long (b)."""
        return torch.arange(self.first, self.first + self.size, device=self.ids.device)

    def negatives(self) -> Tensor:
        """Which samples are true negatives of this rank's: another image and another caption.

        Returns:
            bool (b, g).
        """
        own = slice(self.first, self.first + self.size)
        same_image = self.image_ids[own, None] == self.image_ids
        return ~(same_image | (self.text_ids[own, None] == self.text_ids))

    def patches(self, own: Tensor) -> Tensor:
        """Image features of all ranks, without gradient, for they are frozen: (g, p, d_vision)."""
        return gather(own.detach()) if world_size() > 1 else own


def caption_ids(ids: Tensor) -> Tensor:
    """A number for each text, equal for equal token ids: long (b, t) -> long (b).

    A random linear hash modulo 2⁶⁴: padding (id 0) does not count.
    """
    generator = torch.Generator().manual_seed(0)
    factors = torch.randint(-(2**62), 2**62, (ids.shape[1],), generator=generator)
    return (ids * factors.to(ids.device)).sum(dim=1)
