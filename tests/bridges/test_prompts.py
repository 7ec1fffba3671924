"""Text with images as token ids."""

import pytest
import tiny
import torch

from bridges import PromptEncoder
from bridges.loss import IGNORE


def encoder_of(num_tokens: int = 2, max_completion: int = 64, **options) -> PromptEncoder:
    return PromptEncoder(tiny.make_tokenizer(**options), "<image>", num_tokens, max_completion)


def words(encoder: PromptEncoder, row: torch.Tensor) -> str:
    tokens = encoder.tokenizer.convert_ids_to_tokens(row.tolist())
    return "".join(tokens)


def test_every_image_becomes_its_placeholders():
    encoder = encoder_of(num_tokens=3)
    text = encoder(["a<image>b<image>", "<image>", "none"])
    assert words(encoder, text.input_ids[0]) == "a<image><image><image>b<image><image><image>"
    assert words(encoder, text.input_ids[1]) == "<image><image><image>" + "<pad>" * 5
    assert words(encoder, text.input_ids[2]) == "none" + "<pad>" * 4
    assert text.attention_mask.sum(dim=1).tolist() == [8, 3, 4]
    assert text.attention_mask.dtype == torch.bool
    assert (text.labels == IGNORE).all()


@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_labels_are_the_completion_and_its_end(padding_side: str):
    encoder = encoder_of()
    text = encoder(["<image>Question:", "q"], ["A", "long"], padding_side=padding_side)
    for row, completion in enumerate(["A</s>", "long</s>"]):
        labelled = text.labels[row] != IGNORE
        assert words(encoder, text.labels[row][labelled]) == completion
        assert torch.equal(text.labels[row][labelled], text.input_ids[row][labelled])
        assert not (labelled & ~text.attention_mask[row]).any()
    side = 0 if padding_side == "left" else -1
    assert text.attention_mask[:, side].tolist() == [True, False]


def test_a_beginning_comes_first_where_the_tokenizer_has_one():
    text = encoder_of(bos=True)(["<image>a", ""], ["b", "c"])
    begins = encoder_of(bos=True).tokenizer.bos_token_id
    assert (text.input_ids[:, 0] == begins).all()
    assert (text.input_ids == begins).sum() == 2
    assert not (encoder_of()(["<image>a"]).input_ids == begins).any()


def test_long_completions_are_cut_and_counted():
    encoder = encoder_of(max_completion=4)
    text = encoder(["<image>"] * 3, ["abc", "abcd", "abcdef"])
    ends = [words(encoder, row[row != IGNORE]) for row in text.labels]
    assert ends == ["abc</s>"] * 3
    assert text.truncated == 2


def test_a_batch_of_one_and_an_empty_completion():
    text = encoder_of(num_tokens=1)(["<image>"], [""])
    assert text.input_ids.shape == (1, 2)
    assert text.labels[0].tolist() == [IGNORE, encoder_of().tokenizer.eos_token_id]


def test_without_a_padding_token_the_end_pads():
    encoder = encoder_of()
    encoder.tokenizer.pad_token = None
    text = encoder(["a", "bcd"])
    assert text.input_ids[0, 1:].tolist() == [encoder.tokenizer.eos_token_id] * 2
    assert text.attention_mask[0].tolist() == [True, False, False]


def test_an_image_of_the_text_cannot_be_forged_by_a_caption():
    """A caption that says <image> is data, and must not own placeholders."""
    encoder = encoder_of()
    text = encoder(["<image>"], ["see <image> here"])
    image_id = encoder.tokenizer.convert_tokens_to_ids("<image>")
    assert (text.input_ids == image_id).sum() == encoder.num_tokens
    assert words(encoder, text.labels[0][2:]) == "see <image> here</s>"
