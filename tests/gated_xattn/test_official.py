"""HF's Idefics in: every key, and the same logits, gradients and tokens; where it differs."""

from functools import partial
from pathlib import Path
from typing import Any

import parity
import pytest
import tiny
import tiny_idefics
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from torch import Tensor

from bridges import Condition, LanguageModel, VisionEncoder, VisionLanguageModel, bridge_factory
from bridges.official import rename
from gated_xattn import GatedCrossAttention
from gated_xattn.key_maps import IDEFICS_BLOCKS, block_map
from gated_xattn.official import load_bridge
from gated_xattn.official_models import idefics_bridge, language_config, load_idefics
from perceiver.official import PREFIX, key_map

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "norms": {
        "qk_layer_norms": True,
        "alpha_type": "vector",
        "perceiver_config": {
            "use_resampler": True,
            "resampler_n_latents": 3,
            "resampler_depth": 2,
            "resampler_n_heads": 2,
            "resampler_head_dim": 8,
            "qk_layer_norms_perceiver": True,
        },
    },
    "every": {"cross_layer_interval": 1},
    "tied": {"tie_word_embeddings": True},
    "patches": {"use_resampler": False},
}


@pytest.fixture(scope="session")
def folders(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("idefics")
    for name, changes in VARIANTS.items():
        tiny_idefics.save(tiny_idefics.idefics(**changes), folder / name)
    return {path.name: path for path in folder.iterdir()}


def load_theirs(folder: Path) -> Any:
    theirs = hf.IdeficsForVisionText2Text.from_pretrained(folder)
    return theirs.requires_grad_(True)


def bare_lm(folder: Path) -> Any:
    """The Llama in a folder, without new tokens."""
    llama = hf.LlamaForCausalLM(language_config(hf.AutoConfig.from_pretrained(folder)))
    state = load_file(folder / "model.safetensors")
    llama.load_state_dict({k: state[k] for k in llama.state_dict()})
    return llama


def our_logits(model: VisionLanguageModel, inputs: dict[str, Tensor]) -> Tensor:
    features = model.vision.encode(inputs["pixel_values"], tiny_idefics.image_mask(inputs))
    return model.logits(inputs["input_ids"], inputs["attention_mask"].bool(), features)


def compared(model: VisionLanguageModel, logits: Tensor, inputs: dict[str, Tensor]) -> Tensor:
    """Real columns of text, all columns of the vocabulary but that of the image."""
    words = torch.arange(logits.shape[-1]) != model.lm.image_token_id
    return logits[inputs["attention_mask"].bool()][:, words]


# --- the tables


@pytest.mark.parametrize("norms", [False, True])
def test_the_tables_cover_the_published_sizes(norms: bool):
    """At full size, without its memory: every key and shape of both sides."""
    perceiver = {"use_resampler": True, "qk_layer_norms_perceiver": norms}
    config = hf.IdeficsConfig(
        additional_vocab_size=2,
        cross_layer_interval=4,
        use_resampler=True,
        qk_layer_norms=norms,
        vision_config={"embed_dim": 1280},
        perceiver_config=perceiver,
    )
    from bridges import DecoderShape, VisionShape

    with torch.device("meta"):
        theirs = hf.IdeficsForVisionText2Text(config)
        bridge = bridge_factory(idefics_bridge(config))(
            vision=VisionShape(1280, 257, (16, 16)), decoder=DecoderShape(4096, 32, 32)
        )
    names: dict[str, tuple[int, ...]] = {}
    for name, tensor in bridge.state_dict().items():
        part, _, rest = name.partition(".")
        if part == "resampler":
            theirs_ = rename(rest, key_map("idefics", 6))
            names[f"{PREFIX['idefics']}{theirs_}"] = tuple(tensor.shape)
        elif part == "blocks":
            number = int(rest.partition(".")[0])
            theirs_ = rename(name, block_map("idefics", number))
            names[f"{IDEFICS_BLOCKS}.{number}.{theirs_}"] = tuple(tensor.shape)
        else:
            assert name == "marker"
    ends = ("vision_model.", "layers.", "norm.", "embed_tokens.")
    frozen = ("lm_head.", *(f"model.{name}" for name in ends))
    state = theirs.state_dict().items()
    assert names == {k: tuple(t.shape) for k, t in state if not k.startswith(frozen)}


# --- whole models


@pytest.mark.parametrize("variant", VARIANTS)
def test_outputs_and_gradients(folders, variant: str):
    theirs, model = load_theirs(folders[variant]), load_idefics(folders[variant], dtype="fp32")
    inputs = tiny_idefics.rows([2, 1, 0])
    a = compared(model, our_logits(model, inputs), inputs)
    b = compared(model, theirs(**inputs).logits, inputs)
    parity.close(a, b, "logits")
    weights = torch.randn(a.shape, generator=torch.Generator().manual_seed(1)) / a.numel()
    (a * weights).sum().backward()
    (b * weights).sum().backward()
    partners = tiny_idefics.parameters(theirs)
    trained = dict(model.named_parameters())
    trained = {name: p for name, p in trained.items() if p.requires_grad}
    for name, parameter in trained.items():
        assert parameter.grad is not None
        parity.close(parameter.grad, their_gradient(name, parameter, partners), name)
    blocks = 4 if variant == "every" else 2
    norms = 2 * blocks + 2 * 4 if variant == "norms" else 0
    resampler = 0 if variant == "patches" else 27
    words = 1 if variant == "tied" else 2
    assert len(trained) == 11 * blocks + norms + resampler + 1 + words
    # Not in ours: the image's output row, and the output row of nobody else.
    assert partners["lm_head.additional_fc.weight"].grad is not None


def their_gradient(name: str, ours: Tensor, partners: dict[str, Any]) -> Tensor:
    added = partners["model.embed_tokens.additional_embedding.weight"]
    if name == "bridge.marker":
        return added.grad[[1]]
    if name == "lm.new_tokens.embedding":
        return added.grad[[0, 2]]
    if name == "lm.new_tokens.head":
        return partners["lm_head.additional_fc.weight"].grad[[0, 2]]
    name = name.removeprefix("bridge.")
    if name.startswith("resampler."):
        found = PREFIX["idefics"] + str(rename(name[10:], key_map("idefics", 2)))
    else:
        number = int(name.split(".")[1])
        found = f"{IDEFICS_BLOCKS}.{number}.{rename(name, block_map('idefics', number))}"
    return partners[found].grad.reshape(ours.shape)


@pytest.mark.parametrize("beams", [1, 3])
def test_tokens_written(folders, beams: int):
    theirs, model = load_theirs(folders["norms"]), load_idefics(folders["norms"], dtype="fp32")
    inputs = tiny_idefics.rows([2, 1, 0])
    image = model.lm.image_token_id
    options = {"max_new_tokens": 12, "num_beams": beams, "do_sample": False, "pad_token_id": 0}
    expected = theirs.generate(**inputs, **options, suppress_tokens=[image])
    features = model.vision.encode(inputs["pixel_values"], tiny_idefics.image_mask(inputs))
    mask = inputs["attention_mask"].bool()
    found = model.generate(inputs["input_ids"], mask, features, **options)
    assert found.tolist() == expected[:, mask.shape[1] :].tolist()
    assert len(found.unique()) > 5


def test_prompts_and_pixels_are_those_of_hf(folders):
    model = load_idefics(folders["plain"], dtype="fp32")
    processor = hf.AutoProcessor.from_pretrained(folders["plain"])
    picture = tiny.Image.effect_noise((40, 30), 90).convert("RGB")
    expected = processor(text=[[picture, "ab"]], return_tensors="pt")
    found = model.prompt_encoder()([f"{model.prompt}ab"])
    assert found.input_ids.tolist() == expected["input_ids"].tolist()
    parity.close(model.vision.preprocess(picture), expected["pixel_values"][0, 0], "pixels")


def test_what_is_trained(folders):
    model = load_idefics(folders["plain"])
    trained = {name.split(".")[0] for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"bridge", "lm"}
    names = {name for name, p in model.lm.named_parameters() if p.requires_grad}
    assert names == {"new_tokens.embedding", "new_tokens.head"}
    assert model.lm.new_tokens.ids.tolist() == [99, 101]
    assert type(model.lm.model).__name__ == "LlamaForCausalLM"
    assert type(model.vision.model).__name__ == "CLIPVisionModel"


def test_checkpoints_in_several_files(folders, tmp_path):
    theirs = load_theirs(folders["plain"])
    theirs.save_pretrained(tmp_path, max_shard_size="30KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    model = load_idefics(tmp_path, tokenizer=tiny_idefics.tokenizer(), dtype="fp32")
    expected = load_idefics(folders["plain"], dtype="fp32").trainable_state()
    found = model.trainable_state()
    assert all(torch.equal(t, found[k]) for k, t in expected.items())


def test_buffers_of_older_checkpoints_are_left(folders, tmp_path):
    state = load_file(folders["plain"] / "model.safetensors")
    old = {
        f"{IDEFICS_BLOCKS}.0.cross_attn.rotary_emb.inv_freq": torch.ones(4),
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
        "model.vision_model.embeddings.position_ids": torch.arange(10)[None],
    }
    path = changed(folders["plain"], tmp_path, state | old)
    model = load_idefics(path)
    left = load_bridge(path, model.bridge, model.lm)
    assert left[f"{IDEFICS_BLOCKS}.0.cross_attn.rotary_emb.inv_freq"].startswith("a buffer")


# --- a bridge that starts from a checkpoint, over ends with names of their own


def page_block(name: str) -> str:
    """A block of the page on official weights."""
    page = Path(__file__).parents[2] / "docs" / "official-weights.md"
    text = page.read_text(encoding="utf-8")
    return text.split(f"<!-- test: {name} -->\n```python\n")[1].split("```")[0]


def test_the_page_on_official_weights_runs(folders, tmp_path, monkeypatch, capsys):
    """Its names are those of the published models; here stands a tiny one in their place."""
    (tmp_path / "idefics-9b").symlink_to(folders["norms"])
    tiny.Image.new("RGB", (20, 30), "red").save(tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("bridges.precision.cpu_has_bf16", lambda: False)  # to compare digits
    namespace: dict[str, Any] = {}
    exec(page_block("load-flamingo"), namespace)
    exec(page_block("ends-of-idefics"), namespace)
    assert "'qk_norm': True" in capsys.readouterr().out
    # The YAML that follows: a bridge of its own over the two ends, which starts from the folder.
    config = hf.AutoConfig.from_pretrained("idefics-9b")
    model = VisionLanguageModel.connect(
        VisionEncoder.load("ends/clip", drop_prefix=False, dtype="fp32"),
        LanguageModel.load("ends/llama", dtype="fp32", new_tokens=[tiny_idefics.FAKE]),
        bridge_factory(idefics_bridge(config)),
    )
    model.bridge.load_pretrained("idefics-9b", model.lm)
    inputs = tiny_idefics.rows([1, 2])
    a = compared(model, our_logits(model.eval(), inputs), inputs)
    whole = load_idefics("idefics-9b", dtype="fp32")
    b = compared(whole, our_logits(whole, inputs), inputs)
    parity.close(a, b[:, : a.shape[1]], "logits")  # without <end_of_utterance>, the last token


def test_tokens_that_the_lm_has_not(folders):
    whole = load_idefics(folders["plain"], dtype="fp32")
    bare, words = bare_lm(folders["plain"]), tiny_idefics.tokenizer()
    lm = LanguageModel(bare, words, new_tokens=[tiny_idefics.UTTERANCE])
    left = load_bridge(folders["plain"], whole.bridge, lm)
    assert "lm.new_tokens" in left[f"the token {tiny_idefics.FAKE}"]
    assert left["model.layers.0.mlp.up_proj.weight"].startswith("the frozen LM")
    row = whole.lm.new_tokens.embedding[1]
    assert torch.equal(lm.new_tokens.embedding[0], row)
    bare, words = bare_lm(folders["plain"]), tiny_idefics.tokenizer()
    lm = LanguageModel(bare, words, new_tokens=["<other>"])
    with pytest.warns(UserWarning, match="no token '<other>'"):
        load_bridge(folders["plain"], whole.bridge, lm)


# --- what does not fit


def changed(folder: Path, target: Path, state: dict[str, Tensor], **config: Any) -> Path:
    """A copy of a folder with other weights or another config."""
    target.mkdir(exist_ok=True)
    for file in folder.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    save_file(state, target / "model.safetensors", metadata={"format": "pt"})
    if config:
        described = hf.IdeficsConfig.from_pretrained(folder)
        for name, value in config.items():
            setattr(described, name, value)
        described.save_pretrained(target)
    return target


BLOCK = f"{IDEFICS_BLOCKS}.1"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({f"{BLOCK}.cross_attn.q_proj.weight": None}, r"no blocks\.1\.attn\.q\.weight"),
        ({f"{BLOCK}.extra": torch.zeros(1)}, "extra of gated block 1"),
        ({f"{BLOCK}.mlp.up_proj.weight": torch.zeros(5, 32)}, r"blocks\.1\.ff\.up\.weight"),
        ({"model.perceiver_resampler.latents": None}, "no latents"),
        ({"model.perceiver_resampler.extra": torch.zeros(1)}, r"perceiver_resampler\.extra"),
        ({"model.layers.2.mlp.up_proj.weight": None}, r"layers\.2\.mlp\.up_proj"),
        ({"model.layers.2.extra": torch.zeros(1)}, r"layers\.2\.extra"),
        ({"model.vision_model.extra": torch.zeros(1)}, "extra"),
        ({"model.vision_model.post_layernorm.weight": None}, "post_layernorm"),
        ({"model.embed_tokens.weight": None}, "embed_tokens"),
        ({"extra.weight": torch.zeros(1)}, r"extra\.weight"),
    ],
)
def test_keys_that_do_not_fit_are_named(folders, tmp_path, change, message: str):
    state = load_file(folders["plain"] / "model.safetensors") | change
    path = changed(folders["plain"], tmp_path, {k: t for k, t in state.items() if t is not None})
    with pytest.raises(ValueError, match=message):
        load_idefics(path, dtype="fp32")


def test_nothing_changes_where_something_does_not_fit(folders, tmp_path):
    model = load_idefics(folders["plain"], dtype="fp32")
    before = {k: t.clone() for k, t in model.trainable_state().items()}
    for missing in ("model.perceiver_resampler.latents", f"{BLOCK}.alpha_dense"):
        state = {k: t + 1 for k, t in load_file(folders["plain"] / "model.safetensors").items()}
        state["model.embed_tokens.weight"] -= 1
        del state[missing]
        path = changed(folders["plain"], tmp_path / missing, state)
        with pytest.raises(ValueError, match="expected every weight"):
            load_bridge(path, model.bridge, model.lm)
    assert all(torch.equal(t, before[k]) for k, t in model.trainable_state().items())


def test_configs_that_hf_cannot_run(folders, tmp_path):
    state = load_file(folders["plain"] / "model.safetensors")
    with pytest.raises(ValueError, match="cross_layer_interval=3; expected a divisor"):
        load_idefics(changed(folders["plain"], tmp_path / "a", state, cross_layer_interval=3))
    with pytest.raises(ValueError, match="hidden_act='gelu'"):
        load_idefics(changed(folders["plain"], tmp_path / "b", state, hidden_act="gelu"))
    with pytest.raises(ValueError, match="own tokenizer"):
        load_idefics(folders["plain"], tokenizer=tiny.make_tokenizer(image_token=False))
    with pytest.raises(ValueError, match=r"no config\.json"):
        load_idefics(tmp_path)
    tiny.causal_lm("llama").save_pretrained(tmp_path / "c")
    with pytest.raises(ValueError, match="'llama' model in"):
        load_idefics(tmp_path / "c")


def test_another_lm_is_refused(folders):
    whole = load_idefics(folders["plain"], dtype="fp32")
    other = tiny.causal_lm("llama", seed=1, vocab_size=99, num_hidden_layers=4)
    lm = LanguageModel(other, tiny_idefics.tokenizer())
    with pytest.raises(ValueError, match="differ from the LM's in 99 of 99 rows"):
        load_bridge(folders["plain"], whole.bridge, lm)


# --- where HF's Idefics, OpenFlamingo and we differ, or do not


def test_text_before_any_image_reads_zero_in_all_of_them():
    """Not the average over all images that a softmax over masked scores alone would give."""
    theirs = tiny_idefics.idefics().model.gated_cross_attn_layers[0]
    text, images = torch.randn(1, 4, 32), torch.randn(1, 6, 16)
    blind = torch.full((1, 1, 4, 6), torch.finfo(torch.float32).min)
    options = {"image_hidden_states": images, "image_attention_mask": blind}
    gated = theirs(text, cross_attention_gate=torch.zeros(1, 4), **options)
    without = theirs(text, cross_attention_gate=torch.ones(1, 4), **options)
    average = theirs.cross_attn.v_proj(images).mean(dim=1)
    expected = theirs.act_cross_attn(theirs.alpha_cross_attn) * theirs.cross_attn.o_proj(average)

    def feed_forward(x: Tensor) -> Tensor:
        inner = theirs.mlp(theirs.post_attention_layernorm(x))
        return x + theirs.act_dense(theirs.alpha_dense) * inner

    parity.close(gated, feed_forward(text), "HF, by its cross_attention_gate")
    parity.close(without, feed_forward(text + expected[:, None]), "HF without it")
    ours = GatedCrossAttention(32, 16, num_heads=4, head_dim=8, ff_dim=48)
    tiny.open_gates(ours)
    condition = Condition(
        images.unflatten(1, (2, 3)), torch.ones(1, 2).bool(), torch.full((1, 4), -1)
    )
    plain = text + ours.ff_gate.tanh() * ours.ff(ours.ff_norm(text))
    parity.close(ours(text, condition), plain, "ours")


def test_where_the_blocks_stand(folders):
    """The paper's and IDEFICS' begin before the first LM block, OpenFlamingo's end at the last."""
    model = load_idefics(folders["plain"])
    assert model.bridge.block_indices == [0, 2]
    shapes = {"vision": model.vision.shape, "decoder": model.lm.shape}
    resampler = {"class_path": "bridges.Projector", "init_args": {"layers": 1}}
    make = partial(dict, resampler=resampler, every=2)

    def places(**options: Any) -> list[int]:
        spec = {"class_path": "gated_xattn.GatedXAttn", "init_args": make(**options)}
        return bridge_factory(spec)(**shapes).block_indices

    assert places() == [0, 2]
    assert places(first=1) == [1, 3]


def test_defaults_are_openflamingos_norms_and_gelu():
    block = GatedCrossAttention(32, 16)
    assert isinstance(block.attn_norm, torch.nn.LayerNorm)
    assert isinstance(block.ff.activation, torch.nn.GELU) and block.ff.gate is None
    assert (block.attn.num_heads, block.attn.q.out_features) == (8, 512)


def test_only_cross_attention_has_norms_of_queries_and_keys():
    """So that an Idefics with `qk_layer_norms` still holds a plain Llama."""
    names = list(tiny_idefics.idefics(qk_layer_norms=True).state_dict())
    normed = {name.split(".q_layer_norm")[0] for name in names if ".q_layer_norm" in name}
    assert normed == {f"{IDEFICS_BLOCKS}.{n}.cross_attn" for n in range(2)}


def test_text_after_the_end_of_a_text_reads_nothing_in_hf_only():
    """HF's processor hides images behind EOS; here, packed samples say so by `segments`."""
    import transformers.models.idefics.processing_idefics as processing

    from bridges import image_index

    text = tiny_idefics.tokenizer()
    ids = text(f"{tiny_idefics.IMAGE}ab</s>cd{tiny_idefics.IMAGE}e", add_special_tokens=False)
    row = torch.tensor([ids["input_ids"]])
    latest, _ = processing.image_attention_mask_for_packed_input_ids(row, text, "pt")
    assert latest.tolist() == [[0, 0, 0, 0, -1, -1, 1, 1]]
    images = row == text.convert_tokens_to_ids(tiny_idefics.IMAGE)
    assert image_index(images, 1).tolist() == [[0, 0, 0, 0, 0, 0, 1, 1]]
    segments = torch.tensor([[0, 0, 0, 0, 1, 1, 1, 1]])
    assert image_index(images, 1, segments=segments).tolist() == latest.tolist()
