"""Where the blocks of a decoder LM are: one row per model type."""

from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class DecoderSites:
    """Module paths of one family of causal LMs, relative to the ``...ForCausalLM`` module.

    Attributes:
        decoder: the module that owns the blocks and receives ``past_key_values``.
        block: a decoder block, with ``{i}`` for its index.
        attention: its self-attention.
    """

    decoder: str
    block: str
    attention: str


_LLAMA = DecoderSites("model", "model.layers.{i}", "model.layers.{i}.self_attn")

SITES: dict[str, DecoderSites] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "gemma": _LLAMA,
    "gemma2": _LLAMA,
    "phi3": _LLAMA,
    "gpt2": DecoderSites("transformer", "transformer.h.{i}", "transformer.h.{i}.attn"),
    "opt": DecoderSites(
        "model.decoder", "model.decoder.layers.{i}", "model.decoder.layers.{i}.self_attn"
    ),
    "gpt_neox": DecoderSites("gpt_neox", "gpt_neox.layers.{i}", "gpt_neox.layers.{i}.attention"),
}


def decoder_sites(lm: nn.Module) -> DecoderSites:
    """The row of `SITES` for an HF causal LM.

    Raises:
        ValueError: the model type has no row, with the way to add one.
    """
    model_type = str(getattr(getattr(lm, "config", None), "model_type", type(lm).__name__))
    if model_type not in SITES:
        raise ValueError(
            f"found an LM of type {model_type!r}; expected one of {', '.join(sorted(SITES))}. If "
            "it is a decoder-only LM, add its module paths: "
            f"bridges.sites.SITES[{model_type!r}] = DecoderSites(decoder=..., block=..., "
            "attention=...); print(lm) shows them"
        )
    return SITES[model_type]
