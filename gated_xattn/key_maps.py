"""The names of the same weights here, in HF's Idefics and in OpenFlamingo, as tables.

A row names a parameter, or a module whose parameters keep their names. Our side is that of
`GatedXAttn`; the resampler's rows are in `perceiver.official`. Read off transformers'
``modeling_idefics.py`` and OpenFlamingo's ``helpers.py`` and ``flamingo_lm.py``.
"""

import re

from bridges.official import FlamingoForm, FlamingoRow

BLOCK = (
    FlamingoRow("attn_norm", "input_layernorm", "attn.norm"),
    FlamingoRow("attn.q", "cross_attn.q_proj", "attn.to_q"),
    FlamingoRow("attn.k", "cross_attn.k_proj", None),
    FlamingoRow("attn.v", "cross_attn.v_proj", None),
    FlamingoRow("attn.kv", None, "attn.to_kv"),  # one matrix there: keys, then values
    FlamingoRow("attn.out", "cross_attn.o_proj", "attn.to_out"),
    FlamingoRow("attn.q_norm", "cross_attn.q_layer_norm", None),
    FlamingoRow("attn.k_norm", "cross_attn.k_layer_norm", None),
    FlamingoRow("attn_gate", "alpha_cross_attn", "attn_gate"),
    FlamingoRow("ff_norm", "post_attention_layernorm", "ff.0"),
    FlamingoRow("ff.up", "mlp.up_proj", "ff.1"),
    FlamingoRow("ff.gate", "mlp.gate_proj", None),
    FlamingoRow("ff.out", "mlp.down_proj", "ff.3"),
    FlamingoRow("ff_gate", "alpha_dense", "ff_gate"),
)
"""One gated block. HF's gates are (1) or (1, 1, d), ours and OpenFlamingo's are vectors."""

IDEFICS_BLOCKS = "model.gated_cross_attn_layers"
"""Before the number of a gated block; the n-th stands before LM block n · cross_layer_interval."""

FLAMINGO_BLOCK = re.compile(
    r"lang_encoder\.(?:gated_cross_attn_layers\.(?P<list>\d+)"
    r"|.+\.(?P<wrapped>\d+)\.gated_cross_attn_layer)\.(?P<name>.+)"
)
"""OpenFlamingo's two names of a gated block; both have the number of the LM block behind it."""

FLAMINGO_DECODER = re.compile(r"^old_decoder_blocks\.|\.decoder_layer\.")
"""In OpenFlamingo's names of the LM's own blocks; whatever is in them is frozen."""

OLD_HEAD = "embed_out.weight"
"""Where a GPT-NeoX had its output rows before transformers named them as everywhere."""

END_OF_CHUNK = "<|endofchunk|>"
"""OpenFlamingo's end of a text, and of a completion."""

FAKE_TOKEN = "<fake_token_around_image>"
"""IDEFICS puts it before and after every image."""

LM = "the frozen LM; see load_idefics"
VISION = "the frozen vision encoder; see load_idefics"

IDEFICS_LEFT = {
    "model.vision_model.": VISION,
    "model.layers.": LM,
    "model.norm.": LM,
    "model.embed_tokens.weight": LM,
    "lm_head.weight": LM,
}
"""Beginnings of the keys of HF's Idefics that belong to the frozen ends."""


def block_map(form: FlamingoForm, number: int) -> list[tuple[str, str]]:
    """Pairs (ours, theirs) of one gated block; theirs begins behind its number in the file."""
    return [
        (f"blocks.{number}.{row.ours}", theirs)
        for row in BLOCK
        if (theirs := getattr(row, form)) is not None
    ]
