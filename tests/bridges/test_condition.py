"""What inserted layers know of the images: which one is the latest at each position."""

import pytest
import torch

from bridges import Condition, image_index


def condition_of(index: list[list[int]], mask: list[list[bool]], **options) -> Condition:
    memory = torch.arange(len(mask) * len(mask[0])).float().view(len(mask), -1, 1, 1)
    return Condition(memory, torch.tensor(mask), torch.tensor(index), **options)


@pytest.mark.parametrize("num_tokens", [1, 2])
def test_the_latest_image_at_or_before_each_position(num_tokens: int):
    image = [1] * num_tokens
    placeholders = torch.tensor([[0, *image, 0, 0, *image, 0]]).bool()
    expected = [-1, *[0] * (num_tokens + 2), *[1] * (num_tokens + 1)]
    assert image_index(placeholders, num_tokens).tolist() == [expected]
    assert image_index(torch.zeros(1, 3, dtype=torch.bool), num_tokens).tolist() == [[-1] * 3]


def test_adjacent_images_are_told_apart():
    assert image_index(torch.ones(1, 6, dtype=torch.bool), 3).tolist() == [[0, 0, 0, 1, 1, 1]]


def test_columns_past_the_prompt_repeat_its_last():
    condition = condition_of([[-1, 0, 1], [-1, -1, -1]], [[True, True], [False, False]], start=2)
    assert condition.image_index(torch.zeros(2, 3, 4)).tolist() == [[1, 1, 1], [-1, -1, -1]]


def test_beams_repeat_their_row():
    condition = condition_of([[0], [-1]], [[True], [False]])
    assert condition.visible_images(torch.zeros(4, 1, 4)).flatten().tolist() == [1, 1, 0, 0]
    (kept,) = condition.project(None, torch.zeros(6, 1, 4), lambda memory: (memory,))
    assert kept.flatten().tolist() == [0, 0, 0, 1, 1, 1]
    with pytest.raises(ValueError, match="found 3 rows in the LM for 2 conditioned samples"):
        condition.visible_images(torch.zeros(3, 1, 4))


def test_padding_images_are_not_counted():
    condition = condition_of([[-1, 0, 1]], [[False, True, False, True]])
    assert condition.visible_images(torch.zeros(1, 3, 4))[0].int().tolist() == [
        [0, 0, 0, 0],
        [0, 1, 0, 0],
        [0, 0, 0, 1],
    ]


@pytest.mark.parametrize("keep", [False, True])
def test_projections_are_kept_in_a_generation_only(keep: bool):
    condition = condition_of([[0]], [[True]], keep_projections=keep)
    calls = []
    for owner in ("a", "a", "b"):
        condition.project(owner, torch.zeros(1, 1, 4), lambda m: (calls.append(1), (m,))[1])
    assert len(calls) == (2 if keep else 3)


def test_a_layer_that_reads_what_the_bridge_does_not_give():
    condition = Condition(None, torch.ones(1, 1).bool(), torch.zeros(1, 1).long())
    with pytest.raises(ValueError, match="reads memory, but the bridge returned none"):
        condition.project(None, torch.zeros(1, 1, 4), lambda memory: (memory,))
