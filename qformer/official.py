"""Official weights: LAVIS's ``.pth`` and HF's folders, read into a Q-Former or a stage 1.

Every key of a file is taken, or listed with the reason why not; anything else is an error.
"""

import re
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bridges.official import rename, some, take
from qformer.key_maps import NEVER_TAKEN, Form, key_map
from qformer.layers import QFormerLayer
from qformer.official_files import left_out, read_folder, read_pth
from qformer.resampler import QFormer

HEAD_DIM = 64
"""Width of an attention head in every LAVIS Q-Former; a state dict does not tell it."""

TEXT_BRANCH = re.compile(r"(text_embeddings|layers\.\d+\.text_(ff|norm))\.")


@dataclass(frozen=True)
class QFormerSizes:
    """What the shapes of a Q-Former say about its arguments; no text branch where None."""

    num_queries: int
    dim: int
    depth: int
    num_heads: int
    ff_dim: int
    cross_attention_every: int
    vision_dim: int
    vocab_size: int | None
    max_text: int | None

    def arguments(self) -> dict[str, Any]:
        """Those of `QFormer`, but for the vision encoder's."""
        found = {k: v for k, v in asdict(self).items() if k != "vision_dim" and v is not None}
        return found


@dataclass(frozen=True)
class OfficialCheckpoint:
    """An official file under our names.

    Attributes:
        path: where it is.
        form: whose it is.
        state: weights by the names of `qformer.key_maps`.
        sizes: of its Q-Former.
        left: its keys that were not taken, with the reason.
        config: HF's config, or None.
    """

    path: Path
    form: Form
    state: dict[str, Tensor]
    sizes: QFormerSizes
    left: dict[str, str]
    config: Any | None

    @property
    def ln_vision_eps(self) -> float:
        """LAVIS has torch's default; HF has one epsilon for this norm and the encoder's."""
        return 1e-5 if self.config is None else self.config.vision_config.layer_norm_eps


def read_official(path: str | Path, *, frozen: bool = False) -> OfficialCheckpoint:
    """Reads a LAVIS ``.pth`` or the folder of an HF ``Blip2…`` or ``InstructBlip…``.

    Args:
        path: the file or folder; safetensors only in a folder.
        frozen: also take the vision encoder's weights. The LM's are never taken.

    Raises:
        ValueError: no such checkpoint, a pickle that is more than weights, or a key that no table
            knows.
    """
    path = Path(path)
    form: Form = "lavis"
    config, left = None, {}
    if path.is_dir():
        form, config, theirs, left = read_folder(path, frozen)
    else:
        theirs = read_pth(path)
    left = left | {k: NEVER_TAKEN[k] for k in theirs if k in NEVER_TAKEN}
    pairs = key_map(form, _count(theirs, r"encoder\.layer\."), _count(theirs, r"blocks\."))
    pairs = [(theirs_, ours) for ours, theirs_ in pairs]
    state: dict[str, Tensor] = {}
    unknown: list[str] = []
    for key, tensor in theirs.items():
        if key in left:
            continue
        if (reason := left_out(key, frozen)) is not None:
            left[key] = reason
        elif (ours := rename(key, pairs)) is None:
            unknown.append(key)
        else:
            state[ours] = tensor
    if unknown:
        raise ValueError(
            f"found {some(unknown)} in {path}, which no BLIP-2 or InstructBLIP has; expected the "
            "names in qformer.key_maps: give an official checkpoint, or remove these keys"
        )
    if "qformer.queries" in state:
        state["qformer.queries"] = state["qformer.queries"].flatten(0, -2)
    _join_biases(state)
    heads = config.qformer_config.num_attention_heads if config is not None else None
    return OfficialCheckpoint(path, form, state, _sizes(state, heads, path), left, config)


def load_resampler(path: str | Path, qformer: QFormer) -> dict[str, str]:
    """Copies an official Q-Former's weights; see `QFormer.load_pretrained`.

    Args:
        path: as for `read_official`.
        qformer: takes the text branch along if it has one.

    Returns:
        The file's keys that were left out, with the reason.

    Raises:
        ValueError: other sizes, or weights missing or left over; nothing is changed.
    """
    official = read_official(path)
    left, found = dict(official.left), {}
    for key, tensor in official.state.items():
        name = key.removeprefix("qformer.")
        if name == key:
            left[key] = "a Q-Former alone has no heads and no projection"
        elif qformer.vocab_size is None and TEXT_BRANCH.match(name):
            left[key] = "this Q-Former has no text branch"
        else:
            found[name] = tensor
    check_sizes(official, qformer)
    take(qformer, found, official.path)
    return left


def _count(keys: Iterable[str], before: str) -> int:
    found = [int(m[1]) for key in keys if (m := re.search(before + r"(\d+)\.", key))]
    return max(found, default=-1) + 1


def _join_biases(state: dict[str, Tensor]) -> None:
    """EVA's keys have no bias: q's, zeros, v's make up the one that HF has."""
    for name in [n for n in state if n.endswith(".q_bias")]:
        q, v = state.pop(name), state.pop(name.replace(".q_bias", ".v_bias"))
        state[name.replace(".q_bias", ".qkv.bias")] = torch.cat([q, torch.zeros_like(v), v])


def _sizes(state: Mapping[str, Tensor], num_heads: int | None, where: Path) -> QFormerSizes:
    shapes = {k.removeprefix("qformer."): tuple(t.shape) for k, t in state.items()}
    try:
        num_queries, dim = shapes["queries"]
        depth = _count(shapes, r"^layers\.")
        reads = [n for n in range(depth) if f"layers.{n}.cross_attention.k.weight" in shapes]
        word = shapes.get("text_embeddings.word.weight", (None,))
        position = shapes.get("text_embeddings.position.weight", (None,))
        every = reads[1] if len(reads) > 1 else max(1, depth)
        if reads != [*range(0, depth, every)]:
            raise ValueError(
                f"found cross-attention in layers {reads} of {where}; expected every n-th layer"
            )
        return QFormerSizes(
            num_queries=num_queries,
            dim=dim,
            depth=depth,
            num_heads=num_heads or max(1, dim // HEAD_DIM),
            ff_dim=shapes["layers.0.query_ff.up.weight"][0],
            cross_attention_every=every,
            vision_dim=shapes["layers.0.cross_attention.k.weight"][1],
            vocab_size=word[0],
            max_text=position[0],
        )
    except KeyError as error:
        raise ValueError(
            f"found no {error.args[0]} in {where}; expected the weights of a Q-Former"
        ) from error


def check_sizes(official: OfficialCheckpoint, qformer: QFormer) -> None:
    """Refuses a Q-Former of other sizes than the checkpoint's; warns of another `ln_vision_eps`.

    Raises:
        ValueError: naming the sizes that differ, theirs and ours.
    """
    ours = asdict(sizes_of(qformer))
    theirs = asdict(official.sizes)
    if ours["vocab_size"] is None:
        theirs |= {"vocab_size": None, "max_text": None}
    elif theirs["vocab_size"] is None:
        raise ValueError(
            f"found no text branch in {official.path} (a checkpoint of stage 2); expected one, "
            "since this Q-Former has: build it without tokenizer and vocab_size, or load stage 1"
        )
    if wrong := [k for k in ours if ours[k] != theirs[k]]:
        sizes = ", ".join(f"{k}={theirs[k]} (not {ours[k]})" for k in wrong)
        raise ValueError(
            f"found a Q-Former with {sizes} in {official.path}; expected the sizes of the one to "
            "be filled: build it with these"
        )
    eps = qformer.ln_vision.eps
    if eps != official.ln_vision_eps:
        warnings.warn(
            f"found ln_vision_eps={eps} for weights that {official.path} uses with "
            f"{official.ln_vision_eps}: outputs differ in the last digits; set ln_vision_eps",
            stacklevel=3,
        )


def sizes_of(qformer: QFormer) -> QFormerSizes:
    """Sizes of a Q-Former that is there."""
    layer = qformer.layers[0]
    assert isinstance(layer, QFormerLayer)
    return _sizes(qformer.state_dict(), layer.self_attention.num_heads, Path("this Q-Former"))
