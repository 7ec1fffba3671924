"""The caption loss: chunked, unchunked, and as HF computes it from all logits."""

import pytest
import tiny
import torch

from bridges import LanguageModel, VisionEncoder, VisionLanguageModel
from bridges import loss as loss_module
from bridges.loss import IGNORE, label_positions, token_losses

PROMPTS = ["<image>", "text <image>more"]
COMPLETIONS = ["a longer caption of many letters", "short"]


def passes(encoder: VisionEncoder, monkeypatch: pytest.MonkeyPatch, elements: int | None):
    """Loss and gradients with a given chunk size."""
    heads = []
    lm = tiny.language_model("gemma2")
    torch.manual_seed(0)
    model = VisionLanguageModel.connect(encoder, lm, tiny.factory("mlp"))
    head = lm.head
    monkeypatch.setattr(lm, "head", lambda hidden: heads.append(len(hidden)) or head(hidden))
    if elements is not None:
        monkeypatch.setattr(loss_module, "CHUNK_ELEMENTS", elements)
    text, features = tiny.batch_of(model, PROMPTS, COMPLETIONS)
    out = model(text.input_ids, text.attention_mask, text.labels, features)
    rows = list(heads)
    out.loss.backward()
    return model, text, features, out, rows, [p.grad for p in model.bridge.parameters()]


@pytest.mark.parametrize("elements", [1, 7 * tiny.VOCABULARY])
def test_chunks_change_nothing(encoder, monkeypatch, elements: int):
    *_, whole, rows, gradients = passes(encoder, monkeypatch, None)
    labels = sum(len(c) + 1 for c in COMPLETIONS)
    assert rows == [labels]
    *_, chunked, rows, chunked_gradients = passes(encoder, monkeypatch, elements)
    assert sum(rows) == labels
    assert max(rows) == max(1, elements // tiny.VOCABULARY)
    torch.testing.assert_close(chunked.token_losses, whole.token_losses)
    torch.testing.assert_close(chunked.loss, whole.loss)
    for found, expected in zip(chunked_gradients, gradients, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_it_is_the_loss_that_hf_computes_from_all_logits(encoder, monkeypatch):
    model, text, features, out, _, gradients = passes(encoder, monkeypatch, None)
    model.bridge.zero_grad()
    output = model.bridge(model._matched(features))
    bare = tiny.causal_lm("gemma2")
    expected = bare(
        inputs_embeds=model._fill(text.input_ids, output, features),
        attention_mask=text.attention_mask.long(),
        labels=text.labels,
    ).loss
    torch.testing.assert_close(out.loss, expected, rtol=1e-5, atol=1e-5)
    expected.backward()
    for found, parameter in zip(gradients, model.bridge.parameters(), strict=True):
        torch.testing.assert_close(found, parameter.grad, rtol=1e-4, atol=1e-6)


def test_only_labels_meet_the_head():
    """Vocabulary-sized logits exist where labels are, and nowhere else."""
    hidden = torch.arange(2 * 4 * 3.0).view(2, 4, 3)
    labels = torch.tensor([[IGNORE, 5, IGNORE, 6], [7, IGNORE, IGNORE, IGNORE]])
    at, targets = label_positions(hidden, labels)
    # The first column predicts nothing that stands before it: label 7 is lost, as in HF.
    assert targets.tolist() == [5, 6]
    assert torch.equal(at, hidden[0, [0, 2]])


def test_losses_belong_to_their_rows(language_models, encoder):
    lm: LanguageModel = language_models("llama")
    model = VisionLanguageModel.connect(encoder, lm, tiny.factory("linear"))
    text, features = tiny.batch_of(model, PROMPTS, COMPLETIONS)
    out = model(text.input_ids, text.attention_mask, text.labels, features)
    sizes = [len(c) + 1 for c in COMPLETIONS]
    assert out.label_counts.tolist() == sizes
    expected = torch.stack([part.sum() for part in out.token_losses.split(sizes)])
    torch.testing.assert_close(out.row_losses(), expected)
    torch.testing.assert_close(out.loss, out.row_losses().sum() / sum(sizes))


def test_without_gradients_chunks_are_not_kept(monkeypatch):
    monkeypatch.setattr(loss_module, "CHUNK_ELEMENTS", 10)
    head = torch.nn.Linear(3, 10)
    hidden, targets = torch.randn(5, 3), torch.arange(5)
    with torch.no_grad():
        found = token_losses(head, hidden, targets, 10)
    expected = torch.nn.functional.cross_entropy(head(hidden), targets, reduction="none")
    torch.testing.assert_close(found, expected)
