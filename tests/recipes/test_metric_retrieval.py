"""Recall at k with several captions to an image."""

import pytest
import torch
from torch.nn import functional as F

from qformer.retrieval import itc_similarity, recall_at
from recipes.metric_retrieval import CaptionRecall


def unit(*shape: int, seed: int = 0) -> torch.Tensor:
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


IMAGES, TEXTS = unit(12, 3, 8), unit(30, 8, seed=1)
IDS = torch.arange(100, 112)
OWNERS = IDS[torch.arange(30) % 12]


def test_figures_are_those_of_the_similarity():
    """However the updates cut them, and whichever comes first, an image or its texts."""
    metric = CaptionRecall(ks=(1, 3))
    metric.update(IMAGES[:5], IDS[:5], TEXTS[10:], OWNERS[10:])
    metric.update(IMAGES[5:], IDS[5:], TEXTS[:10], OWNERS[:10])
    scores = itc_similarity(IMAGES, TEXTS)
    right = {
        **{f"text_to_image_{k}": v for k, v in recall_at(scores.T, OWNERS, IDS, (1, 3)).items()},
        **{f"image_to_text_{k}": v for k, v in recall_at(scores, IDS, OWNERS, (1, 3)).items()},
    }
    assert metric.compute() == pytest.approx(right)
    assert 0 < right["image_to_text_recall@3"] < 1


def test_hits_are_the_rows_of_the_figures():
    metric = CaptionRecall(ks=(1, 5))
    metric.update(IMAGES, IDS, TEXTS, OWNERS)
    hits = metric.hits()
    assert {name: float(hit.mean()) for name, hit in hits.items()} == pytest.approx(
        metric.compute()
    )
    assert hits["text_to_image_recall@5"].shape == (30,)
    assert hits["image_to_text_recall@1"].shape == (12,)
    own = [hits["text_to_image_recall@1"][image == OWNERS].mean() for image in IDS]
    torch.testing.assert_close(metric.per_image(), torch.stack(own))
    assert metric.owners().tolist() == OWNERS.tolist()


def test_each_caption_is_searched_with_and_one_is_enough_for_its_image():
    images = torch.eye(2)[:, None]
    texts = F.normalize(torch.tensor([[1.0, 0.0], [0.1, 1.0], [0.0, 1.0]]), dim=-1)
    metric = CaptionRecall(ks=(1,))
    metric.update(images, torch.tensor([7, 9]), texts, torch.tensor([7, 7, 9]))
    assert metric.compute() == pytest.approx(
        {"text_to_image_recall@1": 2 / 3, "image_to_text_recall@1": 1}
    )
    assert metric.per_image().tolist() == [0.5, 1]


def test_what_does_not_belong_together_is_refused():
    metric = CaptionRecall()
    with pytest.raises(ValueError, match=r"expected \(b, n, e\) and \(m, e\)"):
        metric.update(IMAGES[:, 0], IDS, TEXTS, OWNERS)
    with pytest.raises(ValueError, match=r"texts with norms of 2 to 2; expected unit vectors"):
        metric.update(IMAGES, IDS, 2 * TEXTS, OWNERS)
    metric.update(IMAGES[:2], IDS[:2], TEXTS[:3], OWNERS[:3])
    with pytest.raises(ValueError, match="1 of 3 texts whose image is not there"):
        metric.compute()
    metric.update(IMAGES[1:3], IDS[1:3], TEXTS[:0], OWNERS[:0])
    with pytest.raises(ValueError, match="found 1 of 4 image numbers more than once"):
        metric.compute()
    metric.reset()
    metric.update(IMAGES, IDS, TEXTS[:0], OWNERS[:0])
    with pytest.raises(ValueError, match="found 12 images and 0 texts"):
        metric.compute()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_no_obstacle(dtype):
    metric = CaptionRecall()
    metric.update(IMAGES.to(dtype), IDS, TEXTS.to(dtype), OWNERS)
    assert metric.compute()["text_to_image_recall@10"] > 0.5
