"""A Q-Former with the heads of stage 1, and the passes through it."""

from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bridges.contract import Instruction, VisionFeatures
from bridges.loss import token_losses
from qformer.heads import LMHead
from qformer.layers import Projected
from qformer.layout import Layout
from qformer.masks import itc_itg_mask, itc_mask, itm_mask
from qformer.resampler import QFormer


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


class PairEncoder(nn.Module):
    """What a Q-Former and its heads say of images and texts, apart and together.

    What makes it fast: an image's keys and values are projected once for all objectives; the
    streams of ITC and ITG are one pass; no linear layer sees padding; words are looked up once,
    and scored at labels only; ITM's first self-attention, which knows no image yet, runs once per
    text.

    Args:
        qformer: with a text branch.
        embed_dim: width in which images and texts are compared.
        label_smoothing: of ITC and ITG.
        temperature: at the start; similarities are divided by it.
        dec_token_id: first token of text to be written; the vocabulary's last word by default.
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

    def image_embeddings(self, vision: VisionFeatures) -> Tensor:
        """Images as ITC compares them: (b, n, e), L2-normalised, fp32."""
        one_image(vision)
        return self._embed(self.vision_projection, self.qformer(vision)[:, 0])

    def text_embeddings(self, text: Instruction) -> Tensor:
        """Texts as ITC compares them: (b, e), L2-normalised, fp32."""
        check_padding(text)
        layout = Layout.of(0, text.attention_mask, itc_mask)
        x = self.qformer.embed_text(text.input_ids, text.attention_mask)
        first = text.attention_mask.sum(dim=1).cumsum(0) - text.attention_mask.sum(dim=1)
        return self._embed(
            self.text_projection, self.qformer.transform(x, layout, [], keep_text=first)
        )

    def match(self, vision: VisionFeatures, text: Instruction) -> Tensor:
        """ITM logits of each row's image and text: (b, 2); class 1 is a match.

        Images go round where texts are more: one image and k texts give (k, 2).
        """
        check_padding(text)
        projected = self.qformer.project(one_image(vision))
        words = self.qformer.embed_text(text.input_ids, text.attention_mask)
        return self.itm(projected, None, words, text.attention_mask)

    def embed_words(self, ids: Tensor, mask: Tensor) -> Tensor:
        """The real tokens, row by row, then [DEC]: (m + 1, d).

        All objectives read the same words. One look-up for all of them, for each costs a backward
        the size of the vocabulary.
        """
        positions = torch.arange(mask.shape[1], device=mask.device).expand_as(mask)[mask]
        ids = F.pad(ids[mask], (0, 1), value=self.dec_token_id)
        return self.qformer.embed_tokens(ids, F.pad(positions, (0, 1)), mask.shape[1])

    def apart(
        self, projected: list[Projected], words: Tensor, ids: Tensor, mask: Tensor, generate: bool
    ) -> Apart:
        """Queries, the text for contrast and the text to be written, in one pass.

        Args:
            projected: keys and values of the b images.
            words: from `embed_words`.
            ids: long (b, t).
            mask: bool (b, t).
            generate: whether there is text to be written.
        """
        qformer, b = self.qformer, len(ids)
        first = torch.zeros_like(mask)
        first[:, 0] = True
        if generate:
            # Every token but a row's last one predicts the next.
            predicts = F.pad(mask[:, 1:], (0, 1))
            wanted = torch.cat([first, predicts], dim=1)
            starts = torch.cat([first, torch.zeros_like(first)], dim=1)[wanted]
            slots = torch.cat([mask, mask], dim=1)
            layout = Layout.of(qformer.num_tokens, slots, lambda n, _: itc_itg_mask(n, mask))
            place = mask.flatten().cumsum(0).view_as(ids) - 1
            written = place.masked_fill(first, len(words) - 1)
            text = words.index_select(0, torch.cat([place, written], dim=1)[slots])
        else:
            wanted, slots, starts, text = first, mask, first[first], words[:-1]
            layout = Layout.of(qformer.num_tokens, slots, itc_mask)
        x = torch.cat([qformer.embed_queries(b), text])
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

    def itm(
        self,
        own: list[Projected],
        other: list[Projected] | None,
        words: Tensor,
        mask: Tensor,
        rows: Tensor | None = None,
    ) -> Tensor:
        """Two-class logits, averaged over the queries: (r, 2); see `QFormer.transform`."""
        qformer = self.qformer
        layout = Layout.of(qformer.num_tokens, mask, itm_mask)
        x = torch.cat([qformer.embed_queries(len(mask)), words])
        nothing = torch.arange(0, device=mask.device)
        x = qformer.transform(x, layout, own, other, rows=rows, keep_text=nothing)
        return self.itm_head(x).view(-1, qformer.num_tokens, 2).float().mean(dim=1)

    def _embed(self, projection: nn.Linear, x: Tensor) -> Tensor:
        return F.normalize(projection(x).float(), dim=-1)


def one_image(vision: VisionFeatures) -> Tensor:
    """The patches (b, p, d) of one image a sample."""
    if vision.patches.shape[1] != 1:
        raise ValueError(
            f"found {vision.patches.shape[1]} images a sample; expected 1: stage 1 pairs an image "
            "with a text"
        )
    return vision.patches[:, 0]


def check_padding(text: Instruction) -> None:
    """Refuses text that does not begin with a token.

    Raises:
        ValueError: padding on the left.
    """
    if not bool(text.attention_mask[:, 0].all()):
        raise ValueError(
            "found text padded on the left; expected padding on the right: see encode_text"
        )
