"""Official checkpoints: read by their own names, nothing in them run, copied whole or not."""

import json
import os
import shutil
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor, nn

FlamingoForm = Literal["idefics", "openflamingo"]
"""HF's ``Idefics…`` folder or OpenFlamingo's ``.pt``."""

FLAMINGO_FILES = "an OpenFlamingo .pt file or the folder of a Hugging Face Idefics model"
"""What a path to either should be, for messages."""

FLAMINGO_HEAD_DIM = 64
"""Width of every attention head of OpenFlamingo, whose files do not say it."""


class FlamingoRow(NamedTuple):
    """One parameter or module; None where a form has no place for it."""

    ours: str
    idefics: str | None
    openflamingo: str | None


def read_pickle(path: Path, *, inside: str, expected: str) -> dict[str, Tensor]:
    """The tensors of a file that ``torch.save`` wrote; nothing in it is run.

    Args:
        path: the file.
        inside: the key under which training scripts keep the state dict beside other things.
        expected: what the file should be, for messages.

    Raises:
        ValueError: nothing there, more than weights in it, or no state dict.
    """
    if not path.is_file():
        raise ValueError(f"found nothing at {path}; expected {expected}")
    try:
        # A mapped file costs memory only for what is taken of it.
        mapped = zipfile.is_zipfile(path)
        raw = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    # A file that is no state dict may raise nearly anything: refused classes, a broken archive.
    except Exception as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"found {path}, which holds more than weights or is damaged ({reason}); expected "
            f"{expected}. It was not run: fetch it again, or from its source"
        ) from error
    state = raw.get(inside, raw) if isinstance(raw, dict) else None
    if not isinstance(state, dict) or not all(isinstance(t, Tensor) for t in state.values()):
        raise ValueError(
            f"found a {type(raw).__name__} that is no state dict in {path}; expected tensors by "
            f'name, or {{"{inside}": tensors by name}}'
        )
    return state


def unwrapped(state: Mapping[str, Tensor], where: Path) -> dict[str, Tensor]:
    """A state dict without the names that DDP, FSDP, checkpointing and compiling put in.

    Raises:
        ValueError: two names become one.
    """
    found: dict[str, Tensor] = {}
    for key, tensor in state.items():
        name = ".".join(part for part in key.split(".") if part not in _WRAPPERS)
        if name in found:
            raise ValueError(
                f"found {name} twice in {where}, wrapped in different ways; expected it once: "
                "remove one of them"
            )
        found[name] = tensor
    return found


_WRAPPERS = ("module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_orig_mod")


def read_safetensors(
    folder: Path, leave: Callable[[str], str | None] = lambda _: None
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The weights of an HF folder, in one file or in several with an index.

    Args:
        folder: with ``model.safetensors`` or ``model.safetensors.index.json``.
        leave: of a key, the reason to leave it on the disk; None to read it.

    Returns:
        The weights, and the keys left on the disk with the reason.

    Raises:
        ValueError: a file is missing.
    """
    index = folder / "model.safetensors.index.json"
    names = {"model.safetensors"}
    if index.is_file():
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    state: dict[str, Tensor] = {}
    left: dict[str, str] = {}
    for name in sorted(names):
        file = folder / Path(name).name  # an index may not point out of its folder
        if not file.is_file():
            raise ValueError(
                f"found no {file.name} in {folder}; expected a whole checkpoint in safetensors: "
                "fetch it, or convert with from_pretrained(…).save_pretrained(…)"
            )
        with safe_open(file, "pt") as weights:
            for key in weights.keys():  # noqa: SIM118, it is no dict
                if (reason := leave(key)) is None:
                    state[key] = weights.get_tensor(key)
                else:  # an LM of many gigabytes stays on the disk
                    left[key] = reason
    return state, left


def read_config(folder: Path, *model_types: str) -> Any:
    """The config of an HF folder.

    Raises:
        ValueError: no config, or another model's than `model_types`.
    """
    from transformers import AutoConfig

    wanted = " or ".join(model_types)
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"found no config.json in {folder}; expected the folder of a Hugging Face {wanted} "
            "model"
        )
    config = AutoConfig.from_pretrained(folder)
    if config.model_type not in model_types:
        raise ValueError(f"found a {config.model_type!r} model in {folder}; expected {wanted}")
    return config


def rename(key: str, pairs: Iterable[tuple[str, str]]) -> str | None:
    """A key by pairs of (old, new) names of parameters or modules; None when no row fits."""
    for old, new in pairs:
        if key == old or key.startswith(f"{old}."):
            return new + key.removeprefix(old)
    return None


def check_fits(
    module: nn.Module, found: Mapping[str, Tensor], where: Path, fresh: Iterable[str] = ()
) -> None:
    """Refuses weights that are not those of a module, name by name and shape by shape.

    Args:
        module: what is to be filled.
        found: weights by its names.
        where: for the message.
        fresh: names of the module's weights that need not be there.

    Raises:
        ValueError: naming what is missing, left over or of another shape.
    """
    own = module.state_dict()
    missing = sorted(own.keys() - found.keys() - set(fresh))
    over = sorted(found.keys() - own.keys())
    wrong = [
        f"{name} {tuple(found[name].shape)} for {tuple(own[name].shape)}"
        for name in own.keys() & found.keys()
        if own[name].shape != found[name].shape
    ]
    parts = (("no", missing), ("leftover", over), ("mis-shaped", sorted(wrong)))
    if problems := [f"{what} {some(names)}" for what, names in parts if names]:
        raise ValueError(
            f"found {'; '.join(problems)} in {where}; expected every weight of "
            f"{type(module).__name__} and no other: build it with the sizes of the checkpoint"
        )


@torch.no_grad()
def take(
    module: nn.Module, found: Mapping[str, Tensor], where: Path, fresh: Iterable[str] = ()
) -> None:
    """Copies weights into a module when every one of both sides fits.

    Raises:
        ValueError: as `check_fits`; nothing is changed then.
    """
    check_fits(module, found, where, fresh)
    own = module.state_dict()
    for name, tensor in found.items():
        own[name].copy_(tensor)


def repeat_heads(weight: Tensor, num_heads: int, num_kv_heads: int) -> Tensor:
    """Key or value weights of grouped-query attention for a class that has none: the same output.

    Neighbouring heads of queries share a head of keys; here each gets a copy of it.

    Shape: (h_kv · d_head, d) -> (h · d_head, d).
    """
    heads = weight.unflatten(0, (num_kv_heads, -1))
    return heads.repeat_interleave(num_heads // num_kv_heads, dim=0).flatten(0, 1)


def some(names: list[str], most: int = 4) -> str:
    """The first few of many names, for messages."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


@contextmanager
def staged_folder(target: Path) -> Iterator[Path]:
    """A folder beside `target` to write to, renamed to it when nothing went wrong.

    Raises:
        ValueError: files at `target`.
    """
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"found files at {target}; expected a new folder: give another one")
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}")
    temporary.mkdir()
    try:
        yield temporary
        os.replace(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
