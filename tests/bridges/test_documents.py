"""Documents as tokens; clips through encoder and model."""

import pytest
import tiny
import torch

from bridges import VisionFeatures, VisionLanguageModel
from bridges.loss import IGNORE
from bridges.prompts import END_OF_CHUNK, PromptEncoder


def encoder(**options) -> PromptEncoder:
    return PromptEncoder(tiny.make_tokenizer(bos=True), "<image>", 2, **options)


def test_a_document_is_text_images_and_ends():
    encode = encoder()
    image = encode.tokenizer.convert_tokens_to_ids("<image>")
    letters = encode.tokenizer.convert_tokens_to_ids
    ids, lossy = encode.document(["a", None, "", "b", END_OF_CHUNK])
    assert ids == [letters("a"), image, image, letters("b"), encode.tokenizer.eos_token_id]
    assert lossy == [True, False, False, True, True]
    assert encode.bos() == [encode.tokenizer.bos_token_id]


def test_text_of_a_document_is_data():
    encode = encoder()
    ids, lossy = encode.document(["<image></s>"])
    assert len(ids) == len("<image></s>") and all(lossy)
    assert encode.tokenizer.decode(ids) == "<image></s>"


def test_the_end_may_be_another_token():
    encode = encoder(end_id=7)
    assert encode.document([END_OF_CHUNK]) == ([7], [True])
    assert encode.end_of_chunk == encode.tokenizer.convert_ids_to_tokens(7)
    assert encode(["<image>"], ["a"]).labels[0, -1] == 7


@pytest.mark.parametrize("side", ["left", "right"])
def test_rows_are_padded(side: str):
    batch = encoder().pad([([5, 6, 7], [IGNORE, 6, 7]), ([8], [8])], padding_side=side)
    assert batch.attention_mask.sum(dim=1).tolist() == [3, 1]
    assert batch.input_ids[1][batch.attention_mask[1]].tolist() == [8]
    assert batch.labels[1].tolist() == ([IGNORE, IGNORE, 8] if side == "left" else [8, -100, -100])


# --- clips


def test_frames_are_encoded_like_pictures_and_padding_is_not():
    vision = tiny.vision_encoder()
    pixels = torch.rand(2, 1, 3, 3, tiny.IMAGE_SIZE, tiny.IMAGE_SIZE)
    frames = torch.tensor([[[True, True, True]], [[True, False, False]]])
    pixels[~frames] = torch.nan
    seen = []
    vision.model.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(len(kwargs["pixel_values"])), with_kwargs=True
    )
    clips = vision.encode(pixels, frame_mask=frames)
    assert seen == [4] and clips.num_frames == 3
    apart = vision.encode(pixels[:, 0].nan_to_num())
    p = vision.shape.num_patches
    assert clips.patches.shape == (2, 1, 3 * p, vision.shape.dim)
    torch.testing.assert_close(clips.patches[0, 0], apart.patches[0].flatten(0, 1))
    torch.testing.assert_close(clips.patches[1, 0, :p], apart.patches[1, 0])
    assert not clips.patches[1, 0, p:].any()


def test_padding_images_are_not_encoded():
    vision = tiny.vision_encoder()
    pixels = torch.rand(2, 2, 3, tiny.IMAGE_SIZE, tiny.IMAGE_SIZE)
    mask = torch.tensor([[True, False], [True, True]])
    found = vision.encode(pixels, mask)
    torch.testing.assert_close(found.patches[mask], vision.encode(pixels).patches[mask])
    assert not found.patches[~mask].any()
    nothing = vision.encode(pixels, torch.zeros(2, 2, dtype=torch.bool))
    assert nothing.patches.shape == found.patches.shape and not nothing.patches.any()


def clip_of(model: VisionLanguageModel, frames: int) -> VisionFeatures:
    shape = model.vision.shape
    generator = torch.Generator().manual_seed(0)
    patches = torch.randn(1, 1, frames * shape.num_patches, shape.dim, generator=generator)
    mask = torch.ones(1, 1, dtype=torch.bool)
    return VisionFeatures(patches, mask, shape.grid, torch.ones(1, 1, frames, dtype=torch.bool))


def test_a_reader_of_pictures_refuses_clips():
    lm, vision = tiny.language_model(), tiny.vision_encoder()
    model = VisionLanguageModel.connect(vision, lm, tiny.factory("qformer"))
    text, _ = tiny.batch_of(model, ["<image>a"], ["b"])
    with pytest.raises(ValueError, match="clips of 3 frames for QFormer"):
        model(text.input_ids, text.attention_mask, text.labels, clip_of(model, 3))


def test_a_frame_mask_of_another_shape_is_refused():
    with pytest.raises(ValueError, match="frame_mask"):
        VisionFeatures(
            torch.zeros(1, 1, 7, 4), torch.ones(1, 1).bool(), (1, 1), torch.ones(1, 1, 2).bool()
        )
