"""The MLP projector as a soft prefix against HF's LLaVA, by itself and in the whole model."""

from functools import partial

import parity
import tiny
import torch
import transformers as hf
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

from bridges import (
    DecoderShape,
    LanguageModel,
    Projector,
    SoftPrefix,
    VisionEncoder,
    VisionFeatures,
    VisionLanguageModel,
    VisionShape,
)

NAMES = {"resampler.layers.0": "linear_1", "projection": "linear_2"}


def config_of(image_token_id: int) -> hf.LlavaConfig:
    return hf.LlavaConfig(
        vision_config=tiny.vision_model("clip").config,
        text_config=tiny.CONFIGS["llama"](),
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        image_token_index=image_token_id,
        projector_hidden_act="gelu",
    )


def bridge_of(vision: VisionShape, decoder: DecoderShape) -> SoftPrefix:
    resampler = partial(Projector, layers=2, dim=decoder.dim)
    return SoftPrefix(vision=vision, decoder=decoder, resampler=resampler)


def test_projector():
    config = config_of(99)
    theirs = LlavaMultiModalProjector(config)
    dim = config.vision_config.hidden_size
    ours = bridge_of(VisionShape(dim, 9, (3, 3)), DecoderShape(32, 3, 4))
    pairs = parity.pair_up(ours, theirs, NAMES)
    parity.copy_weights(pairs)
    a = torch.randn(2, 3, 9, dim, requires_grad=True)
    b = a.detach().clone().requires_grad_()
    mask = torch.ones(2, 3, dtype=torch.bool)
    out = ours(VisionFeatures(a, mask, (3, 3))).soft_tokens
    parity.assert_parity(pairs, (out, theirs(b)), [(a, b)])


@torch.no_grad()
def test_whole_model():
    tokenizer = tiny.make_tokenizer()
    image_id = tokenizer.convert_tokens_to_ids("<image>")
    theirs = hf.LlavaForConditionalGeneration(config_of(image_id)).eval()
    tiny.randomise(theirs)
    inside = theirs.model

    lm = tiny.causal_lm("llama")
    lm.model.load_state_dict(inside.language_model.state_dict())
    lm.lm_head.load_state_dict(theirs.lm_head.state_dict())
    size = (tiny.IMAGE_SIZE, tiny.IMAGE_SIZE)
    vision = VisionEncoder(inside.vision_tower, tiny.preprocess, layer=-2, image_size=size)
    ours = VisionLanguageModel.connect(vision, LanguageModel(lm, tokenizer), bridge_of)
    for name, a, b in parity.pair_up(ours.bridge, inside.multi_modal_projector, NAMES):
        assert a.shape == b.shape, name
        a.copy_(b)

    pixels = torch.randn(3, 3, *size)
    text = ours.prompt_encoder()(["a <image> b", "two <image> and <image>"])
    mask = torch.tensor([[True, False], [True, True]])
    padded = torch.zeros(2, 2, 3, *size)
    padded[mask] = pixels
    found = ours.logits(text.input_ids, text.attention_mask, vision.encode(padded, mask))
    expected = theirs(
        input_ids=text.input_ids,
        attention_mask=text.attention_mask.long(),
        pixel_values=pixels,
    ).logits
    parity.close(found[text.attention_mask], expected[text.attention_mask], "logits")
    other = ours.logits(text.input_ids, text.attention_mask, vision.encode(padded.flip(1), mask))
    assert (other - found).abs().max() > 1e-2
