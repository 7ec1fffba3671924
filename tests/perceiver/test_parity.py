"""The Perceiver Resampler against those of IDEFICS-1, Idefics2 and flamingo-pytorch."""

from typing import Any

import parity
import pytest
import torch
import transformers as hf
from einops import rearrange
from parity import small
from torch import Tensor, nn
from transformers.models.idefics.perceiver import IdeficsPerceiverResampler
from transformers.models.idefics2.modeling_idefics2 import Idefics2Connector

from bridges import VisionFeatures, VisionShape
from perceiver import PerceiverResampler

DIM, LATENTS, DEPTH = 24, 5, 3


def resampler_of(**options: Any) -> PerceiverResampler:
    sizes = {"num_latents": LATENTS, "depth": DEPTH, "num_heads": 2, "head_dim": 10}
    return PerceiverResampler(vision=VisionShape(DIM, 6, (2, 3)), **(sizes | options))


def features_of(patches: Tensor, frame_mask: Tensor | None = None) -> VisionFeatures:
    """(b, i, f · p, d), all images real."""
    mask = torch.ones(patches.shape[:2], dtype=torch.bool)
    return VisionFeatures(patches, mask, (1, 1), frame_mask)


def layers(rows: dict[str, str]) -> dict[str, str]:
    """The names of all layers, ours to theirs, from those of layer N."""
    return {
        ours.replace("N", str(n)): theirs.replace("N", str(n))
        for n in range(DEPTH)
        for ours, theirs in rows.items()
    }


def idefics(qk_norm: bool) -> IdeficsPerceiverResampler:
    config = hf.IdeficsConfig(
        vision_config={"embed_dim": DIM},
        perceiver_config={"qk_layer_norms_perceiver": qk_norm},
    )
    return IdeficsPerceiverResampler(
        config, embed_dim=DIM, depth=DEPTH, n_heads=2, head_dim=10, n_latents=LATENTS
    )


IDEFICS_LAYER = {
    "layers.N.features_norm": "blocks.N.0.context_layer_norm",
    "layers.N.latents_norm": "blocks.N.0.latents_layer_norm",
    "layers.N.attention.q": "blocks.N.0.q_proj",
    "layers.N.attention.k": "blocks.N.0.k_proj",
    "layers.N.attention.v": "blocks.N.0.v_proj",
    "layers.N.attention.out": "blocks.N.0.output_proj",
    "layers.N.ff_norm": "blocks.N.1.ln",
    "layers.N.ff.up": "blocks.N.1.fc",
    "layers.N.ff.out": "blocks.N.1.c_proj",
}
IDEFICS_QK_NORM = {
    "layers.N.attention.q_norm": "blocks.N.0.q_layer_norm",
    "layers.N.attention.k_norm": "blocks.N.0.k_layer_norm",
}


@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
def test_idefics(qk_norm: bool, frozen: bool):
    ours = resampler_of(activation="relu", qk_norm=qk_norm)
    theirs = idefics(qk_norm)
    rows = IDEFICS_LAYER | (IDEFICS_QK_NORM if qk_norm else {})
    names = {"latents": "latents", "norm": "layer_norm"} | layers(rows)
    pairs = parity.pair_up(ours, theirs, names)
    parity.copy_weights(pairs)
    a = small(2, 3, 6, DIM)
    b = a.detach().flatten(0, 1).requires_grad_()
    out = ours(features_of(a.detach() if frozen else a))
    inputs = [] if frozen else [(a, b)]
    parity.assert_parity(pairs, (out, theirs(b).unflatten(0, (2, 3))), inputs)


def idefics2(dim: int) -> Idefics2Connector:
    """Of three heads that share one head of keys."""
    config = hf.Idefics2Config(
        vision_config={"hidden_size": DIM},
        text_config={"model_type": "mistral", "hidden_size": dim, "intermediate_size": 20},
        perceiver_config={
            "hidden_size": dim,
            "resampler_n_latents": LATENTS,
            "resampler_depth": DEPTH,
            "resampler_n_heads": 6,
            "resampler_head_dim": 10,
            "num_key_value_heads": 2,
        },
        attn_implementation="eager",
    )
    return Idefics2Connector(config)


IDEFICS2_LAYER = {
    "layers.N.features_norm": "layers.N.input_context_norm",
    "layers.N.latents_norm": "layers.N.input_latents_norm",
    "layers.N.attention.q": "layers.N.self_attn.q_proj",
    "layers.N.attention.k": "layers.N.self_attn.k_proj",
    "layers.N.attention.v": "layers.N.self_attn.v_proj",
    "layers.N.attention.out": "layers.N.self_attn.o_proj",
    "layers.N.ff_norm": "layers.N.post_attention_layernorm",
    "layers.N.ff.gate": "layers.N.mlp.gate_proj",
    "layers.N.ff.up": "layers.N.mlp.up_proj",
    "layers.N.ff.out": "layers.N.mlp.down_proj",
}
IDEFICS2 = {
    "num_heads": 6,
    "num_kv_heads": 2,
    "activation": "swiglu",
    "norm": "rms",
    "norm_eps": 1e-6,
    "latents_init": "ones",
}


@pytest.mark.parametrize("connector", [False, True])
def test_idefics2(connector: bool):
    """With its MLP before the resampler, and without; its masked patches are padding frames."""
    dim = 16 if connector else DIM
    theirs = idefics2(dim)
    names = {"latents": "latents", "norm": "norm"} | layers(IDEFICS2_LAYER)
    if connector:
        ours = resampler_of(dim=dim, projection="swiglu", projection_dim=20, **IDEFICS2)
        names = {name: f"perceiver_resampler.{theirs}" for name, theirs in names.items()}
        names["input.gate"] = "modality_projection.gate_proj"
        names["input.up"] = "modality_projection.up_proj"
        names["input.out"] = "modality_projection.down_proj"
        reference: Any = theirs
    else:
        ours, reference = resampler_of(**IDEFICS2), theirs.perceiver_resampler
    assert torch.equal(ours.latents, reference.get_parameter(names["latents"]))  # ones
    pairs = parity.pair_up(ours, reference, names)
    parity.copy_weights(pairs)
    a = small(2, 2, 6, DIM)
    b = a.detach().flatten(0, 1).requires_grad_()
    mask = torch.arange(6) < torch.tensor([6, 4, 1, 5])[:, None]
    out = ours(features_of(a, mask.view(2, 2, 6)))
    expected = reference(b, mask) if connector else reference(context=b, attention_mask=mask)
    parity.assert_parity(pairs, (out, expected.unflatten(0, (2, 2))), [(a, b)])


class KeysAndValues(nn.Module):
    """flamingo-pytorch's `to_kv` as two matrices, as we have it."""

    def __init__(self, joined: nn.Linear) -> None:
        super().__init__()
        self.k = nn.Linear(joined.in_features, joined.out_features // 2, bias=False)
        self.v = nn.Linear(joined.in_features, joined.out_features // 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.k(x), self.v(x)], dim=-1)


FLAMINGO_PYTORCH_LAYER = {
    "layers.N.features_norm": "layers.N.0.norm_media",
    "layers.N.latents_norm": "layers.N.0.norm_latents",
    "layers.N.attention.q": "layers.N.0.to_q",
    "layers.N.attention.k": "layers.N.0.to_kv.k",
    "layers.N.attention.v": "layers.N.0.to_kv.v",
    "layers.N.attention.out": "layers.N.0.to_out",
    "layers.N.ff_norm": "layers.N.1.0",
    "layers.N.ff.up": "layers.N.1.1",
    "layers.N.ff.out": "layers.N.1.3",
}


class Clips(nn.Module):
    """flamingo-pytorch's modules over clips: all frames of one are read together, as in Flamingo.

    Its own forward reads each frame by itself. So the embeddings are added here, and it is given
    the frames as one.
    """

    def __init__(self, resampler: Any, num_frames: int) -> None:
        super().__init__()
        self.resampler = resampler
        self.time_embedding = nn.Parameter(torch.zeros(num_frames, DIM))
        del resampler.media_pos_emb
        resampler.register_buffer("media_pos_emb", torch.zeros(1, 1, DIM))

    def forward(self, frames: Tensor) -> Tensor:
        clips = frames + self.time_embedding[:, None]
        return self.resampler(rearrange(clips, "b f p d -> b 1 (f p) d"))


def flamingo_pytorch(num_frames: int) -> Any:
    package = pytest.importorskip("flamingo_pytorch")
    theirs = package.PerceiverResampler(
        dim=DIM,
        depth=DEPTH,
        dim_head=10,
        heads=2,
        num_latents=LATENTS,
        num_media_embeds=num_frames,
    )
    for attention, _ in theirs.layers:
        attention.to_kv = KeysAndValues(attention.to_kv)
    return theirs


FLAMINGO_PYTORCH = {"latents": "latents", "norm": "norm"} | layers(FLAMINGO_PYTORCH_LAYER)


@pytest.mark.parametrize("frozen", [False, True])
def test_flamingo_pytorch_images(frozen: bool):
    ours, theirs = resampler_of(num_frames=1), flamingo_pytorch(1)
    names = FLAMINGO_PYTORCH | {"time_embedding": "media_pos_emb"}
    pairs = parity.pair_up(ours, theirs, names)
    parity.copy_weights(pairs)
    a = small(4, 1, 6, DIM)
    b = a.detach().clone().requires_grad_()
    out = ours(features_of(a.detach() if frozen else a))
    parity.assert_parity(pairs, (out, theirs(b)), [] if frozen else [(a, b)])


@pytest.mark.parametrize("frozen", [False, True])
def test_flamingo_pytorch_clips(frozen: bool):
    ours, theirs = resampler_of(num_frames=3), Clips(flamingo_pytorch(1), 3)
    names = {ours: f"resampler.{theirs}" for ours, theirs in FLAMINGO_PYTORCH.items()}
    pairs = parity.pair_up(ours, theirs, names | {"time_embedding": "time_embedding"})
    parity.copy_weights(pairs)
    a = small(2, 1, 3 * 6, DIM)
    b = rearrange(a.detach(), "b 1 (f p) d -> b f p d", f=3).requires_grad_()
    out = ours(features_of(a.detach() if frozen else a, torch.ones(2, 1, 3, dtype=torch.bool)))
    parity.assert_parity(pairs, (out, theirs(b)), [] if frozen else [(a, b)])


@torch.no_grad()
def test_flamingo_pytorch_frame_by_frame():
    """Its own forward: every frame as an image, with the embedding of its place."""
    ours, theirs = resampler_of(num_frames=3), flamingo_pytorch(3)
    names = FLAMINGO_PYTORCH | {"time_embedding": "media_pos_emb"}
    parity.copy_weights(parity.pair_up(ours, theirs, names))
    frames = small(2, 3, 6, DIM)
    expected = theirs(frames)
    assert ours.time_embedding is not None
    embedding = ours.time_embedding.clone()
    for k in range(3):
        ours.time_embedding[0] = embedding[k]
        parity.close(ours(features_of(frames[:, k : k + 1])), expected[:, k : k + 1], f"frame {k}")
