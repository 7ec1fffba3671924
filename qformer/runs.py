"""Stage-1 runs on disk: the Q-Former with its heads, and the encoder that it belongs to."""

import inspect
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bridges.files import write_json, write_tensors
from bridges.run import RUN_FILE, VisionSource, check_fingerprints, read_run, read_weights
from bridges.run import WEIGHTS_FILE as BRIDGE_FILE
from bridges.vision import VisionEncoder
from qformer.official import TEXT_BRANCH
from qformer.resampler import QFormer
from qformer.stage1 import Stage1

KIND = "blip2_stage1"
FORMAT = 1
WEIGHTS_FILE = "stage1.safetensors"
QFORMER = "qformer."


@dataclass(frozen=True)
class Stage1Spec:
    """What a stage-1 run is made of: enough to build its model again.

    Attributes:
        vision: the frozen encoder.
        qformer: arguments of `QFormer`, but for the encoder's sizes.
        stage1: arguments of `Stage1`, but for the Q-Former.
        max_text_tokens: to which texts were cut in training.
        fingerprints: of the encoder (``vision``), filled by `save_stage1`.
    """

    vision: VisionSource
    qformer: dict[str, Any] = field(default_factory=dict)
    stage1: dict[str, Any] = field(default_factory=dict)
    max_text_tokens: int = 32
    fingerprints: dict[str, str] = field(default_factory=dict)

    def build(self, vision: VisionEncoder) -> Stage1:
        """The model, untrained.

        Raises:
            ValueError: an argument that there is not.
        """
        try:
            return Stage1(QFormer(vision=vision.shape, **self.qformer), **self.stage1)
        except TypeError as error:
            raise ValueError(
                f"found sizes of a stage-1 run that cannot be built ({error}); expected the "
                f"{RUN_FILE} as `bridges train` wrote it: restore it, or train again"
            ) from error


def save_stage1(folder: Path, stage1: Stage1, spec: Stage1Spec, vision: VisionEncoder) -> None:
    """Writes the weights and `run.json`; the encoder is named, not stored."""
    state = {n: t.detach().cpu().contiguous() for n, t in stage1.state_dict().items()}
    write_tensors(folder / WEIGHTS_FILE, state)
    described = asdict(spec) | {"fingerprints": {"vision": vision.fingerprint}}
    write_json(folder / RUN_FILE, {"format": FORMAT, "kind": KIND} | described)


def is_stage1_run(folder: Path) -> bool:
    """Whether a folder holds a stage-1 run."""
    return (folder / WEIGHTS_FILE).is_file() and (folder / RUN_FILE).is_file()


def read_stage1(folder: Path) -> Stage1Spec:
    """Reads `run.json`.

    Raises:
        ValueError: the folder holds no finished stage-1 run, or one of another format.
    """
    if not is_stage1_run(folder):
        raise ValueError(
            f"found no {RUN_FILE} with {WEIGHTS_FILE} in {folder}; expected a stage-1 run: give "
            "the folder that `bridges train --config blip2_stage1… --run` wrote to"
        )
    try:
        raw = json.loads((folder / RUN_FILE).read_text(encoding="utf-8"))
        found = (raw.pop("format"), raw.pop("kind"))
        if found != (FORMAT, KIND):
            raise ValueError(f"format and kind {found} in place of {(FORMAT, KIND)}")
        return Stage1Spec(VisionSource(**raw.pop("vision")), **raw)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"found a {RUN_FILE} in {folder} that does not describe a stage-1 run ({error!r}); "
            "expected the file as `bridges train` wrote it: restore it, or train again"
        ) from error


def load_stage1(
    folder: str | Path,
    *,
    vision: VisionEncoder | None = None,
    device: str | torch.device | None = None,
) -> tuple[VisionEncoder, Stage1]:
    """Loads a stage-1 run with its frozen encoder, in evaluation mode.

    Args:
        folder: a stage-1 run.
        vision: the encoder, if it is loaded already.
        device: the GPU if there is one, else the CPU, by default.

    Raises:
        ValueError: no such run, a damaged one, or an encoder that it does not belong to.
    """
    folder = Path(folder)
    spec = read_stage1(folder)
    vision = vision or VisionEncoder.load(**vars(spec.vision))
    check_encoder(folder, vision)
    stage1 = spec.build(vision)
    load_weights(stage1, read_weights(folder / WEIGHTS_FILE), str(folder))
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    return vision.to(device), stage1.eval().to(device)


def check_encoder(folder: Path, vision: VisionEncoder) -> None:
    """Refuses an encoder that a stage-1 run was not trained with.

    Raises:
        ValueError: with both fingerprints.
    """
    check_fingerprints(read_stage1(folder).fingerprints, vision, None, str(folder))


def check_shapeless(folder: Path, given: Mapping[str, Any], qformer: QFormer) -> None:
    """Refuses a Q-Former whose settings differ where no tensor's shape would show it.

    Args:
        folder: of the run.
        given: the arguments of the run's Q-Former.
        qformer: to be filled.

    Raises:
        ValueError: another number of heads, or another epsilon of `ln_vision`.
    """
    defaults = inspect.signature(QFormer).parameters
    there = {n: given.get(n, defaults[n].default) for n in ("num_heads", "ln_vision_eps")}
    here = {
        "num_heads": qformer.blocks[0].self_attention.num_heads,
        "ln_vision_eps": qformer.ln_vision.eps,
    }
    if here != there:
        raise ValueError(
            f"found a Q-Former with {here}; expected {there}, as in {folder}: give it the same "
            "arguments"
        )


def read_qformer(folder: Path, qformer: QFormer) -> None:
    """Puts a stage-1 run's Q-Former into another, its text branch only where that has one.

    Raises:
        ValueError: no such run, or a Q-Former of other sizes.
    """
    check_shapeless(folder, read_stage1(folder).qformer, qformer)
    state = read_weights(folder / WEIGHTS_FILE)
    _take(qformer, state, QFORMER, str(folder))


def read_bridge(folder: Path, qformer: QFormer) -> None:
    """Puts the Q-Former of a bridge's run into another, likewise.

    Raises:
        ValueError: a bridge around another resampler, or a Q-Former of other sizes.
    """
    resampler: Any = read_run(folder).bridge.get("init_args", {}).get("resampler", {})
    if isinstance(resampler, str):
        resampler = {"class_path": resampler}
    if resampler.get("class_path", "").rpartition(".")[2] != QFormer.__name__:
        raise ValueError(
            f"found a bridge around {resampler.get('class_path')} in {folder}; expected one around "
            "a qformer.QFormer: give the run of one, or of stage 1"
        )
    check_shapeless(folder, resampler.get("init_args") or {}, qformer)
    _take(qformer, read_weights(folder / BRIDGE_FILE), "bridge.resampler.", str(folder))


def _take(qformer: QFormer, state: Mapping[str, Tensor], prefix: str, where: str) -> None:
    """The part of a state that begins with a prefix, text branch only where there is one."""
    own = {n.removeprefix(prefix): t for n, t in state.items() if n.startswith(prefix)}
    if qformer.vocab_size is None:
        own = {n: t for n, t in own.items() if not TEXT_BRANCH.match(n)}
    load_weights(qformer, own, where)


def load_weights(module: torch.nn.Module, state: Mapping[str, Tensor], where: str) -> None:
    """Copies tensors into a module.

    Raises:
        ValueError: a tensor is missing, unknown or of another shape; nothing is changed.
    """
    own = module.state_dict()
    wrong = [f"{name} (only in one of them)" for name in sorted(own.keys() ^ state.keys())]
    wrong += [
        f"{name} ({tuple(state[name].shape)} for {tuple(own[name].shape)})"
        for name in sorted(own.keys() & state.keys())
        if own[name].shape != state[name].shape
    ]
    if wrong:
        raise ValueError(
            f"found weights in {where} that do not fit this {type(module).__name__} in "
            f"{len(wrong)} places, e.g. {wrong[0]}; expected the same sizes on both sides: give "
            "num_queries, dim, depth, num_heads, ff_dim and cross_attention_every as they were "
            "there, and a tokenizer if a text branch is wanted"
        )
    module.load_state_dict(dict(state))
