"""A generation: steps give what the whole text gives, and compute no more than they need."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import bridges.attention
from bridges import BridgeOutput, Condition
from gated_xattn import GatedCrossAttention, reading

DIM, LATENTS, PROMPT, NEW = 12, 3, 6, 4

PLACEHOLDERS = torch.tensor([[0, 1, 0, 1, 1, 0], [0, 0, 0, 1, 0, 0], [0, 0, 0, 0, 0, 0]]).bool()
IMAGE_MASK = torch.tensor([[True, True, True], [False, True, False], [False, False, False]])


@pytest.fixture
def attended(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, bool]]:
    """Of every dense attention: how many keys, and whether there was a mask."""
    calls: list[tuple[int, bool]] = []
    original = bridges.attention.attend

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        calls.append((k.shape[2], mask is not None))
        return original(q, k, v, mask)

    monkeypatch.setattr(bridges.attention, "attend", attend)
    return calls


@pytest.fixture(params=["grouped", "masked"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways to read a prompt of several images."""
    monkeypatch.setattr(reading, "grouping_is_faster", lambda *_: request.param == "grouped")


def block_of(**options: Any) -> GatedCrossAttention:
    torch.manual_seed(0)
    return GatedCrossAttention(DIM, DIM, num_heads=2, head_dim=5, gate_init=1.0, **options)


def calls(sizes: list[int]) -> Iterator[slice]:
    """The prompt, then what comes in pieces of these sizes."""
    start = 0
    for size in (PROMPT, *sizes):
        yield slice(start, start + size)
        start += size


@torch.no_grad()
@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("beams", [1, 2])
@pytest.mark.parametrize("visible", ["latest", "all"])
@pytest.mark.parametrize("sizes", [[1] * NEW, [NEW], [1, NEW - 1]])
@pytest.mark.parametrize("rows", [slice(0, 1), slice(0, 3), slice(2, 3)])
def test_steps_give_what_the_whole_text_gives(
    rows: slice, sizes: list[int], visible: Any, beams: int
):
    block = block_of(visible=visible)
    placeholders, image_mask = PLACEHOLDERS[rows], IMAGE_MASK[rows]
    memory = torch.randn(*image_mask.shape, LATENTS, DIM)
    output = BridgeOutput(memory, memory)
    hidden = torch.randn(len(placeholders) * beams, PROMPT + NEW, DIM)

    longer = torch.cat([placeholders, torch.zeros(len(placeholders), NEW).bool()], dim=1)
    expected = block(hidden, Condition.of(output, longer, 1, image_mask))
    condition = Condition.of(output, placeholders, 1, image_mask, keep_projections=True)
    for columns in calls(sizes):
        condition.start = columns.start
        found = block(hidden[:, columns], condition)
        torch.testing.assert_close(found, expected[:, columns], rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize(
    ("visible", "rows", "expected"),
    [
        ("latest", slice(0, 2), (LATENTS, False)),  # one image of three, no mask
        ("latest", slice(0, 3), (LATENTS, False)),
        ("all", slice(0, 1), (3 * LATENTS, False)),  # all three are there
        ("all", slice(0, 2), (3 * LATENTS, True)),
    ],
)
def test_a_step_attends_to_what_it_reads(
    visible: Any, rows: slice, expected: tuple[int, bool], attended: list[tuple[int, bool]]
):
    blocks = [block_of(visible=visible) for _ in range(2)]
    projections, masks = [], []
    for block in blocks:
        block.attn.k.register_forward_hook(lambda *_: projections.append(1))
    memory = torch.randn(*IMAGE_MASK[rows].shape, LATENTS, DIM)
    condition = Condition.of(
        BridgeOutput(memory, memory), PLACEHOLDERS[rows], 1, IMAGE_MASK[rows], keep_projections=True
    )
    for name in ("image_place", "visible_images"):
        made = getattr(condition, name)
        setattr(condition, name, lambda *a, made=made: masks.append(1) or made(*a))
    hidden = torch.randn(len(memory), PROMPT + NEW, DIM)
    for columns in calls([1] * NEW):
        condition.start = columns.start
        if columns.start == PROMPT:
            attended.clear()
        for block in blocks:
            block(hidden[:, columns], condition)
    assert attended == [expected] * (2 * NEW)
    assert len(projections) == 2  # once a layer
    assert len(masks) == 2  # once for the prompt, once for all that follows


@torch.no_grad()
@pytest.mark.usefixtures("way")
@pytest.mark.parametrize(("visible", "images"), [("latest", 1), ("all", 3)])
@pytest.mark.parametrize("beams", [1, 2])
def test_what_is_projected_and_kept(visible: Any, images: int, beams: int):
    block, projected = block_of(visible=visible), []
    block.attn.k.register_forward_hook(lambda *args: projected.append(args[2].flatten(0, -2)))
    memory = torch.randn(*IMAGE_MASK.shape, LATENTS, DIM)
    output = BridgeOutput(memory, memory)
    condition = Condition.of(output, PLACEHOLDERS, 1, IMAGE_MASK, keep_projections=True)
    hidden = torch.randn(len(memory) * beams, PROMPT + 1, DIM)
    for columns in calls([1]):
        condition.start = columns.start
        block(hidden[:, columns], condition)
    (rows,) = (len(x) for x in projected)
    assert rows <= memory.shape[:3].numel()  # no image twice, be there beams or not
    kept = [x for kv in condition._kept.values() for x in kv]
    assert [tuple(x.shape) for x in kept] == [(len(hidden), 2, images * LATENTS, 5)] * 2


@pytest.mark.parametrize("visible", ["latest", "all"])
def test_one_image_a_row_needs_no_mask(visible: Any, attended: list[tuple[int, bool]]):
    block, memory = block_of(visible=visible), torch.randn(2, 1, LATENTS, DIM)
    placeholders = torch.tensor([[0, 1, 0], [0, 0, 0]]).bool()
    hidden = torch.randn(2, 3, DIM)
    output, image_mask = BridgeOutput(memory, memory), torch.tensor([[True], [False]])
    read = block.read(hidden, Condition.of(output, placeholders, 1, image_mask))
    assert attended == [(LATENTS, False)]
    assert read.any(dim=-1).tolist() == [[False, True, True], [False] * 3]
