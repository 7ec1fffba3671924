"""BLIP-2's stage 1 the reference way: three full passes through HF's Q-Former."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Blip2QFormerConfig, Blip2QFormerModel
from transformers.models.blip_2.modeling_blip_2 import Blip2TextEmbeddings

from bridges.official import rename
from qformer.key_maps import key_map

Kernel = Literal["eager", "sdpa"]

HEADS = [
    ("qformer.ln_vision", "ln_vision"),
    ("qformer.queries", "queries"),
    ("lm_head.dense", "lm_dense"),
    ("lm_head.norm", "lm_norm"),
    ("lm_head.bias", "lm_bias"),
    ("temperature", "temperature"),
]
"""`Stage1`'s name and the name in `ReferenceStage1`, where HF's classes have no place for it."""


def reference_keys(ours: Iterable[str], depth: int) -> dict[str, str]:
    """The parameters of `ReferenceStage1` that are the given ones of `Stage1`.

    Raises:
        ValueError: one of them has no counterpart.
    """
    pairs = [*HEADS, *key_map("blip2", depth)]
    found = {name: rename(name, pairs) for name in ours}
    missing = sorted(name for name, theirs in found.items() if theirs is None)
    if missing:
        raise ValueError(f"found parameters {missing}; expected ones that HF's Q-Former has")
    return {name: theirs for name, theirs in found.items() if theirs is not None}


@dataclass(frozen=True)
class Negatives:
    """Hard negatives, given to both sides so that they compute the same thing.

    Attributes:
        texts: long (b,), for each image the index of a text that is not its own.
        images: long (b,), for each text the index of an image that is not its own.
    """

    texts: Tensor
    images: Tensor


class ReferenceStage1(nn.Module):
    """ITC, ITM and ITG as LAVIS schedules them, on HF's `Blip2QFormerModel`.

    ITC encodes queries and text apart; ITM encodes 3b rows [queries; text] and projects the
    image's keys and values for each row; ITG encodes [queries; text] again under the UniLM mask.
    Text always has `max_text` columns and the language-model head runs at all of them.

    One difference from LAVIS: its fork of BERT keeps the queries' keys and values of the ITC pass
    for ITG, and HF's class cannot (the bench counts what that would save). Where the schedule
    leaves a choice the faster way is taken: negatives by one `index_select`, no mask over images.

    Args:
        vision_dim: width of the image features.
        vocab_size: of the text, [DEC] (its last token) included.
        num_queries: tokens per image.
        dim: width.
        depth: layers; every second one reads the image.
        num_heads: attention heads.
        max_text: columns of text, padding included.
        embed_dim: width of the ITC embeddings.

    Source: BLIP-2 (arXiv 2301.12597) section 3.1, and its code, `Blip2Qformer.forward`.
    """

    def __init__(
        self,
        *,
        vision_dim: int,
        vocab_size: int,
        num_queries: int = 32,
        dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        max_text: int = 32,
        embed_dim: int = 256,
        label_smoothing: float = 0.1,
    ) -> None:
        super().__init__()
        config = Blip2QFormerConfig(
            vocab_size=vocab_size,
            hidden_size=dim,
            num_hidden_layers=depth,
            num_attention_heads=num_heads,
            intermediate_size=4 * dim,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            encoder_hidden_size=vision_dim,
            use_qformer_text_input=True,
        )
        self.max_text = max_text
        self.label_smoothing = label_smoothing
        self.dec_token_id = vocab_size - 1
        self.queries = nn.Parameter(torch.randn(num_queries, dim) * 0.02)
        self.ln_vision = nn.LayerNorm(vision_dim)
        self.embeddings = Blip2TextEmbeddings(config)
        self.qformer = Blip2QFormerModel(config)
        self.vision_projection = nn.Linear(dim, embed_dim)
        self.text_projection = nn.Linear(dim, embed_dim)
        self.itm_head = nn.Linear(dim, 2)
        self.lm_dense = nn.Linear(dim, dim)
        self.lm_norm = nn.LayerNorm(dim, eps=config.layer_norm_eps)
        self.lm_bias = nn.Parameter(torch.zeros(vocab_size))
        self.temperature = nn.Parameter(torch.tensor(0.07))
        self.use("sdpa")

    def use(self, kernel: Kernel) -> None:
        """Chooses the attention of HF's class."""
        self.kernel = kernel
        self.qformer.set_attn_implementation(kernel)

    def forward(
        self, patches: Tensor, input_ids: Tensor, text_mask: Tensor, negatives: Negatives
    ) -> dict[str, Tensor]:
        """The three losses.

        Args:
            patches: (b, p, d_vision), one image a sample.
            input_ids: (b, t), [CLS] first; padded here to `max_text` columns.
            text_mask: bool (b, t), False marks padding.
            negatives: for ITM.

        Returns:
            ``itc``, ``itm`` and ``itg``, each a scalar.
        """
        pad = (0, self.max_text - input_ids.shape[1])
        input_ids, text_mask = F.pad(input_ids, pad), F.pad(text_mask, pad)
        image = self.ln_vision(patches)
        return {
            "itc": self._itc(image, input_ids, text_mask),
            "itm": self._itm(image, input_ids, text_mask, negatives),
            "itg": self._itg(image, input_ids, text_mask),
        }

    def encode(self, image: Tensor, input_ids: Tensor | None = None, mask: Tensor | None = None):
        """One pass over the queries, and over text after them where it is given.

        Shape: image (b, p, d_vision), input_ids (b, t), mask (b, n + t) or as `prepared`
        makes it -> (b, n + t, d).
        """
        queries = self.queries.expand(image.shape[0], -1, -1)
        embedded = self.embeddings(input_ids, query_embeds=queries)
        return self.qformer(
            query_embeds=embedded,
            query_length=queries.shape[1],
            attention_mask=mask,
            encoder_hidden_states=image,
        ).last_hidden_state

    def prepared(self, allowed: Tensor) -> Tensor:
        """A mask for HF's class, which leaves masks of four axes as they are.

        Shape: bool (b, s, s), True = may attend -> (b, 1, s, s).
        """
        if self.kernel == "sdpa":
            return allowed[:, None]
        floor = torch.finfo(torch.float32).min
        return torch.zeros(allowed.shape, device=allowed.device).masked_fill(~allowed, floor)[
            :, None
        ]

    def itg_states(self, image: Tensor, input_ids: Tensor, text_mask: Tensor) -> Tensor:
        """Text states under the UniLM mask: queries see queries, text queries and its past.

        Shape: image (b, p, d_vision), input_ids (b, t), text_mask bool (b, t) -> (b, t, d).
        """
        (b, t), n = input_ids.shape, self.queries.shape[0]
        allowed = torch.zeros(b, n + t, n + t, dtype=torch.bool, device=input_ids.device)
        allowed[:, :, :n] = True
        past = torch.ones(t, t, dtype=torch.bool, device=input_ids.device).tril()
        allowed[:, n:, n:] = past & text_mask[:, None]
        return self.encode(image, input_ids, self.prepared(allowed))[:, n:]

    def _itc(self, image: Tensor, input_ids: Tensor, text_mask: Tensor) -> Tensor:
        images = F.normalize(self.vision_projection(self.encode(image)).float(), dim=-1)
        states = self.qformer(
            query_embeds=self.embeddings(input_ids), query_length=0, attention_mask=text_mask
        ).last_hidden_state
        texts = F.normalize(self.text_projection(states[:, 0]).float(), dim=-1)
        similarity = torch.einsum("ind,td->itn", images, texts).amax(dim=-1) / self.temperature
        own = torch.arange(len(similarity), device=similarity.device)
        smoothing = self.label_smoothing
        to_text = F.cross_entropy(similarity, own, label_smoothing=smoothing)
        return (to_text + F.cross_entropy(similarity.T, own, label_smoothing=smoothing)) / 2

    def _itm(
        self, image: Tensor, input_ids: Tensor, text_mask: Tensor, negatives: Negatives
    ) -> Tensor:
        b, n = image.shape[0], self.queries.shape[0]
        images = torch.cat([image, image.index_select(0, negatives.images), image])
        texts = torch.cat([input_ids, input_ids, input_ids[negatives.texts]])
        masks = torch.cat([text_mask, text_mask, text_mask[negatives.texts]])
        seen = torch.cat([masks.new_ones(3 * b, n), masks], dim=1)
        logits = self.itm_head(self.encode(images, texts, seen)[:, :n]).mean(dim=1)
        labels = torch.zeros(3 * b, dtype=torch.long, device=logits.device)
        labels[:b] = 1
        return F.cross_entropy(logits.float(), labels)

    def _itg(self, image: Tensor, input_ids: Tensor, text_mask: Tensor) -> Tensor:
        labels = input_ids.masked_fill(~text_mask, -100)[:, 1:]
        input_ids = input_ids.clone()
        input_ids[:, 0] = self.dec_token_id
        states = self.itg_states(image, input_ids, text_mask)
        states = self.lm_norm(F.gelu(self.lm_dense(states)))
        logits = F.linear(states, self.embeddings.word_embeddings.weight, self.lm_bias)
        return F.cross_entropy(
            logits[:, :-1].flatten(0, 1).float(),
            labels.flatten(),
            label_smoothing=self.label_smoothing,
        )

    @torch.no_grad()
    def copy_weights(self, ours: Mapping[str, Tensor]) -> None:
        """Takes all its weights from `Stage1`'s.

        Raises:
            ValueError: the two do not have the same parameters.
        """
        own = dict(self.named_parameters())
        keys = reference_keys(ours, len(self.qformer.encoder.layer))
        found = {keys[name]: weight for name, weight in ours.items()}
        if found.keys() != own.keys():
            raise ValueError(
                f"found parameters that only one side has: {sorted(found.keys() ^ own.keys())}; "
                "expected the same on both"
            )
        for name, weight in found.items():
            own[name].copy_(weight)
