"""BLIP-2's first stage: a Q-Former learns what in an image a text is about."""

from collections.abc import Collection
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from bridges.contract import Instruction, VisionFeatures
from bridges.loss import token_losses
from qformer.gather import gather, rank, total, world_size
from qformer.heads import LMHead
from qformer.joined import JoinedBatch
from qformer.layers import Projected
from qformer.layout import Layout
from qformer.maps import query_diversity, query_usage
from qformer.masks import itc_itg_mask, itc_mask, itm_mask
from qformer.momentum import MomentumTeacher
from qformer.objectives import contrastive_loss, draw_negatives, similarity
from qformer.resampler import QFormer

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
    """

    losses: dict[str, Tensor]
    stats: dict[str, Tensor]
    negatives: tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Apart:
    """What the pass that keeps images and texts apart has found.

    Attributes:
        images: (b, n, e), L2-normalised.
        texts: (b, e), L2-normalised.
        queries: (b, n, d), the query outputs, without gradient.
        token_losses: of ITG, (m); empty without it.
    """

    images: Tensor
    texts: Tensor
    queries: Tensor
    token_losses: Tensor


class Stage1(nn.Module):
    """A Q-Former with the heads of image-text contrast, matching and grounded generation.

    What makes it fast: an image's keys and values are projected once for all objectives; the
    streams of ITC and ITG are one pass; no linear layer sees padding; the vocabulary is scored
    at labels only; ITM's first self-attention, which knows no image yet, runs once per text.

    Args:
        qformer: with a text branch.
        embed_dim: width in which images and texts are compared.
        label_smoothing: of ITC and ITG.
        temperature: at the start; similarities are divided by it.
        dec_token_id: first token of text to be written; the vocabulary's last word by default.

    Source: BLIP-2 (arXiv 2301.12597) section 3.1. Deviations from LAVIS: gradients reach the
    features of other ranks too (see `gather`); samples with the same image or the same caption are
    nobody's negatives; means are those of the joined batch of all ranks.
    """

    def __init__(
        self,
        qformer: QFormer,
        *,
        embed_dim: int = 256,
        label_smoothing: float = 0.1,
        temperature: float = 0.07,
        dec_token_id: int | None = None,
    ) -> None:
        super().__init__()
        if qformer.vocab_size is None:
            raise ValueError(
                "found a Q-Former without a text branch; expected one: build it with tokenizer=…"
            )
        self.qformer = qformer
        qformer.train_last_text(True)
        self.vision_projection = nn.Linear(qformer.dim, embed_dim)
        self.text_projection = nn.Linear(qformer.dim, embed_dim)
        self.itm_head = nn.Linear(qformer.dim, 2)
        self.lm_head = LMHead(qformer.dim, qformer.vocab_size)
        self.temperature = nn.Parameter(torch.tensor(temperature))
        self.label_smoothing = label_smoothing
        self.dec_token_id = qformer.vocab_size - 1 if dec_token_id is None else dec_token_id

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
        patches = _one_image(vision)
        _check_padding(text)
        if teacher is not None and image_ids is None:
            raise ValueError(
                "found a teacher and no image_ids; expected them, for its queue outlives the "
                "batch: give each image a number of its own"
            )
        joined = JoinedBatch.of(text, image_ids)
        generate = "itg" in objectives
        projected = None
        if chunk_size is None:
            projected = self.qformer.project(patches)
            apart = self._apart(projected, text.input_ids, text.attention_mask, generate)
        else:
            apart = self._apart_in_chunks(patches, text, generate, chunk_size)
        losses: dict[str, Tensor] = {}
        with torch.autocast(patches.device.type, enabled=False):
            image_logits, text_logits = self._logits(apart)
            others = joined.negatives()
            if teacher is not None and "itc" in objectives:
                losses["itc"] = teacher.losses(
                    apart.images, apart.texts, self.temperature, joined, vision, text
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
            logits = self._match(projected, patches, text, joined, negatives, chunk_size)
            losses["itm"], stats["itm_accuracy"] = _matching_loss(logits, exists)
        if generate:
            losses["itg"] = _mean(apart.token_losses)
        return Stage1Output(losses, stats, negatives)

    def image_embeddings(self, vision: VisionFeatures) -> Tensor:
        """Images as ITC compares them: (b, n, e), L2-normalised, fp32."""
        _one_image(vision)
        return self._embed(self.vision_projection, self.qformer(vision)[:, 0])

    def text_embeddings(self, text: Instruction) -> Tensor:
        """Texts as ITC compares them: (b, e), L2-normalised, fp32."""
        _check_padding(text)
        layout = Layout.of(0, text.attention_mask, itc_mask)
        x = self.qformer.embed_text(text.input_ids, layout)
        first = text.attention_mask.sum(dim=1).cumsum(0) - text.attention_mask.sum(dim=1)
        return self._embed(
            self.text_projection, self.qformer.transform(x, layout, [], keep_text=first)
        )

    def match(self, vision: VisionFeatures, text: Instruction) -> Tensor:
        """ITM logits of each row's image and text: (b, 2); class 1 is a match.

        Images go round where texts are more: one image and k texts give (k, 2).
        """
        _check_padding(text)
        projected = self.qformer.project(_one_image(vision))
        return self._itm(projected, None, text.input_ids, text.attention_mask)

    def _apart(
        self, projected: list[Projected], ids: Tensor, mask: Tensor, generate: bool
    ) -> Apart:
        """Queries, the text for contrast and the text to be written, in one pass."""
        qformer, b = self.qformer, len(ids)
        first = torch.zeros_like(mask)
        first[:, 0] = True
        if generate:
            written = ids.masked_fill(first, self.dec_token_id)
            # Every token but a row's last one predicts the next.
            predicts = F.pad(mask[:, 1:], (0, 1))
            wanted = torch.cat([first, predicts], dim=1)
            starts = torch.cat([first, torch.zeros_like(first)], dim=1)[wanted]
            slots, tokens = torch.cat([mask, mask], dim=1), torch.cat([ids, written], dim=1)
            layout = Layout.of(qformer.num_tokens, slots, lambda n, _: itc_itg_mask(n, mask))
        else:
            wanted, slots, tokens = first, mask, ids
            starts = first[wanted]
            layout = Layout.of(qformer.num_tokens, slots, itc_mask)
        x = torch.cat(
            [qformer.embed_queries(b), qformer.embed_text(tokens, layout, period=ids.shape[1])]
        )
        keep = wanted[slots].nonzero().squeeze(1)
        x = qformer.transform(x, layout, projected, keep_text=keep)
        queries, text_outputs = x.tensor_split([layout.query_tokens])
        queries = queries.view(b, qformer.num_tokens, -1)
        losses = x.new_zeros(0)
        if generate:
            assert qformer.text_embeddings is not None
            word = qformer.text_embeddings.word.weight
            losses = token_losses(
                partial(self.lm_head, word=word),
                text_outputs[~starts],
                ids[:, 1:][mask[:, 1:]],
                len(word),
                self.label_smoothing,
            )
        return Apart(
            self._embed(self.vision_projection, queries),
            self._embed(self.text_projection, text_outputs[starts]),
            queries.detach(),
            losses,
        )

    def _apart_in_chunks(
        self, patches: Tensor, text: Instruction, generate: bool, chunk_size: int
    ) -> Apart:
        def one(patches: Tensor, ids: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
            apart = self._apart(self.qformer.project(patches), ids, mask, generate)
            return apart.images, apart.texts, apart.queries, apart.token_losses

        chunks = (x.split(chunk_size) for x in (patches, text.input_ids, text.attention_mask))
        parts = [
            checkpoint(one, *chunk, use_reentrant=False) for chunk in zip(*chunks, strict=True)
        ]
        return Apart(*(torch.cat(column) for column in zip(*parts, strict=True)))

    def _embed(self, projection: nn.Linear, x: Tensor) -> Tensor:
        return F.normalize(projection(x).float(), dim=-1)

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
        projected: list[Projected] | None,
        patches: Tensor,
        text: Instruction,
        joined: JoinedBatch,
        negatives: tuple[Tensor, Tensor],
        chunk_size: int | None,
    ) -> Tensor:
        """ITM logits of the pairs, of negative texts, of negative images: (3, b, 2)."""
        negative_texts, negative_images = negatives
        if projected is not None and world_size() == 1:
            # All negatives are in this batch, and so are their projections. One indexed gather:
            # single selects would cost a batch-sized backward each.
            other = [
                (k.index_select(0, negative_images), v.index_select(0, negative_images))
                for k, v in projected
            ]
            rows = torch.cat([joined.own, negative_texts, joined.own])
            logits = self._itm(projected, other, text.input_ids, text.attention_mask, rows)
            return logits.unflatten(0, (3, -1))

        def some(own: list[Projected] | None, patches: Tensor, *rest: Tensor) -> Tensor:
            others, ids, mask, other_ids, other_mask = rest
            rows = torch.arange(2 * len(ids), device=ids.device)
            logits = self._itm(
                own or self.qformer.project(patches),
                self.qformer.project(others),
                torch.cat([ids, other_ids]),
                torch.cat([mask, other_mask]),
                torch.cat([rows, rows[: len(ids)]]),
            )
            return logits.unflatten(0, (3, -1))

        own = slice(joined.first, joined.first + joined.size)
        inputs = (
            patches,
            joined.patches(patches)[negative_images],
            joined.ids[own],
            joined.mask[own],
            joined.ids[negative_texts],
            joined.mask[negative_texts],
        )
        if chunk_size is None:
            return some(projected, *inputs)
        chunks = zip(*(x.split(chunk_size) for x in inputs), strict=True)
        return torch.cat(
            [checkpoint(some, None, *chunk, use_reentrant=False) for chunk in chunks], dim=1
        )

    def _itm(
        self,
        own: list[Projected],
        other: list[Projected] | None,
        ids: Tensor,
        mask: Tensor,
        rows: Tensor | None = None,
    ) -> Tensor:
        """Two-class logits, averaged over the queries: (r, 2); see `QFormer.transform`."""
        qformer = self.qformer
        layout = Layout.of(qformer.num_tokens, mask, itm_mask)
        x = torch.cat([qformer.embed_queries(len(ids)), qformer.embed_text(ids, layout)])
        nothing = torch.arange(0, device=ids.device)
        x = qformer.transform(x, layout, own, other, rows=rows, keep_text=nothing)
        return self.itm_head(x).view(-1, qformer.num_tokens, 2).float().mean(dim=1)


def _one_image(vision: VisionFeatures) -> Tensor:
    """The patches (b, p, d) of one image a sample."""
    if vision.patches.shape[1] != 1:
        raise ValueError(
            f"found {vision.patches.shape[1]} images a sample; expected 1: stage 1 pairs an image "
            "with a text"
        )
    return vision.patches[:, 0]


def _check_padding(text: Instruction) -> None:
    if not bool(text.attention_mask[:, 0].all()):
        raise ValueError(
            "found text padded on the left; expected padding on the right: see encode_text"
        )


def _draw(
    image_logits: Tensor, text_logits: Tensor, others: Tensor, generator: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    """A hard negative text for each image, a hard negative image for each text: long (b) each."""
    b, g = others.shape
    noise = torch.rand(2, g, g, generator=generator).to(others.device)
    # The noise of all ranks, of which each takes its rows.
    for_images, for_texts = noise.unflatten(1, (-1, b))[:, rank()]
    return (
        draw_negatives(image_logits, others, for_images),
        draw_negatives(text_logits, others, for_texts),
    )


def _matching_loss(logits: Tensor, exists: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy and accuracy of (3, b, 2) logits; rows without a negative do not count."""
    counts = torch.stack([torch.ones_like(exists), exists, exists])
    targets = torch.zeros(counts.shape, dtype=torch.long, device=logits.device)
    targets[0] = 1
    losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    right = (logits.argmax(dim=-1) == targets)[counts]
    return _mean(losses[counts.flatten()]), right.float().mean()


def _mean(losses: Tensor) -> Tensor:
    """This rank's part of the joined batch's mean, which is the mean of all ranks' parts."""
    count = total(torch.tensor(float(len(losses)), device=losses.device))
    return losses.sum() * world_size() / count.clamp(min=1)


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
