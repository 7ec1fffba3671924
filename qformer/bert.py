"""Starting a Q-Former from a BERT."""

from typing import Any

import torch
from torch import Tensor, nn

from qformer.layers import BERT_EPS
from qformer.resampler import QFormer
from qformer.tokens import bert_source

_ATTENTION = {
    "self_attention.q": "attention.self.query",
    "self_attention.k": "attention.self.key",
    "self_attention.v": "attention.self.value",
    "self_attention.out": "attention.output.dense",
    "self_norm": "attention.output.LayerNorm",
}
_FEED_FORWARD = {
    "ff.up": "intermediate.dense",
    "ff.out": "output.dense",
    "norm": "output.LayerNorm",
}


@torch.no_grad()
def init_from_bert(qformer: QFormer, name: str) -> dict[str, Tensor]:
    """Copies a BERT into a Q-Former: self-attention, both feed-forwards, norms, embeddings.

    The queries' feed-forward begins as a copy of BERT's; cross-attention, queries and the tokens
    that BERT lacks ([DEC]) stay random. The text stream by itself then computes what BERT does.

    Args:
        qformer: of BERT's width and head count; as deep as BERT or shallower.
        name: a hub name, a local folder, or ``embedded:minilm-l6``.

    Returns:
        The state of BERT's masked-language head (``dense.*``, ``norm.*``, ``bias``), with as many
        outputs as BERT has words; empty if the checkpoint has none (sentence encoders).

    Raises:
        ValueError: a checkpoint of another kind or size.

    Source: BLIP-2 (arXiv 2301.12597) section 3.1. Deviation: BERT's first token type is added to
    the positions; LAVIS drops it, after which the text stream is no longer BERT's.
    """
    from transformers import AutoConfig, AutoModelForMaskedLM

    source = bert_source(name)
    config: Any = AutoConfig.from_pretrained(source)
    if config.model_type != "bert":
        raise ValueError(f"found a {config.model_type!r} model at {name!r}; expected a BERT")
    _check_sizes(qformer, config, name)
    _check_words(qformer, source, name)
    model, report = AutoModelForMaskedLM.from_pretrained(
        source, output_loading_info=True, dtype=torch.float32
    )
    bert = model.bert
    table = qformer.text_embeddings
    if table is not None:
        words = min(len(table.word.weight), config.vocab_size)
        table.word.weight[:words] = bert.embeddings.word_embeddings.weight[:words]
        positions = min(len(table.position.weight), config.max_position_embeddings)
        table.position.weight[:positions] = (
            bert.embeddings.position_embeddings.weight[:positions]
            + bert.embeddings.token_type_embeddings.weight[0]
        )
    _copy(qformer.embedding_norm, bert.embeddings.LayerNorm)
    for layer, theirs in zip(qformer.blocks, bert.encoder.layer, strict=False):
        for ours, bert_name in _ATTENTION.items():
            _copy(layer.get_submodule(ours), theirs.get_submodule(bert_name))
        for ours, bert_name in _FEED_FORWARD.items():
            for branch in ("query", "text") if layer.text_ff is not None else ("query",):
                _copy(layer.get_submodule(f"{branch}_{ours}"), theirs.get_submodule(bert_name))
    if any(key.startswith("cls.predictions.transform") for key in report["missing_keys"]):
        return {}
    head = model.cls.predictions
    return {
        "dense.weight": head.transform.dense.weight,
        "dense.bias": head.transform.dense.bias,
        "norm.weight": head.transform.LayerNorm.weight,
        "norm.bias": head.transform.LayerNorm.bias,
        "bias": head.bias,
    }


def _check_sizes(qformer: QFormer, config: Any, name: str) -> None:
    first = qformer.blocks[0]
    found = {
        "dim": (qformer.dim, config.hidden_size),
        "num_heads": (first.self_attention.num_heads, config.num_attention_heads),
        "ff_dim": (first.query_ff.up.out_features, config.intermediate_size),
    }
    if (config.hidden_act, config.layer_norm_eps) != ("gelu", BERT_EPS):
        raise ValueError(
            f"found hidden_act={config.hidden_act!r} and layer_norm_eps={config.layer_norm_eps} at "
            f"{name!r}; expected 'gelu' and {BERT_EPS}, which the Q-Former computes with: take "
            "another BERT"
        )
    wrong = [f"{size}={ours} where it has {bert}" for size, (ours, bert) in found.items()]
    wrong = [text for text, (a, b) in zip(wrong, found.values(), strict=True) if a != b]
    if len(qformer.layers) > config.num_hidden_layers:
        wrong.append(f"depth={len(qformer.layers)} where it has {config.num_hidden_layers}")
    if wrong:
        raise ValueError(
            f"found a Q-Former with {', '.join(wrong)}; expected the sizes of the BERT {name!r} "
            "(fewer layers are fine): change them, or start without a BERT"
        )


def _check_words(qformer: QFormer, source: str, name: str) -> None:
    """The Q-Former's token ids mean the same words as the BERT's."""
    from transformers import AutoTokenizer

    if qformer.tokenizer is None:
        return
    theirs, ours = AutoTokenizer.from_pretrained(source).get_vocab(), qformer.tokenizer.get_vocab()
    moved = [word for word, place in theirs.items() if ours.get(word) != place]
    if moved:
        raise ValueError(
            f"found {len(moved)} words of {name!r} with other ids in the Q-Former's tokenizer, "
            f"e.g. {moved[0]!r}; expected one vocabulary: give both the same name"
        )


def _copy(ours: nn.Module, theirs: nn.Module) -> None:
    ours.load_state_dict(theirs.state_dict())
