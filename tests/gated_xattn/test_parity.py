"""The gated block against HF's IDEFICS-1."""

import parity
import pytest
import torch
import transformers as hf
from parity import small
from transformers.models.idefics.modeling_idefics import IdeficsGatedCrossAttentionLayer

from bridges import Condition
from gated_xattn import GatedCrossAttention

DIM, MEMORY_DIM, HEADS, FF_DIM, EPS = 32, 24, 4, 48, 1e-6

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


def reference(qk_norm: bool) -> IdeficsGatedCrossAttentionLayer:
    config = hf.IdeficsConfig(
        hidden_size=DIM,
        intermediate_size=FF_DIM,
        num_attention_heads=HEADS,
        rms_norm_eps=EPS,
        qk_layer_norms=qk_norm,
        alpha_type="float",
        alpha_initializer="zeros",
        dropout=0.0,
        vision_config={"embed_dim": MEMORY_DIM},
        attn_implementation="eager",
    )
    return IdeficsGatedCrossAttentionLayer(config, layer_idx=0)


@pytest.mark.parametrize("qk_norm", [False, True])
def test_block(qk_norm: bool):
    ours = GatedCrossAttention(
        DIM,
        MEMORY_DIM,
        num_heads=HEADS,
        head_dim=DIM // HEADS,
        ff_dim=FF_DIM,
        norm="rms",
        feed_forward="swiglu",
        qk_norm=qk_norm,
        norm_eps=EPS,
    )
    theirs = reference(qk_norm)
    pairs = parity.pair_up(ours, theirs, NAMES | (QK_NAMES if qk_norm else {}))
    parity.copy_weights(pairs)
    assert ours.attn_gate != 0 and ours.ff_gate != 0

    # Two images of three tokens; the last row has none, and sees a padding image.
    index = torch.tensor([[-1, 0, 0, 1, 1], [0, 0, 0, 0, 0], [-1, -1, -1, -1, -1]])
    image_mask = torch.tensor([[True, True], [True, False], [False, False]])
    hidden = [small(3, 5, DIM)]
    memory = [torch.randn(3, 2, 3, MEMORY_DIM, requires_grad=True)]
    hidden.append(hidden[0].detach().clone().requires_grad_())
    memory.append(memory[0].detach().flatten(1, 2).requires_grad_())

    bias = torch.full((3, 1, 5, 6), torch.finfo(torch.float32).min)
    for row, column in (index >= 0).nonzero().tolist():
        image = int(index[row, column])
        bias[row, 0, column, 3 * image : 3 * image + 3] = 0.0
    expected = theirs(
        hidden_states=hidden[1],
        image_hidden_states=memory[1],
        image_attention_mask=bias,
        cross_attention_gate=(index >= 0).long(),
    )
    found = ours(hidden[0], Condition(memory[0], image_mask, index))
    parity.assert_parity(pairs, (found, expected), [(hidden[0], hidden[1]), (memory[0], memory[1])])
