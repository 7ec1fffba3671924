"""The frozen encoder: which layer, which tokens, in which order, from which folder."""

import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import transformers as hf
from PIL import Image
from torch import Tensor, nn

from bridges import VisionEncoder
from bridges.preprocess import HFPreprocess, Rescale

SIZE = tiny.IMAGE_SIZE

PREFIX = {"clip": 1, "siglip": 0, "dinov2": 1, "dinov2_registers": 4, "vit": 1}
"""CLS and register tokens of each kind; CNNs have maps."""

CNNS = [kind for kind in tiny.VISION if kind not in PREFIX]


def pixels_of(*shape: int) -> Tensor:
    return torch.rand(*shape, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))


def test_every_tiny_model_is_here():
    assert {*PREFIX, *CNNS} == set(tiny.VISION)


@torch.no_grad()
@pytest.mark.parametrize("kind", PREFIX)
def test_tokens_are_hfs_without_the_prefix(kind: str):
    model = tiny.vision_model(kind)
    pixels = pixels_of(2, 1)
    output = model(pixel_values=pixels[:, 0], output_hidden_states=True)
    states = output.hidden_states
    prefix = PREFIX[kind]
    assert output.last_hidden_state.shape[1] == prefix + 9
    for layer in (None, *range(-len(states), len(states))):
        expected = output.last_hidden_state if layer is None else states[layer]
        patches = tiny.vision_encoder(kind, layer=layer)
        tokens = tiny.vision_encoder(kind, layer=layer, drop_prefix=False)
        found = patches.encode(pixels)
        assert found.grid == (3, 3)
        assert found.image_mask.all()
        assert torch.equal(found.patches[:, 0], expected[:, prefix:])
        assert torch.equal(tokens.encode(pixels).patches[:, 0], expected)
        assert (patches.shape.num_patches, tokens.shape.num_patches) == (9, 9 + prefix)
        assert patches.shape.dim == expected.shape[-1]


@torch.no_grad()
@pytest.mark.parametrize("kind", CNNS)
@pytest.mark.parametrize("layer", [None, -1, -2])
def test_cells_of_a_map_are_its_patches(kind: str, layer: int | None):
    model = tiny.vision_model(kind)
    pixels = pixels_of(2, 1)
    output = model(pixel_values=pixels[:, 0], output_hidden_states=True)
    expected = output.last_hidden_state if layer is None else output.hidden_states[layer]
    encoder = tiny.vision_encoder(kind, layer=layer)
    found = encoder.encode(pixels)
    assert found.grid == tuple(expected.shape[2:]) == encoder.shape.grid
    assert torch.equal(found.patches[:, 0], expected.flatten(2).transpose(1, 2))


class EveryFourthPixel(nn.Module):
    """A CNN of another library: positional pixels in, a map out, no HF config."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, pixels: Tensor) -> Tensor:
        return pixels[:, :, ::4, ::4] * self.scale


def test_a_map_is_read_row_by_row_and_need_not_be_square():
    encoder = VisionEncoder(EveryFourthPixel(), tiny.preprocess, image_size=(8, 12))
    assert encoder.shape.grid == (2, 3)
    pixels = torch.rand(1, 1, 3, 8, 12)
    found = encoder.encode(pixels).patches[0, 0]
    for index in range(6):
        row, column = divmod(index, 3)
        assert torch.equal(found[index], pixels[0, 0, :, 4 * row, 4 * column])


@pytest.mark.parametrize("kind", ["clip", "dinov2_registers", "convnext"])
def test_patches_are_row_major(kind: str):
    """A change in the top right corner changes the third patch's pixels, not the seventh's."""
    encoder = tiny.vision_encoder(kind, layer=0)
    pixels = pixels_of(1, 1)
    other = pixels.clone()
    other[..., :2, -2:] += 1.0
    change = (encoder.encode(other).patches - encoder.encode(pixels).patches)[0, 0].abs().sum(-1)
    columns = encoder.shape.grid[1]
    assert change.nonzero().flatten().tolist() == [columns - 1]


def test_images_are_encoded_one_by_one(encoder: VisionEncoder):
    pixels = pixels_of(2, 3)
    mask = torch.tensor([[True, True, False], [True, False, False]])
    found = encoder.encode(pixels, mask)
    assert found.patches.shape == (2, 3, 9, 16)
    assert torch.equal(found.image_mask, mask)
    for row in range(2):
        for image in range(3):
            alone = encoder.encode(pixels[row : row + 1, image : image + 1])
            wanted = alone.patches[0, 0] if mask[row, image] else torch.zeros(9, 16)
            torch.testing.assert_close(found.patches[row, image], wanted)


@pytest.mark.parametrize(
    ("kind", "layer", "message"),
    [
        ("clip", 4, "found layer=4; expected -4 to 3: this encoder has 4 hidden states"),
        ("clip", -5, "found layer=-5; expected -4 to 3"),
    ],
)
def test_a_layer_that_is_not_there(kind: str, layer: int, message: str):
    with pytest.raises(ValueError, match=message):
        tiny.vision_encoder(kind, layer=layer)


def test_a_map_without_layers_has_no_choice():
    message = "found layer=-2 for EveryFourthPixel, which has one output; leave layer out"
    with pytest.raises(ValueError, match=message):
        VisionEncoder(EveryFourthPixel(), tiny.preprocess, layer=-2, image_size=(8, 8))


@pytest.mark.parametrize("kind", tiny.VISION)
def test_frozen_stays_frozen(kind: str):
    encoder = tiny.vision_encoder(kind)
    state = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    nn.ModuleList([encoder]).train()
    assert not any(module.training for module in encoder.modules())
    pixels = pixels_of(2, 1).requires_grad_()
    first, second = encoder.encode(pixels), encoder.encode(pixels)
    assert torch.equal(first.patches, second.patches)
    assert not first.patches.requires_grad
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    for name, tensor in encoder.state_dict().items():  # a ResNet's running means, too
        assert torch.equal(tensor, state[name]), name


def test_the_fingerprint_names_weights_layer_and_tokens():
    found = tiny.vision_encoder("clip").fingerprint
    assert tiny.vision_encoder("clip").fingerprint == found
    assert tiny.vision_encoder("clip", dtype=torch.bfloat16).fingerprint == found
    others = [
        tiny.vision_encoder("clip", layer=-2),
        tiny.vision_encoder("clip", drop_prefix=False),
        tiny.vision_encoder("vit"),
    ]
    model = tiny.vision_model("clip")
    with torch.no_grad():
        model.post_layernorm.bias += 0.1
    others.append(VisionEncoder(model, tiny.preprocess, image_size=(SIZE, SIZE)))
    model = tiny.vision_model("resnet")
    changed = tiny.vision_encoder("resnet").fingerprint
    for name, buffer in model.named_buffers():
        if name.endswith("running_mean"):
            buffer += 0.5
    others.append(VisionEncoder(model, tiny.preprocess, image_size=(SIZE, SIZE)))
    fingerprints = [found, changed, *(other.fingerprint for other in others)]
    assert len(set(fingerprints)) == len(fingerprints)


# --- from a folder

_CROP = {"size": {"shortest_edge": SIZE}, "crop_size": {"height": SIZE, "width": SIZE}}
_SQUASH = {"size": {"height": SIZE, "width": SIZE}}


def _two_towers(config: type, model: type, kind: str, text: dict[str, Any]) -> nn.Module:
    vision = tiny.vision_model(kind).config.to_dict()
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2} | text
    return tiny.randomise(model(config(text_config=sizes, vision_config=vision)))


SAVED: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
    "clip": (lambda: tiny.vision_model("clip"), lambda: hf.CLIPImageProcessor(**_CROP)),
    "clip_two_towers": (
        lambda: _two_towers(
            hf.CLIPConfig, hf.CLIPModel, "clip", {"intermediate_size": 24, "vocab_size": 50}
        ),
        lambda: hf.CLIPImageProcessor(**_CROP),
    ),
    "siglip_two_towers": (
        lambda: _two_towers(
            hf.SiglipConfig, hf.SiglipModel, "siglip", {"intermediate_size": 24, "vocab_size": 50}
        ),
        lambda: hf.SiglipImageProcessor(**_SQUASH),
    ),
    "dinov2": (lambda: tiny.vision_model("dinov2"), lambda: hf.BitImageProcessor(**_CROP)),
    "vit": (lambda: tiny.vision_model("vit"), lambda: hf.ViTImageProcessor(**_SQUASH)),
    "resnet": (
        lambda: tiny.vision_model("resnet"),
        lambda: hf.ConvNextImageProcessor(size={"shortest_edge": SIZE}, crop_pct=1.0),
    ),
    "convnext": (
        lambda: tiny.vision_model("convnext"),
        lambda: hf.ConvNextImageProcessor(size={"shortest_edge": SIZE}, crop_pct=1.0),
    ),
}


@pytest.mark.parametrize("kind", SAVED)
def test_a_local_folder_is_loaded(kind: str, tmp_path: Path):
    make_model, make_processor = SAVED[kind]
    model, processor = make_model(), make_processor()
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded = VisionEncoder.load(str(tmp_path), dtype="fp32")
    assert loaded.image_size == (SIZE, SIZE)

    tower = getattr(model, "vision_model", model)
    image = Image.effect_noise((30, 20), 80.0).convert("RGB")
    expected = processor(image, return_tensors="pt")["pixel_values"]
    assert torch.equal(loaded.preprocess(image)[None], expected)
    direct = VisionEncoder(tower, tiny.preprocess, image_size=(SIZE, SIZE))
    found = loaded.encode(expected[None])
    assert torch.equal(found.patches, direct.encode(expected[None]).patches)
    assert VisionEncoder.load(str(tmp_path), dtype="bf16").fingerprint == loaded.fingerprint
    # Loading workers that are spawned receive it so.
    again = pickle.loads(pickle.dumps(loaded.preprocess))
    assert torch.equal(again(image), expected[0])


def test_a_checkpoint_without_needed_weights_is_refused(tmp_path: Path):
    model = tiny.vision_model("vit")
    state = model.state_dict()
    del state["layers.2.mlp.fc1.weight"]
    model.save_pretrained(tmp_path, state_dict=state)
    hf.ViTImageProcessor(**_SQUASH).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"found no layers.2.mlp.fc1.weight at .*3 weights miss"):
        VisionEncoder.load(str(tmp_path))


def test_a_folder_of_something_else_is_refused(tmp_path: Path):
    tiny.causal_lm("llama").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"found a 'llama' config at .*; expected a vision model"):
        VisionEncoder.load(str(tmp_path))


def test_the_default_encoder_squashes_to_its_square():
    preprocess = pickle.loads(pickle.dumps(Rescale(size=6, mean=127.0, scale=128.0)))
    white = preprocess(Image.new("RGB", (20, 10), "white"))
    assert white.shape == (3, 6, 6)
    assert white.unique().tolist() == [1.0]


# --- fast pixels


def clip(dtype: torch.dtype = torch.float32, **options: Any) -> VisionEncoder:
    preprocess = HFPreprocess(hf.CLIPImageProcessor(**_CROP, **options))
    model = tiny.vision_model("clip").to(dtype)
    return VisionEncoder(model, preprocess, image_size=(SIZE, SIZE))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_uint8_pixels_are_normalised_in_fp32(dtype: torch.dtype):
    encoder = clip(dtype)
    assert encoder.fast_preprocess is not None
    pixels = torch.randint(0, 256, (2, 1, 3, SIZE, SIZE), dtype=torch.uint8)
    mean = torch.tensor(encoder.fast_preprocess.mean)[:, None, None]
    std = torch.tensor(encoder.fast_preprocess.std)[:, None, None]
    by_hand = (pixels.float() / 255 - mean) / std
    torch.testing.assert_close(encoder.fast_preprocess.normalise(pixels), by_hand)
    normalised = encoder.fast_preprocess.normalise(pixels).to(dtype)
    found, expected = encoder.encode(pixels).patches, encoder.encode(normalised).patches
    assert found.dtype == dtype and torch.equal(found, expected)
    # Clips, and beside padding, too.
    clips = pixels[:, :, None].expand(2, 1, 3, 3, SIZE, SIZE)
    mask = torch.tensor([[[True, True, False]], [[True, False, False]]])
    found = encoder.encode(clips, frame_mask=mask).patches
    assert torch.equal(found, encoder.encode(normalised[:, :, None].expand_as(clips),
                                             frame_mask=mask).patches)  # fmt: skip


def test_uint8_pixels_of_an_unknown_preprocessing_are_passed_on():
    encoder = tiny.vision_encoder("clip")
    assert encoder.fast_preprocess is None
    pixels = torch.randint(0, 256, (1, 1, 3, SIZE, SIZE), dtype=torch.uint8)
    assert torch.equal(encoder.encode(pixels).patches, encoder.encode(pixels.float()).patches)


def test_a_decoder_is_chosen_by_name():
    encoder, stream = clip(), io.BytesIO()
    Image.effect_noise((30, 20), 80.0).convert("RGB").save(stream, "PNG")
    exact, fast = (encoder.image_decoder(name).pixels(stream.getvalue())
                   for name in ("exact", "fast"))  # fmt: skip
    assert torch.equal(exact, encoder.preprocess(Image.open(stream)))
    assert fast.dtype == torch.uint8
    assert encoder.fast_preprocess is not None
    torch.testing.assert_close(encoder.fast_preprocess.normalise(fast), exact, atol=0.03, rtol=0)
    with pytest.raises(ValueError, match="found preprocess, which cannot be done fast"):
        tiny.vision_encoder("clip").image_decoder("fast")


def test_the_transform_has_a_fingerprint_of_its_own():
    encoder = clip()
    fingerprint = encoder.fingerprint
    found = encoder.transform_fingerprint("fast")
    assert encoder.fingerprint == fingerprint
    assert clip().transform_fingerprint("fast") == found
    bilinear = clip(resample=Image.Resampling.BILINEAR)
    others = [encoder.transform_fingerprint(), bilinear.transform_fingerprint(),
              bilinear.transform_fingerprint("fast")]  # fmt: skip
    assert encoder.transform_fingerprint("exact") == others[0]
    unknown = tiny.vision_encoder("clip")
    others.append(unknown.transform_fingerprint())
    assert len({found, *others}) == 5
    with pytest.raises(ValueError, match="set decode: exact"):
        unknown.transform_fingerprint("fast")


def test_pixels_and_masks_of_another_form_are_refused():
    vision = tiny.vision_encoder()
    with pytest.raises(ValueError, match=r"pixels \(3, 12, 12\); expected"):
        vision.encode(torch.zeros(3, 12, 12))
    clips = torch.zeros(1, 1, 2, 3, 12, 12)
    with pytest.raises(ValueError, match=r"frame_mask of torch.int64; expected bool"):
        vision.encode(clips, frame_mask=torch.ones(1, 1, 2, dtype=torch.long))
