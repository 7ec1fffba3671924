"""The Perceiver Resampler against HF's IDEFICS-1."""

import parity
import pytest
import torch
import transformers as hf
from parity import small
from transformers.models.idefics.perceiver import IdeficsPerceiverResampler

from bridges import VisionFeatures, VisionShape
from perceiver import PerceiverResampler

DIM, LATENTS, DEPTH = 24, 5, 3


def reference(qk_norm: bool) -> IdeficsPerceiverResampler:
    config = hf.IdeficsConfig(
        vision_config={"embed_dim": DIM},
        perceiver_config={"qk_layer_norms_perceiver": qk_norm},
    )
    return IdeficsPerceiverResampler(
        config, embed_dim=DIM, depth=DEPTH, n_heads=2, head_dim=10, n_latents=LATENTS
    )


def names_of(qk_norm: bool) -> dict[str, str]:
    """Our names to HF's."""
    names = {"latents": "latents", "norm": "layer_norm"}
    for layer in range(DEPTH):
        ours, theirs = f"layers.{layer}", f"blocks.{layer}"
        names |= {
            f"{ours}.features_norm": f"{theirs}.0.context_layer_norm",
            f"{ours}.latents_norm": f"{theirs}.0.latents_layer_norm",
            f"{ours}.attention.q": f"{theirs}.0.q_proj",
            f"{ours}.attention.k": f"{theirs}.0.k_proj",
            f"{ours}.attention.v": f"{theirs}.0.v_proj",
            f"{ours}.attention.out": f"{theirs}.0.output_proj",
            f"{ours}.ff_norm": f"{theirs}.1.ln",
            f"{ours}.ff.up": f"{theirs}.1.fc",
            f"{ours}.ff.out": f"{theirs}.1.c_proj",
        }
        if qk_norm:
            names[f"{ours}.attention.q_norm"] = f"{theirs}.0.q_layer_norm"
            names[f"{ours}.attention.k_norm"] = f"{theirs}.0.k_layer_norm"
    return names


@pytest.mark.parametrize("qk_norm", [False, True])
def test_resampler(qk_norm: bool):
    ours = PerceiverResampler(
        vision=VisionShape(DIM, 6, (2, 3)),
        num_latents=LATENTS,
        depth=DEPTH,
        num_heads=2,
        head_dim=10,
        activation="relu",
        qk_norm=qk_norm,
    )
    theirs = reference(qk_norm)
    pairs = parity.pair_up(ours, theirs, names_of(qk_norm))
    parity.copy_weights(pairs)
    a = small(2, 3, 6, DIM)
    b = a.detach().flatten(0, 1).requires_grad_()
    mask = torch.ones(2, 3, dtype=torch.bool)
    out = ours(VisionFeatures(a, mask, (2, 3)))
    parity.assert_parity(pairs, (out, theirs(b).unflatten(0, (2, 3))), [(a, b)])
