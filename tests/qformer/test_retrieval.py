"""Ranking, re-ranking and recall, by hand."""

import math

import pytest
import torch

from qformer.retrieval import (
    chance_recall,
    count_duplicates,
    first,
    itc_similarity,
    recall_at,
    rerank,
)


@pytest.mark.parametrize("max_elements", [1, 7 * 3 * 2, 2**25])
def test_similarity_is_the_maximum_over_queries_however_it_is_cut(max_elements: int):
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(5, 3, 4, generator=generator)
    texts = torch.randn(7, 4, generator=generator)
    expected = [[max(float(q @ t) for q in image) for t in texts] for image in images]
    found = itc_similarity(images, texts, max_elements=max_elements)
    torch.testing.assert_close(found, torch.tensor(expected))


SCORES = torch.tensor([[0.9, 0.8, 0.1, 0.0], [0.9, 0.8, 0.7, 0.6], [0.4, 0.3, 0.2, 0.1]])
OWNERS = torch.tensor([0, 0, 1, 2])
"""Image 0 has two texts. Its first stands first; text 2 is third in row 1, text 3 last in row 2."""


def test_an_image_is_found_by_any_of_its_texts():
    found = recall_at(SCORES, torch.arange(3), OWNERS, ks=(1, 2, 3, 4, 9))
    assert found == pytest.approx(
        {"recall@1": 1 / 3, "recall@2": 1 / 3, "recall@3": 2 / 3, "recall@4": 1, "recall@9": 1}
    )


def test_a_text_is_found_by_its_own_image():
    # Its own image stands first, second (after image 1), first and third.
    scores = torch.tensor([[1.0, 0.9, 0.4], [0.8, 0.9, 0.3], [0.1, 0.7, 0.2], [0.5, 0.6, 0.1]])
    found = recall_at(scores, OWNERS, torch.arange(3), ks=(1, 2, 3))
    assert found == pytest.approx({"recall@1": 2 / 4, "recall@2": 3 / 4, "recall@3": 1})


def test_a_model_that_finds_everything_equal_scores_chance():
    n, per_image = 60, 3
    owners = torch.arange(n).repeat_interleave(per_image)
    equal = torch.zeros(n, n * per_image)
    found = recall_at(equal.T, owners, torch.arange(n))
    assert found == pytest.approx({"recall@1": 1 / 60, "recall@5": 5 / 60, "recall@10": 10 / 60})
    found = recall_at(equal, torch.arange(n), owners)
    assert found["recall@1"] == pytest.approx(1 / 60)
    assert found["recall@10"] <= 10 / 60 + 1e-6
    # Half the images alike, each right text among the 30 that tie.
    scores = torch.eye(n)
    scores[30:, 30:] = 0.5
    found = recall_at(scores, torch.arange(n), torch.arange(n))
    assert found["recall@1"] == pytest.approx((30 + 1) / 60)
    assert found["recall@5"] == pytest.approx((30 + 5) / 60)


def test_the_order_of_the_columns_does_not_help():
    # Row i finds itself and all after it equal: by column order it would always be first.
    scores = torch.ones(100, 100).triu()
    assert recall_at(scores, torch.arange(100), torch.arange(100))["recall@1"] < 0.2
    flipped = scores.flip(0, 1)
    assert recall_at(flipped, torch.arange(100), torch.arange(100))["recall@1"] < 0.2


def test_ties_break_the_same_way_every_time():
    equal = torch.zeros(4, 50)
    assert torch.equal(first(equal, 10), first(equal, 10))
    assert not torch.equal(first(equal, 10), first(equal, 10, seed=1))
    assert not torch.equal(first(equal, 10)[0], torch.arange(10))


def test_first_is_the_best_first():
    scores = torch.tensor([[0.1, 0.9, 0.5], [0.3, 0.1, 0.2]])
    assert first(scores, 2).tolist() == [[1, 2], [0, 2]]
    assert first(scores, 9).tolist() == [[1, 2, 0], [0, 2, 1]]


def test_nan_is_no_score():
    with pytest.raises(ValueError, match="NaN in 1 of 2 rows"):
        recall_at(torch.tensor([[0.1, math.nan], [0.1, 0.2]]), torch.arange(2), torch.arange(2))


def test_the_first_of_both_directions_are_judged_once_and_stand_above():
    generator = torch.Generator().manual_seed(0)
    similarity = torch.rand(4, 6, generator=generator)
    logits = torch.randn(4, 6, generator=generator)
    asked: list[tuple[int, int]] = []

    def match(images, texts):
        asked.extend(zip(images.tolist(), texts.tolist(), strict=True))
        return logits[images, texts]

    images, texts = rerank(similarity, match, top_k=2)
    wanted = set()
    for scores, itc, itm in ((images, similarity, logits), (texts, similarity.T, logits.T)):
        for row in range(len(itc)):
            best = itc[row].argsort(descending=True)
            torch.testing.assert_close(scores[row, best[:2]], (itc + itm)[row, best[:2]])
            torch.testing.assert_close(scores[row, best[2:]], itc[row, best[2:]] - 100)
            wanted |= {
                (row, int(c)) if itc is similarity else (int(c), row) for c in best[:2].tolist()
            }
    assert sorted(asked) == asked == sorted(wanted)


def test_reranking_everything_is_the_sum():
    similarity, logits = torch.rand(3, 5), torch.randn(3, 5)
    images, texts = rerank(similarity, lambda i, t: logits[i, t], top_k=128)
    torch.testing.assert_close(images, similarity + logits)
    torch.testing.assert_close(texts, (similarity + logits).T)


def test_chance_by_counting():
    # 2 of 5 columns right: miss at 1 is 3/5, at 2 it is 3/5 · 2/4, at 4 nothing is missed.
    found = chance_recall(torch.tensor([2, 2]), 5, ks=(1, 2, 3, 4, 7))
    assert found == pytest.approx(
        {"recall@1": 0.4, "recall@2": 0.7, "recall@3": 0.9, "recall@4": 1, "recall@7": 1}
    )
    assert chance_recall(torch.ones(50).long(), 50)["recall@5"] == pytest.approx(5 / 50)


def test_duplicates_are_those_of_another_image():
    texts = ["A cat", "a  cat", "a dog", "a dog", "a cow"]
    assert count_duplicates(texts, torch.tensor([0, 1, 2, 2, 3])) == 2
    assert count_duplicates(texts, torch.tensor([0, 0, 1, 2, 3])) == 2
    assert count_duplicates(texts, torch.tensor([0, 0, 1, 1, 2])) == 0
