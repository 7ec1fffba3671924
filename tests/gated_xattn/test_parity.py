"""The gated block against HF's IDEFICS-1 and against flamingo-pytorch."""

from typing import Any

import flamingo_pytorch
import parity
import pytest
import torch
import transformers as hf
from parity import small
from torch import Tensor
from transformers.models.idefics.modeling_idefics import IdeficsGatedCrossAttentionLayer

from bridges import BridgeOutput, Condition
from gated_xattn import GatedCrossAttention, reading

DIM, MEMORY_DIM, HEADS, FF_DIM, EPS, LATENTS = 32, 24, 4, 48, 1e-6, 3

NAMES = {
    "attn_norm": "input_layernorm",
    "attn.q": "cross_attn.q_proj",
    "attn.k": "cross_attn.k_proj",
    "attn.v": "cross_attn.v_proj",
    "attn.out": "cross_attn.o_proj",
    "attn_gate": "alpha_cross_attn",
    "ff_norm": "post_attention_layernorm",
    "ff.gate": "mlp.gate_proj",
    "ff.up": "mlp.up_proj",
    "ff.out": "mlp.down_proj",
    "ff_gate": "alpha_dense",
}
QK_NAMES = {"attn.q_norm": "cross_attn.q_layer_norm", "attn.k_norm": "cross_attn.k_layer_norm"}

FLAMINGO_NAMES = {
    "attn_norm": "attn.norm",
    "attn.q": "attn.to_q",
    "attn.k": "attn.to_k",
    "attn.v": "attn.to_v",
    "attn.out": "attn.to_out",
    "attn_gate": "attn_gate",
    "ff_norm": "ff.0",
    "ff.up": "ff.1",
    "ff.out": "ff.3",
    "ff_gate": "ff_gate",
}

# Two images in the first row; the last row has none, and sees two padding images.
PLACEHOLDERS = torch.tensor([[0, 1, 0, 1, 0], [1, 0, 0, 0, 0], [0, 0, 0, 0, 0]]).bool()
IMAGE_MASK = torch.tensor([[True, True], [True, False], [False, False]])


@pytest.fixture(params=["grouped", "masked"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways to read the latest image."""
    grouped = request.param == "grouped"
    monkeypatch.setattr(reading, "grouping_is_faster", lambda *_: grouped)


def idefics(**options: Any) -> IdeficsGatedCrossAttentionLayer:
    config = hf.IdeficsConfig(
        hidden_size=DIM,
        intermediate_size=FF_DIM,
        num_attention_heads=HEADS,
        rms_norm_eps=EPS,
        dropout=0.0,
        vision_config={"embed_dim": MEMORY_DIM},
        attn_implementation="eager",
        **options,
    )
    return IdeficsGatedCrossAttentionLayer(config, layer_idx=0)


def like_idefics(**options: Any) -> GatedCrossAttention:
    return GatedCrossAttention(
        DIM,
        MEMORY_DIM,
        num_heads=HEADS,
        head_dim=DIM // HEADS,
        ff_dim=FF_DIM,
        norm="rms",
        feed_forward="swiglu",
        norm_eps=EPS,
        **options,
    )


def idefics_masks(seen: Tensor) -> dict[str, Tensor]:
    """What HF's model makes of bool (b, t, i)."""
    floor = torch.finfo(torch.float32).min
    bias = torch.zeros(seen.shape).masked_fill(~seen, floor)
    return {
        "image_attention_mask": bias.repeat_interleave(LATENTS, dim=-1)[:, None],
        "cross_attention_gate": seen.any(dim=-1).long(),
    }


def inputs(memory_dim: int = MEMORY_DIM) -> tuple[list[Tensor], list[Tensor]]:
    """Of both sides: hidden states and memory."""
    ours = [small(3, 5, DIM), torch.randn(3, 2, LATENTS, memory_dim, requires_grad=True)]
    return ours, [x.detach().clone().requires_grad_() for x in ours]


def condition(memory: Tensor) -> Condition:
    return Condition.of(BridgeOutput(memory, memory), PLACEHOLDERS, 1, IMAGE_MASK)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("visible", ["latest", "all"])
@pytest.mark.parametrize("gate", ["scalar", "channel"])
@pytest.mark.parametrize("qk_norm", [False, True])
def test_idefics(qk_norm: bool, gate: Any, visible: Any):
    ours = like_idefics(qk_norm=qk_norm, gate=gate, visible=visible)
    alpha_type = {"scalar": "float", "channel": "vector"}[gate]
    theirs = idefics(qk_layer_norms=qk_norm, alpha_type=alpha_type)
    pairs = parity.pair_up(ours, theirs, NAMES | (QK_NAMES if qk_norm else {}))
    parity.copy_weights(pairs)
    assert ours.attn_gate is not None and ours.attn_gate.all()

    mine, other = inputs()
    seen = condition(mine[1]).visible_images(mine[0], visible)
    expected = theirs(other[0], image_hidden_states=other[1].flatten(1, 2), **idefics_masks(seen))
    found = ours(mine[0], condition(mine[1]))
    parity.assert_parity(pairs, (found, expected), list(zip(mine, other, strict=True)))


@pytest.mark.parametrize("alpha_type", ["float", "vector"])
@pytest.mark.parametrize("initializer", ["zeros", "ones", "normal"])
def test_gates_start_as_in_idefics(initializer: str, alpha_type: str):
    if (initializer, alpha_type) == ("normal", "float"):
        with pytest.raises(TypeError):  # HF's own fault: `size=(1)` is not a tuple
            idefics(alpha_type=alpha_type, alpha_initializer=initializer)
        return
    start = {"zeros": (0.0, 0.0), "ones": (1.0, 0.0), "normal": (0.0, 0.5)}[initializer]
    theirs = idefics(
        alpha_type=alpha_type, alpha_initializer=initializer, alphas_initializer_range=0.5
    )
    ours = like_idefics(
        gate={"float": "scalar", "vector": "channel"}[alpha_type],
        gate_init=start[0],
        gate_std=start[1],
    )
    for mine, other in (
        (ours.attn_gate, theirs.alpha_cross_attn),
        (ours.ff_gate, theirs.alpha_dense),
    ):
        assert mine is not None and mine.numel() == other.numel()
        if start[1]:
            assert 0.25 < mine.std() < 1.0 and 0.25 < other.std() < 1.0
        else:
            torch.testing.assert_close(mine, other.reshape(mine.shape))


class Flamingo(flamingo_pytorch.GatedCrossAttentionBlock):
    """Its joined projection of keys and values as two, so that they can be paired."""

    def __init__(self, **options: Any) -> None:
        super().__init__(dim=DIM, dim_head=DIM // HEADS, heads=HEADS, ff_mult=2, **options)
        del self.attn.to_kv
        self.attn.to_k, self.attn.to_v = (torch.nn.Linear(DIM, DIM, bias=False) for _ in range(2))
        self.attn.to_kv = lambda media: torch.cat(
            [self.attn.to_k(media), self.attn.to_v(media)], dim=-1
        )


def like_flamingo(**options: Any) -> GatedCrossAttention:
    return GatedCrossAttention(
        DIM, DIM, num_heads=HEADS, head_dim=DIM // HEADS, ff_dim=2 * DIM, **options
    )


@pytest.mark.usefixtures("way")
def test_flamingo_pytorch():
    ours, theirs = like_flamingo(), Flamingo()
    pairs = parity.pair_up(ours, theirs, FLAMINGO_NAMES)
    parity.copy_weights(pairs)
    mine, other = inputs(DIM)
    expected = theirs(other[0], other[1], media_locations=PLACEHOLDERS)
    found = ours(mine[0], condition(mine[1]))
    parity.assert_parity(pairs, (found, expected), list(zip(mine, other, strict=True)))


def test_text_before_any_image_here_and_elsewhere():
    """Ours is zero, as in the paper and IDEFICS; flamingo-pytorch without
    `only_attend_immediate_media` averages over all images, those to come included."""
    ours = like_flamingo(visible="all")
    theirs = Flamingo(only_attend_immediate_media=False)
    parity.copy_weights(parity.pair_up(ours, theirs, FLAMINGO_NAMES))
    (hidden, memory), _ = inputs(DIM)
    found = ours.read(hidden, condition(memory))
    expected = theirs.attn(hidden, memory, media_locations=PLACEHOLDERS)
    seen = condition(memory).visible_images(hidden, "all").any(dim=-1)
    parity.close(found[seen], expected[seen], "text after an image")
    assert not found[~seen].any()
    average = theirs.attn.to_out(theirs.attn.to_v(memory.flatten(1, 2)).mean(dim=1))
    parity.close(
        expected[~seen], average[:, None].expand_as(expected)[~seen], "text before any image"
    )

    # HF's attention alone gives such text the average as well: its gate, and only it, makes zero.
    layer, masks = idefics(), idefics_masks(torch.zeros(3, 5, 2).bool())
    (hidden, memory), _ = inputs()
    attention, _ = layer.cross_attn(
        hidden, memory.flatten(1, 2), attention_mask=masks["image_attention_mask"]
    )
    average = layer.cross_attn.o_proj(layer.cross_attn.v_proj(memory.flatten(1, 2)).mean(dim=1))
    parity.close(attention, average[:, None].expand_as(attention), "HF without its gate")
