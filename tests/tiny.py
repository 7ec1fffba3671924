"""Tiny random models of every supported family, made from configs: no network, milliseconds."""

import string
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
import transformers as hf
from PIL import Image
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor, nn

from bridges import (
    BridgeFactory,
    LanguageModel,
    TextBatch,
    VisionEncoder,
    VisionFeatures,
    VisionLanguageModel,
    add_image_token,
    bridge_factory,
)
from bridges.preprocess import ExactDecoder

VOCABULARY = 120
"""Rows of the LMs' embeddings: a few more than the tokenizer has tokens."""

SPECIALS = ["<pad>", "<s>", "</s>", "<unk>"]
IMAGE_SIZE = 12

# Dropout everywhere, so that a frozen model which is put into training mode shows.
_LLAMA_LIKE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "attention_dropout": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

CONFIGS: dict[str, Callable[[], hf.PretrainedConfig]] = {
    # SmolLM2 is a Llama with tied embeddings.
    "llama": lambda: hf.LlamaConfig(**_LLAMA_LIKE, tie_word_embeddings=True),
    "qwen2": lambda: hf.Qwen2Config(**_LLAMA_LIKE),
    # Windows shorter than the prompts: the cache then holds fewer columns than it has seen.
    "mistral": lambda: hf.MistralConfig(**_LLAMA_LIKE, sliding_window=8),
    "gemma2": lambda: hf.Gemma2Config(
        **_LLAMA_LIKE,
        head_dim=8,
        query_pre_attn_scalar=8,
        sliding_window=8,
        attn_logit_softcapping=5.0,
        final_logit_softcapping=3.0,
    ),
    "phi3": lambda: hf.Phi3Config(**_LLAMA_LIKE, resid_pdrop=0.3, embd_pdrop=0.3),
    "gpt2": lambda: hf.GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=128,
        n_embd=32,
        n_layer=3,
        n_head=4,
        resid_pdrop=0.3,
        embd_pdrop=0.3,
        attn_pdrop=0.3,
        bos_token_id=1,
        eos_token_id=2,
    ),
    "opt": lambda: hf.OPTConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        word_embed_proj_dim=32,
        ffn_dim=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=128,
        dropout=0.3,
        attention_dropout=0.3,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    ),
    "gpt_neox": lambda: hf.GPTNeoXConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=128,
        hidden_dropout=0.3,
        attention_dropout=0.3,
        bos_token_id=1,
        eos_token_id=2,
    ),
}
FAMILIES = tuple(CONFIGS)


def randomise(model: nn.Module, seed: int = 0, std: float = 0.2) -> nn.Module:
    """Weights large enough to tell apart what a fresh initialisation (std 0.02) blurs."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim < 2:  # norms and biases stay near their start
                parameter.add_(0.1 * noise)
            else:
                parameter.copy_(std * noise)
    return model.eval()


def causal_lm(family: str, seed: int = 0, **changes: Any) -> Any:
    """A tiny ``...ForCausalLM`` with random weights."""
    config = CONFIGS[family]()
    for name, value in changes.items():
        setattr(config, name, value)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return randomise(hf.AutoModelForCausalLM.from_config(config), seed)


def make_tokenizer(*, image_token: bool = True, bos: bool = False) -> Any:
    """A tokenizer with one token for each printable character."""
    tokens = SPECIALS + sorted(set(string.printable) - set(string.whitespace)) + [" "]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    core.decoder = decoders.Fuse()
    if bos:
        core.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", vocabulary["<s>"])]
        )
    tokenizer = hf.PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
    )
    if image_token:
        add_image_token(tokenizer)
    return tokenizer


def language_model(family: str = "llama", *, dtype: torch.dtype = torch.float32, **options: Any):
    """A frozen tiny LM; options are those of `LanguageModel`."""
    return LanguageModel(causal_lm(family).to(dtype), make_tokenizer(), **options)


def preprocess(image: Image.Image) -> Tensor:
    """A PIL image -> (3, h, w) in 0…1."""
    small = image.convert("RGB").resize((IMAGE_SIZE, IMAGE_SIZE))
    return torch.from_numpy(np.array(small, dtype=np.float32) / 255).permute(2, 0, 1)


DECODER = ExactDecoder(preprocess)
"""Encoded pictures -> (3, h, w) in 0…1."""


_VIT_LIKE = {
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": IMAGE_SIZE,
    "patch_size": 4,
}

VISION: dict[str, Callable[[], nn.Module]] = {
    "clip": lambda: hf.CLIPVisionModel(
        hf.CLIPVisionConfig(**_VIT_LIKE, intermediate_size=24, attention_dropout=0.3)
    ),
    "siglip": lambda: hf.SiglipVisionModel(
        hf.SiglipVisionConfig(**_VIT_LIKE, intermediate_size=24, attention_dropout=0.3)
    ),
    "dinov2": lambda: hf.Dinov2Model(
        hf.Dinov2Config(**_VIT_LIKE, mlp_ratio=2, hidden_dropout_prob=0.3, drop_path_rate=0.3)
    ),
    "dinov2_registers": lambda: hf.Dinov2WithRegistersModel(
        hf.Dinov2WithRegistersConfig(**_VIT_LIKE, mlp_ratio=2, num_register_tokens=3)
    ),
    "vit": lambda: hf.ViTModel(
        hf.ViTConfig(**_VIT_LIKE, intermediate_size=24, hidden_dropout_prob=0.3),
        add_pooling_layer=False,
    ),
    "resnet": lambda: hf.ResNetModel(
        hf.ResNetConfig(embedding_size=8, hidden_sizes=[16, 24], depths=[1, 1], layer_type="basic")
    ),
    "convnext": lambda: hf.ConvNextModel(
        hf.ConvNextConfig(patch_size=2, hidden_sizes=[8, 16], depths=[1, 1], num_stages=2)
    ),
}


def vision_model(kind: str = "clip", seed: int = 0) -> Any:
    """A tiny HF vision model with random weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return randomise(VISION[kind](), seed)


def vision_encoder(kind: str = "clip", *, dtype: torch.dtype = torch.float32, **options: Any):
    """A frozen tiny encoder; options are those of `VisionEncoder`."""
    model = vision_model(kind).to(dtype)
    return VisionEncoder(model, preprocess, image_size=(IMAGE_SIZE, IMAGE_SIZE), **options)


# --- bridges, in the form that a YAML gives them

_LINEAR = {"class_path": "bridges.Projector", "init_args": {"layers": 1}}
_MLP = {"class_path": "bridges.Projector", "init_args": {"layers": 2}}
_QFORMER = {
    "class_path": "qformer.QFormer",
    "init_args": {"num_queries": 3, "dim": 16, "depth": 3, "num_heads": 2},
}
_PERCEIVER = {
    "class_path": "perceiver.PerceiverResampler",
    "init_args": {"num_latents": 3, "depth": 2, "num_heads": 2, "head_dim": 8},
}


def _prefix(resampler: dict[str, Any]) -> dict[str, Any]:
    return {"class_path": "bridges.SoftPrefix", "init_args": {"resampler": resampler}}


def _gated(resampler: dict[str, Any], **options: Any) -> dict[str, Any]:
    sizes = {"every": 2, "num_heads": 2, "head_dim": 8, "ff_mult": 2}
    return {
        "class_path": "gated_xattn.GatedXAttn",
        "init_args": {"resampler": resampler} | sizes | options,
    }


BRIDGES: dict[str, dict[str, Any]] = {
    "linear": _prefix(_LINEAR),
    "mlp": _prefix(_MLP),
    "qformer": _prefix(_QFORMER),
    "perceiver": _prefix(_PERCEIVER),
    "perceiver_gated": _gated(_PERCEIVER),
    "qformer_gated": _gated(_QFORMER, norm="rms", feed_forward="swiglu", qk_norm=True),
    "projector_gated": _gated(_MLP, every=1),
    "third_party": {
        "class_path": "third_party_bridge.AdapterBridge",
        "init_args": {
            "layers": 2,
            "resampler": {
                "class_path": "third_party_bridge.BandResampler",
                "init_args": {"num_bands": 2},
            },
        },
    },
}


@cache
def factory(kind: str) -> BridgeFactory:
    """The factory of a row of `BRIDGES`."""
    return bridge_factory(BRIDGES[kind])


def gates(bridge: nn.Module) -> list[nn.Parameter]:
    """The zero gates of a bridge, by their name; empty for a soft prefix."""
    return [p for name, p in bridge.named_parameters() if name.endswith("gate")]


def open_gates(bridge: nn.Module, seed: int = 0) -> None:
    """Gives every gate a random value well away from 0."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for gate in gates(bridge):
            sign = torch.randint(0, 2, gate.shape, generator=generator) * 2 - 1
            gate.copy_(sign * (0.5 + torch.rand(gate.shape, generator=generator)))


# --- batches


def features_of(
    model: VisionLanguageModel, image_counts: Sequence[int], seed: int = 0
) -> VisionFeatures:
    """Random features; rows with fewer images end in padding images full of NaN."""
    shape = model.vision.shape
    most = max(1, *image_counts)
    generator = torch.Generator().manual_seed(seed)
    patches = torch.randn(
        len(image_counts), most, shape.num_patches, shape.dim, generator=generator
    )
    mask = torch.arange(most) < torch.tensor(image_counts)[:, None]
    patches[~mask] = torch.nan
    return VisionFeatures(patches, mask, shape.grid)


def batch_of(
    model: VisionLanguageModel,
    prompts: Sequence[str],
    completions: Sequence[str] | None = None,
    *,
    padding_side: str = "right",
    seed: int = 0,
) -> tuple[TextBatch, VisionFeatures]:
    """Encoded prompts and random images for every ``<image>`` in them."""
    text = model.prompt_encoder()(prompts, completions, padding_side=padding_side)
    counts = [prompt.count(model.lm.image_token) for prompt in prompts]
    return text, features_of(model, counts, seed)


def row_of(text: TextBatch, features: VisionFeatures, row: int) -> tuple[TextBatch, VisionFeatures]:
    """One row by itself, without padding columns and padding images."""
    columns, images = text.attention_mask[row], features.image_mask[row]
    if not images.any():  # a batch needs an image axis
        images = torch.arange(len(images)) < 1
    return (
        TextBatch(
            text.input_ids[row][columns][None],
            text.attention_mask[row][columns][None],
            text.labels[row][columns][None],
        ),
        VisionFeatures(
            features.patches[row][images][None],
            features.image_mask[row][images][None],
            features.grid,
        ),
    )
