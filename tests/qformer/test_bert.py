"""A Q-Former that starts from a BERT computes what this BERT does."""

from pathlib import Path
from typing import Any

import pytest
import tiny
import tiny_stage1 as tiny1
import torch
import transformers as hf

from qformer import QFormer, init_from_bert
from qformer.heads import LMHead
from qformer.layout import Layout
from qformer.masks import itm_mask

WORDS = tiny1.WORDS - 1
"""[DEC] is the Q-Former's own."""


def bert(cls: Any = hf.BertForMaskedLM, **changes: Any) -> Any:
    sizes = {
        "vocab_size": WORDS,
        "hidden_size": tiny1.WIDTH,
        "num_hidden_layers": 3,
        "num_attention_heads": tiny1.HEADS,
        "intermediate_size": 24,
        "max_position_embeddings": 20,
    }
    return tiny.randomise(cls(hf.BertConfig(**(sizes | changes))))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("bert")
    bert().save_pretrained(path)
    return str(path)


def qformer_of(**options: Any) -> QFormer:
    return tiny1.qformer_of(seed=1, **({"ff_dim": 24} | options))


@torch.no_grad()
def text_stream(qformer: QFormer):
    """The outputs at all real tokens, and the batch."""
    text = tiny1.texts_of()
    layout = Layout.of(0, text.attention_mask, itm_mask)
    return qformer.transform(
        qformer.embed_text(text.input_ids, text.attention_mask), layout, []
    ), text


@torch.no_grad()
@pytest.mark.parametrize(("depth", "max_text"), [(3, 12), (3, 40), (1, 20), (2, 8)])
def test_the_text_stream_is_bert(folder: str, depth: int, max_text: int):
    qformer = qformer_of(depth=depth, max_text=max_text)
    init_from_bert(qformer, folder)
    found, text = text_stream(qformer)
    model = hf.BertModel.from_pretrained(folder, add_pooling_layer=False).eval()
    model.encoder.layer = model.encoder.layer[:depth]
    expected = model(text.input_ids, text.attention_mask.long()).last_hidden_state
    torch.testing.assert_close(found, expected[text.attention_mask], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_the_head_is_berts(folder: str):
    qformer = qformer_of()
    head = LMHead(tiny1.WIDTH, WORDS)
    head.load_state_dict(init_from_bert(qformer, folder))
    found, text = text_stream(qformer)
    model = hf.BertForMaskedLM.from_pretrained(folder).eval()
    expected = model(text.input_ids, text.attention_mask.long()).logits[text.attention_mask]
    logits = head(found, qformer.text_embeddings.word.weight[:WORDS])
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-5)


def test_a_sentence_encoder_has_no_head(tmp_path: Path):
    bert(hf.BertModel).save_pretrained(tmp_path)
    qformer = qformer_of()
    assert init_from_bert(qformer, str(tmp_path)) == {}
    found, text = text_stream(qformer)
    model = hf.BertModel.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        expected = model(text.input_ids, text.attention_mask.long()).last_hidden_state
    torch.testing.assert_close(found, expected[text.attention_mask], atol=1e-5, rtol=1e-5)


def test_what_bert_lacks_is_left_as_it_was(folder: str):
    qformer = qformer_of()
    before = {name: p.detach().clone() for name, p in qformer.named_parameters()}
    trained = [p.requires_grad for p in qformer.parameters()]
    init_from_bert(qformer, folder)
    assert [p.requires_grad for p in qformer.parameters()] == trained
    kept = ("cross_attention", "cross_norm", "ln_vision", "queries")
    for name, p in qformer.named_parameters():
        same = torch.equal(p, before[name])
        assert same == any(part in name.split(".") for part in kept), name
    assert torch.equal(
        qformer.text_embeddings.word.weight[WORDS:], before["text_embeddings.word.weight"][WORDS:]
    )
    for layer in qformer.blocks:
        for query, text in ((layer.query_ff, layer.text_ff), (layer.query_norm, layer.text_norm)):
            for a, b in zip(query.parameters(), text.parameters(), strict=True):
                assert torch.equal(a, b) and a is not b


def test_without_a_text_branch_the_queries_start_from_bert(folder: str):
    ours, theirs = qformer_of(vocab_size=None), qformer_of()
    assert init_from_bert(ours, folder).keys() == init_from_bert(theirs, folder).keys()
    for name, p in ours.blocks[1].named_parameters():
        assert torch.equal(p, theirs.blocks[1].get_parameter(name)), name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dim": 18}, "dim=18 where it has 16"),
        ({"num_heads": 4}, "num_heads=4 where it has 2"),
        ({"ff_dim": 32}, "ff_dim=32 where it has 24"),
        ({"depth": 4}, "depth=4 where it has 3"),
    ],
)
def test_other_sizes_are_refused(folder: str, options: dict[str, int], message: str):
    qformer = qformer_of(**options)
    before = {name: p.detach().clone() for name, p in qformer.named_parameters()}
    with pytest.raises(ValueError, match=f"found a Q-Former with {message}; expected"):
        init_from_bert(qformer, folder)
    assert all(torch.equal(p, before[name]) for name, p in qformer.named_parameters())


def test_other_models_are_refused(tmp_path: Path):
    hf.DistilBertConfig(dim=16, n_layers=1, n_heads=2).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"found a 'distilbert' model at .*; expected a BERT"):
        init_from_bert(qformer_of(), str(tmp_path))


def test_berts_of_another_make_are_refused(tmp_path: Path):
    """Anything else would compute something else in silence."""
    bert(hidden_act="relu").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="relu"):
        init_from_bert(qformer_of(), str(tmp_path))
