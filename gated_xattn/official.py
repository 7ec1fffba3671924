"""Official weights: OpenFlamingo's ``.pt`` and HF's Idefics, read into a bridge and its new tokens.

Every key of a file is taken, or listed with the reason why not; anything else is an error, and
then nothing is changed.
"""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bridges.language import LanguageModel
from bridges.model import VisionLanguageModel
from bridges.official import FLAMINGO_HEAD_DIM, check_fits, some, take
from gated_xattn.bridge import GatedXAttn
from gated_xattn.key_maps import END_OF_CHUNK
from gated_xattn.layers import GatedCrossAttention
from gated_xattn.official_files import OfficialFlamingo, read_flamingo


def load_openflamingo(
    path: str | Path, model: VisionLanguageModel, *, token_ids: Mapping[str, int] | None = None
) -> dict[str, str]:
    """Copies an OpenFlamingo ``.pt`` into the bridge and the new tokens of a model.

    The model's LM is the one that the checkpoint was trained with, its ``end_of_chunk``
    ``<|endofchunk|>``; its bridge a `GatedXAttn` with ``first: every - 1`` around a
    ``perceiver.PerceiverResampler``, both with their defaults.

    Args:
        path: the file.
        model: what to fill.
        token_ids: rows of ``<image>`` and ``<|endofchunk|>`` in the file's token embeddings. By
            default those that OpenFlamingo gives them behind the LM's own vocabulary.

    Returns:
        The file's keys that were left out, with the reason.

    Raises:
        ValueError: no such checkpoint, a pickle that is more than weights, another LM or bridge,
            or weights missing or left over; nothing is changed.
    """
    if not isinstance(model.bridge, GatedXAttn):
        raise ValueError(
            f"found a {type(model.bridge).__name__}; expected a GatedXAttn, whose weights an "
            "OpenFlamingo checkpoint has"
        )
    return load_bridge(path, model.bridge, model.lm, token_ids=token_ids)


def load_bridge(
    path: str | Path,
    bridge: GatedXAttn,
    lm: LanguageModel,
    *,
    token_ids: Mapping[str, int] | None = None,
) -> dict[str, str]:
    """Copies official weights into a bridge, its resampler, and the new tokens of its LM.

    Args:
        path: an OpenFlamingo ``.pt`` or an HF Idefics folder.
        bridge: what to fill.
        lm: the LM that the weights were trained with.
        token_ids: see `load_openflamingo`.

    Returns:
        The file's keys that were left out, with the reason.

    Raises:
        ValueError: as for `load_openflamingo`.
    """
    official = read_flamingo(path, lm)
    _check_settings(official, bridge)
    ids = dict(token_ids) if token_ids is not None else _token_ids(official, lm)
    _check_same_lm(official, lm, set(ids.values()))
    if ids.get(lm.image_token) is None:
        raise ValueError(
            f"found no token {lm.image_token!r} in the vocabulary of {path}; expected the "
            "checkpoint's own tokenizer in its folder or in the LM"
        )
    marker = official.words.embedding[ids[lm.image_token]]
    found = official.state | {"marker": marker[None]}
    own = bridge.state_dict()
    resampler = [name for name in own if name.startswith("resampler.")]
    check_fits(bridge, found, official.path, resampler)
    if bool(resampler) != official.resampler:
        what = "a resampler" if official.resampler else "no resampler"
        raise ValueError(
            f"found {what} in {path} for a {type(bridge.resampler).__name__}; expected a "
            "perceiver.PerceiverResampler for a checkpoint with one, and bridges.Projector with "
            "layers: 1 for one without"
        )
    if resampler:
        bridge.resampler.load_pretrained(path)
    take(bridge, found, official.path, resampler)
    return official.left | _take_tokens(official, lm, ids)


def _token_ids(official: OfficialFlamingo, lm: LanguageModel) -> dict[str, int]:
    """Rows of added tokens in the file's vocabulary, by their text.

    OpenFlamingo adds the end of a chunk, then the image, then perhaps a padding token, to the
    tokenizer of its LM. An Idefics folder has a tokenizer, or `lm` has the same.
    """
    rows = len(official.words.embedding)
    if official.form == "idefics":
        vocabulary = _own_tokenizer(official.path, lm).get_vocab()
        return {
            text: row
            for text, row in vocabulary.items()
            if official.words.known <= row < rows or text == lm.image_token
        }
    added = [END_OF_CHUNK, lm.image_token]
    new = {*added, "<PAD>", *_new_tokens(lm)}
    known = max(row for text, row in lm.tokenizer.get_vocab().items() if text not in new) + 1
    if rows - known - len(added) not in (0, 1):
        raise ValueError(
            f"found {rows} token embeddings in {official.path} for a vocabulary of {known}; "
            f"expected {known + 2} or {known + 3}: use the LM that the checkpoint was trained "
            "with and its tokenizer, or give token_ids"
        )
    return {text: known + place for place, text in enumerate(added)}


def _own_tokenizer(folder: Path, lm: LanguageModel) -> Any:
    from transformers import AutoTokenizer

    files = ("tokenizer.json", "tokenizer_config.json")
    if any((folder / name).is_file() for name in files):
        return AutoTokenizer.from_pretrained(folder)
    return lm.tokenizer


def _new_tokens(lm: LanguageModel) -> list[str]:
    """The texts of an LM's trained rows."""
    if lm.new_tokens is None:
        return []
    assert isinstance(lm.new_tokens.ids, Tensor)
    return lm.tokenizer.convert_ids_to_tokens(lm.new_tokens.ids.tolist())


@torch.no_grad()
def _take_tokens(
    official: OfficialFlamingo, lm: LanguageModel, ids: Mapping[str, int]
) -> dict[str, str]:
    """Copies the rows of the LM's new tokens; returns what else the file has."""
    words, names = official.words, _new_tokens(lm)
    left = {
        f"the token {text}": "the LM has no trained row of it: give it in lm.new_tokens"
        for text in ids
        if text not in (*names, lm.image_token)
    }
    left[f"the output row of {lm.image_token}"] = "images are never written"
    for place, text in enumerate(names):
        assert lm.new_tokens is not None
        if text not in ids:
            warnings.warn(
                f"found no token {text!r} in {official.path}: its rows stay as they were built",
                stacklevel=4,
            )
            continue
        lm.new_tokens.embedding[place].copy_(words.embedding[ids[text]])
        row = words.head_row(ids[text])
        if row is not None:
            lm.new_tokens.head[place].copy_(row)
        else:
            warnings.warn(
                f"found no output row of {text!r} in {official.path}: it stays as it was built, "
                "so that the model does not know when to write it",
                stacklevel=4,
            )
    return left


def _check_same_lm(official: OfficialFlamingo, lm: LanguageModel, added: set[int]) -> None:
    """Refuses the weights of another LM, by its token embeddings; rounding passes."""
    theirs = official.words.embedding[: official.words.known]
    ours = lm.model.get_input_embeddings().weight
    rows = torch.tensor([row for row in range(len(theirs)) if row not in added])
    # OpenFlamingo pads its vocabulary behind the added tokens.
    if official.form == "openflamingo":
        rows = rows[rows < min(added)]
    rows = rows.to(ours.device)
    if ours.shape[1] != theirs.shape[1] or len(ours) <= int(rows.max()):
        raise ValueError(
            f"found token embeddings {tuple(theirs.shape)} in {official.path} for an LM with "
            f"{tuple(ours.shape)}; expected the LM that the checkpoint was trained with"
        )
    a, b = ours[rows].float(), theirs.to(ours.device)[rows].float()
    rounding = 2**-7 * b.abs() + 1e-3 * b.square().mean().sqrt()
    wrong = int(((a - b).abs() > rounding).any(dim=1).sum())
    if wrong:
        raise ValueError(
            f"found token embeddings in {official.path} that differ from the LM's in {wrong} of "
            f"{len(rows)} rows; expected the LM that the checkpoint was trained with, frozen: "
            "load that one (Idefics instruct models trained theirs: take load_idefics)"
        )


def _check_settings(official: OfficialFlamingo, bridge: GatedXAttn) -> None:
    """What no shape shows: places, heads, activation, and, with a warning, epsilons and view."""
    if official.layers != bridge.block_indices:
        raise ValueError(
            f"found gated blocks before the LM blocks {some(list(map(str, official.layers)))} in "
            f"{official.path}; expected {some(list(map(str, bridge.block_indices)))}, as in the "
            "bridge to be filled: set its every and first (OpenFlamingo: first = every - 1, "
            "Idefics: 0)"
        )
    block = bridge.blocks[0]
    assert isinstance(block, GatedCrossAttention)
    inner, heads = block.attn.q.out_features, block.attn.num_heads
    activation: type[nn.Module] = nn.GELU
    expected, eps = inner // FLAMINGO_HEAD_DIM, 1e-5
    if (config := official.config) is not None:
        activation, expected, eps = nn.SiLU, config.num_attention_heads, config.rms_norm_eps
        if config.hidden_act != "silu":
            raise ValueError(
                f"found hidden_act={config.hidden_act!r} in {official.path}; expected 'silu', as "
                "in every published Idefics"
            )
    if heads != expected:
        raise ValueError(
            f"found {expected} heads in {official.path}; expected {heads}, as in the bridge to be "
            f"filled: set num_heads to {expected} and head_dim to {inner // max(1, expected)}"
        )
    if not isinstance(block.ff.activation, activation):
        raise ValueError(
            f"found a checkpoint of {official.form} in {official.path}, whose feed-forward has "
            f"{activation.__name__}; expected {type(block.ff.activation).__name__}, as in the "
            f"bridge to be filled: set feed_forward to "
            f"{'gelu' if config is None else 'swiglu'}"
        )
    ours = block.attn_norm.eps
    if ours != eps:
        warnings.warn(
            f"found norm_eps={ours} for weights that {official.path} uses with {eps}: outputs "
            "differ in the last digits; set norm_eps",
            stacklevel=4,
        )
    if block.visible != "latest":
        warnings.warn(
            f"found visible={block.visible!r} for weights that read the latest image only",
            stacklevel=4,
        )
