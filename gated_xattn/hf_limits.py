"""What HF's Idefics class can hold of a bridge, checked before anything is written."""

import warnings
from typing import Any

from torch import nn

from bridges.model import VisionLanguageModel
from bridges.vision import VisionEncoder
from gated_xattn.bridge import GatedXAttn
from gated_xattn.layers import GatedCrossAttention


def check_vision(vision: VisionEncoder) -> None:
    """Refuses an encoder, or a choice of its tokens, that HF's Idefics does not have."""
    name = type(vision.model).__name__
    if name != "CLIPVisionModel":
        raise ValueError(
            f"found a {name} as vision encoder; expected a CLIPVisionModel, whose copy HF's "
            "Idefics holds: other encoders have no Hugging Face form, keep the run"
        )
    config: Any = vision.model.config
    if vision.layer not in (None, -1, config.num_hidden_layers) or vision.drop_prefix:
        raise ValueError(
            f"found layer={vision.layer} and drop_prefix={vision.drop_prefix}; expected layer: "
            "null (or -1) and drop_prefix: false, since HF's Idefics reads all tokens of the last "
            "block, CLS included: train with these to export"
        )


def check_lm(model: VisionLanguageModel) -> Any:
    """The plain HF model of a model's LM; refuses what is no Llama as HF's Idefics has it."""
    lm = model.lm.model
    config = lm.config
    if config.model_type != "llama":
        raise ValueError(
            f"found a {config.model_type!r} LM; expected a Llama (SmolLM2 is one), whose blocks "
            "HF's Idefics has: other LMs have no Hugging Face form, keep the run"
        )
    trained = [name for name in model.lm.trainable_state() if "lora_" in name]
    if trained:
        raise ValueError(
            "found LoRA weights in the LM; expected a plain one, since HF's Idefics has no place "
            "for them: train without lora to export"
        )
    if getattr(lm, "is_quantized", False):
        raise ValueError(
            "found a quantised LM; expected plain weights: load the run with quantize=None"
        )
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    limits = (
        (config.attention_bias, "biases in its attention"),
        (config.mlp_bias, "biases in its feed-forward"),
        (
            head_dim * config.num_attention_heads != config.hidden_size,
            f"heads of width {head_dim}, not {config.hidden_size // config.num_attention_heads}",
        ),
    )
    if problems := [what for wrong, what in limits if wrong]:
        raise ValueError(
            f"found an LM with {' and '.join(problems)}; expected none, since HF's Idefics has no "
            "place for them: such an LM has no Hugging Face form, keep the run"
        )
    return lm


def check_bridge(model: VisionLanguageModel) -> GatedXAttn:
    """The bridge of a model; refuses what is not IDEFICS-1's."""
    bridge = model.bridge
    if not isinstance(bridge, GatedXAttn):
        raise ValueError(
            f"found a {type(bridge).__name__}; expected a GatedXAttn, all that HF's Idefics "
            "holds: keep the run"
        )
    config = model.lm.model.config
    block = bridge.blocks[0]
    assert isinstance(block, GatedCrossAttention)
    attn, places = block.attn, bridge.block_indices
    every = places[1] - places[0] if len(places) > 1 else config.num_hidden_layers
    heads, eps = config.num_attention_heads, config.rms_norm_eps
    head_dim, inner = config.hidden_size // heads, config.intermediate_size
    width = attn.q.out_features // attn.num_heads
    limits = (
        (places != [*range(0, config.num_hidden_layers, every)], f"blocks at {places}", "first: 0"),
        (
            config.num_hidden_layers % every != 0,
            f"every={every} for {config.num_hidden_layers} LM blocks",
            "a divisor as every",
        ),
        (attn.num_heads != heads, f"num_heads={attn.num_heads}", f"num_heads: {heads}, the LM's"),
        (width != head_dim, f"head_dim={width}", f"head_dim: {head_dim}, the LM's"),
        (not isinstance(block.attn_norm, nn.RMSNorm), "norms that are no RMSNorm", "norm: rms"),
        (block.attn_norm.eps != eps, f"norm_eps={block.attn_norm.eps}", f"norm_eps: {eps}, its"),
        (
            not isinstance(block.ff.activation, nn.SiLU) or config.hidden_act != "silu",
            "another feed-forward than the LM's",
            "feed_forward: swiglu over an LM with silu",
        ),
        (
            block.ff.up.out_features != inner,
            f"a feed-forward of width {block.ff.up.out_features}",
            f"ff_mult: {inner / config.hidden_size:g}, the LM's {inner}",
        ),
        (block.attn_gate is None, "no gates", "gate: scalar or channel"),
    )
    if problems := [f"{what} ({fix} has a place)" for wrong, what, fix in limits if wrong]:
        raise ValueError(
            f"found in the bridge {', '.join(problems)}; expected IDEFICS-1's settings, all that "
            "HF's Idefics holds: train with these to export"
        )
    if block.visible != "latest":
        warnings.warn(
            f"found visible={block.visible!r}; HF's processor shows each token its latest image: "
            "make image_attention_mask yourself",
            stacklevel=3,
        )
    return bridge
