"""A trained bridge on disk: only itself, back again, and only between its own two ends."""

from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import torch
from safetensors import safe_open

from bridges import (
    LanguageModel,
    LanguageSource,
    LoRA,
    RunSpec,
    VisionEncoder,
    VisionLanguageModel,
    VisionSource,
    load,
    save_run,
)

PROMPT = "<image>A picture of"


def spec_of(kind: str, **lm) -> RunSpec:
    return RunSpec(
        VisionSource("tiny-clip"), LanguageSource("tiny-lm", **lm), tiny.BRIDGES[kind], PROMPT
    )


def logits_of(model: VisionLanguageModel) -> torch.Tensor:
    text, features = tiny.batch_of(model, [PROMPT, f"{PROMPT} x<image>"])
    with torch.no_grad():
        return model.logits(text.input_ids, text.attention_mask, features)


def test_a_run_comes_back_as_it_was(open_vlm: VisionLanguageModel, kind: str, tmp_path: Path):
    expected = logits_of(open_vlm)
    save_run(tmp_path, open_vlm, spec_of(kind))
    open_vlm.hooks.remove()
    with safe_open(tmp_path / "bridge.safetensors", "pt") as file:
        assert set(file.keys()) == {f"bridge.{name}" for name in open_vlm.bridge.state_dict()}
    assert {p.name for p in tmp_path.iterdir()} == {"bridge.safetensors", "run.json"}

    torch.manual_seed(1)  # the loaded weights must not be luck
    loaded = load(tmp_path, vision=open_vlm.vision, lm=open_vlm.lm)
    assert loaded.prompt == PROMPT
    assert not loaded.training
    try:
        assert torch.equal(logits_of(loaded), expected)
    finally:
        loaded.hooks.remove()


@pytest.fixture
def run(
    tmp_path: Path, encoder: VisionEncoder, language_models: Callable[[str], LanguageModel]
) -> Path:
    lm = language_models("llama")
    model = VisionLanguageModel.connect(encoder, lm, tiny.factory("perceiver_gated"))
    model.hooks.remove()
    save_run(tmp_path, model, spec_of("perceiver_gated"))
    return tmp_path


def test_ends_are_loaded_by_the_names_in_the_run(
    run: Path,
    monkeypatch: pytest.MonkeyPatch,
    encoder: VisionEncoder,
    language_models: Callable[[str], LanguageModel],
):
    asked = {}
    monkeypatch.setattr(VisionEncoder, "load", lambda **kwargs: asked.update(v=kwargs) or encoder)
    monkeypatch.setattr(
        LanguageModel, "load", lambda **kwargs: asked.update(l=kwargs) or language_models("llama")
    )
    load(run).hooks.remove()
    assert asked["v"]["name"] == "tiny-clip"
    assert asked["l"]["name"] == "tiny-lm"


def test_another_encoder_is_refused(run: Path, language_models: Callable[[str], LanguageModel]):
    lm = language_models("llama")
    for other in (tiny.vision_encoder("siglip"), tiny.vision_encoder("clip", layer=-2)):
        with pytest.raises(ValueError) as caught:
            load(run, vision=other, lm=lm)
        message = str(caught.value)
        assert message.startswith(f"found a vision encoder with fingerprint {other.fingerprint};")
        assert f"{run} was trained with" in message
        assert "load the same weights" in message


def test_another_lm_is_refused(run: Path, encoder: VisionEncoder):
    for other in (tiny.language_model("qwen2"), LanguageModel(
        tiny.causal_lm("llama", seed=1), tiny.make_tokenizer()
    )):  # fmt: skip
        with pytest.raises(ValueError, match="found a language model with fingerprint"):
            load(run, vision=encoder, lm=other)


def test_changed_weights_are_refused(run: Path, encoder: VisionEncoder):
    changed = tiny.causal_lm("llama")
    with torch.no_grad():
        changed.model.layers[2].mlp.up_proj.weight *= 1.1
    with pytest.raises(ValueError, match="found a language model with fingerprint"):
        load(run, vision=encoder, lm=LanguageModel(changed, tiny.make_tokenizer()))
    model = tiny.vision_model("clip")
    with torch.no_grad():
        next(model.parameters()).mul_(1.1)
    size = (tiny.IMAGE_SIZE, tiny.IMAGE_SIZE)
    other = VisionEncoder(model, tiny.preprocess, image_size=size)
    with pytest.raises(ValueError, match="found a vision encoder with fingerprint"):
        load(run, vision=other, lm=tiny.language_model("llama"))


def test_the_same_lm_in_bf16_is_accepted(run: Path, encoder: VisionEncoder):
    lm = tiny.language_model("llama", dtype=torch.bfloat16)
    load(run, vision=encoder, lm=lm).hooks.remove()


def test_lora_weights_belong_to_the_run(encoder: VisionEncoder, tmp_path: Path):
    lora = LoRA(r=2, targets=["q_proj", "v_proj"])
    lm = tiny.language_model("llama", lora=lora)
    bare = tiny.language_model("llama")
    assert lm.fingerprint == bare.fingerprint
    model = VisionLanguageModel.connect(encoder, lm, tiny.factory("perceiver_gated"))
    trained = lm.trainable_state()
    assert len(trained) == 2 * 2 * lm.shape.num_layers
    text, features = tiny.batch_of(model, [PROMPT], ["a cat"])
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):  # B starts at zero, so A learns from the second step on
        optimizer.zero_grad()
        model(text.input_ids, text.attention_mask, text.labels, features).loss.backward()
        optimizer.step()
    assert all(parameter.grad.any() for parameter in trained.values())
    assert not any(p.grad is not None for n, p in lm.named_parameters() if "lora_" not in n)

    expected = logits_of(model)
    save_run(tmp_path, model, spec_of("perceiver_gated", lora=lora))
    with safe_open(tmp_path / "bridge.safetensors", "pt") as file:
        in_lm = {name for name in file.keys() if name.startswith("lm.")}  # noqa: SIM118
    assert in_lm == {f"lm.{name}" for name in trained}

    fresh = tiny.language_model("llama", lora=lora)
    loaded = load(tmp_path, vision=encoder, lm=fresh)
    assert torch.equal(logits_of(loaded), expected)
    with pytest.raises(ValueError, match="found weights that do not fit this bridge"):
        load(tmp_path, vision=encoder, lm=bare)
