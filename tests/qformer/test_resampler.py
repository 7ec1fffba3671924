"""The Q-Former beyond its parity with the reference."""

import pytest
import torch

from bridges import VisionFeatures, VisionShape
from qformer import QFormer


def qformer_of(**options) -> QFormer:
    sizes = {"num_queries": 3, "dim": 16, "depth": 5, "num_heads": 2}
    return QFormer(vision=VisionShape(8, 5, (1, 5)), **(sizes | options))


@pytest.mark.parametrize(("every", "layers"), [(1, [0, 1, 2, 3, 4]), (2, [0, 2, 4]), (9, [0])])
def test_the_image_is_read_in_every_nth_layer(every: int, layers: list[int]):
    qformer = qformer_of(cross_attention_every=every)
    found = [i for i, layer in enumerate(qformer.layers) if layer.cross_attention is not None]
    assert found == layers


def test_it_starts_as_the_paper_says():
    torch.manual_seed(0)
    qformer = qformer_of(num_queries=32, dim=64)
    assert abs(qformer.queries.std().item() / 0.02 - 1) < 0.1
    for name, parameter in qformer.named_parameters():
        if name.endswith((".q.weight", ".up.weight")):
            assert abs(parameter.std().item() / 0.02 - 1) < 0.15, name
        if name.endswith(".bias"):
            assert not parameter.any(), name


@torch.no_grad()
def test_each_image_by_itself_and_one_of_everything():
    qformer = qformer_of()
    patches = torch.randn(2, 2, 5, 8)
    found = qformer(VisionFeatures(patches, torch.ones(2, 2, dtype=torch.bool), (1, 5)))
    assert found.shape == (2, 2, 3, 16)
    one = torch.ones(1, 1, dtype=torch.bool)
    alone = qformer(VisionFeatures(patches[1:, 1:], one, (1, 5)))
    torch.testing.assert_close(found[1, 1], alone[0, 0])
    single = qformer_of(num_queries=1, depth=1)
    assert single(VisionFeatures(torch.randn(1, 1, 1, 8), one, (1, 1))).shape == (1, 1, 1, 16)
