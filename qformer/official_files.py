"""Reading the files of official checkpoints: weights by their official names, nothing executed."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bridges.official import read_pickle, read_safetensors
from qformer.key_maps import Form

LM = {
    "opt_model": "the frozen LM, loaded by its own name",
    "t5_model": "the frozen LM, loaded by its own name",
    "llm_model": "the frozen LM, loaded by its own name",
    "language_model": "the frozen LM; see load_blip2",
}
VISION = {
    "visual_encoder": "the frozen vision encoder; see load_vision",
    "vision_model": "the frozen vision encoder; see load_vision",
}


def read_pth(path: Path) -> dict[str, Tensor]:
    """The state dict of a LAVIS file; the bias of its LM head under the decoder's name.

    Raises:
        ValueError: nothing there, more than weights in it, or an LM head that is not tied.
    """
    expected = "a LAVIS .pth file or a Hugging Face folder"
    state = read_pickle(path, inside="model", expected=expected)
    tied, base = "Qformer.cls.predictions", "Qformer.bert.embeddings.word_embeddings.weight"
    weight = state.get(f"{tied}.decoder.weight")
    if weight is not None and not (base in state and torch.equal(weight, state[base])):
        raise ValueError(
            f"found {tied}.decoder.weight unlike {base} in {path}; expected them to be tied, as "
            "BLIP-2 has them: only one can be kept"
        )
    if f"{tied}.bias" in state:
        state.setdefault(f"{tied}.decoder.bias", state[f"{tied}.bias"])
    return state


def read_folder(path: Path, frozen: bool) -> tuple[Form, Any, dict[str, Tensor], dict[str, str]]:
    """Form, config, weights, and keys left on the disk (with the reason) of an HF folder.

    Raises:
        ValueError: no config of such a model, or a weights file is missing.
    """
    config = read_config(path)
    form: Form = "blip2" if config.model_type == "blip-2" else "instructblip"
    state, left = read_safetensors(path, lambda key: left_out(key, frozen))
    return form, config, state, left


def read_config(path: Path) -> Any:
    """The config of an HF BLIP-2 or InstructBLIP folder.

    Raises:
        ValueError: no config, or another model's.
    """
    from transformers import AutoConfig

    if not (path / "config.json").is_file():
        raise ValueError(
            f"found no config.json in {path}; expected the folder of a Hugging Face Blip2… or "
            "InstructBlip… model, a stage-1 run, or a LAVIS .pth file"
        )
    config = AutoConfig.from_pretrained(path)
    if config.model_type not in ("blip-2", "instructblip"):
        raise ValueError(
            f"found a {config.model_type!r} model in {path}; expected blip-2 or instructblip"
        )
    return config


def left_out(key: str, frozen: bool) -> str | None:
    """Why a key is not taken; None for one that is. See `read_official` for `frozen`."""
    if key.startswith("vision_model.post_layernorm."):
        return None
    start = key.partition(".")[0]
    return LM.get(start) or (None if frozen else VISION.get(start))
