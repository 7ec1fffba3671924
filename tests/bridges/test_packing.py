"""Samples packed into one row are the samples by themselves."""

import pytest
import tiny
import torch

from bridges import TextBatch, VisionFeatures, VisionLanguageModel
from bridges.language import UNPACKABLE
from bridges.loss import IGNORE

PROMPTS = ["<image>ab", "no image", "x<image>y<image>"]
COMPLETIONS = ["cd", "an image", "z"]


def packed(text: TextBatch) -> tuple[TextBatch, torch.Tensor]:
    """All rows side by side in one, three columns of padding behind them; and its segments."""
    ids, labels, segments = [], [], []
    for row in range(len(text.input_ids)):
        columns = text.attention_mask[row]
        ids.append(text.input_ids[row][columns])
        labels.append(text.labels[row][columns])
        segments += [row] * int(columns.sum())
    padding = 3
    row = torch.cat([*ids, torch.zeros(padding, dtype=torch.long)])[None]
    wanted = torch.cat([*labels, torch.full((padding,), IGNORE)])[None]
    mask = torch.arange(row.shape[1])[None] < row.shape[1] - padding
    places = torch.tensor(segments + [segments[-1]] * padding)[None]
    return TextBatch(row, mask, wanted), places


@pytest.mark.parametrize("family", [f for f in tiny.FAMILIES if f not in UNPACKABLE])
@pytest.mark.parametrize("kind", ["perceiver", "perceiver_gated"])
def test_a_packed_row_is_its_samples(family: str, kind: str):
    torch.manual_seed(0)
    lm = tiny.language_model(family)
    model = VisionLanguageModel.connect(tiny.vision_encoder(), lm, tiny.factory(kind))
    tiny.open_gates(model.bridge)
    text, features = tiny.batch_of(model, PROMPTS, COMPLETIONS)
    apart = model(text.input_ids, text.attention_mask, text.labels, features)
    row, segments = packed(text)
    together = model(row.input_ids, row.attention_mask, row.labels, features, segments=segments)
    torch.testing.assert_close(together.token_losses, apart.token_losses, rtol=1e-5, atol=1e-5)
    # No sample predicts the first token of the next.
    first = int(text.attention_mask[0].sum())
    row.labels[0, first] = row.input_ids[0, first]
    again = model(row.input_ids, row.attention_mask, row.labels, features, segments=segments)
    assert torch.equal(again.token_losses, together.token_losses)
    row.labels[0, first] = IGNORE
    # Without segments they do look at each other: the test can fail.
    patches = features.patches[features.image_mask][None]
    images = VisionFeatures(patches, torch.ones(patches.shape[:2], dtype=torch.bool), features.grid)
    mixed = model(row.input_ids, row.attention_mask, row.labels, images)
    assert not torch.allclose(mixed.token_losses, apart.token_losses, atol=1e-3)


@pytest.mark.parametrize("wrong", [[[1, 0]], [[0, 2]]])
def test_samples_out_of_order_are_refused(wrong: list[list[int]]):
    model = VisionLanguageModel.connect(
        tiny.vision_encoder(), tiny.language_model(), tiny.factory("perceiver_gated")
    )
    text, features = tiny.batch_of(model, ["<image>"] * 2)
    row, _ = packed(text)
    ids, mask, labels = (x[:, :2] for x in (row.input_ids, row.attention_mask, row.labels))
    with pytest.raises(ValueError, match="segments out of order, or above 1"):
        model(ids, mask, labels, features, segments=torch.tensor(wrong))


def test_attention_that_would_mix_samples_is_refused():
    lm = tiny.language_model()
    lm.check_packable()
    lm.model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="attn_implementation='flash_attention_2'"):
        lm.check_packable()


@pytest.mark.parametrize("family", UNPACKABLE)
def test_an_lm_that_would_mix_samples_is_refused(family: str):
    lm = tiny.language_model(family)
    ones = torch.ones(1, 2, dtype=torch.long)
    with pytest.raises(ValueError, match="would see each other"):
        lm.hidden(lm.embed(ones), ones.bool(), segments=ones)


def test_segments_and_a_cache_do_not_go_together():
    lm = tiny.language_model()
    ones = torch.ones(1, 2, dtype=torch.long)
    with pytest.raises(ValueError, match="segments with a cache"):
        lm.hidden(lm.embed(ones), ones.bool(), segments=ones, cache=object())
