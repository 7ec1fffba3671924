"""The Q-Former's tokenizer and its batches of text."""

import json
from pathlib import Path

import pytest
import tiny
import torch

from bridges import VisionShape
from bridges.prompts import encode_text
from qformer import QFormer
from qformer.tokens import DEC_TOKEN, load_tokenizer

VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "cat", "##s", "sat"]
VOCABULARY += ["[", "]", "dec", "sep", "cls", "pad", "mask", "."]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT's tokenizer, as its folder on the hub holds it."""
    path = tmp_path_factory.mktemp("tokenizer")
    (path / "vocab.txt").write_text("\n".join(VOCABULARY) + "\n")
    (path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer"}))
    return path


@pytest.fixture(scope="module")
def tokenizer(folder: Path):
    return load_tokenizer(str(folder))


def words(tokenizer, ids: torch.Tensor) -> str:
    return " ".join(tokenizer.convert_ids_to_tokens(ids.tolist()))


def test_dec_is_the_last_word(tokenizer):
    assert len(tokenizer) == len(VOCABULARY) + 1
    assert tokenizer.convert_tokens_to_ids(DEC_TOKEN) == tokenizer.bos_token_id == len(VOCABULARY)
    assert tokenizer.bos_token == DEC_TOKEN


def test_a_qformer_has_a_row_for_each_word(folder: Path):
    sizes = {"num_queries": 2, "dim": 8, "depth": 1, "num_heads": 2}
    vision = VisionShape(4, 3, (1, 3))
    qformer = QFormer(vision=vision, tokenizer=str(folder), **sizes)
    assert qformer.vocab_size == len(VOCABULARY) + 1 == len(qformer.tokenizer)
    assert qformer.text_embeddings.word.weight.shape == (len(VOCABULARY) + 1, 8)
    with pytest.raises(ValueError, match="vocab_size=7 and a tokenizer of 19; expected them to"):
        QFormer(vision=vision, tokenizer=str(folder), vocab_size=7, **sizes)


def test_a_batch_is_padded_on_the_right_to_its_longest(tokenizer):
    text = encode_text(tokenizer, ["A red cat.", "cats", ""], 10)
    assert text.input_ids.dtype == torch.long
    assert text.attention_mask.dtype == torch.bool
    assert [words(tokenizer, row) for row in text.input_ids] == [
        "[CLS] a red cat . [SEP]",
        "[CLS] cat ##s [SEP] [PAD] [PAD]",
        "[CLS] [SEP] [PAD] [PAD] [PAD] [PAD]",
    ]
    assert text.attention_mask.sum(dim=1).tolist() == [6, 4, 2]
    assert torch.equal(text.attention_mask, text.input_ids != tokenizer.pad_token_id)


@pytest.mark.parametrize(
    ("side", "length", "expected"),
    [
        ("right", 5, "[CLS] a red cat [SEP]"),
        ("left", 5, "[CLS] cat sat . [SEP]"),
        ("right", 3, "[CLS] a [SEP]"),
        ("left", 3, "[CLS] . [SEP]"),
        ("left", 7, "[CLS] a red cat sat . [SEP]"),
        ("left", 99, "[CLS] a red cat sat . [SEP]"),
    ],
)
def test_long_text_is_cut(tokenizer, side, length: int, expected: str):
    text = encode_text(tokenizer, ["a red cat sat.", "a"], length, side)
    assert words(tokenizer, text.input_ids[0]) == expected
    assert words(tokenizer, text.input_ids[1]).startswith("[CLS] a [SEP]")


@pytest.mark.parametrize("special", ["[DEC]", "[SEP]", "[CLS]", "[PAD]", "[MASK]"])
def test_text_is_data(tokenizer, special: str):
    text = encode_text(tokenizer, [f"a {special} cat", special], 99)
    spelt = f"[ {special[1:-1].lower()} ]"
    assert words(tokenizer, text.input_ids[0]) == f"[CLS] a {spelt} cat [SEP]"
    assert words(tokenizer, text.input_ids[1]).startswith(f"[CLS] {spelt} [SEP]")
    assert text.attention_mask[0].all()


def test_a_tokenizer_of_another_kind_is_refused(tmp_path: Path):
    tiny.make_tokenizer(image_token=False).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"without \[CLS\] and \[SEP\] at .*; expected a BERT's"):
        load_tokenizer(str(tmp_path))
