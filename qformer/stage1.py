"""BLIP-2's first stage: a Q-Former learns what in an image a text is about."""

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from bridges.contract import Instruction, VisionFeatures
from qformer.gather import gather, joined_mean, rank, world_size
from qformer.joined import JoinedBatch
from qformer.layers import Projected
from qformer.maps import query_diversity, query_usage
from qformer.momentum import MomentumTeacher
from qformer.objectives import contrastive_loss, draw_negatives, matching_loss, similarity
from qformer.pairs import Apart, PairEncoder, check_padding, one_image

OBJECTIVES = ("itc", "itm", "itg")


@dataclass(frozen=True)
class Stage1Output:
    """Result of a training step's forward pass.

    Attributes:
        losses: of each objective, in nats. On several ranks each is this rank's part, scaled so
            that the mean over ranks is the joined batch's loss.
        stats: ``itc_accuracy`` (how often the own counterpart is the nearest), ``itm_accuracy``
            (saying "no match" always gives ⅔), ``query_usage`` and ``query_diversity`` (see
            `qformer.maps`).
        negatives: of ITM, for each image a text and for each text an image: long (b) each, as
            places in the batch of all ranks.
        images: (b, n, e), as ITC compares them, without gradient.
        texts: (b, e), likewise.
    """

    losses: dict[str, Tensor]
    stats: dict[str, Tensor]
    negatives: tuple[Tensor, Tensor]
    images: Tensor
    texts: Tensor


class Stage1(PairEncoder):
    """A Q-Former with the heads of image-text contrast, matching and grounded generation.

    Built like `PairEncoder`, whose passes it makes losses of.

    Source: BLIP-2 (arXiv 2301.12597) section 3.1. Deviations from LAVIS: gradients reach the
    features of other ranks too (see `gather`); samples with the same image or the same caption are
    nobody's negatives; means are those of the joined batch of all ranks.
    """

    def forward(
        self,
        vision: VisionFeatures,
        text: Instruction,
        *,
        image_ids: Tensor | None = None,
        objectives: Collection[str] = OBJECTIVES,
        negatives: tuple[Tensor, Tensor] | None = None,
        generator: torch.Generator | None = None,
        chunk_size: int | None = None,
        teacher: MomentumTeacher | None = None,
    ) -> Stage1Output:
        """Losses of a batch of pairs; the batches of all ranks count as one.

        Args:
            vision: features of one image a sample.
            text: captions, [CLS] first, padded on the right.
            image_ids: long (b), equal where images are; all different by default.
            objectives: the losses that are wanted.
            negatives: see `Stage1Output`; drawn from the similarities by default.
            generator: of that draw, on the CPU. With the same state on all ranks it makes them
                draw what one process would.
            chunk_size: recompute activations in backward, so many samples at a time: the memory
                of a small batch with the loss and the gradients of the whole (cached gradients, as
                in GradCache, arXiv 2101.06983), for a second forward pass.
            teacher: gives ITC soft targets and a queue.

        Raises:
            ValueError: several images a sample; text that is padded on the left; a teacher without
                image ids, by which it knows the images in its queue.
        """
        patches = one_image(vision)
        check_padding(text)
        if teacher is not None and image_ids is None:
            raise ValueError(
                "found a teacher and no image_ids; expected them, for its queue outlives the "
                "batch: give each image a number of its own"
            )
        joined = JoinedBatch.of(text, image_ids)
        generate = "itg" in objectives
        projected = words = None
        if chunk_size is None:
            projected = self.qformer.project(patches)
            words = self.embed_words(text.input_ids, text.attention_mask)
            apart = self.apart(projected, words, text.input_ids, text.attention_mask, generate)
        else:
            apart = self._apart_in_chunks(patches, text, generate, chunk_size)
        losses: dict[str, Tensor] = {}
        opinion = None if teacher is None else teacher.embed(vision, text)
        with torch.autocast(patches.device.type, enabled=False):
            image_logits, text_logits = self._logits(apart)
            others = joined.negatives()
            if teacher is not None and opinion is not None and "itc" in objectives:
                losses["itc"] = teacher.losses(
                    (apart.images, apart.texts), opinion, self.temperature, joined
                ).mean()
            elif "itc" in objectives:
                allowed = others.scatter(1, joined.own[:, None], True)
                losses["itc"] = torch.cat(
                    [
                        contrastive_loss(logits, joined.own, allowed, self.label_smoothing)
                        for logits in (image_logits, text_logits)
                    ]
                ).mean()
        stats = _stats(apart, image_logits.detach(), text_logits.detach(), joined)
        exists = others.any(dim=1)
        if negatives is None:
            negatives = _draw(image_logits, text_logits, others, generator)
        if "itm" in objectives:
            here = (projected, words) if projected is not None and words is not None else None
            logits = self._match(here, patches, text, joined, negatives, chunk_size)
            losses["itm"], stats["itm_accuracy"] = matching_loss(logits, exists)
        if generate:
            losses["itg"] = joined_mean(apart.token_losses)
        return Stage1Output(losses, stats, negatives, apart.images.detach(), apart.texts.detach())

    def _apart_in_chunks(
        self, patches: Tensor, text: Instruction, generate: bool, chunk_size: int
    ) -> Apart:
        def one(patches: Tensor, ids: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
            words = self.embed_words(ids, mask)
            apart = self.apart(self.qformer.project(patches), words, ids, mask, generate)
            return apart.images, apart.texts, apart.queries, apart.token_losses

        chunks = (x.split(chunk_size) for x in (patches, text.input_ids, text.attention_mask))
        parts = [
            checkpoint(one, *chunk, use_reentrant=False) for chunk in zip(*chunks, strict=True)
        ]
        return Apart(*(torch.cat(column) for column in zip(*parts, strict=True)))

    def _logits(self, apart: Apart) -> tuple[Tensor, Tensor]:
        """Image to all texts and text to all images, over temperature: (b, g) both."""
        temperature = self.temperature.float()
        if world_size() == 1:
            logits = similarity(apart.images, apart.texts) / temperature
            return logits, logits.T
        return (
            similarity(apart.images, gather(apart.texts)) / temperature,
            similarity(gather(apart.images), apart.texts).T / temperature,
        )

    def _match(
        self,
        here: tuple[list[Projected], Tensor] | None,
        patches: Tensor,
        text: Instruction,
        joined: JoinedBatch,
        negatives: tuple[Tensor, Tensor],
        chunk_size: int | None,
    ) -> Tensor:
        """ITM logits of the pairs, of negative texts, of negative images: (3, b, 2).

        `here` are the batch's projections and words, where they are still there.
        """
        negative_texts, negative_images = negatives
        if here is not None and world_size() == 1:
            projected, words = here
            # All negatives are in this batch, and so are their projections. One indexed gather:
            # single selects would cost a batch-sized backward each.
            other = [
                (k.index_select(0, negative_images), v.index_select(0, negative_images))
                for k, v in projected
            ]
            rows = torch.cat([joined.own, negative_texts, joined.own])
            logits = self.itm(projected, other, words[:-1], text.attention_mask, rows)
            return logits.unflatten(0, (3, -1))

        everyone = joined.patches(patches)

        def some(projected: list[Projected] | None, patches: Tensor, *places: Tensor) -> Tensor:
            own, negative_texts, negative_images = places
            texts, rows = torch.cat([own, negative_texts]), torch.arange(2 * len(own))
            logits = self.itm(
                projected or self.qformer.project(patches),
                self.qformer.project(everyone[negative_images]),
                self.qformer.embed_text(joined.ids[texts], joined.mask[texts]),
                joined.mask[texts],
                torch.cat([rows, rows[: len(own)]]).to(own.device),
            )
            return logits.unflatten(0, (3, -1))

        inputs = (patches, joined.own, negative_texts, negative_images)
        if chunk_size is None:
            return some(here[0] if here is not None else None, *inputs)
        chunks = zip(*(x.split(chunk_size) for x in inputs), strict=True)
        return torch.cat(
            [checkpoint(some, None, *chunk, use_reentrant=False) for chunk in chunks], dim=1
        )


def _draw(
    image_logits: Tensor, text_logits: Tensor, others: Tensor, generator: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    """A hard negative text for each image, a hard negative image for each text: long (b) each."""
    b, g = others.shape
    noise = torch.rand(2, g, generator=generator).to(others.device)
    # The noise of all ranks, of which each takes its rows.
    for_images, for_texts = noise.unflatten(1, (-1, b))[:, rank()]
    return (
        draw_negatives(image_logits, others, for_images),
        draw_negatives(text_logits, others, for_texts),
    )


@torch.no_grad()
def _stats(
    apart: Apart, image_logits: Tensor, text_logits: Tensor, joined: JoinedBatch
) -> dict[str, Tensor]:
    nearest = [(logits.argmax(dim=1) == joined.own) for logits in (image_logits, text_logits)]
    winners = (apart.images @ apart.texts[..., None]).squeeze(-1).argmax(dim=1)
    return {
        "itc_accuracy": torch.cat(nearest).float().mean(),
        "query_usage": query_usage(winners, apart.images.shape[1]),
        "query_diversity": query_diversity(apart.queries),
    }
