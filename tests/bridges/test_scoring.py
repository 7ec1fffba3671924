"""Scores of continuations: those of whole sequences, with the prompt read once."""

from collections.abc import Callable, Iterator

import pytest
import tiny
import torch
from torch import Tensor

from bridges import LanguageModel, TextBatch, VisionEncoder, VisionFeatures, VisionLanguageModel
from bridges.loss import IGNORE
from bridges.prompts import END_OF_CHUNK
from bridges.scoring import score_choices

# Longer than the windows of the tiny Mistral and Gemma2; several images, one, and none.
PROMPTS = ["one <image>two <image>three", "<image>a picture of", "no picture"]
IMAGE_ID = tiny.make_tokenizer().convert_tokens_to_ids("<image>")
CHOICES = [["x", "a longer choice", "red", "two words"], ["cat", "dog"], ["a", "bc", "a picture"]]


@pytest.fixture(params=tiny.FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=["perceiver", "perceiver_gated", "projector_gated", "third_party"])
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def vlm(
    kind: str,
    family: str,
    encoder: VisionEncoder,
    language_models: Callable[[str], LanguageModel],
) -> Iterator[VisionLanguageModel]:
    torch.manual_seed(0)
    model = VisionLanguageModel.connect(encoder, language_models(family), tiny.factory(kind))
    tiny.open_gates(model.bridge)
    yield model
    model.hooks.remove()


@pytest.fixture
def gated(encoder: VisionEncoder) -> VisionLanguageModel:
    """One bridge that nobody shares."""
    torch.manual_seed(0)
    lm = tiny.language_model("llama")
    model = VisionLanguageModel.connect(encoder, lm, tiny.factory("perceiver_gated"))
    tiny.open_gates(model.bridge)
    return model


def tokens(model: VisionLanguageModel, choices: list[list[str]]) -> list[list[list[int]]]:
    encode = model.prompt_encoder()
    return [[encode.document([c, END_OF_CHUNK])[0] for c in row] for row in choices]


@torch.no_grad()
def whole_sequences(
    model: VisionLanguageModel, prompts: list[str], choices: list[list[list[int]]], seed: int = 0
) -> list[Tensor]:
    """Each choice after its prompt, teacher-forced, a row by itself."""
    encode, found = model.prompt_encoder(), []
    text, features = tiny.batch_of(model, prompts, seed=seed)
    for row, continuations in enumerate(choices):
        alone, images = tiny.row_of(text, features, row)
        prompt = alone.input_ids[0].tolist()
        rows = [(prompt + c, [IGNORE] * len(prompt) + c) for c in continuations]
        batch, n = encode.pad(rows), len(rows)
        repeated = VisionFeatures(
            images.patches.expand(n, -1, -1, -1), images.image_mask.expand(n, -1), images.grid
        )
        output = model(batch.input_ids, batch.attention_mask, batch.labels, repeated)
        found.append(-output.row_losses())
    return found


def test_scores_are_those_of_whole_sequences(vlm: VisionLanguageModel):
    choices = tokens(vlm, CHOICES)
    for seed in (0, 1):  # nothing of the first images is left
        text, features = tiny.batch_of(vlm, PROMPTS, padding_side="left", seed=seed)
        expected = whole_sequences(vlm, PROMPTS, choices, seed)
        for max_rows in (1, 6, 64):
            found = score_choices(vlm, text, choices, features, max_rows=max_rows)
            for row, scores in enumerate(expected):
                n = len(scores)
                torch.testing.assert_close(
                    found.log_likelihoods[row, :n], scores, rtol=0, atol=1e-4
                )
                lengths = torch.tensor([len(c) for c in choices[row]])
                assert torch.equal(found.lengths[row, :n], lengths)
                torch.testing.assert_close(
                    found.per_token[row, :n], scores / lengths, atol=1e-4, rtol=0
                )
                assert found.log_likelihoods[row, n:].eq(-torch.inf).all()
    assert vlm.hooks.condition is None


def test_the_likeliest_choice_by_sum_and_by_token(gated: VisionLanguageModel):
    choices = tokens(gated, CHOICES)
    text, features = tiny.batch_of(gated, PROMPTS, padding_side="left")
    found = score_choices(gated, text, choices, features)
    expected = whole_sequences(gated, PROMPTS, choices)
    assert found.best().tolist() == [int(scores.argmax()) for scores in expected]
    means = [
        s / torch.tensor([len(c) for c in row]) for s, row in zip(expected, choices, strict=True)
    ]
    assert found.best(per_token=True).tolist() == [int(scores.argmax()) for scores in means]
    # A long choice is unlikely as a whole, which is what the mean takes away.
    assert found.best().tolist() != found.best(per_token=True).tolist()


def test_the_prompt_is_read_once(gated: VisionLanguageModel, monkeypatch: pytest.MonkeyPatch):
    text, features = tiny.batch_of(gated, PROMPTS, padding_side="left")
    seen: list[tuple[int, ...]] = []
    resampled: list[int] = []
    decoder = gated.lm.model.get_submodule("model")
    decoder.register_forward_pre_hook(
        lambda _, __, kwargs: seen.append(tuple(kwargs["inputs_embeds"].shape[:2])),
        with_kwargs=True,
    )
    gated.bridge.register_forward_pre_hook(lambda *_: resampled.append(1))
    choices = tokens(gated, CHOICES)
    score_choices(gated, text, choices, features, max_rows=6)
    prompt = tuple(text.input_ids.shape)
    # Two choices of three rows at a time; each is read but for its last token.
    assert seen == [prompt, (6, len("a longer choice")), (6, len("a picture"))]
    assert resampled == [1]
    # Where every choice is one token, the prompt alone says everything.
    seen.clear()
    found = score_choices(gated, text, [[[5], [6]], [[5], [7]], [[8], [9]]], features)
    assert seen == [prompt]
    logits = gated.logits(text.input_ids, text.attention_mask, features)[:, -1].log_softmax(-1)
    torch.testing.assert_close(found.log_likelihoods[1], logits[1, [5, 7]], rtol=0, atol=1e-5)


def test_a_new_end_of_chunk_is_scored(encoder: VisionEncoder):
    lm = tiny.language_model("llama", end_of_chunk="<|endofchunk|>")
    model = VisionLanguageModel.connect(encoder, lm, tiny.factory("perceiver"))
    choices = tokens(model, CHOICES)
    assert all(c[-1] == lm.end_id != lm.tokenizer.eos_token_id for row in choices for c in row)
    text, features = tiny.batch_of(model, PROMPTS, padding_side="left")
    found = score_choices(model, text, choices, features)
    for row, scores in enumerate(whole_sequences(model, PROMPTS, choices)):
        torch.testing.assert_close(
            found.log_likelihoods[row, : len(scores)], scores, rtol=0, atol=1e-4
        )


def test_checkpointing_scores_and_goes_on_training(encoder: VisionEncoder):
    """In training mode HF gives a checkpointed block no cache."""
    lm = tiny.language_model("llama", gradient_checkpointing=True)
    model = VisionLanguageModel.connect(encoder, lm, tiny.factory("perceiver"))
    choices = tokens(model, CHOICES)
    text, features = tiny.batch_of(model, PROMPTS, padding_side="left")
    found = score_choices(model, text, choices, features)
    for row, scores in enumerate(whole_sequences(model, PROMPTS, choices)):
        torch.testing.assert_close(
            found.log_likelihoods[row, : len(scores)], scores, rtol=0, atol=1e-4
        )
    assert lm.model.training


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ([[[5]], [[5]]], "2 rows and 3 prompts"),
        ([[[5]], [], [[5]]], "row 1: found 0 choices"),
        ([[[5]], [[5]], [[5], []]], "none empty"),
        ([[[5]], [[5, IMAGE_ID]], [[5]]], "images in the prompt only"),
        ([[[5] * 120]] * 3, "context"),
    ],
)
def test_what_cannot_be_scored_is_refused(gated: VisionLanguageModel, choices, message):
    text, features = tiny.batch_of(gated, PROMPTS, padding_side="left")
    with pytest.raises(ValueError, match=message):
        score_choices(gated, text, choices, features)
    assert gated.hooks.condition is None


def test_right_padding_and_foreign_caches_are_refused(
    gated: VisionLanguageModel, monkeypatch: pytest.MonkeyPatch
):
    choices = tokens(gated, CHOICES)
    text, features = tiny.batch_of(gated, PROMPTS, padding_side="right")
    with pytest.raises(ValueError, match="padding on the left"):
        score_choices(gated, text, choices, features)

    class Odd:
        pass

    def odd(config: object) -> object:
        cache = type("Cache", (), {})()
        cache.layers = [Odd()]
        return cache

    monkeypatch.setattr("bridges.scoring.DynamicCache", odd)
    left = TextBatch(text.input_ids[:1], text.attention_mask[:1], text.labels[:1])
    one = VisionFeatures(features.patches[:1], features.image_mask[:1], features.grid)
    with pytest.raises(ValueError, match="found an LM whose cache has a Odd"):
        score_choices(gated, left, choices[:1], one)
    assert gated.hooks.condition is None
