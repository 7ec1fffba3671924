"""Three ways to read images compute one attention: grouped, behind a mask, one image alone."""

import random
from collections.abc import Iterator
from functools import partial

import parity
import pytest
import torch
from torch import Tensor, nn

from bridges import BridgeOutput, Condition
from bridges.attention import Attention, attend, attend_runs
from gated_xattn import GatedCrossAttention, reading
from gated_xattn.reading import Runs, read, read_masked, read_one, read_runs

DIM, MEMORY_DIM, LATENTS = 12, 10, 3


@pytest.fixture
def grouped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Positions are grouped however few they are."""
    monkeypatch.setattr(reading, "grouping_is_faster", lambda *_: True)


@pytest.fixture(params=["grouped", "masked"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways to read one image of several."""
    monkeypatch.setattr(reading, "grouping_is_faster", lambda *_: request.param == "grouped")


def attention() -> Attention:
    torch.manual_seed(0)
    return Attention(DIM, MEMORY_DIM, num_heads=2, head_dim=5, qk_norm=nn.RMSNorm)


def batches() -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]]:
    """Random texts: placeholders, image_mask, padding, segments and next_image.

    Texts without images, images without text between them, padding on either side and padding
    images among the others.
    """
    draw = random.Random(0)
    for _ in range(25):
        batch, length, most = draw.randint(1, 4), draw.randint(1, 14), draw.randint(1, 4)
        placeholders = torch.zeros(batch, length, dtype=torch.bool)
        image_mask = torch.zeros(batch, most, dtype=torch.bool)
        padding = torch.zeros(batch, length, dtype=torch.bool)
        segments = torch.zeros(batch, length, dtype=torch.long)
        for row in range(batch):
            real = draw.randint(1, length)
            text = list(range(length))[-real:] if draw.random() < 0.5 else list(range(real))
            padding[row] = True
            padding[row, text] = False
            images = draw.sample(text, draw.randint(0, min(most, real)))
            placeholders[row, images] = True
            image_mask[row, draw.sample(range(most), len(images))] = True
            segments[row] = torch.tensor(sorted(draw.randint(0, 2) for _ in range(length)))
        following = torch.tensor([draw.random() < 0.5 for _ in range(batch)])
        yield (
            placeholders,
            image_mask,
            padding,
            draw.choice([None, segments.masked_fill(padding, -1)]),
            draw.choice([None, following]),
        )


def outcome(out: Tensor, attn: Attention, inputs: list[Tensor]) -> dict[str, Tensor]:
    """The output, and every gradient of it."""
    names = [f"gradient of {name}" for name, _ in attn.named_parameters()]
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    leaves = [*attn.parameters(), *inputs]
    found = torch.autograd.grad((out * weights).sum(), leaves, allow_unused=True)
    assert all(gradient is not None for gradient in found), "a leaf without gradient"
    return dict(zip(["output", *names, "hidden", "memory"], [out, *found], strict=True))


def test_grouped_is_masked():
    attn, norm = attention(), nn.LayerNorm(DIM)
    grouped = 0
    for placeholders, image_mask, _, segments, following in batches():
        hidden = torch.randn(*placeholders.shape, DIM, requires_grad=True)
        memory = torch.randn(*image_mask.shape, LATENTS, MEMORY_DIM, requires_grad=True)
        output = BridgeOutput(memory, memory, next_image=following)

        condition = partial(Condition.of, output, placeholders, 1, image_mask, segments=segments)
        expected = outcome(
            read_masked(attn, norm, hidden, condition(), "latest"), attn, [hidden, memory]
        )
        ways = {"read": read(attn, norm, hidden, condition(), "latest")}
        runs = Runs.of(condition(), hidden)
        if runs.lengths:
            ways["grouped"] = read_runs(attn, norm, hidden, condition(), runs)
            keeping = condition(keep_projections=True)
            ways["grouped, kept"] = read_runs(attn, norm, hidden, keeping, runs)
            grouped += 1
        if image_mask.shape[1] == 1:
            ways["one"] = read_one(attn, norm, hidden, condition())
        for way, out in ways.items():
            for name, tensor in outcome(out, attn, [hidden, memory]).items():
                parity.close(tensor, expected[name], f"{way}: {name}")
    assert grouped > 10


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_runs_of_queries(kv_heads: int, dtype: torch.dtype):
    lengths = [3, 1, 5]
    q = torch.randn(1, 9, 4, 16).transpose(1, 2).to(dtype)
    k, v = torch.randn(2, 3, kv_heads, 6, 16).to(dtype)
    found = attend_runs(q, k, v, lengths)
    rows = zip(q.split(lengths, dim=2), k.split(1), v.split(1), strict=True)
    expected = torch.cat([attend(*row) for row in rows], dim=2)
    assert found.dtype == dtype
    torch.testing.assert_close(found, expected)


@pytest.mark.usefixtures("way")
def test_who_sees_nothing_gets_zeros_and_no_gradient_leaks():
    attn = attention()
    for placeholders, image_mask, _, segments, following in batches():
        hidden = torch.randn(*placeholders.shape, DIM)
        memory = torch.randn(*image_mask.shape, LATENTS, MEMORY_DIM, requires_grad=True)
        output = BridgeOutput(memory, memory, next_image=following)
        condition = Condition.of(output, placeholders, 1, image_mask, segments=segments)
        out = read(attn, nn.Identity(), hidden, condition, "latest")
        seen = condition.visible_images(hidden)
        assert not out[~seen.any(dim=-1)].any()
        (used,) = torch.autograd.grad(out.sum(), memory)
        for place in range(image_mask.shape[1]):
            assert used[:, place].flatten(1).any(dim=1).equal(seen[..., place].any(dim=1))


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("visible", ["latest", "all"])
def test_a_later_image_changes_nothing_before_it(visible):
    attn, hidden = attention(), torch.randn(2, 9, DIM)
    placeholders = torch.tensor([[0, 0, 1, 0, 0, 1, 0, 0, 0], [1, 0, 0, 0, 1, 0, 0, 1, 0]]).bool()
    image_mask = torch.tensor([[True, True, False], [True, True, True]])
    memory = torch.randn(2, 3, LATENTS, MEMORY_DIM)

    def out(changed: int | None = None) -> Tensor:
        images = memory.clone()
        if changed is not None:
            images[:, changed] += 1
        output = BridgeOutput(images, images)
        condition = Condition.of(output, placeholders, 1, image_mask)
        return read(attn, nn.Identity(), hidden, condition, visible)

    for image in range(3):
        index = placeholders.long().cumsum(dim=1) - 1
        reads = index >= image if visible == "all" else index == image
        assert (out(image) != out()).any(dim=-1).equal(reads)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("images", [1, 3])
@pytest.mark.parametrize("gate", ["scalar", "channel", "none"])
def test_a_batch_without_images_gives_every_parameter_a_gradient(images: int, bf16: bool, gate):
    """Or DDP waits for those that have none."""
    block = GatedCrossAttention(DIM, MEMORY_DIM, num_heads=2, head_dim=5, gate=gate)
    hidden = torch.randn(2, 6, DIM, requires_grad=True)
    memory = torch.randn(2, images, LATENTS, MEMORY_DIM, requires_grad=True)
    nothing = torch.zeros(2, images, dtype=torch.bool)
    condition = Condition(memory, nothing, torch.full((2, 6), -1))
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        out = block(hidden, condition)
    out.float().square().sum().backward()
    assert all(p.grad is not None for p in block.parameters())
    assert memory.grad is not None and not memory.grad.any()
    assert block.attn.k.weight.grad is not None and not block.attn.k.weight.grad.any()


@pytest.mark.usefixtures("grouped")
def test_positions_without_an_image_and_images_without_a_reader_are_not_computed():
    block = GatedCrossAttention(DIM, MEMORY_DIM, num_heads=2, head_dim=5)
    rows: dict[str, int] = {}
    for name in ("q", "k", "v", "out"):
        getattr(block.attn, name).register_forward_pre_hook(
            lambda _, args, name=name: rows.update({name: args[0].flatten(0, -2).shape[0]})
        )
    # The third image stands right before the fourth: its placeholder alone reads it.
    placeholders = torch.tensor([[0, 0, 1, 0, 1, 0, 0], [0, 0, 0, 0, 1, 1, 0]]).bool()
    image_mask = torch.tensor([[True, False, True], [True, True, False]])
    memory = torch.randn(2, 3, LATENTS, MEMORY_DIM)
    output = BridgeOutput(memory, memory)
    block(torch.randn(2, 7, DIM), Condition.of(output, placeholders, 1, image_mask))
    assert rows == {"q": 8, "k": 4 * LATENTS, "v": 4 * LATENTS, "out": 8}


@pytest.mark.usefixtures("grouped")
def test_layers_share_the_runs_of_a_call(monkeypatch: pytest.MonkeyPatch):
    calls = []
    original = Runs.of
    monkeypatch.setattr(Runs, "of", lambda *args: calls.append(1) or original(*args))
    blocks = [GatedCrossAttention(DIM, MEMORY_DIM, num_heads=2, head_dim=5) for _ in range(3)]
    memory = torch.randn(1, 2, LATENTS, MEMORY_DIM)
    placeholders = torch.tensor([[1, 0, 1, 0]]).bool()
    output = BridgeOutput(memory, memory)
    for expected in (1, 2):
        condition = Condition.of(output, placeholders, 1, torch.ones(1, 2).bool())
        hidden = torch.randn(1, 4, DIM)
        for block in blocks:
            hidden = block(hidden, condition)
        assert len(calls) == expected


def test_short_groups_are_not_worth_it():
    worth = reading.grouping_is_faster
    assert worth(torch.zeros(2, 256, 8), 5, 64)
    assert not worth(torch.zeros(12, 48, 8), 3, 16)
    assert not worth(torch.zeros(2, 256, 8, device="meta"), 5, 64)  # only where it is measured
