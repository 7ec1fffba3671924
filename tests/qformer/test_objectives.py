"""The formulas of stage 1 by hand, and what a draw of hard negatives may give."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bridges import Instruction
from qformer.joined import JoinedBatch, caption_ids
from qformer.objectives import (
    contrastive_loss,
    draw_negatives,
    similarity,
    soft_contrastive_loss,
)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_similarity_is_that_of_the_best_query():
    images, texts = random(4, 3, 5), random(6, 5, seed=1)
    expected = [[max(float(q @ text) for q in image) for text in texts] for image in images]
    torch.testing.assert_close(similarity(images, texts), torch.tensor(expected))


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.5])
def test_contrast_is_smoothed_cross_entropy(smoothing: float):
    logits, own = random(4, 7).requires_grad_(), torch.tensor([2, 0, 6, 6])
    found = contrastive_loss(logits, own, torch.ones(4, 7).bool(), smoothing)
    expected = F.cross_entropy(logits, own, reduction="none", label_smoothing=smoothing)
    torch.testing.assert_close(found, expected)
    gradients = [torch.autograd.grad(x.sum(), logits, retain_graph=True) for x in (found, expected)]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_contrast_over_fewer_candidates_is_that_of_the_smaller_row(smoothing: float):
    logits, own = random(3, 6).requires_grad_(), torch.tensor([1, 0, 5])
    allowed = torch.tensor(
        [[1, 1, 0, 0, 1, 1], [1, 0, 0, 0, 0, 0], [0, 1, 1, 1, 0, 1]], dtype=torch.bool
    )
    found = contrastive_loss(logits, own, allowed, smoothing)
    for row in range(3):
        candidates = logits[row][allowed[row]]
        place = allowed[row][: own[row]].sum()
        expected = F.cross_entropy(candidates, place, label_smoothing=smoothing)
        torch.testing.assert_close(found[row], expected)
    (gradient,) = torch.autograd.grad(found.sum(), logits)
    assert gradient.isfinite().all()
    assert not gradient[~allowed].any()
    assert gradient[0][allowed[0]].all()


def test_soft_contrast_is_cross_entropy_with_those_targets():
    logits = random(3, 5).requires_grad_()
    allowed = torch.tensor([[1, 1, 1, 1, 1], [0, 1, 1, 0, 1], [1, 0, 0, 0, 0]]).bool()
    targets = random(3, 5, seed=1).masked_fill(~allowed, -torch.inf).softmax(dim=1)
    found = soft_contrastive_loss(logits, targets, allowed)
    for row in range(3):
        here = allowed[row]
        expected = F.cross_entropy(logits[row, here], targets[row, here])
        torch.testing.assert_close(found[row], expected)
    (gradient,) = torch.autograd.grad(found.sum(), logits)
    assert gradient.isfinite().all()
    assert not gradient[~allowed].any()


def test_negatives_are_drawn_in_proportion_to_softmax():
    draws = 20_000
    logits = torch.tensor([[0.0, 1.0, -1.0, 9.0, 2.0], [1.0, 1.0, 1.0, 1.0, -20.0]])
    allowed = torch.tensor([[1, 1, 1, 0, 1], [0, 1, 1, 1, 1]]).bool()
    noise = torch.rand(2 * draws, generator=torch.Generator().manual_seed(0))
    found = draw_negatives(logits.repeat(draws, 1), allowed.repeat(draws, 1), noise)
    expected = logits.masked_fill(~allowed, -torch.inf).softmax(dim=1)
    for row in range(2):
        share = torch.bincount(found[row::2], minlength=5) / draws
        assert not share[~allowed[row]].any()
        # Four standard deviations.
        bound = 4 * (expected[row] * (1 - expected[row]) / draws).sqrt() + 1e-4
        assert ((share - expected[row]).abs() <= bound).all(), (share, expected[row])


def test_the_ends_of_the_noise_choose_no_forbidden_one():
    logits, allowed = torch.zeros(2, 3), torch.tensor([[0, 1, 1], [1, 0, 0]]).bool()
    for noise in (torch.zeros(2), torch.ones(2), torch.tensor([1 - 1e-7, 1e-30])):
        found = draw_negatives(logits, allowed, noise)
        assert allowed[torch.arange(2), found].all()
    nothing = draw_negatives(logits, torch.zeros(2, 3).bool(), torch.rand(2))
    assert ((nothing >= 0) & (nothing < 3)).all()


def test_who_is_whose_negative():
    ids = torch.tensor([[2, 7, 3, 0], [2, 7, 3, 9], [2, 8, 9, 3], [2, 7, 3, 0], [2, 5, 3, 0]])
    # What stands in the padding of row 1 does not count: rows 0, 1 and 3 say the same.
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 0], [1, 1, 1, 1], [1, 1, 1, 0], [1, 1, 1, 0]])
    images = torch.tensor([10, 11, 12, 13, 12])
    joined = JoinedBatch.of(Instruction(ids, mask.bool()), images)
    captions = ["a", "a", "b", "a", "c"]
    expected = [
        [captions[i] != captions[j] and bool(images[i] != images[j]) for j in range(5)]
        for i in range(5)
    ]
    assert joined.negatives().tolist() == expected
    without = JoinedBatch.of(Instruction(ids, mask.bool()), None).negatives()
    assert without.tolist() == [[a != b for b in captions] for a in captions]


def test_captions_are_told_apart_by_every_token_and_by_order():
    rows = torch.randint(1, 30_000, (300, 12), generator=torch.Generator().manual_seed(0))
    changed = rows.repeat(12, 1)
    changed[torch.arange(len(changed)), torch.arange(12).repeat_interleave(300)] += 1
    swapped = rows[:, [1, 0, *range(2, 12)]]
    shorter = rows.clone()
    shorter[:, -1] = 0
    every = torch.cat([rows, changed, swapped, shorter])
    assert len(caption_ids(every).unique()) == len(every.unique(dim=0))
    # However far a batch is padded: the queue compares captions of different batches.
    assert torch.equal(caption_ids(F.pad(every, (0, 50))), caption_ids(every))
