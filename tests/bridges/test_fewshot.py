"""Few-shot prompts, token by token, and which demonstrations are chosen."""

import pytest
import tiny
import torch

from bridges import LanguageModel, VisionEncoder, VisionLanguageModel
from bridges.fewshot import (
    OPENFLAMINGO_CAPTION,
    OPENFLAMINGO_VQA,
    FewShotPrompts,
    Shot,
    draw,
    most_similar,
    pooled,
)
from bridges.prompts import END_OF_CHUNK

IMAGE = "<image>" * 3
SHOTS = [Shot("a cat"), Shot("a dog")]


def model_of(encoder: VisionEncoder, prompt: str = "<image>", **lm: object) -> VisionLanguageModel:
    tokenizer = tiny.make_tokenizer(bos=bool(lm.pop("bos", False)))
    language = LanguageModel(tiny.causal_lm("llama"), tokenizer, **lm)  # pyright: ignore
    return VisionLanguageModel.connect(encoder, language, tiny.factory("perceiver"), prompt=prompt)


def words(model: VisionLanguageModel, ids: list[int]) -> str:
    return "".join(model.lm.tokenizer.convert_ids_to_tokens(ids))


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("<image>", f"{IMAGE}a cat</s>{IMAGE}a dog</s>{IMAGE}"),
        (
            "Picture: <image>",
            f"Picture: {IMAGE}a cat</s>Picture: {IMAGE}a dog</s>Picture: {IMAGE}",
        ),
        # After text an answer begins with a space, as in training.
        (
            "<image>A photo of",
            f"{IMAGE}A photo of a cat</s>{IMAGE}A photo of a dog</s>{IMAGE}A photo of",
        ),
    ],
)
def test_a_demonstration_looks_like_a_training_sample(encoder, prompt: str, expected: str):
    model = model_of(encoder, prompt)
    prompts = FewShotPrompts.of(model, bos=False)
    assert words(model, prompts(SHOTS)) == expected
    assert prompts.template == prompt
    # The same ids as the model is trained on, demonstration by demonstration.
    encode = model.prompt_encoder()
    trained = encode([prompt], [encode.caption(prompt, "a cat")]).input_ids[0].tolist()
    assert prompts(SHOTS)[: len(trained)] == trained
    query = encode([prompt]).input_ids[0].tolist()
    assert prompts([]) == query
    assert query + prompts.answer("a cat") == trained
    # A document begins with BOS, though this tokenizer puts none by itself.
    document = encode.bos() + encode.document([None, "a cat", END_OF_CHUNK, None])[0]
    if prompt == "<image>":
        assert FewShotPrompts.of(model)(SHOTS[:1]) == document
    assert words(model, FewShotPrompts.of(model)(SHOTS)) == f"<s>{expected}"


def test_openflamingos_templates(encoder):
    model = model_of(encoder, end_of_chunk="<|endofchunk|>", bos=True)
    end = "<|endofchunk|>"
    prompts = FewShotPrompts.of(model, OPENFLAMINGO_CAPTION)
    assert words(model, prompts(SHOTS)) == (
        f"<s>{IMAGE}Output:a cat{end}{IMAGE}Output:a dog{end}{IMAGE}Output:"
    )
    assert prompts.template == OPENFLAMINGO_CAPTION
    prompts = FewShotPrompts.of(model, OPENFLAMINGO_VQA)
    assert words(model, prompts([Shot("cat", "what?")], "how many?")) == (
        f"<s>{IMAGE}Question:what? Short answer:cat{end}{IMAGE}Question:how many? Short answer:"
    )
    assert words(model, prompts.answer("two")) == f"two{end}"


def test_text_only_demonstrations_have_no_image(encoder):
    model = model_of(encoder, "Picture: <image>")
    for template, expected in {
        None: f"<s>Picture: a cat</s>Picture: a dog</s>Picture: {IMAGE}",
        OPENFLAMINGO_CAPTION: f"<s>Output:a cat</s>Output:a dog</s>{IMAGE}Output:",
    }.items():
        prompts = FewShotPrompts.of(model, template)
        assert words(model, prompts(SHOTS, images=False)) == expected


def test_data_are_spelt_out_and_the_template_is_not(encoder):
    model = model_of(encoder, "</s><image>{question} ")
    prompts = FewShotPrompts.of(model)
    image, end = model.lm.image_token_id, model.lm.tokenizer.eos_token_id
    ids = prompts([Shot("an <image></s>", "<image>?")], "</s>?")
    assert ids.count(image) == 2 * model.bridge.num_tokens
    assert ids.count(end) == 2 + 1  # of the template twice, and the end of the answer
    assert prompts.answer("</s>").count(end) == 1


def test_a_prompt_that_sets_bos_itself_gets_no_other(encoder):
    bos = model_of(encoder, bos=True).lm.tokenizer.bos_token_id
    for prompt, expected in {"<image>": 1, "<image><s>": 3}.items():
        for begins in (True, False):
            prompts = FewShotPrompts.of(model_of(encoder, prompt, bos=True), bos=begins)
            assert prompts(SHOTS).count(bos) == expected
            text_only = prompts(SHOTS, images=False)
            assert text_only.count(bos) == expected
            assert text_only[0] == bos


@pytest.mark.parametrize("end", [None, "<|endofchunk|>"])
@pytest.mark.parametrize("by_itself", [True, False])
def test_a_prompt_that_begins_with_bos_makes_documents(encoder, by_itself: bool, end: str | None):
    """So pairs look like documents: BOS is where the whole begins, and before no demonstration."""
    model = model_of(encoder, "<s><image>", bos=by_itself, end_of_chunk=end)
    encode, bos = model.prompt_encoder(), model.lm.tokenizer.bos_token_id
    pair = encode.bos() + encode.document([None, "a cat", END_OF_CHUNK])[0]
    assert encode(["<s><image>"], ["a cat"]).input_ids[0].tolist() == pair
    for begins in (True, False):
        prompts = FewShotPrompts.of(model, bos=begins)
        assert prompts.template == "<s><image>"
        assert prompts([]) + prompts.answer("a cat") == pair
        assert prompts(SHOTS[:1])[: len(pair)] == pair
        parts = [None, "a cat", END_OF_CHUNK, None, "a dog", END_OF_CHUNK, None]
        assert prompts(SHOTS) == encode.bos() + encode.document(parts)[0]
        assert prompts(SHOTS).count(bos) == 1
        parts = ["a cat", END_OF_CHUNK, "a dog", END_OF_CHUNK, None]
        assert prompts(SHOTS, images=False) == encode.bos() + encode.document(parts)[0]
    # Text beside the image stands in every demonstration, a BOS elsewhere too.
    stop = end or "</s>"
    for prompt, each in {
        "<s>See <image>:": f"See {IMAGE}: ",
        "<s><image><s>": f"{IMAGE}<s>",
    }.items():
        prompts = FewShotPrompts.of(model_of(encoder, prompt, bos=by_itself, end_of_chunk=end))
        expected = f"<s>{each}a cat{stop}{each}a dog{stop}{each.rstrip()}"
        assert words(model, prompts(SHOTS)) == expected


def test_a_prompt_may_begin_with_what_stands_for_bos(encoder):
    """Where a tokenizer has no BOS, documents begin with EOS."""
    model = model_of(encoder, "</s><image>")
    model.lm.tokenizer.bos_token = None
    assert words(model, FewShotPrompts.of(model)(SHOTS)) == (
        f"</s>{IMAGE}a cat</s>{IMAGE}a dog</s>{IMAGE}"
    )


def test_long_answers_are_cut_as_in_training(encoder):
    model = model_of(encoder)
    prompts = FewShotPrompts.of(model, max_answer=4)
    assert words(model, prompts([Shot("abcdefgh")])) == f"<s>{IMAGE}abc</s>{IMAGE}"
    assert [prompts.cuts(text) for text in ("abc", "abcd")] == [False, True]


@pytest.mark.parametrize(
    "template", ["no image{answer}", "<image><image>{answer}", "<image>{answer} and more"]
)
def test_a_template_has_one_image_and_ends_in_the_answer(encoder, template: str):
    with pytest.raises(ValueError, match="expected '<image>' in it once"):
        FewShotPrompts.of(model_of(encoder), template)


def test_another_image_token_goes_into_the_templates(encoder):
    tokenizer = tiny.make_tokenizer(image_token=False)
    tiny.add_image_token(tokenizer, "<|img|>")
    lm = LanguageModel(tiny.causal_lm("llama"), tokenizer, image_token="<|img|>")
    model = VisionLanguageModel.connect(encoder, lm, tiny.factory("perceiver"), prompt="<|img|>")
    prompts = FewShotPrompts.of(model, OPENFLAMINGO_CAPTION)
    assert prompts([]).count(lm.image_token_id) == model.bridge.num_tokens


# --- which demonstrations


def test_the_most_similar_stands_last():
    generator = torch.Generator().manual_seed(0)
    support = pooled(torch.randn(20, 5, 8, generator=generator))
    query = pooled(torch.randn(1, 5, 8, generator=generator))[0]
    allowed = torch.ones(20, dtype=torch.bool)
    by_hand = [float(torch.nn.functional.cosine_similarity(query, s, dim=0)) for s in support]
    order = sorted(range(20), key=lambda place: by_hand[place])
    assert most_similar(query, support, 4, allowed) == order[-4:]
    allowed[order[-1]] = allowed[order[-3]] = False
    assert most_similar(query, support, 3, allowed) == [order[-5], order[-4], order[-2]]


def test_random_demonstrations_are_those_of_the_seed():
    allowed = torch.ones(30, dtype=torch.bool)
    allowed[::3] = False
    chosen = draw("0/a", 8, allowed)
    assert chosen == draw("0/a", 8, allowed)
    assert chosen != draw("1/a", 8, allowed)
    assert len(set(chosen)) == 8
    assert all(place % 3 for place in chosen)
    # More shots are further shots, so that a curve does not jump for other reasons.
    assert draw("0/a", 4, allowed) == chosen[:4]
    drawn = {place for seed in range(50) for place in draw(f"{seed}/a", 4, allowed)}
    assert drawn == {place for place in range(30) if place % 3}


def test_too_small_a_support_set_is_refused():
    allowed = torch.tensor([True, False, True])
    for choose in (
        lambda: draw("0", 3, allowed),
        lambda: most_similar(torch.ones(2), torch.ones(3, 2), 3, allowed),
    ):
        with pytest.raises(ValueError, match="found 2 samples to demonstrate 3 shots"):
            choose()
