"""One picture of a document exchanged at a time: which texts change, and by how much."""

import math
import statistics
from dataclasses import replace

import pytest
import tiny
import torch
from torch import Tensor

from bridges import BridgeOutput, Instruction, VisionEncoder, VisionFeatures, VisionLanguageModel
from bridges.loss import IGNORE
from bridges.prompts import END_OF_CHUNK
from recipes.fewshot_documents import Chunk, DocumentPool
from recipes.fewshot_exchange import Exchange, exchange_pictures
from recipes.fewshot_runner import Runner

TEXTS = [
    ["left out", "a cat", "two dogs"],
    ["also", "one red hen", "x"],
    ["more", "blue", "a long text"],
]


def model_of(encoder: VisionEncoder, kind: str = "perceiver_gated", **lm: object):
    torch.manual_seed(0)
    language = tiny.language_model("llama", **lm)  # pyright: ignore
    model = VisionLanguageModel.connect(encoder, language, tiny.factory(kind))
    tiny.randomise(model.bridge)
    tiny.open_gates(model.bridge)
    return model


def pool_of(model: VisionLanguageModel, pictures: tuple[int, ...] = (1, 1, 1)) -> DocumentPool:
    """Documents of three texts; as many pictures before each as given, the last one's doubled."""
    encode, documents, count = model.prompt_encoder(), [], 0
    for number, texts in enumerate(TEXTS):
        chunks = []
        for text, shown in zip(texts, pictures, strict=True):
            shown *= 1 + (number == 2 and shown > 1)
            rows = list(range(count, count := count + shown))
            answer = encode.document([text, END_OF_CHUNK])[0]
            chunks.append(Chunk(encode.document([None] * shown)[0], answer, rows))
        documents.append(chunks)
    shape, generator = model.vision.shape, torch.Generator().manual_seed(1)
    patches = torch.randn(count, shape.num_patches, shape.dim, generator=generator)
    return DocumentPool(["a", "b", "c"], documents, patches, [(0, 0)] * count, encode.bos(), {})


def exchange(model: VisionLanguageModel, pool: DocumentPool, size: int = 8, k: int = 2) -> Exchange:
    return exchange_pictures(Runner(model, list(pool.patches), size), pool, k)


@torch.no_grad()
def losses_of(
    model: VisionLanguageModel, pool: DocumentPool, row: int, rows: list[int], k: int
) -> list[Tensor]:
    """The loss of every token of the last k texts of a document, given some pictures."""
    ids, labels, chunks = list(pool.bos), [IGNORE] * len(pool.bos), pool.documents[row][-k:]
    for chunk in chunks:
        ids += chunk.head + chunk.answer
        labels += [IGNORE] * len(chunk.head) + chunk.answer
    batch = model.prompt_encoder().pad([(ids, labels)])
    patches = pool.patches[rows][None]
    mask = torch.ones(patches.shape[:2], dtype=torch.bool)
    vision = VisionFeatures(patches, mask, model.vision.shape.grid)
    output = model(batch.input_ids, batch.attention_mask, batch.labels, vision)
    return list(output.token_losses.split([len(chunk.answer) for chunk in chunks]))


@pytest.mark.parametrize("size", [1, 2, 8])
@pytest.mark.parametrize("kind", ["perceiver_gated", "perceiver"])
def test_the_losses_are_those_of_each_document_by_itself(encoder, kind: str, size: int):
    model = model_of(encoder, kind)
    pool = pool_of(model)
    found = exchange(model, pool, size)
    # The last two pictures are 1 and 2, 4 and 5, 7 and 8.
    settings = [
        [[1, 2], [4, 5], [7, 8]],
        [[4, 2], [7, 5], [1, 8]],
        [[1, 5], [4, 8], [7, 2]],
    ]
    for setting, rows in enumerate(settings):
        for document, pictures in enumerate(rows):
            texts = losses_of(model, pool, document, pictures, 2)
            expected = torch.stack([text.double().sum() for text in texts])
            torch.testing.assert_close(
                found.losses[setting, document], expected, rtol=1e-5, atol=1e-5
            )
    assert found.tokens.tolist() == [[len(text) + 1 for text in texts[1:]] for texts in TEXTS]
    # Each text that follows the exchanged picture changes, in each document.
    assert (found.losses[1] - found.losses[0]).abs().min() > 1e-4
    assert (found.losses[2] - found.losses[0])[:, 1].abs().min() > 1e-4


@pytest.mark.parametrize("kind", ["perceiver_gated", "projector_gated", "perceiver"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_text_before_the_exchanged_picture_stays_as_it_is(encoder, kind: str, dtype: torch.dtype):
    model = model_of(encoder, kind, dtype=dtype)
    for k in (2, 3):
        found = exchange(model, pool_of(model), 2, k)
        for place in range(k):
            gap = found.losses[1 + place] - found.losses[0]
            assert gap[:, :place].eq(0).all()
            assert gap[:, place].ne(0).all()
        assert found.largest_change_before == 0
        summary = found.summary()
        assert summary["gap"]["image 2"]["text 1"] == {"mean": 0.0, "se": 0.0}
        assert summary["largest_change_before"] == 0


def test_an_image_that_reaches_back_is_seen(encoder, monkeypatch):
    """Flamingo's augmentation, never drawn here, has a text read the picture that follows it."""
    model = model_of(encoder)
    pool, forward = pool_of(model), model.bridge.forward
    assert exchange(model, pool).largest_change_before == 0

    def reaching(vision: VisionFeatures, text: Instruction | None = None) -> BridgeOutput:
        every = torch.ones(len(vision.patches), dtype=torch.bool)
        return replace(forward(vision, text), next_image=every)

    monkeypatch.setattr(model.bridge, "forward", reaching)
    assert exchange(model, pool).largest_change_before > 1e-3


def test_the_summary_by_hand():
    losses = torch.tensor(
        [
            [[2.0, 6.0], [3.0, 1.0], [1.0, 2.0]],
            [[4.0, 6.5], [4.0, 0.5], [3.0, 2.0]],
            [[2.0, 9.0], [3.0, 2.0], [1.0, 4.0]],
        ],
        dtype=torch.float64,
    )
    tokens = torch.tensor([[2, 4], [3, 1], [1, 2]])
    found = Exchange(losses, tokens, 1e-7).summary()
    assert (found["images"], found["documents"]) == (2, 3)
    assert found["largest_change_before"] == 1e-7
    assert found["loss"] == {
        "right": pytest.approx([6 / 6, 9 / 7]),
        "image 1": pytest.approx([11 / 6, 9 / 7]),
        "image 2": pytest.approx([6 / 6, 15 / 7]),
    }
    assert set(found["gap"]) == {"image 1", "image 2"}
    gap = found["gap"]["image 1"]["text 1"]
    assert gap["mean"] == pytest.approx(11 / 6 - 6 / 6)
    # Where all texts are as long, the error is that of a plain mean.
    even = Exchange(losses, torch.full((3, 2), 4), 0.0).summary()["gap"]["image 2"]["text 2"]
    gaps = [3 / 4, 1 / 4, 2 / 4]
    assert even["mean"] == pytest.approx(statistics.fmean(gaps))
    assert even["se"] == pytest.approx(statistics.stdev(gaps) / math.sqrt(3))
    # Else a document weighs as much as it has tokens.
    rest = [2 - 5 / 6 * 2, 1 - 5 / 6 * 3, 2 - 5 / 6 * 1]
    error = math.sqrt(sum(x * x for x in rest) * 3 / 2) / 6
    assert gap["se"] == pytest.approx(error)


def test_pictures_side_by_side_are_exchanged_together(encoder):
    """Of the next document, given again where it has fewer."""
    model = model_of(encoder)
    pool = pool_of(model, (1, 2, 1))
    assert [c.pictures for c in pool.documents[2]] == [[8], [9, 10, 11, 12], [13]]
    found = exchange(model, pool)
    rows = [[1, 2, 3], [5, 6, 7], [9, 10, 11, 12, 13]]
    others = [[5, 6, 3], [11, 12, 7], [1, 2, 1, 2, 13]]  # from the end
    for setting, each in enumerate((rows, others)):
        for document, pictures in enumerate(each):
            texts = losses_of(model, pool, document, pictures, 2)
            expected = torch.stack([text.double().sum() for text in texts])
            torch.testing.assert_close(
                found.losses[setting, document], expected, rtol=1e-5, atol=1e-5
            )


def test_a_document_that_shares_a_picture_is_passed_over(encoder):
    model = model_of(encoder)
    pool = pool_of(model)
    shared = [replace(chunk, pictures=chunk.pictures.copy()) for chunk in pool.documents[1]]
    shared[2].pictures[0] = 2  # as the first document's last
    pool.documents[1] = shared
    found = exchange(model, pool)
    pictures = [[1, 8], [4, 8], [7, 2]]
    for document, rows in enumerate(pictures):
        texts = losses_of(model, pool, document, rows, 2)
        expected = torch.stack([text.double().sum() for text in texts])
        torch.testing.assert_close(found.losses[2, document], expected, rtol=1e-5, atol=1e-5)


def test_too_few_documents_or_pictures_are_refused(encoder):
    model = model_of(encoder)
    pool = pool_of(model)
    with pytest.raises(ValueError, match=r"found 3 documents of 3 pictures .* 2 documents of 4"):
        exchange(model, pool, k=4)
    alone = DocumentPool(["a"], pool.documents[:1], pool.patches, [(0, 0)] * 9, pool.bos, {})
    with pytest.raises(ValueError, match="found 1 documents"):
        exchange(model, alone)
