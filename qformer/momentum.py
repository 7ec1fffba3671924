"""ALBEF's momentum teacher: soft targets and a queue of negatives for image-text contrast."""

from __future__ import annotations

from copy import deepcopy
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from bridges.contract import Instruction, VisionFeatures
from qformer.gather import gather
from qformer.joined import JoinedBatch
from qformer.objectives import similarity, soft_contrastive_loss

if TYPE_CHECKING:
    from qformer.stage1 import Stage1

EMPTY = torch.iinfo(torch.long).min
"""Image id of a place in the queue that nothing has filled yet."""


class MomentumTeacher(nn.Module):
    """A slowly following copy of the student, and the features that it made last.

    Args:
        student: to be copied.
        momentum: of the exponential moving average of the weights.
        queue_size: image and text features kept. At ALBEF's 65536, 32 queries of width 256 are
            2 GiB (in every checkpoint, and once more within a step), and their similarities with
            b texts 8 MiB · b.
        alpha: weight of the teacher's opinion in the targets.
        ramp_steps: steps in which `alpha` grows from 0. ALBEF: those of the first epoch.

    Source: ALBEF (arXiv 2107.07651) sections 3.2 and 3.3, equations 1 and 6. Deviations: places of
    the queue that are still empty are no candidates (ALBEF fills them with random features), and
    samples with the same image or caption are nobody's negatives.
    """

    image_queue: Tensor
    text_queue: Tensor
    image_ids: Tensor
    text_ids: Tensor
    next: Tensor
    steps: Tensor

    def __init__(
        self,
        student: Stage1,
        *,
        momentum: float = 0.995,
        queue_size: int = 65536,
        alpha: float = 0.4,
        ramp_steps: int = 0,
    ) -> None:
        super().__init__()
        if queue_size < 1:
            raise ValueError(f"found queue_size={queue_size}; expected at least 1")
        self.model = deepcopy(student).requires_grad_(False)
        self.momentum = momentum
        self.max_alpha = alpha
        self.ramp_steps = ramp_steps
        width = student.vision_projection.out_features
        queries = student.qformer.num_tokens
        device = student.temperature.device
        self.register_buffer("image_queue", torch.zeros(queue_size, queries, width, device=device))
        self.register_buffer("text_queue", torch.zeros(queue_size, width, device=device))
        for name in ("image_ids", "text_ids"):
            self.register_buffer(name, torch.full((queue_size,), EMPTY, device=device))
        self.register_buffer("next", torch.zeros((), dtype=torch.long, device=device))
        self.register_buffer("steps", torch.zeros((), dtype=torch.long, device=device))

    @property
    def alpha(self) -> float:
        """Weight of the teacher's opinion at this step."""
        if not self.ramp_steps:
            return self.max_alpha
        return self.max_alpha * min(1.0, max(0, int(self.steps) - 1) / self.ramp_steps)

    @torch.no_grad()
    def update(self, student: Stage1) -> None:
        """Follows the student; call it before each optimiser step, as ALBEF does."""
        self.steps.add_(1)
        for ours, theirs in zip(self.model.parameters(), student.parameters(), strict=True):
            ours.lerp_(theirs.to(ours.dtype), 1 - self.momentum)

    @torch.no_grad()
    def embed(self, vision: VisionFeatures, text: Instruction) -> tuple[Tensor, Tensor]:
        """The teacher's features: images (b, n, e), texts (b, e)."""
        return self.model.image_embeddings(vision), self.model.text_embeddings(text)

    def losses(
        self,
        student: tuple[Tensor, Tensor],
        teacher: tuple[Tensor, Tensor],
        temperature: Tensor,
        joined: JoinedBatch,
    ) -> Tensor:
        """Contrast of the student's features with the teacher's; then the queue moves on.

        Args:
            student: its images (b, n, e) and texts (b, e).
            teacher: likewise, from `embed`.
            temperature: the student's.
            joined: the batch of all ranks.

        Returns:
            One loss for each image, then one for each text: (2 b).
        """
        new = gather(teacher[0]), gather(teacher[1])
        own = slice(joined.first, joined.first + joined.size)
        image_ids = torch.cat([joined.image_ids, self.image_ids])
        text_ids = torch.cat([joined.text_ids, self.text_ids])
        same = (image_ids[own, None] == image_ids) | (text_ids[own, None] == text_ids)
        allowed = ~same & (image_ids != EMPTY)
        allowed = allowed.scatter(1, joined.own[:, None], True)
        # Copies, for the queue moves on before backward.
        queue = self.image_queue.clone(), self.text_queue.clone()
        found = _logits(student, new, queue, temperature)
        with torch.no_grad():
            opinions = _logits(teacher, new, queue, temperature)
        losses = [
            soft_contrastive_loss(logits, self.targets(opinion, joined.own, allowed), allowed)
            for logits, opinion in zip(found, opinions, strict=True)
        ]
        finite = new[0].isfinite().all() & new[1].isfinite().all()
        if self.training and torch.is_grad_enabled() and bool(finite):
            self._enqueue(*new, joined)
        return torch.cat(losses)

    def targets(self, logits: Tensor, own: Tensor, allowed: Tensor) -> Tensor:
        """α · softmax(teacher) + (1 − α) · one-hot: (b, c)."""
        opinion = logits.masked_fill(~allowed, -torch.inf).softmax(dim=1)
        hard = torch.nn.functional.one_hot(own, logits.shape[1])
        return self.alpha * opinion + (1 - self.alpha) * hard

    @torch.no_grad()
    def _enqueue(self, images: Tensor, texts: Tensor, joined: JoinedBatch) -> None:
        size = len(self.image_ids)
        places = (self.next + torch.arange(len(images), device=images.device)) % size
        # Of a batch larger than the queue the last ones stay.
        places, kept = places[-size:], slice(-size, None)
        self.image_queue[places] = images[kept]
        self.text_queue[places] = texts[kept]
        self.image_ids[places] = joined.image_ids[kept]
        self.text_ids[places] = joined.text_ids[kept]
        self.next.copy_((self.next + len(images)) % size)


def _logits(
    who: tuple[Tensor, Tensor],
    new: tuple[Tensor, Tensor],
    queue: tuple[Tensor, Tensor],
    temperature: Tensor,
) -> tuple[Tensor, Tensor]:
    """Images to all candidates, texts to all candidates: the batch's, then the queue's."""
    images, texts = who
    to_texts = [similarity(images, candidates) for candidates in (new[1], queue[1])]
    to_images = [similarity(candidates, texts).T for candidates in (new[0], queue[0])]
    return torch.cat(to_texts, dim=1) / temperature, torch.cat(to_images, dim=1) / temperature
