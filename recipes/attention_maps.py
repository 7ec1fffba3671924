"""Where a text looks: the attention of its positions, carried from image tokens to patches."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal

import torch
from einops import rearrange
from torch import Tensor, nn

from bridges import Instruction, Projector, SoftPrefix, VisionFeatures, VisionLanguageModel
from bridges.attention import Attention
from bridges.condition import Condition
from bridges.loss import IGNORE
from bridges.sites import decoder_sites
from gated_xattn import GatedCrossAttention
from perceiver import PerceiverResampler
from qformer import QFormer
from qformer.maps import cross_attention_maps

Layer = Literal["last", "mean"]


@torch.no_grad()
def text_maps(
    model: VisionLanguageModel,
    input_ids: Tensor,
    vision: VisionFeatures,
    text: Instruction | None = None,
    layer: Layer = "mean",
) -> Tensor:
    """How much each position of a text attends to each patch of each picture.

    A composition of two readings: how the text reads the image tokens (`token_reads`) times how
    each of these tokens was made of the patches (`token_origins`). It says where attention went,
    not what caused a word: values, residual streams and feed-forwards have no part in it.

    Args:
        model: of any run whose resampler is a `Projector`, `PerceiverResampler` or `QFormer` and
            whose reader is `SoftPrefix` or `GatedXAttn`.
        input_ids: long (1, t), without padding.
        vision: features of the pictures, no padding among them.
        text: the instruction, for a resampler that reads one.
        layer: see `token_reads`.

    Returns:
        (t, i, p), fp32. Summed over patches: the share of a position's attention that goes to a
        picture. Of gated cross-attention all shares of a position make 1, or 0 where it reads no
        picture; of an LM with soft tokens the rest goes to the text.

    Raises:
        ValueError: another resampler or reader.
    """
    resampler = getattr(model.bridge, "resampler", model.bridge)
    like = next(model.bridge.parameters())
    image_mask = vision.image_mask.to(like.device)
    vision = replace(vision, patches=vision.patches.to(like), image_mask=image_mask)
    origins = token_origins(resampler, vision, text)[0]
    reads = token_reads(model, input_ids, vision, text, layer)
    return torch.einsum("tin,inp->tip", reads, origins).cpu()


def token_origins(
    resampler: nn.Module, vision: VisionFeatures, text: Instruction | None = None
) -> Tensor:
    """How much each image token was made of each patch, as far as attention tells.

    - `Projector`: a token is its patch.
    - `PerceiverResampler`: attention rollout over its layers. A layer's latent is half itself
      and half what it attends to: patches, and latents as the layer before left them.
    - `QFormer`: its cross-attention, mean over the layers that read the image.

    Heads are averaged.

    Returns:
        (b, i, n, p), fp32; a token's row sums to 1.

    Raises:
        ValueError: another resampler.

    Source: Abnar and Zuidema, Quantifying Attention Flow in Transformers (arXiv 2005.00928), for
    the rollout.
    """
    b, i, p = vision.patches.shape[:3]
    if isinstance(resampler, Projector):
        return torch.eye(p, device=vision.patches.device).expand(b, i, p, p)
    if isinstance(resampler, QFormer):
        return cross_attention_maps(resampler, vision, text).mean(dim=(2, 3))
    if not isinstance(resampler, PerceiverResampler):
        raise ValueError(
            f"found a {type(resampler).__name__} as resampler; expected bridges.Projector, "
            "perceiver.PerceiverResampler or qformer.QFormer: of others nobody knows which patch "
            "a token comes from"
        )
    found: list[Tensor] = []

    def note(block: nn.Module, arguments: tuple[Any, ...]) -> None:
        assert isinstance(block, Attention)
        queries, (keys, _), *mask = arguments
        found.append(block.weights(queries, keys, *mask).mean(dim=1))

    layers = [layer.get_submodule("attention") for layer in resampler.layers]
    with _hooked(layers, lambda layer: layer.register_forward_pre_hook(note)):
        resampler(vision, text)
    made = torch.zeros_like(found[0][..., :p])
    for weights in found:  # keys are [patches; latents]
        made = (made + weights[..., :p] + weights[..., p:] @ made) / 2
    made = made / made.sum(dim=-1, keepdim=True)
    return rearrange(made, "(b i) n p -> b i n p", b=b)


def token_reads(
    model: VisionLanguageModel,
    input_ids: Tensor,
    vision: VisionFeatures,
    text: Instruction | None,
    layer: Layer,
) -> Tensor:
    """How much each position of a text attends to each image token, heads averaged.

    Args:
        model: see `text_maps`.
        input_ids: long (1, t).
        vision: features of the pictures.
        text: see `text_maps`.
        layer: ``last``, or ``mean`` over the layers: of the gated blocks, each weighed by how far
            its attention gate is open, |tanh α|; of the LM's own layers for soft tokens.

    Returns:
        (t, i, n), fp32.

    Raises:
        ValueError: a reader that is neither gated cross-attention nor a soft prefix.
    """
    modules = [insert.module for insert in model.bridge.inserts()]
    gated = [module for module in modules if isinstance(module, GatedCrossAttention)]
    if gated and len(gated) == len(modules):
        layers = _gated_reads(model, gated, input_ids, vision, text)
        opened = torch.stack([_opening(block) for block in gated])
    elif isinstance(model.bridge, SoftPrefix):
        layers = _soft_reads(model, input_ids, vision, text)
        opened = torch.ones(len(layers), device=layers.device)
    else:
        raise ValueError(
            f"found a {type(model.bridge).__name__}; expected a gated_xattn.GatedXAttn or a "
            "bridges.SoftPrefix: only their attention to a picture is drawn"
        )
    if layer == "last":
        return layers[-1]
    if not bool(opened.any()):  # before training: all are closed
        opened = torch.ones_like(opened)
    return torch.einsum("l,ltin->tin", opened / opened.sum(), layers)


def _gated_reads(
    model: VisionLanguageModel,
    blocks: Sequence[GatedCrossAttention],
    input_ids: Tensor,
    vision: VisionFeatures,
    text: Instruction | None,
) -> Tensor:
    """(layers, t, i, m)."""
    found: list[Tensor] = []

    # Computed again from what the block is given: the block itself never has all the scores.
    def note(block: nn.Module, arguments: tuple[Any, ...]) -> None:
        assert isinstance(block, GatedCrossAttention)
        hidden, condition = arguments
        assert isinstance(condition, Condition) and condition.memory is not None
        images, tokens = condition.memory.shape[1:3]
        keys, _ = block.attn.project(rearrange(condition.memory, "b i m d -> b (i m) d"))
        seen = condition.visible_images(hidden, block.visible).repeat_interleave(tokens, dim=-1)
        blind = ~seen.any(dim=-1, keepdim=True)
        weights = block.attn.weights(block.attn_norm(hidden), keys, (seen | blind)[:, None])
        weights = weights.mean(dim=1).masked_fill(blind, 0.0)[0]
        found.append(rearrange(weights, "t (i m) -> t i m", i=images))

    with _hooked(blocks, lambda block: block.register_forward_pre_hook(note)):
        _run(model, input_ids, vision, text)
    return torch.stack(found)


def _soft_reads(
    model: VisionLanguageModel,
    input_ids: Tensor,
    vision: VisionFeatures,
    text: Instruction | None,
) -> Tensor:
    """(layers, t, i, n)."""
    lm = model.lm.model
    places = (input_ids[0] == model.lm.image_token_id).nonzero()[:, 0].to(model.lm.device)
    found: list[Tensor] = []

    def note(_module: nn.Module, _inputs: object, output: tuple[Any, ...]) -> None:
        weights = output[1][0].float().mean(dim=0)[:, places]
        found.append(rearrange(weights, "t (i n) -> t i n", n=model.bridge.num_tokens))

    paths = decoder_sites(lm).attention
    blocks = [lm.get_submodule(paths.format(i=i)) for i in range(model.lm.shape.num_layers)]
    kernel = lm.config._attn_implementation
    lm.set_attn_implementation("eager")  # the others never have the weights
    try:
        with _hooked(blocks, lambda block: block.register_forward_hook(note)):
            _run(model, input_ids, vision, text)
    finally:
        lm.set_attn_implementation(kernel)
    return torch.stack(found)


def _run(
    model: VisionLanguageModel, input_ids: Tensor, vision: VisionFeatures, text: Instruction | None
) -> None:
    """The model over a text; its loss, which nobody wants, is that of one token."""
    labels = torch.full_like(input_ids, IGNORE)
    labels[:, -1] = 0
    model(input_ids, torch.ones_like(input_ids, dtype=torch.bool), labels, vision, text)


def _opening(block: GatedCrossAttention) -> Tensor:
    """How far the attention gate of a block is open; 1 without a gate."""
    if block.attn_gate is None:
        return next(block.parameters()).new_ones((), dtype=torch.float32)
    return block.attn_gate.float().tanh().abs().mean()


@contextmanager
def _hooked(modules: Sequence[nn.Module], hook: Callable[[nn.Module], Any]) -> Iterator[None]:
    handles = [hook(module) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
