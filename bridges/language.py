"""The frozen causal LM, its tokenizer and its placeholder for images."""

import os
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from bridges.contract import DecoderShape
from bridges.embedded import fetch
from bridges.frozen import Frozen, fingerprint, freeze
from bridges.new_tokens import NewTokens
from bridges.precision import Precision, resolve_dtype
from bridges.sites import decoder_sites
from bridges.vision import EMBEDDED

IMAGE_TOKEN = "<image>"

UNPACKABLE = ("opt",)
"""Types of LMs in which HF puts a mask of ones in the place of none, so that samples mix."""

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
        new_tokens: tokens whose rows are trained beside the bridge, see `NewTokens`; added to the
            tokenizer where it lacks them.
        end_of_chunk: the token that ends each text of an interleaved document, and every
            completion (Flamingo's ``<EOC>``); one that the LM has no row of becomes a new token.
            None for the tokenizer's EOS.
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
        new_tokens: Sequence[str] = (),
        end_of_chunk: str | None = None,
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
        self.end_of_chunk = end_of_chunk
        self.new_tokens = self._new_tokens(list(new_tokens))
        self.end_id: int = tokenizer.eos_token_id
        if end_of_chunk is not None:
            self.end_id = tokenizer.convert_tokens_to_ids(end_of_chunk)
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
        new_tokens: Sequence[str] = (),
        end_of_chunk: str | None = None,
    ) -> "LanguageModel":
        """Loads a hub name, a local directory, or ``embedded:smollm2-135m``.

        Args:
            name: where the LM and its tokenizer are.
            dtype: of the frozen weights; ``auto`` is bf16 where the device has it.
            quantize: 4- or 8-bit weights by bitsandbytes (extra ``quantize``).
            lora: see `LanguageModel`.
            gradient_checkpointing: see `LanguageModel`.
            image_token: added to the vocabulary (not to the embedding) if it is not there.
            new_tokens: see `LanguageModel`.
            end_of_chunk: see `LanguageModel`.
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
            new_tokens=new_tokens,
            end_of_chunk=end_of_chunk,
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

    def hidden(
        self,
        embeddings: Tensor,
        attention_mask: Tensor,
        *,
        segments: Tensor | None = None,
        cache: Any = None,
    ) -> Tensor:
        """Final hidden states, before the LM head.

        Positions count the attended columns only, so that left padding changes nothing.

        Args:
            embeddings: (b, t, d_lm).
            attention_mask: bool (b, t), with a cache (b, past + t).
            segments: long (b, t), which sample of a packed row each column belongs to: none
                looks at another, and each counts its positions from 0.
            cache: an HF ``Cache`` to read and to fill.

        Returns:
            (b, t, d_lm).

        Raises:
            ValueError: segments together with a cache, or for an LM that cannot keep the samples
                of a row apart.
        """
        if segments is not None:
            if cache is not None:
                raise ValueError("found segments with a cache; expected one of them: leave one out")
            self.check_packable()
            # HF sees by the positions where a packed sample begins, if it is given no mask.
            mask, positions = None, packed_positions(segments, attention_mask)
        else:
            mask = attention_mask.long()
            positions = (mask.cumsum(dim=1) - 1).clamp(min=0)[:, -embeddings.shape[1] :]
        options = {} if cache is None else {"past_key_values": cache}
        return self.model.base_model(
            inputs_embeds=embeddings,
            attention_mask=mask,
            position_ids=positions,
            use_cache=cache is not None,
            **options,
        ).last_hidden_state

    def check_packable(self) -> None:
        """Refuses packed rows for an LM that cannot keep the samples of a row apart.

        Raises:
            ValueError: naming its type, or its attention.
        """
        config = self.model.config
        attention = str(getattr(config, "_attn_implementation", None))
        if config.model_type in UNPACKABLE:
            raise ValueError(
                f"found packed rows for an LM of type {config.model_type!r}, in which the samples "
                "of a row would see each other; expected one sample a row: leave data.pack (or "
                "segments) out"
            )
        if "flash" in attention:
            # HF's flash attention knows of packed samples in a batch of one row only.
            raise ValueError(
                f"found packed rows for an LM with attn_implementation={attention!r}, in which "
                "the samples of a row would see each other; expected 'sdpa' or 'eager': load the "
                "LM with one of these, or leave data.pack (or segments) out"
            )

    def head(self, hidden: Tensor) -> Tensor:
        """Logits of some hidden states: (n, d_lm) -> (n, vocabulary), in fp32."""
        logits = self.model.get_output_embeddings()(hidden).float()
        cap = getattr(self.model.config, "final_logit_softcapping", None)
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def trainable_state(self) -> dict[str, Tensor]:
        """The LoRA weights and the rows of new tokens by name."""
        return {
            name.removeprefix("model."): parameter
            for name, parameter in self.named_parameters()
            if parameter.requires_grad
        }

    def _new_tokens(self, tokens: list[str]) -> NewTokens | None:
        """The trained rows, if there are any."""
        known = len(self.model.get_input_embeddings().weight)
        vocabulary = self.tokenizer.get_vocab()
        end = self.end_of_chunk
        if end is not None and end not in tokens and vocabulary.get(end, known) >= known:
            tokens = [*tokens, end]
        if self.image_token in tokens:
            raise ValueError(
                f"found the image token {self.image_token!r} among new_tokens; expected others: "
                "the bridge's soft tokens stand in its place"
            )
        if not tokens:
            return None
        self.tokenizer.add_tokens([t for t in tokens if t not in vocabulary], special_tokens=True)
        return NewTokens(self.model, self.tokenizer.convert_tokens_to_ids(tokens))


def packed_positions(segments: Tensor, attention_mask: Tensor) -> Tensor:
    """Positions that begin anew with every sample of a packed row: long (b, t).

    Padding is a sample of its own, so that nothing looks at it.

    Args:
        segments: long (b, t), ids of samples that stand side by side.
        attention_mask: bool (b, t).
    """
    columns = torch.arange(segments.shape[1], device=segments.device).expand_as(segments)
    begins = (segments != segments.roll(1, 1)) | (attention_mask != attention_mask.roll(1, 1))
    begins[:, 0] = True
    return columns - columns.masked_fill(~begins, 0).cummax(dim=1).values


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
