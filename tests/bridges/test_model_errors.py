"""Bad input to the assembled model: each message says what was found, expected, and the fix."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor

from bridges import (
    Bridge,
    BridgeOutput,
    DecoderShape,
    LanguageModel,
    Projector,
    TextBatch,
    VisionEncoder,
    VisionFeatures,
    VisionLanguageModel,
    VisionShape,
    bridge_factory,
    load,
)
from bridges.run import read_run
from qformer import QFormer


@pytest.fixture
def lm(language_models: Callable[[str], LanguageModel]) -> LanguageModel:
    return language_models("llama")


@pytest.fixture
def vlm(encoder: VisionEncoder, lm: LanguageModel) -> Iterator[VisionLanguageModel]:
    model = VisionLanguageModel.connect(encoder, lm, tiny.factory("qformer"))
    yield model
    model.hooks.remove()


def run(model: VisionLanguageModel, text: TextBatch, features: VisionFeatures) -> Any:
    return model(text.input_ids, text.attention_mask, text.labels, features)


def test_a_vocabulary_without_the_placeholder():
    message = (
        r"found a vocabulary of 99 tokens without '<image>'; expected a placeholder id: call "
        r"bridges.add_image_token\(tokenizer\) first"
    )
    with pytest.raises(ValueError, match=message):
        LanguageModel(tiny.causal_lm("llama"), tiny.make_tokenizer(image_token=False))


def test_an_lm_of_unknown_type():
    lm = tiny.causal_lm("llama")
    lm.config.model_type = "novel"
    with pytest.raises(ValueError, match=r"type 'novel'; expected one of .*SITES\['novel'\] = "):
        LanguageModel(lm, tiny.make_tokenizer())


def test_an_lm_whose_embeddings_are_projected():
    lm = tiny.causal_lm("opt", word_embed_proj_dim=16)
    with pytest.raises(ValueError, match="found token embeddings of width 16 in an LM of width 32"):
        LanguageModel(lm, tiny.make_tokenizer())


def test_features_of_another_encoder(vlm: VisionLanguageModel):
    text, features = tiny.batch_of(vlm, ["<image>"], ["a"])
    wide = VisionFeatures(torch.randn(1, 1, 9, 17), features.image_mask, features.grid)
    message = "found features of width 17; expected 16, .* these features come from another encoder"
    with pytest.raises(ValueError, match=message):
        run(vlm, text, wide)
    with pytest.raises(ValueError, match=message):
        vlm.generate(text.input_ids, text.attention_mask, wide)


def test_another_number_of_patches_than_the_projector_was_built_for(
    encoder: VisionEncoder, lm: LanguageModel
):
    model = VisionLanguageModel.connect(encoder, lm, tiny.factory("mlp"))
    text, _ = tiny.batch_of(model, ["<image>"], ["a"])
    more = VisionFeatures(torch.randn(1, 1, 16, 16), torch.ones(1, 1, dtype=torch.bool), (4, 4))
    with pytest.raises(ValueError, match=r"found 16 patches an image; expected the 9 .*: resize"):
        run(model, text, more)


def test_a_bridge_built_for_another_lm(encoder: VisionEncoder, lm: LanguageModel):
    narrow = tiny.factory("qformer")(vision=encoder.shape, decoder=DecoderShape(24, 3, 4))
    model = VisionLanguageModel(encoder, lm, narrow)
    text, features = tiny.batch_of(model, ["<image>"], ["a"])
    message = "found soft tokens of width 24; expected 32, the LM's: build the bridge with"
    with pytest.raises(ValueError, match=message):
        run(model, text, features)


@pytest.mark.parametrize(
    ("prompts", "counts", "message"),
    [
        (["<image>", "<image><image>"], [1, 1], "row 1: found 6 placeholders for 1 images × 3 tok"),
        (["", "<image>"], [1, 1], "row 0: found 0 placeholders for 1 images × 3 tokens; exp"),
        (["<image>", ""], [0, 0], "row 0: found 3 placeholders for 0 images × 3 tokens; exp"),
    ],
)
def test_placeholders_that_do_not_match_the_images(
    vlm: VisionLanguageModel, prompts: list[str], counts: list[int], message: str
):
    text = vlm.prompt_encoder()(prompts, ["a", "b"])
    with pytest.raises(ValueError, match=message) as caught:
        run(vlm, text, tiny.features_of(vlm, counts))
    assert "build prompts with PromptEncoder" in str(caught.value)


def test_more_placeholders_than_the_context_holds(vlm: VisionLanguageModel):
    prompt = "<image>" * 43  # × 3 tokens = 129 of 128
    text, features = tiny.batch_of(vlm, [prompt], [""])
    message = (
        r"found 130 positions \(3 placeholders an image, text and new tokens\); expected at most "
        "128, the LM's context length: use fewer images, fewer tokens per image or less text"
    )
    with pytest.raises(ValueError, match=message):
        run(vlm, text, features)


def test_new_tokens_that_the_context_cannot_hold(vlm: VisionLanguageModel):
    text, features = tiny.batch_of(vlm, ["<image>"])
    fits = vlm.generate(text.input_ids, text.attention_mask, features, max_new_tokens=125)
    assert fits.shape[1] <= 125
    message = "found 129 positions .*text and new tokens.*; expected at most 128"
    with pytest.raises(ValueError, match=message):
        vlm.generate(text.input_ids, text.attention_mask, features, max_new_tokens=126)


def test_prompts_padded_on_the_right_are_not_continued(vlm: VisionLanguageModel):
    text, features = tiny.batch_of(vlm, ["<image>", "<image>longer"])
    with pytest.raises(ValueError, match=r"found prompts padded on the right; expected .* left"):
        vlm.generate(text.input_ids, text.attention_mask, features)


def test_chunked_prefill(vlm: VisionLanguageModel):
    text, features = tiny.batch_of(vlm, ["<image>"])
    with pytest.raises(ValueError, match=r"found prefill_chunk_size; .* Leave it out"):
        vlm.generate(text.input_ids, text.attention_mask, features, prefill_chunk_size=2)


def test_a_failed_generation_leaves_nothing_behind(encoder: VisionEncoder, lm: LanguageModel):
    model = VisionLanguageModel.connect(encoder, lm, tiny.factory("perceiver_gated"))
    text, features = tiny.batch_of(model, ["<image>"])
    with pytest.raises(ValueError, match="no_such_option"):
        model.generate(text.input_ids, text.attention_mask, features, no_such_option=1)
    assert model.hooks.condition is None
    model.hooks.remove()


def test_a_prompt_without_an_image(encoder: VisionEncoder, lm: LanguageModel):
    with pytest.raises(ValueError, match="found prompt 'A picture of'; expected '<image>' in it"):
        VisionLanguageModel.connect(encoder, lm, tiny.factory("linear"), prompt="A picture of")


class NoTokens(Bridge):
    num_tokens = 0

    def forward(self, vision: VisionFeatures, text: Any = None) -> BridgeOutput:
        return BridgeOutput(vision.patches)


def test_a_bridge_without_placeholders(encoder: VisionEncoder, lm: LanguageModel):
    message = "found num_tokens=0 in NoTokens; expected at least one placeholder an image"
    with pytest.raises(ValueError, match=message):
        VisionLanguageModel(encoder, lm, NoTokens())


def test_gated_blocks_past_the_last_layer(encoder: VisionEncoder, lm: LanguageModel):
    spec = tiny.BRIDGES["perceiver_gated"]
    spec = spec | {"init_args": spec["init_args"] | {"first": 3}}
    with pytest.raises(ValueError, match=r"found first=3 for an LM of 3 layers; .*: lower first"):
        VisionLanguageModel.connect(encoder, lm, bridge_factory(spec))


@pytest.mark.parametrize(
    ("patches", "mask", "grid", "message"),
    [
        (torch.zeros(2, 9, 16), torch.ones(2, 1), (3, 3), r"add the image axis with patches\[:, "),
        (torch.zeros(2, 1, 9, 16), torch.ones(2, 2), (3, 3), r"and image_mask \(2, 2\); expected"),
        (torch.zeros(2, 1, 9, 16), torch.ones(2, 1), (4, 3), "found 9 patches a frame for a 4×3"),
    ],
)
def test_features_of_a_wrong_shape(patches: Tensor, mask: Tensor, grid: Any, message: str):
    with pytest.raises(ValueError, match=message):
        VisionFeatures(patches, mask.bool(), grid)


def test_a_folder_that_is_no_run(tmp_path: Path):
    message = (
        f"found no run.json and no bridge.safetensors in {tmp_path}; expected a run directory: give"
    )
    with pytest.raises(ValueError, match=message):
        load(tmp_path)
    with pytest.raises(ValueError, match=r"found no run\.json and no bridge"):
        load(tmp_path / "not-there")
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(ValueError, match=r"found no bridge\.safetensors in"):
        load(tmp_path)


def test_a_run_of_another_format(tmp_path: Path):
    (tmp_path / "run.json").write_text('{"format": 99}')
    (tmp_path / "bridge.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="format 99 in place of 1"):
        read_run(tmp_path)


def test_weights_of_another_bridge_change_nothing(vlm: VisionLanguageModel):
    before = {name: tensor.clone() for name, tensor in vlm.trainable_state().items()}
    wrong = {name: tensor + 1 for name, tensor in before.items()}
    wrong["bridge.resampler.queries"] = torch.zeros(4, 16)
    message = "in 1 places, first 'bridge.resampler.queries'; expected those of SoftPrefix"
    with pytest.raises(ValueError, match=message):
        vlm.load_trainable_state(wrong)
    with pytest.raises(ValueError, match=r"in 1 places, first 'bridge\.surplus'"):
        vlm.load_trainable_state(before | {"bridge.surplus": torch.zeros(1)})
    for name, tensor in vlm.trainable_state().items():
        assert torch.equal(tensor, before[name])


def _prefix(resampler: dict[str, Any]) -> dict[str, Any]:
    return {"class_path": "bridges.SoftPrefix", "init_args": {"resampler": resampler}}


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"class_path": "bridges.NoSuch"}, "module 'bridges' has no attribute 'NoSuch'"),
        ({"class_path": "no_such_package.Bridge"}, "No module named 'no_such_package'"),
        ({"class_path": "torch.nn.Linear"}, "'torch.nn.Linear' to be a subclass of .*Bridge"),
        ({"class_path": "bridges.Projector"}, "'bridges.Projector' to be a subclass of .*Bridge"),
        ({"class_path": "bridges.SoftPrefix"}, "arguments are required: resampler"),
        (_prefix({"class_path": "bridges.SoftPrefix"}), "to be a subclass of .*Resampler"),
        (
            _prefix({"class_path": "bridges.Projector", "init_args": {"layrs": 2}}),
            "Option 'layrs' is not accepted",
        ),
        (
            _prefix({"class_path": "bridges.Projector", "init_args": {"layers": "two"}}),
            "Expected a <class 'int'>. Got value: two",
        ),
    ],
)
def test_a_bridge_that_cannot_be_built(spec: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=f"(?s)found a bridge that cannot be built: .*{message}"):
        bridge_factory(spec)


def test_sizes_that_do_not_fit():
    shape = VisionShape(16, 9, (3, 3))
    with pytest.raises(ValueError, match="found width 16 for 3 heads; expected a multiple"):
        QFormer(vision=shape, dim=16, num_heads=3, depth=1)
    with pytest.raises(ValueError, match=r"found layers=0; expected 1 \(linear\) or more"):
        Projector(vision=shape, layers=0)
    with pytest.raises(ValueError, match=r"found dim=8 with layers=1, .*: 2"):
        Projector(vision=shape, layers=1, dim=8)
