"""Loading the frozen LM, and what may be added to it. Its arithmetic is in tests/contract."""

import sys
from pathlib import Path

import pytest
import tiny
import torch

from bridges import LanguageModel, LoRA, add_image_token


@pytest.fixture
def folder(tmp_path: Path) -> str:
    tiny.causal_lm("llama").save_pretrained(tmp_path)
    tiny.make_tokenizer(image_token=False).save_pretrained(tmp_path)
    return str(tmp_path)


def test_a_local_folder_is_loaded(folder: str):
    loaded = LanguageModel.load(folder, dtype="fp32")
    built = tiny.language_model("llama")
    assert loaded.dtype == torch.float32
    assert loaded.fingerprint == built.fingerprint
    assert loaded.image_token_id == built.image_token_id == 99
    narrow = LanguageModel.load(folder, dtype="bf16")
    assert narrow.dtype == torch.bfloat16
    assert narrow.fingerprint == built.fingerprint
    assert tiny.language_model("qwen2").fingerprint != built.fingerprint


def test_a_placeholder_needs_no_row_in_the_embedding():
    lm = LanguageModel(tiny.causal_lm("llama", vocab_size=99), tiny.make_tokenizer())
    assert lm.image_token_id == 99 == lm.model.get_input_embeddings().num_embeddings
    assert lm.embed(torch.tensor([[5, 99]])).shape == (1, 2, 32)


def test_adding_the_placeholder_keeps_the_other_special_tokens():
    tokenizer = tiny.make_tokenizer(image_token=False)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|end|>"]})
    before = tokenizer.all_special_tokens
    assert add_image_token(tokenizer) == add_image_token(tokenizer) == 100
    assert set(before) <= set(tokenizer.all_special_tokens)
    ids = tokenizer("a<image>b<|end|>")["input_ids"]
    assert len(ids) == 4
    assert tokenizer.decode(ids, skip_special_tokens=True) == "ab"


def test_quantization_without_its_package(folder: str):
    pytest.importorskip("transformers")
    if "bitsandbytes" in sys.modules:
        pytest.skip("bitsandbytes is here")
    with pytest.raises(ImportError, match=r"pip install 'bridges\[quantize\]'"):
        LanguageModel.load(folder, quantize="4bit")


def test_lora_without_its_package(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match=r"pip install 'bridges\[lora\]'"):
        tiny.language_model("llama", lora=LoRA())


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_fresh_lora_changes_nothing_and_is_all_that_trains(family: str):
    bare = tiny.language_model(family)
    lm = tiny.language_model(family, lora=LoRA(r=2))
    ids = torch.arange(10, 16)[None]
    mask = torch.ones_like(ids, dtype=torch.bool)
    with torch.no_grad():
        assert torch.equal(lm.hidden(lm.embed(ids), mask), bare.hidden(bare.embed(ids), mask))
    trained = lm.trainable_state()
    assert trained
    assert all("lora_" in name for name in trained)
    assert bare.trainable_state() == {}


def test_checkpointing_leaves_no_dropout_in_training_mode():
    for family in tiny.FAMILIES:
        lm = tiny.language_model(family, gradient_checkpointing=True)
        lm.train()
        assert lm.model.training
        ids = torch.arange(10, 16)[None]
        mask = torch.ones_like(ids, dtype=torch.bool)
        with torch.no_grad():
            first, second = (lm.hidden(lm.embed(ids), mask) for _ in range(2))
            assert torch.equal(first, second), family
            lm.eval()
            assert torch.equal(first, lm.hidden(lm.embed(ids), mask)), family
