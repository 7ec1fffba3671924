"""The names of the same weights here, in LAVIS and in HF, as tables.

A row names a parameter, or a module whose parameters keep their names. Our side is that of
`Stage1` (``qformer.``, the heads), of `SoftPrefix` (``projection``), and for the frozen ends
``vision.`` and ``lm.`` before the names that HF's vision model and causal LM have. Read off LAVIS's
`Qformer.py`, `blip2_qformer.py`, `blip2_opt.py`, `blip2_vicuna_instruct.py` and `eva_vit.py`, and
the state dicts of transformers.
"""

from typing import Literal, NamedTuple

Form = Literal["lavis", "blip2", "instructblip"]
"""A LAVIS ``.pth``, HF's ``Blip2…`` or HF's ``InstructBlip…``."""


class Row(NamedTuple):
    """One parameter or module; None where a form has no place for it."""

    ours: str
    lavis: str | None
    blip2: str | None
    instructblip: str | None


_WORD = "qformer.text_embeddings.word"
_POSITION = "qformer.text_embeddings.position"
_BERT = "Qformer.bert.embeddings"
_CLS = "Qformer.cls.predictions"

TOP = (
    Row("qformer.queries", "query_tokens", "query_tokens", "query_tokens"),
    Row(
        "qformer.embedding_norm",
        f"{_BERT}.LayerNorm",
        "qformer.layernorm",
        "qformer.embeddings.layernorm",
    ),
    # HF counts this norm to the encoder; it is trained with the Q-Former.
    Row(
        "qformer.ln_vision",
        "ln_vision",
        "vision_model.post_layernorm",
        "vision_model.post_layernorm",
    ),
    Row(
        _WORD,
        f"{_BERT}.word_embeddings",
        "embeddings.word_embeddings",
        "qformer.embeddings.word_embeddings",
    ),
    Row(
        _POSITION,
        f"{_BERT}.position_embeddings",
        "embeddings.position_embeddings",
        "qformer.embeddings.position_embeddings",
    ),
    Row("vision_projection", "vision_proj", "vision_projection", None),
    Row("text_projection", "text_proj", "text_projection", None),
    Row("itm_head", "itm_head", "itm_head", None),
    Row("temperature", "temp", None, None),
    Row("lm_head.dense", f"{_CLS}.transform.dense", None, None),
    Row("lm_head.norm", f"{_CLS}.transform.LayerNorm", None, None),
    # LAVIS adds the bias of its decoder; `predictions.bias` is the same one under another name.
    Row("lm_head.bias", f"{_CLS}.decoder.bias", None, None),
    Row("projection", "opt_proj", "language_projection", "language_projection"),
    Row("projection", "t5_proj", None, None),
    Row("projection", "llm_proj", None, None),
    Row("lm", "opt_model", "language_model", "language_model"),
    Row("lm", "t5_model", None, None),
    Row("lm", "llm_model", None, None),
)

LAYER = (
    ("self_attention.q", "attention.self.query", "attention.attention.query"),
    ("self_attention.k", "attention.self.key", "attention.attention.key"),
    ("self_attention.v", "attention.self.value", "attention.attention.value"),
    ("self_attention.out", "attention.output.dense", "attention.output.dense"),
    ("self_norm", "attention.output.LayerNorm", "attention.output.LayerNorm"),
    ("cross_attention.q", "crossattention.self.query", "crossattention.attention.query"),
    ("cross_attention.k", "crossattention.self.key", "crossattention.attention.key"),
    ("cross_attention.v", "crossattention.self.value", "crossattention.attention.value"),
    ("cross_attention.out", "crossattention.output.dense", "crossattention.output.dense"),
    ("cross_norm", "crossattention.output.LayerNorm", "crossattention.output.LayerNorm"),
    ("query_ff.up", "intermediate_query.dense", "intermediate_query.dense"),
    ("query_ff.out", "output_query.dense", "output_query.dense"),
    ("query_norm", "output_query.LayerNorm", "output_query.LayerNorm"),
    ("text_ff.up", "intermediate.dense", "intermediate.dense"),
    ("text_ff.out", "output.dense", "output.dense"),
    ("text_norm", "output.LayerNorm", "output.LayerNorm"),
)
"""One layer of the Q-Former: ours, LAVIS, HF (both classes)."""

VISION = (
    ("embeddings.class_embedding", "cls_token"),
    ("embeddings.position_embedding", "pos_embed"),
    ("embeddings.patch_embedding", "patch_embed.proj"),
)
"""EVA ViT-g outside of its blocks: HF (and so ours), LAVIS."""

VISION_BLOCK = (
    ("layer_norm1", "norm1"),
    ("self_attn.qkv.weight", "attn.qkv.weight"),
    # `q_bias`, zeros and `v_bias` make up HF's bias; see `qformer.official`.
    ("self_attn.q_bias", "attn.q_bias"),
    ("self_attn.v_bias", "attn.v_bias"),
    ("self_attn.projection", "attn.proj"),
    ("layer_norm2", "norm2"),
    ("mlp.fc1", "mlp.fc1"),
    ("mlp.fc2", "mlp.fc2"),
)
"""One block of EVA ViT-g: HF (and so ours), LAVIS."""

NEVER_TAKEN = {
    "Qformer.bert.embeddings.position_ids": "a buffer that counts 0, 1, 2, …",
    "embeddings.position_ids": "a buffer that counts 0, 1, 2, …",
    "qformer.embeddings.position_ids": "a buffer that counts 0, 1, 2, …",
    f"{_CLS}.decoder.weight": "tied: equal to the word embeddings (checked)",
    f"{_CLS}.bias": "another name of decoder.bias, which is the one that LAVIS adds",
}
"""Keys of official files that have no place here, and why."""


HF_LEAVES_OUT = {
    "lm_head": "HF's retrieval class has no head for image-grounded generation",
    "temperature": "HF's retrieval class returns cosines, not divided by a temperature",
}
"""Our stage-1 weights that an HF folder cannot hold, and why."""


def key_map(form: Form, depth: int, vision_depth: int = 0) -> list[tuple[str, str]]:
    """Pairs (ours, theirs) of names of parameters and modules; the first match counts.

    Args:
        form: whose names.
        depth: layers of the Q-Former.
        vision_depth: blocks of LAVIS's vision encoder.
    """
    pairs = [(row.ours, theirs) for row in TOP if (theirs := getattr(row, form)) is not None]
    lavis = form == "lavis"
    base = "Qformer.bert.encoder.layer" if lavis else "qformer.encoder.layer"
    for layer in range(depth):
        pairs += [
            (f"qformer.layers.{layer}.{row[0]}", f"{base}.{layer}.{row[1 if lavis else 2]}")
            for row in LAYER
        ]
    if not lavis:
        return [*pairs, ("vision", "vision_model")]
    pairs += [(f"vision.{ours}", f"visual_encoder.{theirs}") for ours, theirs in VISION]
    for block in range(vision_depth):
        pairs += [
            (f"vision.encoder.layers.{block}.{ours}", f"visual_encoder.blocks.{block}.{theirs}")
            for ours, theirs in VISION_BLOCK
        ]
    return pairs
