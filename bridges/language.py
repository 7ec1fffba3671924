"""The frozen causal LM, its tokenizer and its placeholder for images."""

import os
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from bridges.contract import DecoderShape
from bridges.embedded import fetch
from bridges.frozen import Frozen, fingerprint, freeze
from bridges.precision import Precision, resolve_dtype
from bridges.sites import decoder_sites
from bridges.vision import EMBEDDED

IMAGE_TOKEN = "<image>"

UNKNOWN_SCALES = ("logit_scale", "logits_scaling", "lm_head_multiplier")
"""Settings by which Cohere, Granite and Falcon-H1 scale their logits after the head."""


@dataclass(frozen=True)
class LoRA:
    """Low-rank adapters on the frozen LM, by peft (extra ``lora``).

    Attributes:
        r: rank.
        alpha: scale numerator; updates are scaled by alpha / r.
        targets: names of the linear layers that get one; peft's choice for the LM by default.
    """

    r: int = 8
    alpha: int = 16
    targets: list[str] | None = None


def add_image_token(tokenizer: Any, token: str = IMAGE_TOKEN) -> int:
    """Makes sure that the vocabulary has a placeholder for images; returns its id.

    The LM's embedding is left alone: the placeholder's row is never looked up, since soft tokens
    take its place, so the id may lie past the end of the embedding.
    """
    if token not in tokenizer.get_vocab():
        tokenizer.add_tokens([token], special_tokens=True)
    return tokenizer.convert_tokens_to_ids(token)


class LanguageModel(Frozen):
    """A frozen HF decoder LM with its tokenizer.

    Args:
        model: any ``...ForCausalLM`` whose type is in `bridges.sites.SITES`.
        tokenizer: its tokenizer, with `image_token` in its vocabulary (see `add_image_token`).
        image_token: the placeholder of images.
        lora: adapters to train beside the bridge, or None.
        gradient_checkpointing: recompute each block in backward instead of keeping its
            activations. HF checkpoints in training mode only, so the LM is put into it, with
            every dropout set to zero.

    Raises:
        ValueError: an unknown LM type, a vocabulary without a placeholder id or an EOS, embeddings
            of another width than the LM, or a head that scales its logits.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        *,
        image_token: str = IMAGE_TOKEN,
        lora: LoRA | None = None,
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        decoder_sites(model)
        if image_token not in tokenizer.get_vocab():
            raise ValueError(
                f"found a vocabulary of {len(tokenizer)} tokens without {image_token!r}; expected "
                "a placeholder id: call bridges.add_image_token(tokenizer) first"
            )
        if tokenizer.eos_token_id is None:
            raise ValueError(
                "found a tokenizer without an EOS token; expected one, it ends every caption: set "
                "tokenizer.eos_token"
            )
        self.model: Any = freeze(model)
        self.tokenizer = tokenizer
        self.image_token_id: int = tokenizer.convert_tokens_to_ids(image_token)
        self.image_token = image_token
        self.fingerprint = fingerprint(model)
        config = self.model.config
        embedding = self.model.get_input_embeddings().weight
        self.shape = DecoderShape(
            dim=config.hidden_size,
            num_layers=config.num_hidden_layers,
            num_heads=config.num_attention_heads,
            embedding_std=float(self._embed(torch.arange(min(4096, len(embedding)))).float().std()),
        )
        if embedding.shape[1] != config.hidden_size:
            raise ValueError(
                f"found token embeddings of width {embedding.shape[1]} in an LM of width "
                f"{config.hidden_size}; expected equal widths: such an LM (OPT-350M) projects its "
                "embeddings, which soft tokens would bypass"
            )
        for name in UNKNOWN_SCALES:
            if getattr(config, name, None) not in (None, 1, 1.0):
                raise ValueError(
                    f"found {name}={getattr(config, name)} in the config of a "
                    f"{config.model_type!r} LM; expected plain logits: its head scales them, which "
                    "LanguageModel.head must learn first"
                )
        self.max_length: int | None = getattr(config, "max_position_embeddings", None)
        if lora is not None:
            _add_lora(self.model, lora)
        self.recompute_context: AbstractContextManager[None] = nullcontext()
        self._checkpointing = gradient_checkpointing
        if gradient_checkpointing:
            _zero_dropout(self.model)
            # Renamed in transformers 5; the old name warns.
            name = "activation_checkpointing_enable"
            enable = getattr(self.model, name, None) or self.model.gradient_checkpointing_enable
            enable({"use_reentrant": False, "context_fn": self._checkpoint_contexts})
        self.train()

    @classmethod
    def load(
        cls,
        name: str,
        *,
        dtype: Precision = "auto",
        quantize: Literal["4bit", "8bit"] | None = None,
        lora: LoRA | None = None,
        gradient_checkpointing: bool = False,
        image_token: str = IMAGE_TOKEN,
    ) -> "LanguageModel":
        """Loads a hub name, a local directory, or ``embedded:smollm2-135m``.

        Args:
            name: where the LM and its tokenizer are.
            dtype: of the frozen weights; ``auto`` is bf16 where the device has it.
            quantize: 4- or 8-bit weights by bitsandbytes (extra ``quantize``).
            lora: see `LanguageModel`.
            gradient_checkpointing: see `LanguageModel`.
            image_token: added to the vocabulary (not to the embedding) if it is not there.
        """
        from transformers import AutoModelForCausalLM, AutoTokenizer

        if name.startswith(EMBEDDED):
            name = str(fetch(name.removeprefix(EMBEDDED)))
        extra: dict[str, Any] = {}
        if quantize is not None:
            extra["quantization_config"] = _quantization(quantize)
            if torch.cuda.is_available():  # bitsandbytes quantises on the way to the rank's GPU
                extra["device_map"] = {"": int(os.environ.get("LOCAL_RANK", 0))}
        resolved = resolve_dtype(dtype)
        if resolved == torch.bfloat16 and not torch.cuda.is_available():
            extra["attn_implementation"] = "eager"  # see `bridges.attention.attend`
        tokenizer = AutoTokenizer.from_pretrained(name)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            name, dtype=resolved, output_loading_info=True, **extra
        )
        model, report = loaded
        if report["missing_keys"]:
            missing = sorted(report["missing_keys"])
            raise ValueError(
                f"found no {missing[0]} at {name!r} ({len(missing)} weights missing); expected a "
                f"whole {type(model).__name__}, these would be random: fetch the checkpoint again"
            )
        add_image_token(tokenizer, image_token)
        return cls(
            model,
            tokenizer,
            image_token=image_token,
            lora=lora,
            gradient_checkpointing=gradient_checkpointing,
        )

    @property
    def dtype(self) -> torch.dtype:
        """Type of the token embeddings, and so of the residual stream."""
        return self.model.get_input_embeddings().weight.dtype

    @property
    def device(self) -> torch.device:
        """Where the LM is."""
        return self.model.get_input_embeddings().weight.device

    def train(self, mode: bool = True) -> "LanguageModel":
        """Stays in eval mode, except for gradient checkpointing (see the class)."""
        super().train(False)
        if self._checkpointing and mode:
            self.model.train()
        return self

    def embed(self, input_ids: Tensor) -> Tensor:
        """Token embeddings; placeholders get an arbitrary row, to be overwritten.

        Shape: (b, t) -> (b, t, d_lm).
        """
        return self._embed(input_ids.masked_fill(input_ids == self.image_token_id, 0))

    def _checkpoint_contexts(
        self,
    ) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """Around a block's first run, and around its second one in backward."""
        return nullcontext(), self.recompute_context

    def _embed(self, ids: Tensor) -> Tensor:
        return self.model.get_input_embeddings()(ids.to(self.device))

    def hidden(self, embeddings: Tensor, attention_mask: Tensor) -> Tensor:
        """Final hidden states, before the LM head.

        Positions count the attended columns only, so that left padding changes nothing.

        Shape: (b, t, d_lm), bool (b, t) -> (b, t, d_lm).
        """
        positions = (attention_mask.long().cumsum(dim=1) - 1).clamp(min=0)
        return self.model.base_model(
            inputs_embeds=embeddings,
            attention_mask=attention_mask.long(),
            position_ids=positions,
            use_cache=False,
        ).last_hidden_state

    def head(self, hidden: Tensor) -> Tensor:
        """Logits of some hidden states: (n, d_lm) -> (n, vocabulary), in fp32."""
        logits = self.model.get_output_embeddings()(hidden).float()
        cap = getattr(self.model.config, "final_logit_softcapping", None)
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def trainable_state(self) -> dict[str, Tensor]:
        """The LoRA weights by name; empty without LoRA."""
        return {n: p for n, p in self.model.named_parameters() if p.requires_grad}


def _add_lora(model: nn.Module, lora: LoRA) -> None:
    try:
        from peft import LoraConfig, inject_adapter_in_model
        from transformers.pytorch_utils import Conv1D
    except ImportError as error:
        raise ImportError("lora needs peft: pip install 'bridges[lora]'") from error
    config = LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        target_modules=lora.targets,
        fan_in_fan_out=any(isinstance(m, Conv1D) for m in model.modules()),  # GPT-2
    )
    inject_adapter_in_model(config, model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)


def _quantization(bits: str) -> Any:
    from importlib.util import find_spec

    from transformers import BitsAndBytesConfig

    if find_spec("bitsandbytes") is None:
        raise ImportError("quantize needs bitsandbytes: pip install 'bridges[quantize]'")
    if bits == "4bit":
        return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.bfloat16)
    return BitsAndBytesConfig(load_in_8bit=True)


def _zero_dropout(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in ("dropout", "attention_dropout", "layerdrop", "hidden_dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
