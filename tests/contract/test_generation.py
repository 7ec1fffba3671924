"""Cached generation gives what the model says when it is asked anew for every token."""

import tiny
import torch
from torch import Tensor

from bridges import TextBatch, VisionFeatures, VisionLanguageModel

# Longer than the windows of the tiny Mistral and Gemma2.
PROMPTS = ["<image>a picture of", "no image", "one <image>two <image>three"]
NEW = 6


def teacher_forced(
    model: VisionLanguageModel, text: TextBatch, features: VisionFeatures
) -> tuple[Tensor, Tensor]:
    """Greedy tokens and their logits, the whole sequence recomputed for each.

    ``generate(use_cache=False)`` would be no oracle: with embeddings it caches all the same.
    """
    ids, mask = text.input_ids, text.attention_mask
    steps = []
    for _ in range(NEW):
        logits = model.logits(ids, mask, features)[:, -1]
        steps.append(logits.clone())
        logits[:, [model.lm.image_token_id, model.lm.tokenizer.eos_token_id]] = -torch.inf
        ids = torch.cat([ids, logits.argmax(dim=-1, keepdim=True)], dim=1)
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
    return ids[:, -NEW:], torch.stack(steps, dim=1)


def generate(
    model: VisionLanguageModel, text: TextBatch, features: VisionFeatures, **options
) -> Tensor:
    lengths = {"max_new_tokens": NEW, "min_new_tokens": NEW}
    return model.generate(
        text.input_ids, text.attention_mask, features, **lengths, **{"do_sample": False} | options
    )


@torch.no_grad()
def test_cached_generation_is_teacher_forced_generation(open_vlm: VisionLanguageModel):
    text, features = tiny.batch_of(open_vlm, PROMPTS, padding_side="left")
    tokens, logits = teacher_forced(open_vlm, text, features)
    found = generate(open_vlm, text, features, output_logits=True, return_dict_in_generate=True)
    torch.testing.assert_close(torch.stack(found.logits, dim=1), logits, rtol=0, atol=1e-4)
    assert torch.equal(found.sequences, tokens)
    # Nothing is remembered: other images, other captions.
    others = tiny.features_of(open_vlm, features.image_mask.sum(dim=1).tolist(), seed=1)
    tokens, logits = teacher_forced(open_vlm, text, others)
    found = generate(open_vlm, text, others, output_logits=True, return_dict_in_generate=True)
    torch.testing.assert_close(torch.stack(found.logits, dim=1), logits, rtol=0, atol=1e-4)
    assert open_vlm.hooks.condition is None


@torch.no_grad()
def test_beams_of_a_row_in_a_batch_are_those_of_the_row_alone(open_vlm: VisionLanguageModel):
    text, features = tiny.batch_of(open_vlm, PROMPTS, padding_side="left")
    options = {"num_beams": 3, "num_return_sequences": 2, "length_penalty": 0.0}
    batch = generate(open_vlm, text, features, **options)
    assert batch.shape == (2 * len(PROMPTS), NEW)
    for row in range(len(PROMPTS)):
        alone = generate(open_vlm, *tiny.row_of(text, features, row), **options)
        assert torch.equal(batch[2 * row : 2 * row + 2], alone)


@torch.no_grad()
def test_every_returned_sample_is_drawn_for_its_own_row(open_vlm: VisionLanguageModel):
    text, features = tiny.batch_of(open_vlm, PROMPTS, padding_side="left")
    greedy = generate(open_vlm, text, features)
    options = {"do_sample": True, "num_return_sequences": 3}
    # Drawn from one candidate, each sample of a row is that row's greedy caption.
    certain = generate(open_vlm, text, features, top_k=1, **options)
    assert torch.equal(certain, greedy.repeat_interleave(3, dim=0))
    torch.manual_seed(0)
    drawn = generate(open_vlm, text, features, temperature=5.0, top_k=0, **options)
    assert drawn.shape == certain.shape
    assert len(drawn.unique(dim=0)) == len(drawn)
