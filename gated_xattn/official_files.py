"""Reading the files of OpenFlamingo and of HF's Idefics: weights by our names, nothing run."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bridges.language import LanguageModel
from bridges.official import (
    FLAMINGO_FILES,
    FlamingoForm,
    read_config,
    read_pickle,
    read_safetensors,
    rename,
    some,
    unwrapped,
)
from gated_xattn.key_maps import (
    FLAMINGO_BLOCK,
    FLAMINGO_DECODER,
    IDEFICS_BLOCKS,
    IDEFICS_LEFT,
    OLD_HEAD,
    block_map,
)

RESAMPLER: dict[FlamingoForm, str] = {
    "idefics": "model.perceiver_resampler.",
    "openflamingo": "perceiver.",
}
"""Beginnings of the keys that are the resampler's to take."""

VOCABULARY = (
    "model.embed_tokens.weight",
    "model.embed_tokens.additional_embedding.weight",
    "lm_head.weight",
    "lm_head.additional_fc.weight",
)
"""Where HF's Idefics has its tokens: the LM's own, and those that were added."""


@dataclass(frozen=True)
class Words:
    """Rows of a file's vocabulary, those of added tokens included.

    Attributes:
        embedding: (rows, d).
        head: (rows, d) output rows; None where the file has none.
        known: rows of the LM's own vocabulary.
        tied: whether the output rows are the embedding's.
    """

    embedding: Tensor
    head: Tensor | None
    known: int
    tied: bool

    def head_row(self, token_id: int) -> Tensor | None:
        """The output row of a token, (d), if the file has it."""
        head = self.embedding if self.tied else self.head
        return None if head is None else head[token_id]


@dataclass(frozen=True)
class OfficialFlamingo:
    """An official file under our names.

    Attributes:
        path: where it is.
        form: whose it is.
        state: gated blocks by the names of `GatedXAttn`.
        layers: the LM block behind each gated block.
        words: its rows of tokens.
        resampler: whether there is one in it.
        left: its keys that were not taken, with the reason.
        config: HF's config, or None.
    """

    path: Path
    form: FlamingoForm
    state: dict[str, Tensor]
    layers: list[int]
    words: Words
    resampler: bool
    left: dict[str, str]
    config: Any | None


def is_flamingo(path: str | Path) -> bool:
    """Whether something is an OpenFlamingo ``.pt`` or an HF Idefics folder.

    A file in another form is not; whoever reads it says what is wrong with it.
    """
    path = Path(path)
    if not path.is_dir():
        try:
            state = unwrapped(
                read_pickle(path, inside="model_state_dict", expected=FLAMINGO_FILES), path
            )
        except ValueError:
            return False
        return any(name.startswith("lang_encoder.") for name in state)
    if not (path / "config.json").is_file():
        return False
    from transformers import PretrainedConfig

    return PretrainedConfig.get_config_dict(path)[0].get("model_type") == "idefics"


def read_flamingo(path: str | Path, lm: LanguageModel) -> OfficialFlamingo:
    """Reads an official file.

    Args:
        path: an OpenFlamingo ``.pt`` or an HF Idefics folder.
        lm: the LM that the weights are for; OpenFlamingo's names of tokens depend on it.

    Raises:
        ValueError: no such checkpoint, a pickle that is more than weights, or a key that no table
            knows.
    """
    path = Path(path)
    return _read_folder(path) if path.is_dir() else _read_file(path, lm)


def _read_folder(path: Path) -> OfficialFlamingo:
    config = read_config(path, "idefics")

    def leave(key: str) -> str | None:
        # Kept on the disk, all but the vocabulary, which tells whether it is the same LM.
        reasons = (reason for start, reason in IDEFICS_LEFT.items() if key.startswith(start))
        return None if key in VOCABULARY else next(reasons, None)

    found, left = read_safetensors(path, leave)
    blocks: dict[tuple[int, str], Tensor] = {}
    unknown: list[str] = []
    resampler = False
    for key, tensor in found.items():
        number, _, name = key.removeprefix(f"{IDEFICS_BLOCKS}.").partition(".")
        if key.startswith(RESAMPLER["idefics"]):
            resampler = True
        elif key.endswith(".rotary_emb.inv_freq"):
            left[key] = "a buffer computed from the config"
        elif key.startswith(f"{IDEFICS_BLOCKS}.") and number.isdigit():
            blocks[int(number), name] = tensor
        elif key not in VOCABULARY:
            unknown.append(key)
    state, numbers = _our_names(blocks, "idefics", unknown, path)
    known, more, head, more_head = (found.get(key) for key in VOCABULARY)
    if known is None:
        raise ValueError(f"found no {VOCABULARY[0]} in {path}; expected a whole Idefics model")
    left |= {key: IDEFICS_LEFT[key] for key in (VOCABULARY[0], VOCABULARY[2]) if key in found}
    words = Words(
        known if more is None else torch.cat([known, more]),
        head if head is None or more_head is None else torch.cat([head, more_head]),
        len(known),
        tied=bool(config.tie_word_embeddings),
    )
    layers = [number * config.cross_layer_interval for number in numbers]
    return OfficialFlamingo(path, "idefics", state, layers, words, resampler, left, config)


def _read_file(path: Path, lm: LanguageModel) -> OfficialFlamingo:
    raw = read_pickle(path, inside="model_state_dict", expected=FLAMINGO_FILES)
    found = unwrapped(raw, path)
    own = {name for name, _ in lm.model.named_parameters(remove_duplicate=False)}
    own |= {name for name, _ in lm.model.named_buffers()}
    ends = [_name_of(lm.model, m) for m in (lm.model.get_input_embeddings(), _head(lm))]
    blocks: dict[tuple[int, str], Tensor] = {}
    left: dict[str, str] = {}
    unknown: list[str] = []
    resampler = False
    for key, tensor in found.items():
        inner = key.removeprefix("lang_encoder.")
        if key.startswith(RESAMPLER["openflamingo"]):
            resampler = True
        elif match := FLAMINGO_BLOCK.fullmatch(key):
            place = (int(match["list"] or match["wrapped"]), match["name"])
            if place in blocks and not torch.equal(blocks[place], tensor):
                raise ValueError(
                    f"found two different {match['name']} of the gated block before LM block "
                    f"{place[0]} in {path}; expected one, under two names at most"
                )
            blocks[place] = tensor
        elif key.startswith("vision_encoder."):
            left[key] = "the frozen vision encoder, loaded by its own name"
        elif key != inner and (inner in own or inner == OLD_HEAD or FLAMINGO_DECODER.search(inner)):
            left[key] = "the frozen LM, loaded by its own name"
        else:
            unknown.append(key)
    state, numbers = _our_names(blocks, "openflamingo", unknown, path)
    embedding = found.get(f"lang_encoder.{ends[0]}.weight")
    if embedding is None:
        raise ValueError(
            f"found no lang_encoder.{ends[0]}.weight in {path}; expected the LM's token "
            "embeddings, in which OpenFlamingo keeps those of <image> and <|endofchunk|>: use the "
            "LM that the checkpoint was trained with, or fetch the checkpoint again"
        )
    head = found.get(f"lang_encoder.{ends[1]}.weight", found.get(f"lang_encoder.{OLD_HEAD}"))
    tied = _head(lm).weight is lm.model.get_input_embeddings().weight
    words = Words(embedding, head, len(embedding), tied)
    return OfficialFlamingo(path, "openflamingo", state, numbers, words, resampler, left, None)


def _our_names(
    blocks: Mapping[tuple[int, str], Tensor], form: FlamingoForm, unknown: list[str], where: Path
) -> tuple[dict[str, Tensor], list[int]]:
    """Gated blocks by our names, and their numbers in the file.

    Raises:
        ValueError: keys that no table knows, those in `unknown` included.
    """
    numbers = sorted({number for number, _ in blocks})
    places = {number: place for place, number in enumerate(numbers)}
    state: dict[str, Tensor] = {}
    for (number, key), tensor in blocks.items():
        pairs = [(theirs, ours) for ours, theirs in block_map(form, places[number])]
        name = rename(key, pairs)
        if name is None:
            unknown = [*unknown, f"{key} of gated block {number}"]
        elif name.endswith(".kv.weight"):
            start = name.removesuffix("kv.weight")
            state[f"{start}k.weight"], state[f"{start}v.weight"] = tensor.chunk(2)
        else:
            state[name] = tensor.flatten() if name.endswith("_gate") else tensor
    if unknown:
        raise ValueError(
            f"found {some(unknown)} in {where}, which no OpenFlamingo or Idefics over this LM "
            "has; expected the names in gated_xattn.key_maps and perceiver.official: give an "
            "official checkpoint and the LM that it was trained with, or remove these keys"
        )
    if not numbers:
        raise ValueError(f"found no gated cross-attention in {where}; expected {FLAMINGO_FILES}")
    return state, numbers


def _head(lm: LanguageModel) -> Any:
    return lm.model.get_output_embeddings()


def _name_of(model: Any, module: Any) -> str:
    return next(name for name, found in model.named_modules() if found is module)
