"""An LM that carries a bridge is still itself for everybody else."""

import pytest
import tiny
import torch

from bridges import VisionLanguageModel


@pytest.mark.parametrize("kind", ["perceiver_gated", "third_party"])
def test_a_training_step_leaves_no_trace_on_the_lm(kind, encoder, bare_lms):
    """Two bridges on one LM take turns; the LM alone gives its own logits in between."""
    lm = tiny.language_model("llama")
    models = [VisionLanguageModel.connect(encoder, lm, tiny.factory(kind)) for _ in range(2)]
    for seed, model in enumerate(models):
        tiny.open_gates(model.bridge, seed)
    alone = VisionLanguageModel.connect(encoder, tiny.language_model("llama"), tiny.factory(kind))
    alone.bridge.load_state_dict(models[1].bridge.state_dict())
    text, features = tiny.batch_of(models[0], ["<image>a"], ["bc"])
    inputs = (text.input_ids, text.attention_mask, text.labels, features)
    models[0](*inputs).loss.backward()
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        assert torch.equal(lm.model(ids).logits, bare_lms("llama")(ids).logits)
    found, expected = models[1](*inputs).loss, alone(*inputs).loss
    assert torch.equal(found, expected)
