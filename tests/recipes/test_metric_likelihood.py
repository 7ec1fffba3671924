"""Loss per token and perplexity."""

import pytest
import torch

from recipes.metric_likelihood import CaptionNLL


def test_every_token_counts_alike():
    metric = CaptionNLL()
    metric.update(torch.tensor([6.0, 1.0]), torch.tensor([3, 1]))
    metric.update(torch.tensor([3.0]), torch.tensor([6]))
    found = metric.compute()
    assert found["nll"] == pytest.approx(10 / 10)
    assert found["perplexity"] == pytest.approx(2.718281828459045, abs=1e-12)
    assert metric.per_image().tolist() == [2, 1, 0.5]
    assert metric.per_image_sums().tolist() == [[6, 3], [1, 1], [3, 6]]


def test_a_uniform_model_is_as_perplexed_as_it_has_words():
    logits = torch.zeros(4, 7, 50)
    losses = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), torch.zeros(28, dtype=torch.long), reduction="none"
    )
    metric = CaptionNLL()
    metric.update(losses.view(4, 7).sum(dim=1), torch.full((4,), 7))
    assert metric.compute()["perplexity"] == pytest.approx(50, rel=1e-5)


def test_what_does_not_belong_together_is_refused():
    metric = CaptionNLL()
    with pytest.raises(
        ValueError, match=r"losses of shape \(2,\) and token counts of shape \(3,\)"
    ):
        metric.update(torch.ones(2), torch.ones(3))
    with pytest.raises(ValueError, match="1 captions of no tokens"):
        metric.update(torch.ones(2), torch.tensor([1, 0]))
    metric.reset()
    with pytest.raises(ValueError, match="found no image"), pytest.warns(UserWarning):
        metric.compute()
