"""What inserted layers know of the images: which one is the latest at each position."""

import random
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from bridges import BridgeOutput, Condition, image_index


def condition_of(index: list[list[int]], mask: list[list[bool]], **options) -> Condition:
    memory = torch.arange(len(mask) * len(mask[0])).float().view(len(mask), -1, 1, 1)
    return Condition(memory, torch.tensor(mask), torch.tensor(index), **options)


def packed(placeholders: str, segments: str, **options) -> list[int]:
    """The index of one row: `I` is a placeholder, equal letters are one sample."""
    row = torch.tensor([[letter == "I" for letter in placeholders]])
    samples = torch.tensor([[ord(letter) for letter in segments]])
    return image_index(row, 1, segments=samples, **options)[0].tolist()


def output_of(images: Tensor, next_image: Tensor | None = None) -> BridgeOutput:
    memory = torch.arange(images.numel()).float().view(*images.shape, 1, 1)
    return BridgeOutput(memory, memory, next_image=next_image)


@pytest.mark.parametrize("num_tokens", [1, 2])
def test_the_latest_image_at_or_before_each_position(num_tokens: int):
    image = [1] * num_tokens
    placeholders = torch.tensor([[0, *image, 0, 0, *image, 0]]).bool()
    expected = [-1, *[0] * (num_tokens + 2), *[1] * (num_tokens + 1)]
    assert image_index(placeholders, num_tokens).tolist() == [expected]
    assert image_index(torch.zeros(1, 3, dtype=torch.bool), num_tokens).tolist() == [[-1] * 3]


def test_adjacent_images_are_told_apart():
    assert image_index(torch.ones(1, 6, dtype=torch.bool), 3).tolist() == [[0, 0, 0, 1, 1, 1]]


def test_the_next_image_at_or_after_each_position():
    placeholders = torch.tensor([[0, 0, 1, 0, 1, 0]]).bool().repeat(3, 1)
    placeholders[2] = False
    rows = torch.tensor([True, False, True])
    assert image_index(placeholders, 1, next_image=rows).tolist() == [
        [0, 0, 0, 1, 1, 1],  # none follows the last: it is read itself
        [-1, -1, 0, 0, 1, 1],
        [-1] * 6,
    ]
    wide = torch.tensor([[0, 1, 1, 0, 1, 1, 0]]).bool()
    assert image_index(wide, 2, next_image=rows[:1]).tolist() == [[0, 0, 0, 1, 1, 1, 1]]


def test_no_look_across_the_samples_of_a_packed_row():
    assert packed("..I..I...I.", "aaaabbbcccc") == [-1, -1, 0, 0, -1, 1, 1, -1, -1, 2, 2]
    # The same number again is another sample, and one without images sees none.
    assert packed("I.....I", "aabbaaa") == [0, 0, -1, -1, -1, -1, 1]
    every = torch.tensor([True])
    assert packed("..I..I...I.", "aaaabbbcccc", next_image=every) == [0] * 4 + [1] * 3 + [2] * 4
    assert packed("I.....I", "aabbaaa", next_image=every) == [0, 0, -1, -1, 1, 1, 1]
    with pytest.raises(ValueError, match=r"found segments \(1, 2\) for a text of \(1, 3\)"):
        image_index(torch.ones(1, 3).bool(), 1, segments=torch.zeros(1, 2).long())


def rows() -> Iterator[tuple[list[int], list[int], int]]:
    """Random rows: the image of each column or -1, its sample, and placeholders of an image."""
    draw = random.Random(0)
    for _ in range(60):
        num_tokens, images, samples, image = draw.choice([1, 3]), [], [], 0
        for sample in range(draw.randint(1, 3)):
            for _ in range(draw.randint(1, 5)):
                one = draw.random() < 0.5
                images += [image] * num_tokens if one else [-1]
                samples += [sample] * (num_tokens if one else 1)
                image += one
        yield images, samples, num_tokens


@pytest.mark.parametrize("following", [False, True])
def test_random_rows(following: bool):
    for images, samples, num_tokens in rows():
        found = image_index(
            torch.tensor([images]) >= 0,
            num_tokens,
            segments=torch.tensor([samples]),
            next_image=torch.tensor([following]),
        )
        for column, sample in enumerate(samples):
            own = [(c, image) for c, image in enumerate(images) if samples[c] == sample]
            before = [image for c, image in own if image >= 0 and c <= column]
            after = [image for c, image in own if image >= 0 and c >= column]
            expected = before[-1:] if not following else after[:1] or before[-1:]
            assert found[0, column] == (expected or [-1])[0], (images, samples, column)


def test_all_images_before_of_the_same_sample():
    images = torch.tensor([[True, True, False, True]])
    placeholders = torch.tensor([[0, 1, 1, 0, 0, 1]]).bool()
    hidden = torch.zeros(1, 6, 4)
    one = Condition.of(output_of(images), placeholders, 1, images)
    assert one.visible_images(hidden, "all")[0].int().tolist() == [
        [0, 0, 0, 0],
        [1, 0, 0, 0],
        *[[1, 1, 0, 0]] * 3,
        [1, 1, 0, 1],
    ]
    segments = torch.tensor([[0, 0, 0, 0, 1, 1]])
    two = Condition.of(output_of(images), placeholders, 1, images, segments=segments)
    assert two.visible_images(hidden, "all")[0].int().tolist() == [
        [0, 0, 0, 0],
        [1, 0, 0, 0],
        *[[1, 1, 0, 0]] * 2,
        [0, 0, 0, 0],
        [0, 0, 0, 1],
    ]


def test_the_rows_that_the_bridge_drew_read_the_next_image():
    images = torch.ones(2, 2).bool()
    placeholders = torch.tensor([[0, 1, 0, 1]]).bool().repeat(2, 1)
    output = output_of(images, next_image=torch.tensor([False, True]))
    condition = Condition.of(output, placeholders, 1, images)
    assert condition.index.tolist() == [[-1, 0, 0, 1], [0, 0, 1, 1]]


def test_left_padding_sees_nothing():
    images = torch.tensor([[True, True], [True, False]])
    placeholders = torch.tensor([[1, 0, 1, 0], [0, 0, 1, 0]]).bool()
    condition = Condition.of(output_of(images), placeholders, 1, images)
    assert condition.image_place(torch.zeros(2, 4, 8)).tolist() == [[0, 0, 1, 1], [-1, -1, 0, 0]]


def test_columns_past_the_prompt_repeat_its_last():
    condition = condition_of([[-1, 0, 1], [-1, -1, -1]], [[True, True], [False, False]], start=2)
    assert condition.image_index(torch.zeros(2, 3, 4)).tolist() == [[1, 1, 1], [-1, -1, -1]]
    assert condition.past_prompt
    condition.start = 1
    assert not condition.past_prompt


def test_beams_repeat_their_row():
    condition = condition_of([[0], [-1]], [[True], [False]])
    assert condition.visible_images(torch.zeros(4, 1, 4)).flatten().tolist() == [1, 1, 0, 0]
    assert condition.image_place(torch.zeros(4, 1, 4)).flatten().tolist() == [0, 0, -1, -1]
    (kept,) = condition.project(None, torch.zeros(6, 1, 4), lambda memory: (memory,))
    assert kept.flatten().tolist() == [0, 0, 0, 1, 1, 1]
    with pytest.raises(ValueError, match="found 3 rows in the LM for 2 conditioned samples"):
        condition.visible_images(torch.zeros(3, 1, 4))


def test_padding_images_are_not_counted():
    condition = condition_of([[-1, 0, 1, 2]], [[False, True, False, True]])
    assert condition.visible_images(torch.zeros(1, 4, 4))[0].int().tolist() == [
        [0, 0, 0, 0],
        [0, 1, 0, 0],
        [0, 0, 0, 1],
        [0, 0, 0, 0],  # an image that is not there
    ]
    assert condition.image_place(torch.zeros(1, 4, 4)).tolist() == [[-1, 1, 3, -1]]


@pytest.mark.parametrize("keep", [False, True])
def test_projections_are_kept_in_a_generation_only(keep: bool):
    condition = condition_of([[0]], [[True]], keep_projections=keep)
    calls = []
    for owner in ("a", "a", "b"):
        condition.project(owner, torch.zeros(1, 1, 4), lambda m: (calls.append(1), (m,))[1])
    assert len(calls) == (2 if keep else 3)


def test_what_needs_no_weights_is_made_once_a_call_and_once_past_the_prompt():
    condition = condition_of([[0, 0, 0]], [[True]])
    calls = []

    def layers(start: int, length: int, rows: int = 1) -> None:
        condition.start = start
        for _ in range(2):
            made = condition.shared(
                "name", torch.zeros(rows, length, 4), lambda: calls.append(1) or len(calls)
            )
            assert made == len(calls)

    for call, expected in (
        ((0, 1), 1),  # a part of the prompt
        ((1, 1), 2),
        ((2, 1), 3),  # its last column, which sees what all later ones see
        ((3, 1), 3),
        ((4, 1), 3),
        ((5, 2), 4),
        ((7, 2, 3), 5),
        ((0, 2), 6),
    ):
        layers(*call)
        assert len(calls) == expected


def test_a_layer_that_reads_what_the_bridge_does_not_give():
    condition = Condition(None, torch.ones(1, 1).bool(), torch.zeros(1, 1).long())
    with pytest.raises(ValueError, match="reads memory, but the bridge returned none"):
        condition.project(None, torch.zeros(1, 1, 4), lambda memory: (memory,))
