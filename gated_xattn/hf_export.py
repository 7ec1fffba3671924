"""Our models as HF Idefics folders that `from_pretrained` loads."""

from collections.abc import Callable, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bridges.model import VisionLanguageModel
from bridges.official import rename, repeat_heads, staged_folder
from bridges.projector import Projector
from bridges.vision import VisionEncoder
from gated_xattn.bridge import GatedXAttn
from gated_xattn.hf_limits import check_bridge, check_lm, check_vision
from gated_xattn.key_maps import FAKE_TOKEN, IDEFICS_BLOCKS, block_map
from gated_xattn.official_models import LANGUAGE_FIELDS, VISION, VISION_FIELDS

ResamplerForm = Callable[[nn.Module], tuple[dict[str, Any], dict[str, Tensor]]]
"""A resampler -> HF's ``perceiver_config``, and its weights by HF's names."""


def write_idefics(
    model: VisionLanguageModel, folder: str | Path, resampler_form: ResamplerForm
) -> None:
    """Writes ``IdeficsForVisionText2Text``; see `recipes.export.export_idefics`.

    Args:
        model: CLIP, a `GatedXAttn` with IDEFICS-1's settings, a Llama.
        folder: new, or empty.
        resampler_form: of the resampler, ``perceiver.official.idefics_form``; not asked where the
            patches themselves are read (``bridges.Projector`` with ``layers: 1``).

    Raises:
        ValueError: something that HF's class cannot hold, or a folder with files in it.
    """
    import transformers as hf

    check_vision(model.vision)
    lm = check_lm(model)
    bridge = check_bridge(model)
    perceiver: dict[str, Any] = {"use_resampler": False}
    state: dict[str, Tensor] = {}
    if not isinstance(bridge.resampler, Projector) or len(bridge.resampler.layers):
        perceiver, weights = resampler_form(bridge.resampler)
        state |= {f"model.perceiver_resampler.{k}": t for k, t in weights.items()}
    state |= {f"{VISION}{k}": t for k, t in model.vision.model.state_dict().items()}
    state |= _blocks(bridge)
    state |= _language(lm)
    state |= _vocabulary(model)
    added = state["model.embed_tokens.additional_embedding.weight"]
    if not len(added):
        del state["model.embed_tokens.additional_embedding.weight"]
        del state["lm_head.additional_fc.weight"]
    config = hf.IdeficsConfig(
        **_language_config(lm),
        additional_vocab_size=len(added),
        cross_layer_interval=lm.config.num_hidden_layers // len(bridge.blocks),
        qk_layer_norms=not isinstance(_first(bridge).attn.q_norm, nn.Identity),
        alpha_type="float" if _gates(bridge) == 1 else "vector",
        use_resampler=perceiver["use_resampler"],
        perceiver_config=perceiver,
        vision_config=_vision_config(model.vision),
    )
    with torch.device("meta"):
        theirs: Any = hf.IdeficsForVisionText2Text(config)
    state = {name: tensor.detach().cpu() for name, tensor in state.items()}
    theirs.load_state_dict(state, assign=True)
    ends = [model.lm.tokenizer.eos_token_id, model.lm.end_id]
    theirs.generation_config.eos_token_id = list(dict.fromkeys(ends))
    theirs.generation_config.suppress_tokens = [model.lm.image_token_id]
    with staged_folder(Path(folder)) as staged:
        theirs.save_pretrained(staged)
        _save_processor(model, staged)


def _blocks(bridge: GatedXAttn) -> dict[str, Tensor]:
    vector = _gates(bridge) > 1
    state: dict[str, Tensor] = {}
    for number, block in enumerate(bridge.blocks):
        pairs = block_map("idefics", number)
        for name, tensor in block.state_dict().items():
            theirs = rename(f"blocks.{number}.{name}", pairs)
            if theirs is None:
                raise ValueError(
                    f"found {name} in a gated block, which HF's Idefics has no name for; expected "
                    "the rows of gated_xattn.key_maps"
                )
            gate = vector and name.endswith("_gate")
            state[f"{IDEFICS_BLOCKS}.{number}.{theirs}"] = tensor[None, None] if gate else tensor
    return state


def _language(lm: Any) -> dict[str, Tensor]:
    """A Llama's blocks; grouped keys and values once for each head, as HF's Idefics has them."""
    heads, kv_heads = lm.config.num_attention_heads, lm.config.num_key_value_heads
    state = {
        k: t for k, t in lm.state_dict().items() if k.startswith(("model.layers.", "model.norm."))
    }
    for name, tensor in state.items():
        if name.endswith((".k_proj.weight", ".v_proj.weight")):
            state[name] = repeat_heads(tensor, heads, kv_heads)
    return state


def _vocabulary(model: VisionLanguageModel) -> dict[str, Tensor]:
    """Token embeddings and output rows: the LM's, and after them those of the added tokens.

    The marker is the embedding of the image. Its output row is the mean of all, whose logit is
    the mean of all logits and so never the largest; where the LM has a row at this place (of
    padding), that one is kept. Untied, since the image's two rows differ.
    """
    lm, new = model.lm, model.lm.new_tokens
    embedding = lm.model.get_input_embeddings().weight.detach()
    head = lm.model.get_output_embeddings().weight.detach()
    assert isinstance(model.bridge, GatedXAttn)
    known, image = len(embedding), lm.image_token_id
    rows = max(known, image + 1, 0 if new is None else new.width)
    matrices = []
    for weight in (embedding, head):
        mean = weight.float().mean(dim=0, keepdim=True).to(weight.dtype)
        matrices.append(torch.cat([weight, mean.expand(rows - known, -1)]))
    if new is not None:
        assert isinstance(new.ids, Tensor)
        for matrix, trained in zip(matrices, (new.embedding, new.head), strict=True):
            matrix[new.ids.to(matrix.device)] = trained.detach().to(matrix)
    matrices[0][image] = model.bridge.marker[0].detach().to(matrices[0])
    names = (
        ("model.embed_tokens.weight", "model.embed_tokens.additional_embedding.weight"),
        ("lm_head.weight", "lm_head.additional_fc.weight"),
    )
    return {
        name: part.clone()
        for matrix, pair in zip(matrices, names, strict=True)
        for name, part in zip(pair, (matrix[:known], matrix[known:]), strict=True)
    }


def _language_config(lm: Any) -> dict[str, Any]:
    config = {name: getattr(lm.config, name) for name in LANGUAGE_FIELDS}
    return config | {"tie_word_embeddings": False}


def _vision_config(vision: VisionEncoder) -> dict[str, Any]:
    config = {name: getattr(vision.model.config, name) for name in VISION_FIELDS}
    return config | {"embed_dim": config.pop("hidden_size")}


def _first(bridge: GatedXAttn) -> Any:
    return bridge.blocks[0]


def _gates(bridge: GatedXAttn) -> int:
    """Values of a gate: 1, or one for each channel."""
    return _first(bridge).attn_gate.numel()


def _save_processor(model: VisionLanguageModel, folder: Path) -> None:
    """HF's processor where it would make the same ids and pixels, else the tokenizer alone."""
    import transformers as hf

    tokenizer = deepcopy(model.lm.tokenizer)
    image: Mapping[str, Any] | None = _squash(model.vision)
    if image is None or FAKE_TOKEN not in tokenizer.get_vocab():
        tokenizer.save_pretrained(folder)
        return
    side = model.vision.image_size[0]
    processor = hf.IdeficsImageProcessor(image_size=side, **image)
    hf.IdeficsProcessor(processor, tokenizer, image_size=side).save_pretrained(folder)


def _squash(vision: VisionEncoder) -> dict[str, Any] | None:
    """Colours of a preprocessing that HF's Idefics has too: squashed to a square, normalised."""
    processor = getattr(vision.preprocess, "processor", None)
    size = getattr(processor, "size", None)
    square = size is not None and size.get("height") == size.get("width") == vision.image_size[0]
    if processor is None or not square or getattr(processor, "do_center_crop", False):
        return None
    return {"image_mean": processor.image_mean, "image_std": processor.image_std}
