"""Tiny random BLIP-2 and InstructBLIP models of HF, and what LAVIS would have saved of them."""

from typing import Any

import tiny
import torch
import transformers as hf
from torch import Tensor

from bridges import Instruction

QUERIES, DIM, DEPTH, VISION_DIM, VOCABULARY, MAX_TEXT = 5, 128, 3, 24, 40, 16
STD = 0.1  # sums over 128 with more would not be exact to 1e-5
TOKENIZER = tiny.make_tokenizer()


def config(cls: Any = hf.Blip2Config, *, text: bool = False) -> Any:
    """Sizes small enough for milliseconds; heads of width 64, as LAVIS has them."""
    qformer = {
        "hidden_size": DIM,
        "num_hidden_layers": DEPTH,
        "num_attention_heads": 2,
        "intermediate_size": 96,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": MAX_TEXT,
    }
    extra: dict[str, Any] = {}
    if cls is hf.Blip2Config:
        qformer["use_qformer_text_input"] = text
        extra["image_text_hidden_size"] = 8
    if not text or cls is hf.InstructBlipConfig:
        extra["image_token_index"] = TOKENIZER.convert_tokens_to_ids("<image>")
    return cls(
        vision_config={
            "hidden_size": VISION_DIM,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": tiny.IMAGE_SIZE,
            "patch_size": 4,
        },
        qformer_config=qformer,
        text_config=tiny.CONFIGS["opt"]().to_dict(),
        num_query_tokens=QUERIES,
        **extra,
    )


def blip2() -> Any:
    """A `Blip2ForConditionalGeneration` with OPT."""
    return _with_lm(hf.Blip2ForConditionalGeneration(config()))


def instructblip() -> Any:
    """An `InstructBlipForConditionalGeneration` with OPT."""
    return _with_lm(hf.InstructBlipForConditionalGeneration(config(hf.InstructBlipConfig)))


def _with_lm(model: Any) -> Any:
    tiny.randomise(model, std=STD)
    # Otherwise the LM would write one token again and again.
    tiny.randomise(model.language_model, seed=3, std=0.3)
    return model


def retrieval() -> Any:
    """A `Blip2ForImageTextRetrieval`."""
    return tiny.randomise(hf.Blip2ForImageTextRetrieval(config(text=True)), std=STD)


def pixels(seed: int = 0) -> Tensor:
    """Two pictures."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, 3, tiny.IMAGE_SIZE, tiny.IMAGE_SIZE, generator=generator)


def text() -> Instruction:
    """Two texts of different lengths in the Q-Former's vocabulary."""
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]], dtype=torch.bool)
    ids = torch.tensor([[2, 7, 9, 11, 3], [2, 8, 3, 0, 0]])
    return Instruction(ids, mask)


# What HF's own conversion of LAVIS's files replaced, backwards: it knows nothing of our tables.
_FROM_HF = (
    ("vision_model.post_layernorm", "ln_vision"),
    ("vision_model.embeddings.class_embedding", "visual_encoder.cls_token"),
    ("vision_model.embeddings.position_embedding", "visual_encoder.pos_embed"),
    ("vision_model.embeddings.patch_embedding", "visual_encoder.patch_embed.proj"),
    ("vision_model.encoder.layers", "visual_encoder.blocks"),
    ("layer_norm", "norm"),
    ("self_attn.projection", "attn.proj"),
    ("self_attn", "attn"),
    ("qformer.layernorm", "Qformer.bert.embeddings.LayerNorm"),
    ("qformer.encoder", "Qformer.bert.encoder"),
    ("attention.attention", "attention.self"),
    ("_projection", "_proj"),
)
_HEAD = "Qformer.cls.predictions"


def lavis_state(theirs: Any, lm_head: Any, temperature: Tensor) -> dict[str, Tensor]:
    """The state dict that LAVIS would save of HF's retrieval model and an LM head of ours."""
    state = {"temp": temperature.detach().clone()}
    for name, tensor in theirs.state_dict().items():
        if name.startswith("embeddings."):
            name = f"Qformer.bert.{name}"
        for old, new in _FROM_HF:
            name = name.replace(old, new)
        if name.endswith("qkv.bias"):
            q, k, v = tensor.chunk(3)
            assert not k.any()
            state[name.replace("qkv.bias", "q_bias")] = q.clone()
            state[name.replace("qkv.bias", "v_bias")] = v.clone()
        else:
            state[name] = tensor.clone()
    for name, tensor in lm_head.state_dict().items():
        name = name.replace("dense", "transform.dense").replace("norm", "transform.LayerNorm")
        state[f"{_HEAD}.{name}"] = tensor.clone()
    state[f"{_HEAD}.decoder.bias"] = state[f"{_HEAD}.bias"].clone()
    state[f"{_HEAD}.decoder.weight"] = theirs.embeddings.word_embeddings.weight.detach().clone()
    state["Qformer.bert.embeddings.position_ids"] = torch.arange(MAX_TEXT)[None]
    return state
