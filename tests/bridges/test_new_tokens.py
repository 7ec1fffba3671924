"""New tokens: trained rows beside a frozen, bit-identical vocabulary."""

import pytest
import tiny
import torch

from bridges import LanguageModel, VisionLanguageModel

END = "<|endofchunk|>"
FAMILIES = ["llama", "gemma2", "gpt2", "opt", "gpt_neox"]


def model_of(family: str, kind: str = "perceiver_gated", **options) -> VisionLanguageModel:
    torch.manual_seed(0)
    lm = tiny.language_model(family, end_of_chunk=END, **options)
    model = VisionLanguageModel.connect(tiny.vision_encoder(), lm, tiny.factory(kind))
    tiny.open_gates(model.bridge)
    return model


def grown(lm: LanguageModel) -> torch.nn.Module:
    """The same LM with its matrices resized by HF and the rows written into them."""
    family = lm.model.config.model_type
    full = tiny.causal_lm(family)
    assert lm.new_tokens is not None
    full.resize_token_embeddings(lm.new_tokens.width)
    rows = lm.new_tokens
    with torch.no_grad():
        full.get_input_embeddings().weight[rows.ids] = rows.embedding
        full.get_output_embeddings().weight[rows.ids] = rows.head
        if rows.head_bias is not None:
            full.get_output_embeddings().bias[rows.ids] = rows.head_bias
    return full


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_rows_beside_the_matrix_are_rows_in_it(family: str):
    lm = tiny.language_model(family, new_tokens=["<new>"], end_of_chunk=END)
    assert lm.new_tokens is not None and len(lm.new_tokens.ids) == 2
    full = grown(lm)
    ids = torch.tensor([[5, int(lm.new_tokens.ids[0]), 7, lm.end_id, 9]])
    assert lm.end_id == lm.tokenizer.convert_tokens_to_ids(END)
    ours = lm.head(lm.hidden(lm.embed(ids), torch.ones_like(ids).bool()))
    theirs = full(input_ids=ids).logits
    owned = [*range(tiny.VOCABULARY), *lm.new_tokens.ids.tolist()]
    torch.testing.assert_close(ours[..., owned], theirs[..., owned], rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_vocabulary_stays_frozen_and_the_rows_learn(family: str):
    model = model_of(family)
    lm = model.lm
    frozen = {n: t.clone() for n, t in lm.model.state_dict().items()}
    assert lm.new_tokens is not None
    names = {n for n in model.trainable_state() if n.startswith("lm.")}
    tied = lm.new_tokens.head is lm.new_tokens.embedding
    assert names == {"lm.new_tokens.embedding"} | (set() if tied else {"lm.new_tokens.head"})
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=0.1)
    ids, lossy = model.prompt_encoder().document([None, "ab"])
    end = [lm.end_id]
    # In the middle too: its embedding is read, and its output row predicts it.
    rows = [ids + end + ids + end]
    text = model.prompt_encoder().pad([(rows[0], [-100] * len(ids) + end + ids[1:] + [-100, *end])])
    text.labels[text.input_ids == lm.image_token_id] = -100
    features = tiny.features_of(model, [2])
    before = {n: t.clone() for n, t in model.trainable_state().items()}
    model(text.input_ids, text.attention_mask, text.labels, features).loss.backward()
    assert all(p.grad is not None for p in parameters)
    optimizer.step()
    for name in names:
        assert not torch.equal(before[name], model.trainable_state()[name])
    assert all(torch.equal(t, frozen[n]) for n, t in lm.model.state_dict().items())
    assert lossy == [False, True, True]


def test_a_batch_without_new_tokens_gives_them_a_zero_gradient():
    model = model_of("llama")
    text, features = tiny.batch_of(model, ["<image>a"], ["b"])
    text.labels[text.labels == model.lm.end_id] = -100
    model(text.input_ids, text.attention_mask, text.labels, features).loss.backward()
    assert model.lm.new_tokens is not None
    assert model.lm.new_tokens.embedding.grad is not None


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}])
def test_generation_ends_with_the_end_of_chunk(options: dict[str, int]):
    model = model_of("llama")
    text, features = tiny.batch_of(model, ["<image>ab", "c<image>"], padding_side="left")
    assert model.lm.new_tokens is not None
    hidden = model._decode(text.input_ids, text.attention_mask, features, None)[1]
    with torch.no_grad():  # nothing else can win after the first prompt
        model.lm.new_tokens.head.copy_(100 * hidden[:1, -1])
    new = model.generate(
        text.input_ids, text.attention_mask, features, max_new_tokens=5, do_sample=False, **options
    )
    assert new[0, 0] == model.lm.end_id


def test_the_rows_come_back_with_the_run(tmp_path):
    model, other = model_of("gpt2"), model_of("gpt2")
    with torch.no_grad():
        for tensor in other.trainable_state().values():
            tensor.add_(1)
    other.load_trainable_state(model.trainable_state())
    for name, tensor in model.trainable_state().items():
        assert torch.equal(tensor, other.trainable_state()[name])


def test_the_image_token_is_no_new_token():
    with pytest.raises(ValueError, match="soft tokens stand in its place"):
        tiny.language_model("llama", new_tokens=["<image>"])


def test_a_token_that_the_lm_knows_needs_no_row():
    lm = tiny.language_model("llama", end_of_chunk="</s>")
    assert lm.new_tokens is None and lm.end_id == lm.tokenizer.eos_token_id
