"""Who sees whom: the masks by their definition, and through a whole Q-Former by gradients."""

from collections.abc import Callable

import pytest
import tiny_stage1 as tiny1
import torch
from torch import Tensor

from bridges import Instruction, VisionFeatures
from qformer import masks
from qformer.layout import Layout
from qformer.masks import instruction_mask, itc_itg_mask, itc_mask, itg_mask, itm_mask

LENGTHS = (4, 1, 3)


def itc(n: int, t: int, row: int, column: int) -> bool:
    """Queries see queries, text sees text."""
    return (row < n) == (column < n)


def itm(n: int, t: int, row: int, column: int) -> bool:
    """Everything sees everything."""
    return True


def itg(n: int, t: int, row: int, column: int) -> bool:
    """Queries see queries; text sees the queries, itself and the text before it."""
    return column < n if row < n else column < n or column <= row


def itc_itg(n: int, t: int, row: int, column: int) -> bool:
    """The first text as in ITC, the second as in ITG, and neither sees the other."""
    if n + t <= row or n + t <= column:
        if n <= row < n + t or n <= column < n + t:
            return False
        second = [place - t if place >= n + t else place for place in (row, column)]
        return itg(n, t, *second)
    return itc(n, t, row, column)


RULES = [
    (itc_mask, itc, 1),
    (itm_mask, itm, 1),
    (itg_mask, itg, 1),
    (instruction_mask, itm, 1),
    (itc_itg_mask, itc_itg, 2),
]


@pytest.mark.parametrize(("function", "rule", "texts"), RULES)
@pytest.mark.parametrize("n", [0, 1, 3])
def test_a_mask_is_what_its_words_say(function: Callable, rule: Callable, texts: int, n: int):
    t = max(LENGTHS)
    text_mask = torch.arange(t) < torch.tensor(LENGTHS)[:, None]
    found = function(n, text_mask)
    size = n + texts * t
    assert found.shape == (len(LENGTHS), size, size)
    assert found.dtype == torch.bool
    for row, length in enumerate(LENGTHS):
        real = [place < n or (place - n) % t < length for place in range(size)]
        for i in range(size):
            for j in range(size):
                if not real[j]:
                    assert not found[row, i, j], (row, i, j)
                elif real[i]:
                    assert found[row, i, j] == rule(n, t, i, j), (row, i, j)


def influence(outputs: Tensor, inputs: Tensor) -> Tensor:
    """Which of the outputs (m, …) have a gradient to which of the inputs (k, …): bool (m, k)."""
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(outputs.shape, generator=generator)
    rows = []
    for output, weight in zip(outputs, weights, strict=True):
        (gradient,) = torch.autograd.grad(
            (output * weight).sum(), inputs, retain_graph=True, materialize_grads=True
        )
        rows.append(gradient.flatten(1).any(dim=1))
    return torch.stack(rows)


@pytest.mark.parametrize("function", [itc_mask, itm_mask, itg_mask, instruction_mask])
def test_nothing_leaks_through_the_layers(function: Callable):
    """Each mask is transitive: what three layers let through is what one lets through."""
    qformer = tiny1.qformer_of()
    text, vision = tiny1.texts_of(LENGTHS), tiny1.images_of(len(LENGTHS))
    n, t, mask = tiny1.QUERIES, max(LENGTHS), text.attention_mask
    layout = Layout.of(n, mask, function)
    patches = vision.patches[:, 0].requires_grad_()
    x = torch.cat(
        [qformer.embed_queries(len(mask)), qformer.embed_text(text.input_ids, text.attention_mask)]
    )
    x = x.detach().requires_grad_()
    out = qformer.transform(x, layout, qformer.project(patches))

    rows, text_places = mask.nonzero(as_tuple=True)
    row_of = torch.cat([torch.arange(len(mask)).repeat_interleave(n), rows])
    place_of = torch.cat([torch.arange(n).repeat(len(mask)), text_places + n])
    allowed = function(n, mask)[row_of[:, None], place_of[:, None], place_of[None]]
    same_row = row_of[:, None] == row_of
    assert torch.equal(influence(out, x), allowed & same_row)

    sees_queries = function(n, torch.ones(1, t).bool())[0, :, 0][place_of]
    own_image = row_of[:, None] == torch.arange(len(mask))
    assert torch.equal(influence(out, patches), own_image & sees_queries[:, None])


class Watched:
    """What goes into the heads of stage 1 in a forward pass, and the words that it came from."""

    def __init__(self, generator: torch.Generator) -> None:
        self.stage1 = stage1 = tiny1.stage1_of()
        self.text = tiny1.texts_of(LENGTHS)
        vision = tiny1.images_of(len(LENGTHS))
        self.patches = vision.patches.requires_grad_()
        self.words: list[Tensor] = []
        self.seen: dict[str, Tensor] = {}
        word = stage1.qformer.text_embeddings.word
        word.register_forward_hook(lambda _, __, out: self.words.append(out))
        for name in ("vision_projection", "text_projection", "itm_head", "lm_head"):

            def note(_, inputs: tuple[Tensor, ...], name: str = name) -> None:
                self.seen[name] = inputs[0]

            getattr(stage1, name).register_forward_pre_hook(note)
        self.out = stage1(vision, self.text, generator=generator)

    def read(self, head: str, words: Tensor) -> tuple[Tensor, Tensor]:
        """For each row of a head's input: bool, which words and which images it depends on."""
        states = self.seen[head].flatten(0, -2)
        return influence(states, words), influence(states, self.patches)


def test_nothing_leaks_in_stage_1():
    watched = Watched(torch.Generator().manual_seed(0))
    b, n, lengths = len(LENGTHS), tiny1.QUERIES, torch.tensor(LENGTHS)
    (looked_up,) = watched.words
    # All rows' tokens, looked up once for all objectives, and [DEC], which begins what is written.
    row = torch.cat([torch.arange(b).repeat_interleave(lengths), torch.tensor([-1])])
    place = torch.cat([torch.arange(k) for k in [*LENGTHS, 1]])
    dec = row < 0
    images = torch.eye(b).bool()

    words, read = watched.read("text_projection", looked_up)
    assert torch.equal(words, row == torch.arange(b)[:, None])
    assert not read.any()

    words, read = watched.read("vision_projection", looked_up)
    assert not words.any()
    assert torch.equal(read, images.repeat_interleave(n, dim=0))

    words, read = watched.read("lm_head", looked_up)
    predicts = [(r, t) for r, k in enumerate(LENGTHS) for t in range(k - 1)]
    expected = [dec | (row == r) & (place > 0) & (place <= t) for r, t in predicts]
    assert torch.equal(words, torch.stack(expected))
    assert torch.equal(read, images[[r for r, _ in predicts]])

    words, read = watched.read("itm_head", looked_up)
    other_texts, other_images = watched.out.negatives
    own = torch.arange(b)
    texts = torch.cat([own, other_texts, own]).repeat_interleave(n)
    assert torch.equal(words, row == texts[:, None])
    assert torch.equal(read, images[torch.cat([own, own, other_images]).repeat_interleave(n)])


def garbage(text: Instruction, columns: int = 2) -> Instruction:
    """The same text with more padding, and words in it."""
    mask = torch.nn.functional.pad(text.attention_mask, (0, columns))
    ids = torch.nn.functional.pad(text.input_ids, (0, columns))
    return Instruction(ids.masked_fill(~mask, tiny1.SEP + 1), mask)


@torch.no_grad()
def test_padding_does_not_matter():
    stage1 = tiny1.stage1_of()
    text, vision = tiny1.texts_of(), tiny1.images_of()
    found = [
        stage1.text_embeddings(text),
        stage1.match(vision, text),
        stage1.qformer(vision, text)[:, 0],
    ]
    padded = garbage(text)
    again = [
        stage1.text_embeddings(padded),
        stage1.match(vision, padded),
        stage1.qformer(vision, padded)[:, 0],
    ]
    torch.testing.assert_close(again, found)
    for row, length in enumerate(tiny1.LENGTHS):
        alone = Instruction(text.input_ids[row : row + 1, :length], torch.ones(1, length).bool())
        image = tiny1.pick(vision, [row])
        torch.testing.assert_close(stage1.text_embeddings(alone)[0], found[0][row])
        torch.testing.assert_close(stage1.match(image, alone)[0], found[1][row])
        torch.testing.assert_close(stage1.qformer(image, alone)[0, 0], found[2][row])


def test_padding_does_not_matter_to_the_losses():
    stage1 = tiny1.stage1_of()
    vision, text = tiny1.images_of(), tiny1.texts_of()
    expected = stage1(vision, text, generator=torch.Generator().manual_seed(0))
    found = stage1(vision, garbage(text), generator=torch.Generator().manual_seed(0))
    assert torch.equal(torch.stack(found.negatives), torch.stack(expected.negatives))
    torch.testing.assert_close(found.losses, expected.losses)
    tiny1.assert_same_gradients(
        tiny1.gradients(stage1, found.losses), tiny1.gradients(stage1, expected.losses)
    )


@torch.no_grad()
def test_an_instruction_is_read_beside_every_image():
    qformer, text = tiny1.qformer_of(), tiny1.texts_of()
    vision = tiny1.images_of(images=2)
    found = qformer(vision, text)
    assert (found - qformer(vision)).abs().max() > 1e-2
    for image in range(2):
        alone = VisionFeatures(vision.patches[:, [image]], vision.image_mask[:, [image]], (1, 5))
        torch.testing.assert_close(qformer(alone, text)[:, 0], found[:, image])


def test_every_mask_is_tested():
    functions = {name for name in vars(masks) if name.endswith("_mask")}
    assert functions == {function.__name__ for function, *_ in RULES}
