"""A row of a padded batch is the same row alone."""

import pytest
import tiny
import torch

from bridges import VisionLanguageModel

PROMPTS = ["<image>a<image>", "no image at all", "some <image>more text"]
COMPLETIONS = ["short", "a rather longer one", ""]


@torch.no_grad()
@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_a_row_alone_is_the_row_in_a_batch(open_vlm: VisionLanguageModel, padding_side: str):
    text, features = tiny.batch_of(open_vlm, PROMPTS, COMPLETIONS, padding_side=padding_side)
    assert not text.attention_mask.all()
    batch = open_vlm(text.input_ids, text.attention_mask, text.labels, features)
    logits = open_vlm.logits(text.input_ids, text.attention_mask, features)
    assert batch.label_counts.tolist() == [len(c) + 1 for c in COMPLETIONS]
    for row in range(len(PROMPTS)):
        one, images = tiny.row_of(text, features, row)
        alone = open_vlm(one.input_ids, one.attention_mask, one.labels, images)
        torch.testing.assert_close(
            batch.row_losses()[row], alone.row_losses()[0], rtol=1e-5, atol=1e-5
        )
        torch.testing.assert_close(
            logits[row][text.attention_mask[row]],
            open_vlm.logits(one.input_ids, one.attention_mask, images)[0],
            rtol=0,
            atol=1e-4,
        )


def test_one_row_of_one_image_and_one_token(open_vlm: VisionLanguageModel):
    text, features = tiny.batch_of(open_vlm, ["<image>"], [""])
    assert features.patches.shape[:2] == (1, 1)
    output = open_vlm(text.input_ids, text.attention_mask, text.labels, features)
    assert output.loss.shape == ()
    assert output.token_losses.shape == output.label_counts.shape == (1,)
    output.loss.backward()
    prompt, _ = tiny.batch_of(open_vlm, ["<image>"], padding_side="left")
    new = open_vlm.generate(prompt.input_ids, prompt.attention_mask, features, max_new_tokens=1)
    assert new.shape == (1, 1)
