"""Run directories: a trained bridge on disk, and the frozen ends that it belongs to."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from bridges.build import bridge_factory
from bridges.files import write_json, write_tensors
from bridges.language import IMAGE_TOKEN, LanguageModel, LoRA
from bridges.model import VisionLanguageModel
from bridges.precision import Precision
from bridges.vision import VisionEncoder

FORMAT = 1
RUN_FILE = "run.json"
WEIGHTS_FILE = "bridge.safetensors"


@dataclass(frozen=True)
class VisionSource:
    """Where a frozen encoder comes from; the arguments of `VisionEncoder.load`.

    Attributes:
        name: a hub name, a local directory, or ``embedded:efficientnet-lite0``.
        layer: hidden state to take; null for the encoder's output after its final norm.
        drop_prefix: drop CLS and register tokens.
        dtype: of the frozen weights.
    """

    name: str
    layer: int | None = None
    drop_prefix: bool = True
    dtype: Precision = "auto"


@dataclass(frozen=True)
class LanguageSource:
    """Where a frozen LM comes from; the arguments of `LanguageModel.load`.

    Attributes:
        name: a hub name, a local directory, or ``embedded:smollm2-135m``.
        dtype: of the frozen weights.
        quantize: 4- or 8-bit weights by bitsandbytes.
        lora: low-rank adapters trained beside the bridge.
        gradient_checkpointing: recompute activations in backward.
        image_token: the placeholder of images.
        new_tokens: tokens whose rows are trained beside the bridge.
        end_of_chunk: the token that ends each text of a document and every completion; null for
            the tokenizer's EOS.
    """

    name: str
    dtype: Precision = "auto"
    quantize: Literal["4bit", "8bit"] | None = None
    lora: LoRA | None = None
    gradient_checkpointing: bool = False
    image_token: str = IMAGE_TOKEN
    new_tokens: list[str] = field(default_factory=list)
    end_of_chunk: str | None = None


@dataclass(frozen=True)
class RunSpec:
    """What a run is made of: enough to build its model again.

    Attributes:
        vision: the frozen encoder.
        lm: the frozen LM.
        bridge: ``class_path`` and ``init_args``, see `bridge_factory`.
        prompt: what stands before a caption.
        fingerprints: of the two frozen ends (``vision``, ``lm``), filled by `save_run`.
        format: version of this file's form.
    """

    vision: VisionSource
    lm: LanguageSource
    bridge: dict[str, Any]
    prompt: str = IMAGE_TOKEN
    fingerprints: dict[str, str] = field(default_factory=dict)
    format: int = FORMAT


def save_run(folder: Path, model: VisionLanguageModel, spec: RunSpec) -> None:
    """Writes the trained weights and `run.json`; the frozen ends are named, not stored."""
    state = {n: t.detach().cpu().contiguous() for n, t in model.trainable_state().items()}
    write_tensors(folder / WEIGHTS_FILE, state)
    fingerprints = {"vision": model.vision.fingerprint, "lm": model.lm.fingerprint}
    write_json(folder / RUN_FILE, asdict(spec) | {"fingerprints": fingerprints})


def read_run(folder: Path) -> RunSpec:
    """Reads `run.json`.

    Raises:
        ValueError: the folder holds no finished run, or one of another format.
    """
    kind = _kind(folder)
    if kind is not None:
        raise ValueError(
            f"found a {kind} run in {folder} (BLIP-2's stage-1 has no language model, for one); "
            "expected a run of a bridge: train one that starts from it with --model.init_from"
        )
    missing = [n for n in (RUN_FILE, WEIGHTS_FILE) if not (folder / n).is_file()]
    if missing:
        raise ValueError(
            f"found no {' and no '.join(missing)} in {folder}; expected a run directory: give the "
            "folder that `bridges train --run` wrote to"
        )
    try:
        raw = json.loads((folder / RUN_FILE).read_text(encoding="utf-8"))
        if raw["format"] != FORMAT:
            raise ValueError(f"format {raw['format']!r} in place of {FORMAT}")
        lora = raw["lm"].pop("lora")
        lm = LanguageSource(**raw["lm"], lora=LoRA(**lora) if lora else None)
        return RunSpec(
            VisionSource(**raw["vision"]), lm, raw["bridge"], raw["prompt"], raw["fingerprints"]
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"found a {RUN_FILE} in {folder} that does not describe a run ({error!r}); expected "
            "the file as `bridges train` wrote it: restore it, or train again"
        ) from error


def _kind(folder: Path) -> str | None:
    """What a run of another kind calls itself; None for a bridge's run, or none at all."""
    try:
        described = json.loads((folder / RUN_FILE).read_text(encoding="utf-8"))
        return described.get("kind")
    except (OSError, ValueError, AttributeError):
        return None


def check_fingerprints(
    expected: dict[str, str], vision: VisionEncoder, lm: LanguageModel | None, where: str
) -> None:
    """Refuses frozen ends that a run was not trained with; a run of stage 1 has no LM.

    Raises:
        ValueError: naming the end, with both fingerprints.
    """
    ends = {"vision": vision.fingerprint} | ({"lm": lm.fingerprint} if lm is not None else {})
    for end, found in ends.items():
        if expected.get(end) != found:
            what = "vision encoder" if end == "vision" else "language model"
            raise ValueError(
                f"found a {what} with fingerprint {found}; {where} was trained with "
                f"{expected.get(end)}: load the same weights (and the same layer), or train "
                "for this one"
            )


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a run.

    Raises:
        ValueError: a damaged file.
    """
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(
            f"found {path} damaged ({error}); expected the file as it was written: copy it again"
        ) from error


def load(
    run: str | Path,
    *,
    vision: VisionEncoder | None = None,
    lm: LanguageModel | None = None,
    device: str | torch.device | None = None,
) -> VisionLanguageModel:
    """Loads a trained bridge with its frozen ends, ready for captions.

    Args:
        run: a run directory.
        vision: the encoder, if it is loaded already; else loaded by the name in the run.
        lm: the LM, likewise.
        device: where to put the model; the GPU if there is one, else the CPU, by default.

    Raises:
        ValueError: no run there, a damaged one, or frozen ends that the bridge does not belong to.
    """
    folder = Path(run)
    spec = read_run(folder)
    # First, since a third party's package may bring its LM's row of the site table along.
    bridge = bridge_factory(spec.bridge)
    vision = vision or VisionEncoder.load(**vars(spec.vision))
    lm = lm or LanguageModel.load(**vars(spec.lm))
    check_fingerprints(spec.fingerprints, vision, lm, str(folder))
    model = VisionLanguageModel.connect(vision, lm, bridge, prompt=spec.prompt)
    model.load_trainable_state(read_weights(folder / WEIGHTS_FILE))
    return model.eval().to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
