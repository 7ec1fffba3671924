"""The workloads of `bridges bench packing`: a training step from packed rows and from padded ones.

Both are steps of one model on the same samples: ours packs them as `recipes.packing` does, the
reference pads each to the longest. Packing itself is done beforehand, as loader workers do it.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from typing import Any, Literal

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from bridges import (
    LanguageModel,
    SoftPrefix,
    VisionEncoder,
    VisionLanguageModel,
    add_image_token,
)
from bridges.loss import IGNORE
from gated_xattn import GatedXAttn
from perceiver import PerceiverResampler
from recipes.batch import CaptionBatch
from recipes.packing import pack
from recipes.workload import Side, Workload

SPECIALS = ["<pad>", "</s>"]


@dataclass(frozen=True)
class Sizes:
    """A Llama with random weights, a Perceiver before it, and the lengths of the texts.

    Attributes:
        bridge: how the LM reads the pictures.
        batch: samples, each with a picture.
        median: words of a text; the lengths are log-normal.
        spread: standard deviation of their logarithm.
        longest: words of the longest text.
        width: of the LM; this and the sizes below are SmolLM2-135M's, with 4 of its 30 blocks.
        ff_dim: inner width of its feed-forward.
        layers: blocks.
        heads: of its attention.
        kv_heads: of its keys and values.
        vocab: rows of its embedding.
        latents: tokens of a picture.
        patches: rows and columns of a picture's features.
        vision_dim: width of its features.
    """

    bridge: Literal["prefix", "gated"] = "prefix"
    batch: int = 16
    median: float = 50.0
    spread: float = 0.8
    longest: int = 256
    width: int = 576
    ff_dim: int = 1536
    layers: int = 4
    heads: int = 9
    kv_heads: int = 3
    vocab: int = 49152
    latents: int = 32
    patches: int = 14
    vision_dim: int = 384


CASES = {
    f"{bridge}-{name}": replace(Sizes(bridge), **lengths)
    for bridge in ("prefix", "gated")
    for name, lengths in {
        "instructions": {},
        # Nothing to gain: all about as long as each other.
        "captions": {"median": 12.0, "spread": 0.2},
    }.items()
}


def packing_workloads(
    device: torch.device, cases: Mapping[str, Sizes] | None = None
) -> dict[str, Callable[[], Workload]]:
    """All workloads on a device, by name."""
    models = cache(partial(_model, device=device))
    found = CASES if cases is None else cases
    return {name: partial(_workload, name, sizes, device, models) for name, sizes in found.items()}


def _workload(
    name: str,
    sizes: Sizes,
    device: torch.device,
    models: Callable[[Sizes], VisionLanguageModel],
) -> Workload:
    model = models(replace(sizes, median=0.0, spread=0.0))  # one for all lengths of text
    padded = _batch(model, sizes)
    packed = pack(padded, model.prompt_encoder(), model.lm.shape.dim, model.lm.max_length)
    sides = {"packed": packed.to(device), "padded": padded.to(device)}

    def step(batch: CaptionBatch) -> Tensor:
        text = batch.text
        loss = model(
            text.input_ids,
            text.attention_mask,
            text.labels,
            batch.features(model.vision),
            segments=batch.segments,
        ).loss
        loss.backward()
        return loss.detach()

    def checks(_: Mapping[str, int]) -> dict[str, float]:
        losses, gradients = [], []
        for batch in sides.values():
            model.zero_grad()
            losses.append(step(batch))
            gradients.append([p.grad for p in model.bridge.parameters() if p.grad is not None])
        relative = [
            float((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1e-30))
            for ours, theirs in zip(*gradients, strict=True)
        ]
        return {
            "max_abs_loss_diff": float((losses[0] - losses[1]).abs()),
            "max_rel_grad_diff": max(relative),
        }

    counted: dict[str, Any] = {}
    for side, batch in sides.items():
        counted[f"{side}_rows"], counted[f"{side}_columns"] = batch.text.input_ids.shape
        counted[f"{side}_fill"] = round(float(batch.fill), 3)
    ours, reference = (Side(partial(step, batch), model.zero_grad) for batch in sides.values())
    return Workload(name, asdict(sizes) | counted, "fp32", ours, reference, checks)


def _model(sizes: Sizes, device: torch.device) -> VisionLanguageModel:
    """In fp32, its gates open."""
    torch.manual_seed(0)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(
            WordLevel({t: i for i, t in enumerate(SPECIALS)}, unk_token="</s>")
        ),
        pad_token="<pad>",
        eos_token="</s>",
    )
    add_image_token(tokenizer)
    config = LlamaConfig(
        vocab_size=sizes.vocab,
        hidden_size=sizes.width,
        intermediate_size=sizes.ff_dim,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.kv_heads,
        tie_word_embeddings=True,
    )
    size = (sizes.patches, sizes.patches)
    encoder = VisionEncoder(
        nn.Conv2d(3, sizes.vision_dim, 1), lambda _: torch.zeros(3, *size), image_size=size
    )
    resampler = partial(PerceiverResampler, num_latents=sizes.latents, depth=2)
    bridge = {
        "prefix": partial(SoftPrefix, resampler=resampler),
        "gated": partial(GatedXAttn, resampler=resampler, gate_init=0.5),
    }[sizes.bridge]
    lm = LanguageModel(LlamaForCausalLM(config), tokenizer)
    return VisionLanguageModel.connect(encoder, lm, bridge).to(device)


def _batch(model: VisionLanguageModel, sizes: Sizes) -> CaptionBatch:
    """Random words after random features; the same at every call."""
    random = torch.Generator().manual_seed(0)
    lengths = torch.randn(sizes.batch, generator=random).mul(sizes.spread).exp() * sizes.median
    encode = model.prompt_encoder()
    first = len(SPECIALS) + 1
    rows = []
    for length in lengths.long().clamp(2, sizes.longest).tolist():
        words = torch.randint(first, sizes.vocab, (length,), generator=random).tolist()
        picture, _ = encode.document([None])
        rows.append((picture + words, [IGNORE] * len(picture) + words))
    shape = (sizes.batch, 1, sizes.patches**2, sizes.vision_dim)
    return CaptionBatch(
        torch.randn(shape, generator=random),
        model.vision.shape.grid,
        [{} for _ in rows],
        text=encode.pad(rows),
    )
