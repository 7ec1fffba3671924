"""Tokens without padding against the plain way: padded rows through the same weights."""

from collections.abc import Callable

import pytest
import tiny_stage1 as tiny1
import torch
from torch import Tensor

from bridges import Instruction
from qformer import QFormer
from qformer.layout import Layout
from qformer.masks import itc_mask, itg_mask, itm_mask

MASKS = [itc_mask, itg_mask, itm_mask]
LENGTHS = (4, 1, 5)


def plain(qformer: QFormer, patches: Tensor, text: Instruction, mask: Tensor) -> Tensor:
    """The Q-Former on padded rows: (r, p, d_vision), (r, t), (r, n + t, n + t) -> (r, n + t, d)."""
    table, n = qformer.text_embeddings, qformer.num_tokens
    assert table is not None
    words = table.word(text.input_ids) + table.position.weight[: text.input_ids.shape[1]]
    queries = qformer.queries.expand(len(patches), -1, -1)
    x = qformer.embedding_norm(torch.cat([queries, words], dim=1))
    image = qformer.ln_vision(patches)
    for layer in qformer.blocks:
        block = layer.self_attention
        x = layer.self_norm(x + block(x, block.project(x), mask[:, None]))
        queries, words = x[:, :n], x[:, n:]
        if (block := layer.cross_attention) is not None:
            queries = layer.cross_norm(queries + block(queries, block.project(image)))
        queries = layer.query_norm(queries + layer.query_ff(queries))
        x = torch.cat([queries, layer.text_norm(words + layer.text_ff(words))], dim=1)
    return x


def flat(padded: Tensor, text_mask: Tensor) -> Tensor:
    """(r, n + t, d) -> all queries, then all real text tokens."""
    n = padded.shape[1] - text_mask.shape[1]
    return torch.cat([padded[:, :n].flatten(0, 1), padded[:, n:][text_mask]])


def assert_same(qformer: QFormer, found: Tensor, expected: Tensor) -> None:
    """Equal outputs, and equal gradients of all parameters."""
    torch.testing.assert_close(found, expected, atol=2e-6, rtol=1e-5)
    weights = torch.randn(found.shape, generator=torch.Generator().manual_seed(0))
    sides = [
        torch.autograd.grad(
            (out * weights).mean(),
            list(qformer.parameters()),
            retain_graph=True,
            materialize_grads=True,
        )
        for out in (found, expected)
    ]
    for (name, _), a, b in zip(qformer.named_parameters(), *sides, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def start(qformer: QFormer, text: Instruction, mask: Callable) -> tuple[Tensor, Layout]:
    qformer.train_last_text(True)
    layout = Layout.of(qformer.num_tokens, text.attention_mask, mask)
    queries = qformer.embed_queries(len(text.input_ids))
    return torch.cat([queries, qformer.embed_text(text.input_ids, text.attention_mask)]), layout


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("lengths", [LENGTHS, (3, 3), (1,)])
def test_packed_is_padded(mask: Callable, lengths: tuple[int, ...]):
    qformer = tiny1.qformer_of()
    text, patches = tiny1.texts_of(lengths), tiny1.images_of(len(lengths)).patches[:, 0]
    x, layout = start(qformer, text, mask)
    found = qformer.transform(x, layout, qformer.project(patches))
    expected = plain(qformer, patches, text, mask(tiny1.QUERIES, text.attention_mask))
    assert_same(qformer, found, flat(expected, text.attention_mask))


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("shared", [False, True])
def test_only_the_wanted_text_goes_through_the_last_layer(depth: int, shared: bool):
    qformer = tiny1.qformer_of(depth=depth)
    text, patches = tiny1.texts_of(LENGTHS), tiny1.images_of(len(LENGTHS)).patches[:, 0]
    x, layout = start(qformer, text, itg_mask)
    keep = torch.tensor([7, 0, 4])
    rows = torch.arange(len(LENGTHS)) if shared else None
    every = qformer.transform(x, layout, qformer.project(patches))
    every = every[torch.cat([torch.arange(layout.query_tokens), keep + layout.query_tokens])]
    found = qformer.transform(x, layout, qformer.project(patches), rows=rows, keep_text=keep)
    assert_same(qformer, found, every)


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_rows_that_share_their_first_attention(depth: int):
    """Rows 0 to 2 and 3 to 5 read the images in turn, 6 and 7 have images of their own."""
    qformer = tiny1.qformer_of(depth=depth)
    text, patches = tiny1.texts_of(LENGTHS), tiny1.images_of(len(LENGTHS)).patches[:, 0]
    rows, others = torch.tensor([0, 1, 2, 2, 0, 1, 0, 2]), torch.tensor([2, 1])
    x, layout = start(qformer, text, itm_mask)
    found = qformer.transform(
        x, layout, qformer.project(patches), qformer.project(patches[others]), rows=rows
    )
    repeated = tiny1.pick(text, rows)
    images = patches[torch.cat([torch.arange(3).repeat(2), others])]
    expected = plain(qformer, images, repeated, itm_mask(tiny1.QUERIES, repeated.attention_mask))
    assert_same(qformer, found, flat(expected, repeated.attention_mask))


@pytest.mark.parametrize("n", [0, 3])
def test_select_is_indexing(n: int):
    text = tiny1.texts_of(LENGTHS)
    mask = text.attention_mask
    layout = Layout.of(n, mask, itg_mask)
    padded = torch.randn(len(LENGTHS), 2, n + max(LENGTHS), 4)
    rows = torch.tensor([2, 0, 2, 1, 1])
    chosen, places = layout.select(rows)
    assert (chosen.rows, chosen.num_queries, chosen.length) == (5, n, max(LENGTHS))
    expected = Layout.of(n, mask[rows], itg_mask)
    assert torch.equal(chosen.text, expected.text)
    assert torch.equal(chosen.mask, expected.mask)
    assert torch.equal(layout.flat(padded)[places], expected.flat(padded[rows]))


def test_heads_are_cut_and_joined_again():
    mask = tiny1.texts_of(LENGTHS).attention_mask
    layout = Layout.of(2, mask, itc_mask)
    tokens = torch.randn(layout.query_tokens + sum(LENGTHS), 6)
    padded = layout.heads(tokens, 3)
    assert padded.shape == (len(LENGTHS), 3, 2 + max(LENGTHS), 2)
    assert not padded[:, :, 2:].transpose(1, 2)[~mask].any()
    assert torch.equal(padded[1, 2, 0], tokens[2, 4:])
    assert torch.equal(padded[2, 0, 2], tokens[layout.query_tokens + LENGTHS[0] + 1, :2])
    assert torch.equal(layout.flat(padded), tokens)


def test_a_layout_without_text_has_no_rows_to_choose():
    with pytest.raises(ValueError, match=r"without text; expected one made by Layout\.of"):
        Layout(2, 3).select(torch.tensor([0]))
