"""Our models as HF Idefics folders: loaded whole, with equal logits and tokens; or a clear no."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import parity
import pytest
import tiny
import tiny_idefics
import torch
import transformers as hf
from torch import Tensor

from bridges import (
    LanguageModel,
    LanguageSource,
    Projector,
    RunSpec,
    VisionEncoder,
    VisionLanguageModel,
    VisionSource,
    bridge_factory,
    save_run,
)
from bridges.vision import HFPreprocess
from gated_xattn import GatedXAttn
from gated_xattn.official_models import load_idefics
from perceiver import PerceiverResampler
from recipes.export import export_idefics, main

IDEFICS: dict[str, Any] = {
    "every": 2,
    "num_heads": 4,
    "head_dim": 8,
    "ff_mult": 1.5,
    "norm": "rms",
    "norm_eps": 1e-6,
    "feed_forward": "swiglu",
}
PERCEIVER: dict[str, Any] = {
    "num_latents": 3,
    "depth": 2,
    "num_heads": 2,
    "head_dim": 8,
    "activation": "relu",
}


def square() -> HFPreprocess:
    side = tiny.IMAGE_SIZE
    size = {"height": side, "width": side}
    return HFPreprocess(hf.CLIPImageProcessor(size=size, do_center_crop=False))


def llama(**changes: Any) -> Any:
    # Untied: a tied one of random weights writes the same token for ever.
    options = {"num_hidden_layers": 4, "vocab_size": 99, "tie_word_embeddings": False}
    return tiny.randomise(tiny.causal_lm("llama", **(options | changes)), std=0.12)


def model(
    lm: Any = None,
    words: Any = None,
    *,
    preprocess: Any = None,
    new_tokens: tuple[str, ...] = (),
    end_of_chunk: str | None = None,
    resampler: Any = None,
    perceiver: dict[str, Any] | None = None,
    encoder: str = "clip",
    drop_prefix: bool = False,
    **bridge: Any,
) -> VisionLanguageModel:
    side = (tiny.IMAGE_SIZE, tiny.IMAGE_SIZE)
    resampler = resampler or partial(PerceiverResampler, **(PERCEIVER | (perceiver or {})))
    made = VisionLanguageModel.connect(
        VisionEncoder(
            tiny.vision_model(encoder),
            preprocess or tiny.preprocess,
            drop_prefix=drop_prefix,
            image_size=side,
        ),
        LanguageModel(
            lm or llama(),
            words or tiny_idefics.tokenizer(),
            new_tokens=new_tokens,
            end_of_chunk=end_of_chunk,
        ),
        partial(GatedXAttn, resampler=resampler, **(IDEFICS | bridge)),
    ).eval()
    tiny.randomise(made.bridge, seed=2, std=0.12)
    tiny.open_gates(made.bridge)
    return made


def load_theirs(folder: Path) -> Any:
    loaded: Any = hf.IdeficsForVisionText2Text.from_pretrained(folder, output_loading_info=True)
    theirs, report = loaded
    assert not any(report.values()), report
    return theirs


def inputs_of(ours: VisionLanguageModel, prompts: list[str]) -> dict[str, Tensor]:
    """HF's inputs for prompts in our tokens: each token reads its latest image."""
    text = ours.prompt_encoder()(prompts, padding_side="left")
    counts = [prompt.count(ours.lm.image_token) for prompt in prompts]
    most = max(1, *counts)
    latest = (text.input_ids == ours.lm.image_token_id).cumsum(dim=1) - 1
    generator = torch.Generator().manual_seed(0)
    side = tiny.IMAGE_SIZE
    return {
        "input_ids": text.input_ids,
        "attention_mask": text.attention_mask.long(),
        "pixel_values": torch.randn(len(prompts), most, 3, side, side, generator=generator),
        "image_attention_mask": (latest[..., None] == torch.arange(most)).long(),
    }


PROMPTS = ["ab<image>cd<image>efg", "<image>h", "ijk"]


def assert_same(ours: VisionLanguageModel, theirs: Any, image_column: bool = False) -> None:
    """Logits, but for the image's, and tokens written."""
    inputs = inputs_of(ours, PROMPTS)
    real = inputs["attention_mask"].bool()
    counts = (inputs["input_ids"] == ours.lm.image_token_id).sum(dim=1)
    images = torch.arange(inputs["pixel_values"].shape[1]) < counts[:, None]
    features = ours.vision.encode(inputs["pixel_values"], images)
    with torch.no_grad():
        a = ours.logits(inputs["input_ids"], real, features)[real]
        b = theirs(**inputs).logits[real]
    image = ours.lm.image_token_id
    for written in (b.argmax(dim=-1), a.argmax(dim=-1)):
        assert image_column or image not in written
    if image < a.shape[1] and not image_column:
        a, b = (torch.cat([x[:, :image], x[:, image + 1 :]], dim=1) for x in (a, b))
    parity.close(a, b[:, : a.shape[1]], "logits")
    options = {"max_new_tokens": 10, "do_sample": False, "pad_token_id": 0}
    found = ours.generate(inputs["input_ids"], real, features, **options)
    expected = theirs.generate(**inputs, **options)[:, real.shape[1] :]
    assert found.tolist() == expected.tolist()
    assert len(found.unique()) > 1


VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "new tokens": {"new_tokens": (tiny_idefics.FAKE,), "end_of_chunk": tiny_idefics.UTTERANCE},
    "norms": {"qk_norm": True, "gate": "channel", "perceiver": {"qk_norm": True}},
    "every": {"every": 1},
    "one": {"every": 4},
    "grouped": {"perceiver": {"num_kv_heads": 1}},
    "patches": {"resampler": partial(Projector, layers=1)},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_round_trip(tmp_path, variant: str):
    ours = model(**VARIANTS[variant])
    export_idefics(ours, tmp_path / "out")
    assert_same(ours, load_theirs(tmp_path / "out"))
    again = load_idefics(tmp_path / "out", tokenizer=tiny_idefics.tokenizer(), dtype="fp32")
    inputs = inputs_of(ours, PROMPTS)
    real, features = inputs["attention_mask"].bool(), tiny.features_of(ours, [2, 1, 0])
    known = slice(0, 99)
    with torch.no_grad():
        a = ours.logits(inputs["input_ids"], real, features)[real][:, known]
        b = again.logits(inputs["input_ids"], real, features)[real][:, known]
    parity.close(a, b, "back again")


@pytest.mark.parametrize(
    "changes",
    [
        {"num_key_value_heads": 4},
        {"num_key_value_heads": 1},
        {"tie_word_embeddings": True},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 500.0, "factor": 2.0}},
    ],
    ids=["ungrouped", "one head of keys", "tied", "theta", "linear"],
)
def test_llamas(tmp_path, changes: dict[str, Any]):
    ours = model(llama(**changes))
    export_idefics(ours, tmp_path / "out")
    assert_same(ours, load_theirs(tmp_path / "out"))


def test_an_image_inside_the_vocabulary(tmp_path):
    """Rows of padding, which many LMs have, take the tokens in; the image keeps its output row."""
    ours = model(llama(vocab_size=110), new_tokens=(tiny_idefics.FAKE,))
    export_idefics(ours, tmp_path / "out")
    theirs = load_theirs(tmp_path / "out")
    assert theirs.config.additional_vocab_size == 0
    assert_same(ours, theirs, image_column=True)
    again = load_idefics(tmp_path / "out", tokenizer=tiny_idefics.tokenizer(), dtype="fp32")
    parity.close(again.bridge.marker, ours.bridge.marker, "marker")
    assert again.lm.new_tokens is None


def test_the_frozen_ends_stay_as_they_were(tmp_path):
    ours = model(new_tokens=(tiny_idefics.FAKE,))
    before = [tensor.clone() for tensor in ours.state_dict().values()]
    export_idefics(ours, tmp_path / "out")
    after = ours.state_dict().values()
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_the_processor_goes_along_where_it_fits(tmp_path):
    ours = model(new_tokens=(tiny_idefics.FAKE,), preprocess=square())
    export_idefics(ours, tmp_path / "a")
    processor = hf.AutoProcessor.from_pretrained(tmp_path / "a")
    picture = tiny.Image.effect_noise((40, 30), 90).convert("RGB")
    found = processor(text=[[picture, "ab"]], return_tensors="pt")
    parity.close(ours.vision.preprocess(picture), found["pixel_values"][0, 0], "pixels")
    again = load_idefics(tmp_path / "a", dtype="fp32")
    assert again.prompt == f"<s>{tiny_idefics.FAKE}<image>{tiny_idefics.FAKE}"
    assert again.vision.fingerprint.split("-")[1] == ours.vision.fingerprint.split("-")[1]
    for name, other in (("b", model(words=tiny.make_tokenizer())), ("c", model())):
        export_idefics(other, tmp_path / name)
        files = {file.name for file in (tmp_path / name).iterdir()}
        assert "tokenizer.json" in files
        assert not files & {"processor_config.json", "preprocessor_config.json"}


def test_what_is_written_ends_where_it_was_trained_to_end(tmp_path):
    ours = model(end_of_chunk=tiny_idefics.UTTERANCE)
    export_idefics(ours, tmp_path / "out")
    described = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert described["eos_token_id"] == [2, 101]
    assert described["suppress_tokens"] == [ours.lm.image_token_id]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"encoder": "vit"}, "found a ViTModel"),
        ({"drop_prefix": True}, "drop_prefix: false"),
        ({"first": 1}, r"blocks at \[1, 3\] \(first: 0"),
        ({"every": 3}, r"every=3 for 4 LM blocks \(a divisor"),
        ({"num_heads": 2, "head_dim": 16}, r"\(num_heads: 4.*\(head_dim: 8"),
        ({"norm": "layer"}, "norm: rms"),
        ({"norm_eps": 1e-5}, "norm_eps: 1e-06"),
        ({"feed_forward": "gelu"}, "feed_forward: swiglu"),
        ({"ff_mult": 2.0}, r"width 64 \(ff_mult: 1\.5, the LM's 48"),
        ({"gate": "none"}, "gate: scalar or channel"),
        ({"perceiver": {"activation": "gelu"}}, "activation: relu"),
        ({"perceiver": {"activation": "swiglu"}}, "activation: relu"),
        ({"perceiver": {"norm": "rms"}}, "norm: layer"),
        ({"perceiver": {"norm_eps": 1e-6}}, r"norm_eps: 1\.0e-5"),
        ({"perceiver": {"num_frames": 4}}, "num_frames: 0"),
        ({"perceiver": {"dim": 24}}, "dim: null"),
        ({"perceiver": {"ff_mult": 2}}, "ff_mult: 4"),
        ({"resampler": partial(Projector, layers=2)}, "found a Projector as resampler"),
    ],
)
def test_what_has_no_place_is_named(tmp_path, options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        export_idefics(model(**options), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("lm", "message"),
    [
        (partial(tiny.causal_lm, "gpt2"), "'gpt2' LM; expected a Llama"),
        (partial(llama, attention_bias=True), "biases in its attention"),
        (partial(llama, mlp_bias=True), "biases in its feed-forward"),
        (partial(llama, head_dim=16), "heads of width 16, not 8"),
        (partial(llama, hidden_act="gelu"), "over an LM with silu"),
    ],
)
def test_lms_that_have_no_place_are_named(tmp_path, lm, message: str):
    with pytest.raises(ValueError, match=message):
        export_idefics(model(lm()), tmp_path / "out")


def test_lora_and_other_bridges_have_no_place(tmp_path):
    pytest.importorskip("peft")
    from bridges import LoRA

    ours = model()
    ours.lm = LanguageModel(llama(), tiny_idefics.tokenizer(), lora=LoRA(targets=["q_proj"]))
    with pytest.raises(ValueError, match="LoRA"):
        export_idefics(ours, tmp_path / "out")
    prefix = VisionLanguageModel.connect(
        tiny.vision_encoder(drop_prefix=False), tiny.language_model(), tiny.factory("perceiver")
    )
    with pytest.raises(ValueError, match="found a SoftPrefix"):
        export_idefics(prefix, tmp_path / "out")


def test_a_view_of_all_images_warns(tmp_path):
    with pytest.warns(UserWarning, match="visible='all'"):
        export_idefics(model(visible="all"), tmp_path / "out")


def test_a_folder_with_files_is_refused(tmp_path):
    (tmp_path / "x").write_text("mine")
    with pytest.raises(ValueError, match="found files at"):
        export_idefics(model(), tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["x"]


def test_command_on_a_run(tmp_path, capsys):
    tiny.vision_model().save_pretrained(tmp_path / "clip")
    square().processor.save_pretrained(tmp_path / "clip")
    llama().save_pretrained(tmp_path / "llama")
    tiny_idefics.tokenizer().save_pretrained(tmp_path / "llama")
    perceiver = {"class_path": "perceiver.PerceiverResampler", "init_args": PERCEIVER}
    bridge = {
        "class_path": "gated_xattn.GatedXAttn",
        "init_args": {"resampler": perceiver, **IDEFICS},
    }
    vision = VisionSource(str(tmp_path / "clip"), drop_prefix=False, dtype="fp32")
    lm = LanguageSource(str(tmp_path / "llama"), dtype="fp32", new_tokens=[tiny_idefics.FAKE])
    ours = VisionLanguageModel.connect(
        VisionEncoder.load(**vars(vision)), LanguageModel.load(**vars(lm)), bridge_factory(bridge)
    )
    tiny.open_gates(ours.bridge)
    save_run(tmp_path / "run", ours, RunSpec(vision, lm, bridge))
    main(["--run", str(tmp_path / "run"), "--out", str(tmp_path / "out")])
    assert "IdeficsForVisionText2Text" in capsys.readouterr().out
    theirs = load_theirs(tmp_path / "out")
    assert torch.equal(theirs.model.perceiver_resampler.latents, ours.bridge.resampler.latents)
