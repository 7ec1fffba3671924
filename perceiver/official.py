"""Official weights of the Perceiver Resampler: OpenFlamingo's and IDEFICS-1's, and back to HF.

Every key of a resampler is taken, or is an error; the other parts of a model are left to
`gated_xattn.official`.
"""

import warnings
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from bridges.official import (
    FLAMINGO_FILES,
    FLAMINGO_HEAD_DIM,
    FlamingoForm,
    FlamingoRow,
    check_fits,
    read_config,
    read_pickle,
    read_safetensors,
    rename,
    repeat_heads,
    some,
    take,
    unwrapped,
)
from perceiver.resampler import PerceiverLayer, PerceiverResampler

TOP = (
    FlamingoRow("latents", "latents", "latents"),
    FlamingoRow("time_embedding", None, "frame_embs"),
    FlamingoRow("norm", "layer_norm", "norm"),
)

LAYER = (
    FlamingoRow("features_norm", "0.context_layer_norm", "0.norm_media"),
    FlamingoRow("latents_norm", "0.latents_layer_norm", "0.norm_latents"),
    FlamingoRow("attention.q", "0.q_proj", "0.to_q"),
    FlamingoRow("attention.k", "0.k_proj", None),
    FlamingoRow("attention.v", "0.v_proj", None),
    FlamingoRow("attention.kv", None, "0.to_kv"),  # one matrix there: keys, then values
    FlamingoRow("attention.out", "0.output_proj", "0.to_out"),
    FlamingoRow("attention.q_norm", "0.q_layer_norm", None),
    FlamingoRow("attention.k_norm", "0.k_layer_norm", None),
    FlamingoRow("ff_norm", "1.ln", "1.0"),
    FlamingoRow("ff.up", "1.fc", "1.1"),
    FlamingoRow("ff.out", "1.c_proj", "1.3"),
)
"""One layer; in both forms a pair of attention (0) and feed-forward (1)."""

PREFIX: dict[FlamingoForm, str] = {
    "idefics": "model.perceiver_resampler.",
    "openflamingo": "perceiver.",
}

LAYERS: dict[FlamingoForm, str] = {"idefics": "blocks", "openflamingo": "layers"}

ACTIVATION: dict[FlamingoForm, type[nn.Module]] = {"idefics": nn.ReLU, "openflamingo": nn.GELU}


def key_map(form: FlamingoForm, depth: int) -> list[tuple[str, str]]:
    """Pairs (ours, theirs) of names of parameters and modules, without `PREFIX`."""
    pairs = [(row.ours, theirs) for row in TOP if (theirs := getattr(row, form)) is not None]
    for layer in range(depth):
        pairs += [
            (f"layers.{layer}.{row.ours}", f"{LAYERS[form]}.{layer}.{theirs}")
            for row in LAYER
            if (theirs := getattr(row, form)) is not None
        ]
    return pairs


def load_resampler(path: str | Path, resampler: PerceiverResampler) -> dict[str, str]:
    """Copies an official resampler's weights; see `PerceiverResampler.load_pretrained`.

    Args:
        path: an OpenFlamingo ``.pt`` or the folder of an HF ``Idefics…`` in safetensors.
        resampler: what to fill.

    Returns:
        The file's keys that were left out, with the reason.

    Raises:
        ValueError: no such checkpoint, a pickle that is more than weights, other sizes or
            settings, or weights missing or left over; nothing is changed.
    """
    path = Path(path)
    form, state, left, heads = _read(path)
    pairs = [(theirs, ours) for ours, theirs in key_map(form, len(resampler.layers))]
    found: dict[str, Tensor] = {}
    unknown: list[str] = []
    for key, tensor in state.items():
        name = rename(key.removeprefix(PREFIX[form]), pairs)
        if name is None:
            unknown.append(key)
        else:
            found[name] = tensor
    if unknown:
        raise ValueError(
            f"found {some(unknown)} in {path}, which a {type(resampler).__name__} of "
            f"{len(resampler.layers)} layers has no place for; expected the names in "
            "perceiver.official: build it with the checkpoint's depth, or, if these are "
            "embeddings of the place of an image, take a checkpoint without"
        )
    for name in [n for n in found if n.endswith(".kv.weight")]:
        halves = found.pop(name).chunk(2)
        for letter, half in zip("kv", halves, strict=True):
            found[name.removesuffix("kv.weight") + f"{letter}.weight"] = half
    fresh = ["time_embedding"] if "time_embedding" not in found else []
    check_fits(resampler, found, path, fresh)
    _check_settings(resampler, form, heads, path)
    if fresh and resampler.time_embedding is not None:
        warnings.warn(
            f"found no frame_embs in {path}, which was trained on pictures: the time_embedding "
            "stays as it was built",
            stacklevel=3,
        )
    take(resampler, found, path, fresh)
    return left


def idefics_form(resampler: nn.Module) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A resampler for HF's Idefics classes.

    Args:
        resampler: a `PerceiverResampler` with the settings of IDEFICS-1.

    Returns:
        The settings of HF's ``perceiver_config``, and the weights by the names of its module.

    Raises:
        ValueError: something that HF's ``IdeficsPerceiverResampler`` cannot hold.
    """
    if not isinstance(resampler, PerceiverResampler):
        raise ValueError(
            f"found a {type(resampler).__name__} as resampler; expected a PerceiverResampler or "
            "the patches themselves (bridges.Projector with layers: 1), all that HF's Idefics "
            "classes hold: keep the run"
        )
    layers = [layer for layer in resampler.layers if isinstance(layer, PerceiverLayer)]
    first = layers[0]
    attention, norm = first.attention, resampler.norm
    dim, head_dim = resampler.dim, attention.q.out_features // attention.num_heads
    qk_norm = not isinstance(attention.q_norm, nn.Identity)
    limits = (
        (not isinstance(resampler.input, nn.Identity), "a projection of the features", "dim: null"),
        (resampler.time_embedding is not None, "time embeddings", "num_frames: 0"),
        (not isinstance(norm, nn.LayerNorm), "norms that are no LayerNorm", "norm: layer"),
        (norm.eps != 1e-5, f"norm_eps={norm.eps}", "norm_eps: 1.0e-5"),
        (not isinstance(first.ff.activation, nn.ReLU), "another activation", "activation: relu"),
        (first.ff.gate is not None, "a gated feed-forward", "activation: relu"),
        (first.ff.up.out_features != 4 * dim, "another width of the feed-forward", "ff_mult: 4"),
    )
    if problems := [f"{what} ({fix} has a place)" for wrong, what, fix in limits if wrong]:
        raise ValueError(
            f"found in the resampler {', '.join(problems)}; expected IDEFICS-1's, all that HF's "
            "Idefics classes hold: train with these settings to export"
        )
    ours = resampler.state_dict()
    for name in [n for n in ours if n.endswith((".attention.k.weight", ".attention.v.weight"))]:
        ours[name] = repeat_heads(ours[name], attention.num_heads, attention.num_kv_heads)
    pairs = key_map("idefics", len(layers))
    state = {str(rename(name, pairs)): tensor for name, tensor in ours.items()}
    config = {
        "use_resampler": True,
        "resampler_n_latents": resampler.num_tokens,
        "resampler_depth": len(layers),
        "resampler_n_heads": attention.num_heads,
        "resampler_head_dim": head_dim,
        "qk_layer_norms_perceiver": qk_norm,
    }
    return config, state


def _read(
    path: Path,
) -> tuple[FlamingoForm, dict[str, Tensor], dict[str, str], tuple[int, int] | None]:
    """Form, weights of the resampler, keys left out, and heads and their width if known."""
    reason = "no part of the resampler; see gated_xattn.official"
    if path.is_dir():
        form: FlamingoForm = "idefics"
        config = read_config(path, "idefics")
        perceiver = config.perceiver_config
        heads = (perceiver.resampler_n_heads, perceiver.resampler_head_dim)

        def leave(key: str) -> str | None:
            return None if key.startswith(PREFIX[form]) else reason

        state, left = read_safetensors(path, leave)
    else:
        form, heads, left = "openflamingo", None, {}
        state = {}
        raw = read_pickle(path, inside="model_state_dict", expected=FLAMINGO_FILES)
        for key, tensor in unwrapped(raw, path).items():
            if key.startswith(PREFIX[form]):
                state[key] = tensor
            else:
                left[key] = reason
    if not state:
        raise ValueError(
            f"found no {PREFIX[form]}… in {path}; expected a checkpoint with a Perceiver Resampler"
        )
    return form, state, left, heads


def _check_settings(
    resampler: PerceiverResampler, form: FlamingoForm, heads: tuple[int, int] | None, where: Path
) -> None:
    """What no shape shows: heads, activation, norms, heads of keys."""
    layer = resampler.layers[0]
    assert isinstance(layer, PerceiverLayer)
    attention = layer.attention
    inner = attention.q.out_features
    expected = heads or (inner // FLAMINGO_HEAD_DIM, FLAMINGO_HEAD_DIM)
    found = (attention.num_heads, inner // attention.num_heads)
    if found != expected:
        raise ValueError(
            f"found num_heads={expected[0]} and head_dim={expected[1]} in {where}; expected those "
            f"of the resampler to be filled, {found[0]} and {found[1]}: build it with the former"
        )
    wanted = ACTIVATION[form]
    if not isinstance(layer.ff.activation, wanted):
        raise ValueError(
            f"found a checkpoint of {form} in {where}, whose feed-forward has {wanted.__name__}; "
            f"expected {type(layer.ff.activation).__name__}, that of the resampler to be filled: "
            f"build it with activation: {wanted.__name__.lower()}"
        )
    if resampler.norm.eps != 1e-5:
        warnings.warn(
            f"found norm_eps={resampler.norm.eps} for weights that {where} uses with 1e-05: "
            "outputs differ in the last digits; set norm_eps",
            stacklevel=4,
        )
