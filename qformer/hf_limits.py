"""What HF's BLIP-2 classes can hold of a bridge, checked before anything is written."""

import warnings
from typing import Any

from torch import nn

from bridges.model import VisionLanguageModel
from bridges.soft_prefix import SoftPrefix
from bridges.vision import VisionEncoder
from qformer.resampler import QFormer

ENCODERS = ("Blip2VisionModel", "InstructBlipVisionModel")


def check_encoder(vision: VisionEncoder) -> None:
    """Refuses an encoder, or a choice of its tokens, that HF's BLIP-2 does not have."""
    name = type(vision.model).__name__
    if name not in ENCODERS:
        raise ValueError(
            f"found a {name} as vision encoder; expected {' or '.join(ENCODERS)}, the one that "
            "HF's BLIP-2 classes hold: other encoders have no Hugging Face form, keep the run"
        )
    last: Any = vision.model.config
    if vision.layer not in (-1, last.num_hidden_layers) or vision.drop_prefix:
        raise ValueError(
            f"found layer={vision.layer} and drop_prefix={vision.drop_prefix}; expected layer=-1 "
            "and drop_prefix=False: HF's classes read all tokens of the last block"
        )


def check_norm(vision: VisionEncoder, qformer: QFormer) -> None:
    """Warns of an epsilon of `ln_vision` that HF cannot keep."""
    config: Any = vision.model.config
    if qformer.ln_vision.eps != config.layer_norm_eps:
        warnings.warn(
            f"found ln_vision_eps={qformer.ln_vision.eps}; HF has one epsilon for this norm and "
            f"the encoder's, {config.layer_norm_eps}: outputs differ in the last digits",
            stacklevel=3,
        )


def soft_prefix(model: VisionLanguageModel) -> tuple[QFormer, nn.Linear]:
    """The Q-Former and the projection of a model's bridge; refuses any other bridge."""
    bridge = model.bridge
    resampler = getattr(bridge, "resampler", None)
    if not isinstance(bridge, SoftPrefix) or not isinstance(resampler, QFormer):
        raise ValueError(
            f"found a {type(bridge).__name__} with a {type(resampler).__name__}; expected a "
            "SoftPrefix with a QFormer, all that HF's BLIP-2 classes hold: keep the run"
        )
    if not isinstance(bridge.norm, nn.Identity):
        raise ValueError(
            "found match_embedding_scale=True, a norm on the soft tokens; expected none, since "
            "HF's BLIP-2 classes have no place for it: train with match_embedding_scale=False"
        )
    return resampler, bridge.projection


def check_lm(model: VisionLanguageModel) -> Any:
    """The plain HF model of a model's LM; refuses what has no place in HF's BLIP-2."""
    from transformers import AutoModelForCausalLM

    lm = model.lm.model
    if type(lm.config) not in AutoModelForCausalLM._model_mapping:
        raise ValueError(
            f"found a {type(lm).__name__} as LM; expected one that AutoModelForCausalLM makes, "
            "since HF's BLIP-2 classes build theirs by it"
        )
    if model.lm.trainable_state():
        raise ValueError(
            "found LoRA weights in the LM; expected a plain one, since HF's BLIP-2 classes have "
            "no place for them: train without lora to export"
        )
    if getattr(lm, "is_quantized", False):
        raise ValueError(
            "found a quantised LM; expected plain weights: load the run with quantize=None"
        )
    return lm


def check_prompt(model: VisionLanguageModel) -> None:
    """HF's processor writes images, BOS, text; a bridge that saw another order is told so."""
    ids = model.prompt_encoder()([model.prompt], questions=[""]).input_ids[0].tolist()
    if ids[: model.bridge.num_tokens] != [model.lm.image_token_id] * model.bridge.num_tokens:
        warnings.warn(
            f"found the prompt {model.prompt!r} (with its BOS) not beginning with the image; HF's "
            "processor puts the image first: build input_ids by PromptEncoder instead",
            stacklevel=3,
        )
