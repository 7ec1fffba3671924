"""Our models as HF folders that `from_pretrained` loads: BLIP-2, InstructBLIP and retrieval."""

from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bridges.model import VisionLanguageModel
from bridges.official import rename, staged_folder
from bridges.vision import VisionEncoder
from qformer.hf_limits import check_encoder, check_lm, check_norm, check_prompt, soft_prefix
from qformer.key_maps import HF_LEAVES_OUT, Form, key_map
from qformer.official import sizes_of
from qformer.resampler import QFormer
from qformer.stage1 import Stage1

VISION_FIELDS = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "image_size",
    "patch_size",
    "hidden_act",
    "layer_norm_eps",
    "attention_dropout",
    "qkv_bias",
)
"""What both vision configs of HF have."""


def export_blip2(model: VisionLanguageModel, folder: str | Path) -> None:
    """Writes ``Blip2ForConditionalGeneration``; with a text branch ``InstructBlip…``.

    Tokenizer and image processor go along as far as they are HF's. The prompt has no place there.

    Args:
        model: HF's BLIP-2 encoder, a soft prefix with a Q-Former, any causal LM.
        folder: new, or empty.

    Raises:
        ValueError: something that HF's class cannot hold, or a folder with files in it.
    """
    import transformers as hf

    check_encoder(model.vision)
    qformer, projection = soft_prefix(model)
    lm = check_lm(model)
    check_prompt(model)
    check_norm(model.vision, qformer)
    instruct = qformer.vocab_size is not None
    form: Form = "instructblip" if instruct else "blip2"
    rows = max(lm.config.vocab_size, model.lm.image_token_id + 1)
    text_config = lm.config.to_dict() | {
        "vocab_size": rows,
        # Captions end where they were trained to end.
        "eos_token_id": model.lm.tokenizer.eos_token_id,
    }
    sub = {
        "vision_config": _vision_config(model.vision),
        "qformer_config": _qformer_config(qformer) | ({} if instruct else _NO_TEXT),
        "text_config": text_config,
        "num_query_tokens": qformer.num_tokens,
        "image_token_index": model.lm.image_token_id,
    }
    ours = {f"qformer.{k}": t for k, t in qformer.state_dict().items()}
    ours |= {f"projection.{k}": t for k, t in projection.state_dict().items()}
    ours |= {f"vision.{k}": t for k, t in _encoder_state(model.vision).items()}
    ours |= {f"lm.{k}": t for k, t in _lm_state(lm, rows).items()}
    config_class = hf.InstructBlipConfig if instruct else hf.Blip2Config
    model_class: Any = (
        hf.InstructBlipForConditionalGeneration if instruct else hf.Blip2ForConditionalGeneration
    )
    with torch.device("meta"):
        theirs = model_class(config_class(**sub))
    theirs.load_state_dict(_their_names(ours, form, len(qformer.layers)), assign=True)
    with staged_folder(Path(folder)) as staged:
        theirs.save_pretrained(staged)
        _save_processor(model, qformer, staged)


def export_retrieval(vision: VisionEncoder, stage1: Stage1, folder: str | Path) -> dict[str, str]:
    """Writes ``Blip2ForImageTextRetrieval``.

    Args:
        vision: HF's BLIP-2 encoder.
        stage1: the Q-Former with its heads.
        folder: new, or empty.

    Returns:
        Our weights that HF has no place for, with the reason.

    Raises:
        ValueError: something that HF's class cannot hold, or a folder with files in it.
    """
    import transformers as hf

    check_encoder(vision)
    qformer = stage1.qformer
    check_norm(vision, qformer)
    state = stage1.state_dict()
    left = {k: r for k in state if (r := HF_LEAVES_OUT.get(k.partition(".")[0])) is not None}
    ours = {k: t for k, t in state.items() if k not in left}
    ours |= {f"vision.{k}": t for k, t in _encoder_state(vision).items()}
    config = hf.Blip2Config(
        vision_config=_vision_config(vision),
        qformer_config=_qformer_config(qformer) | {"use_qformer_text_input": True},
        num_query_tokens=qformer.num_tokens,
        image_text_hidden_size=stage1.vision_projection.out_features,
    )
    with torch.device("meta"):
        theirs: Any = hf.Blip2ForImageTextRetrieval(config)
    theirs.load_state_dict(_their_names(ours, "blip2", len(qformer.layers)), assign=True)
    with staged_folder(Path(folder)) as staged:
        theirs.save_pretrained(staged)
        if (processor := _image_processor(vision)) is not None:
            processor.save_pretrained(staged)
        if qformer.tokenizer is not None:
            qformer.tokenizer.save_pretrained(staged)
    return left


_NO_TEXT = {"use_qformer_text_input": False}


def _vision_config(vision: VisionEncoder) -> dict[str, Any]:
    return {name: getattr(vision.model.config, name) for name in VISION_FIELDS}


def _qformer_config(qformer: QFormer) -> dict[str, Any]:
    sizes = sizes_of(qformer)
    config = {
        "hidden_size": sizes.dim,
        "num_hidden_layers": sizes.depth,
        "num_attention_heads": sizes.num_heads,
        "intermediate_size": sizes.ff_dim,
        "cross_attention_frequency": sizes.cross_attention_every,
        "encoder_hidden_size": sizes.vision_dim,
    }
    if sizes.vocab_size is not None:
        config |= {
            "vocab_size": sizes.vocab_size,
            "max_position_embeddings": sizes.max_text,
        }
    return config


def _encoder_state(vision: VisionEncoder) -> dict[str, Tensor]:
    """Without the norm after the last block, whose place the Q-Former's `ln_vision` takes."""
    state = vision.model.state_dict().items()
    return {k: t for k, t in state if not k.startswith("post_layernorm.")}


def _lm_state(lm: Any, rows: int) -> dict[str, Tensor]:
    """The LM's weights, with vocabulary rows up to the placeholder's.

    HF looks the placeholder up before it overwrites it. A new row is the mean of all, whose logit
    is the mean of all logits and so never the largest.
    """
    heads = [lm.get_input_embeddings(), lm.get_output_embeddings()]
    padded = {t.data_ptr(): t for head in heads for t in head.state_dict().values()}
    for address, tensor in padded.items():
        mean = tensor.float().mean(dim=0, keepdim=True).to(tensor.dtype)
        new = mean.expand(rows - len(tensor), *tensor.shape[1:])
        padded[address] = torch.cat([tensor, new]) if len(new) else tensor
    return {k: padded.get(t.data_ptr(), t) for k, t in lm.state_dict().items()}


def _their_names(ours: Mapping[str, Tensor], form: Form, depth: int) -> dict[str, Tensor]:
    pairs = key_map(form, depth)
    state: dict[str, Tensor] = {}
    for name, tensor in ours.items():
        theirs = rename(name, pairs)
        if theirs is None:
            raise ValueError(
                f"found {name}, which {form} has no name for; expected the rows of qformer.key_maps"
            )
        state[theirs] = tensor.detach().cpu()
    state["query_tokens"] = state["query_tokens"][None]
    return state


def _image_processor(vision: VisionEncoder) -> Any | None:
    processor = getattr(vision.preprocess, "processor", None)
    return processor if hasattr(processor, "save_pretrained") else None


def _save_processor(model: VisionLanguageModel, qformer: QFormer, folder: Path) -> None:
    import transformers as hf

    image, tokenizer = _image_processor(model.vision), deepcopy(model.lm.tokenizer)
    numbers = {"num_query_tokens": qformer.num_tokens}
    if image is None or (qformer.vocab_size is not None and qformer.tokenizer is None):
        tokenizer.save_pretrained(folder)
    elif qformer.vocab_size is None:
        hf.Blip2Processor(image, tokenizer, **numbers).save_pretrained(folder)
    else:
        both = (tokenizer, deepcopy(qformer.tokenizer))
        hf.InstructBlipProcessor(image, *both, **numbers).save_pretrained(folder)
