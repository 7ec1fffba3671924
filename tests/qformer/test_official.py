"""Official weights in: every key of the tables, and the same outputs and gradients as HF."""

import json
from pathlib import Path
from typing import Any

import parity
import pytest
import tiny
import tiny_blip2
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from bridges import VisionShape
from bridges.official import rename
from qformer import QFormer
from qformer.key_maps import HF_LEAVES_OUT, key_map
from qformer.objectives import similarity
from qformer.official import load_resampler, read_official
from qformer.official_models import load_blip2, load_official_stage1, load_vision
from qformer.stage1 import Stage1

SHAPE = VisionShape(tiny_blip2.VISION_DIM, 10, (3, 3))


def resampler(**options: Any) -> QFormer:
    sizes: dict[str, Any] = {"num_queries": 5, "dim": 128, "depth": 3, "num_heads": 2, "ff_dim": 96}
    text = {"max_text": tiny_blip2.MAX_TEXT} if "vocab_size" in options else {}
    return QFormer(vision=SHAPE, **({"ln_vision_eps": 1e-6} | sizes | text | options))


@pytest.fixture(scope="session")
def folders(tmp_path_factory) -> dict[str, Path]:
    """HF folders of the three classes."""
    folder = tmp_path_factory.mktemp("hf")
    for name in ("blip2", "instructblip", "retrieval"):
        getattr(tiny_blip2, name)().save_pretrained(folder / name)
    return {path.name: path for path in folder.iterdir()}


@pytest.fixture
def lavis() -> tuple[Any, Stage1, dict[str, Tensor]]:
    """An HF retrieval model whose key bias is zero, our stage 1 with its weights, LAVIS's names."""
    theirs = tiny_blip2.retrieval()
    for layer in theirs.vision_model.encoder.layers:
        layer.self_attn.qkv.bias.data[24:48] = 0
    stage1 = Stage1(resampler(vocab_size=tiny_blip2.VOCABULARY), embed_dim=8)
    tiny.randomise(stage1, seed=1)
    names = [(b, a) for a, b in key_map("blip2", 3)]
    ours = {str(rename(k, names)): t for k, t in theirs.state_dict().items()}
    ours["qformer.queries"] = ours["qformer.queries"][0]
    ours |= {k: t for k, t in stage1.state_dict().items() if k.partition(".")[0] in HF_LEAVES_OUT}
    stage1.load_state_dict({k: t for k, t in ours.items() if not k.startswith("vision.")})
    return theirs, stage1, tiny_blip2.lavis_state(theirs, stage1.lm_head, stage1.temperature)


def saved(folder: Path, state: Any) -> Path:
    torch.save(state, folder / "lavis.pth")
    return folder / "lavis.pth"


# --- the tables


def their_names(ours: nn.Module, form: Any, prefix: str = "") -> dict[str, tuple[int, ...]]:
    """Names and shapes of our weights in the words of another form."""
    found = {}
    for name, tensor in ours.state_dict().items():
        theirs = rename(prefix + name, key_map(form, 12))
        if theirs is not None:
            shape = tuple(tensor.shape)
            found[theirs] = (1, *shape) if theirs == "query_tokens" else shape
    return found


def shapes_of(module: nn.Module, *without: str) -> dict[str, tuple[int, ...]]:
    state = module.state_dict().items()
    return {k: tuple(t.shape) for k, t in state if not k.startswith(without)}


@pytest.mark.parametrize("kind", ["retrieval", "blip2", "instructblip"])
def test_the_tables_cover_the_published_sizes(kind: str):
    """At full size, without its memory: every key and shape of both sides."""
    text_config = hf.OPTConfig(
        hidden_size=2560, ffn_dim=10240, num_hidden_layers=32, num_attention_heads=32
    ).to_dict()
    with torch.device("meta"):
        vocab_size = None if kind == "blip2" else 30523
        qformer = QFormer(vision=VisionShape(1408, 257, (16, 16)), vocab_size=vocab_size)
        if kind == "retrieval":
            config = hf.Blip2Config(
                qformer_config={"vocab_size": 30523, "use_qformer_text_input": True}
            )
            theirs, stage1 = hf.Blip2ForImageTextRetrieval(config), Stage1(qformer)
            names = their_names(stage1, "blip2")
            fresh = {k for k in stage1.state_dict() if k.partition(".")[0] in HF_LEAVES_OUT}
            assert len(names) == len(stage1.state_dict()) - len(fresh)
        else:
            instruct = kind == "instructblip"
            config: Any = (hf.InstructBlipConfig if instruct else hf.Blip2Config)(
                text_config=text_config,
                qformer_config={"vocab_size": 30523} if instruct else None,
            )
            theirs = (
                hf.InstructBlipForConditionalGeneration
                if instruct
                else hf.Blip2ForConditionalGeneration
            )(config)
            names = their_names(qformer, kind, "qformer.")
            names |= their_names(nn.Linear(768, 2560), kind, "projection.")
            assert len(names) == len(qformer.state_dict()) + 2
    # What is left is the frozen encoder and LM, whose keys are HF's own.
    frozen = ("vision_model.embeddings", "vision_model.encoder", "language_model.")
    assert names == shapes_of(theirs, *frozen)


def test_the_tables_name_everything_in_lavis(lavis):
    _, stage1, state = lavis
    names = {rename(k, key_map("lavis", 3)) for k in stage1.state_dict()}
    assert None not in names
    left = {k for k in state if not k.startswith("visual_encoder.")} - names
    assert left == {
        "Qformer.bert.embeddings.position_ids",
        "Qformer.cls.predictions.decoder.weight",
        "Qformer.cls.predictions.bias",
    }


# --- stage 1


def assert_same_gradients(ours: nn.Module, theirs: nn.Module, form: Any, prefix: str) -> None:
    """Of every parameter of ours that the other model has too; at least one of them nonzero."""
    partners = dict(theirs.named_parameters())
    compared = 0
    for name, parameter in ours.named_parameters():
        partner = partners.get(str(rename(prefix + name, key_map(form, 3))))
        if partner is None or partner.grad is None:
            assert parameter.grad is None or not parameter.grad.any(), name
            continue
        if parameter.grad is None:  # text that nobody reads is not computed
            assert not partner.grad.any(), name
            continue
        parity.close(parameter.grad, partner.grad.reshape(parameter.shape), name)
        compared += 1
    assert compared > 40


def assert_same_retrieval(vision: Any, stage1: Stage1, theirs: Any) -> None:
    """ITC and ITM logits, and the gradients of both."""
    text = tiny_blip2.text()
    pixels = tiny_blip2.pixels()
    features = vision.encode(pixels[:, None])
    inputs = {
        "pixel_values": pixels,
        "input_ids": text.input_ids,
        "attention_mask": text.attention_mask.long(),
    }
    itc = similarity(stage1.image_embeddings(features), stage1.text_embeddings(text))
    itm = stage1.match(features, text)
    theirs.requires_grad_(True)
    their_itc = theirs(**inputs).logits_per_image
    their_itm = theirs(**inputs, use_image_text_matching_head=True).logits_per_image
    parity.close(itc, their_itc, "ITC")
    parity.close(itm, their_itm, "ITM")
    weights = torch.tensor([[0.3, -0.7], [0.4, 0.9]])
    stage1.zero_grad()
    theirs.zero_grad()
    ((itc + itm) * weights).sum().backward()
    ((their_itc + their_itm) * weights).sum().backward()
    assert_same_gradients(stage1, theirs, "blip2", "")


def test_retrieval_folder(folders):
    vision = load_vision(folders["retrieval"], dtype="fp32")
    stage1, fresh = load_official_stage1(folders["retrieval"], vision=vision.shape)
    assert {name.partition(".")[0] for name in fresh} == {"lm_head", "temperature"}
    theirs = hf.Blip2ForImageTextRetrieval.from_pretrained(folders["retrieval"])
    assert_same_retrieval(vision, stage1, theirs)


@pytest.mark.parametrize("bare", [False, True])
def test_lavis_file(lavis, tmp_path, bare: bool):
    theirs, original, state = lavis
    path = saved(tmp_path, state if bare else {"model": state, "epoch": 3})
    vision = load_vision(path, num_heads=2, dtype="fp32")
    stage1, fresh = load_official_stage1(path, vision=vision.shape)
    assert fresh == []
    assert stage1.qformer.ln_vision.eps == 1e-5
    stage1.qformer.ln_vision.eps = 1e-6  # HF's, to compare with
    found = stage1.state_dict()
    assert all(torch.equal(found[k], t) for k, t in original.state_dict().items())
    assert_same_retrieval(vision, stage1, theirs)


def test_lavis_without_frozen_weights(lavis, tmp_path):
    _, _, state = lavis
    path = saved(tmp_path, {k: t for k, t in state.items() if not k.startswith("visual_encoder")})
    load_official_stage1(path, vision=SHAPE)
    with pytest.raises(ValueError, match="no vision encoder"):
        load_vision(path)


def test_the_bias_that_lavis_adds_is_taken(lavis, tmp_path):
    _, original, state = lavis
    state["Qformer.cls.predictions.bias"] += 1
    stage1, _ = load_official_stage1(saved(tmp_path, state), vision=SHAPE)
    assert torch.equal(stage1.lm_head.bias, original.lm_head.bias)
    del state["Qformer.cls.predictions.decoder.bias"]
    stage1, _ = load_official_stage1(saved(tmp_path, state), vision=SHAPE)
    assert torch.equal(stage1.lm_head.bias, original.lm_head.bias + 1)


# --- the resampler alone


@pytest.mark.parametrize("text_branch", [False, True])
def test_resampler_from_lavis(lavis, tmp_path, text_branch: bool):
    _, stage1, state = lavis
    options = {"vocab_size": tiny_blip2.VOCABULARY} if text_branch else {}
    qformer = resampler(**options, ln_vision_eps=1e-5)
    left = load_resampler(saved(tmp_path, {"model": state}), qformer)
    expected = stage1.qformer.state_dict()
    assert all(torch.equal(t, expected[k]) for k, t in qformer.state_dict().items())
    assert "visual_encoder.cls_token" in left and "temperature" in left
    assert ("qformer.layers.0.text_ff.up.weight" in left) != text_branch


@pytest.mark.parametrize("stage2", ["opt_proj", "t5_proj", "llm_proj"])
def test_resampler_from_stage_2_of_lavis(lavis, tmp_path, stage2: str):
    _, stage1, state = lavis
    words = (".intermediate.", ".output.dense", ".output.LayerNorm", "embeddings.word", ".cls.")
    text = {k for k in state if any(w in k for w in words) and "attention" not in k}
    text |= {k for k in state if "position_embeddings" in k or k == "temp"}
    text |= {k for k in state if k.startswith(("vision_proj", "text_proj", "itm_head"))}
    state = {k: t for k, t in state.items() if k not in text}
    state |= {f"{stage2}.weight": torch.zeros(9, 128), f"{stage2}.bias": torch.zeros(9)}
    state |= {f"{stage2[:3].rstrip('_')}_model.x": torch.zeros(2)}
    path = saved(tmp_path, state)
    qformer = resampler(ln_vision_eps=1e-5)
    left = qformer.load_pretrained(path) or load_resampler(path, qformer)
    assert torch.equal(qformer.queries, stage1.qformer.queries)
    assert "projection.weight" in left
    with pytest.raises(ValueError, match="no text branch"):
        resampler(vocab_size=tiny_blip2.VOCABULARY, ln_vision_eps=1e-5).load_pretrained(path)
    with pytest.raises(ValueError, match="no stage-1 heads"):
        load_official_stage1(path, vision=SHAPE)


# --- whole models


@pytest.mark.parametrize("kind", ["blip2", "instructblip"])
def test_whole_model(folders, kind: str):
    cls = "Blip2" if kind == "blip2" else "InstructBlip"
    theirs = getattr(hf, f"{cls}ForConditionalGeneration").from_pretrained(folders[kind])
    ours = load_blip2(folders[kind], tokenizer=tiny.make_tokenizer(), dtype="fp32")
    assert_same_model(ours, theirs, kind)


def assert_same_model(ours: Any, theirs: Any, kind: str) -> None:
    """Logits, gradients of the bridge, and tokens written greedily and by beams."""
    instruction = tiny_blip2.text() if kind == "instructblip" else None
    extra = {}
    if instruction is not None:
        extra["qformer_input_ids"] = instruction.input_ids
        extra["qformer_attention_mask"] = instruction.attention_mask.long()
    pixels = tiny_blip2.pixels()
    features = ours.vision.encode(pixels[:, None])
    text = ours.prompt_encoder()(["<image>a", "<image>longer"], padding_side="left")
    soft = ours.bridge(features, instruction).soft_tokens
    theirs.requires_grad_(True)
    their_soft = theirs.get_image_features(pixels, **extra).pooler_output[:, None]
    parity.close(soft, their_soft, "soft tokens")
    weights = torch.randn(soft.shape, generator=torch.Generator().manual_seed(1)) / soft.numel()
    (soft * weights).sum().backward()
    (their_soft * weights).sum().backward()
    bridge = nn.ModuleDict({"qformer": ours.bridge.resampler, "projection": ours.bridge.projection})
    assert_same_gradients(bridge, theirs, kind, "")

    inputs = {"pixel_values": pixels, "input_ids": text.input_ids}
    inputs |= {"attention_mask": text.attention_mask.long()} | extra
    with torch.no_grad():
        logits = theirs(**inputs).logits
        row = ours.bridge(features, instruction)
        hidden = ours.lm.hidden(ours._fill(text.input_ids, row, features), text.attention_mask)
        parity.close(ours.lm.head(hidden)[:, -1], logits[:, -1], "logits")
    for beams in (1, 3):
        options = {"max_new_tokens": 12, "num_beams": beams, "do_sample": False}
        options |= {"suppress_tokens": [ours.lm.image_token_id], "pad_token_id": 0}
        found = ours.generate(text.input_ids, text.attention_mask, features, instruction, **options)
        expected = theirs.generate(**inputs, **options)[:, text.input_ids.shape[1] :]
        assert found.tolist() == expected.tolist()
        assert len(found.unique()) > 2


def test_frozen_ends_are_frozen(folders):
    ours = load_blip2(folders["blip2"], tokenizer=tiny.make_tokenizer())
    names = {n.partition(".")[0] for n, p in ours.named_parameters() if p.requires_grad}
    assert names == {"bridge"}


def test_the_prompt_has_the_order_of_hf(folders):
    tokenizer = tiny.make_tokenizer(bos=True)
    ours = load_blip2(folders["blip2"], tokenizer=tokenizer)
    processor = hf.Blip2Processor(
        ours.vision.preprocess.processor, tiny.make_tokenizer(bos=True), num_query_tokens=5
    )
    picture = tiny.Image.new("RGB", (20, 30))
    expected = processor(text="a b", images=picture)["input_ids"]
    assert ours.prompt_encoder()([f"{ours.prompt}a b"]).input_ids.tolist() == expected


# --- what does not fit


class Bomb:
    """Makes a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return (Path.touch, (self.mark,))


def test_a_pickle_is_not_run(tmp_path):
    path = saved(tmp_path, {"model": Bomb(tmp_path / "run")})
    with pytest.raises(ValueError, match="more than weights"):
        read_official(path)
    assert not (tmp_path / "run").exists()
    (tmp_path / "x.pth").write_bytes(b"no archive")
    with pytest.raises(ValueError, match="more than weights"):
        read_official(tmp_path / "x.pth")
    with pytest.raises(ValueError, match="no state dict"):
        read_official(saved(tmp_path, {"model": [torch.zeros(2)]}))
    with pytest.raises(ValueError, match="nothing at"):
        read_official(tmp_path / "y.pth")


def test_keys_that_do_not_fit_are_named(lavis, tmp_path):
    _, _, state = lavis
    key = "Qformer.bert.encoder.layer.1.output_query.dense.weight"

    def load(**changes: Tensor | None) -> None:
        changed = {k: t for k, t in (state | changes).items() if t is not None}
        load_official_stage1(saved(tmp_path, changed), vision=SHAPE)

    with pytest.raises(ValueError, match=r"Qformer\.bert\.pooler\.dense\.weight.*no BLIP-2"):
        load(**{"Qformer.bert.pooler.dense.weight": torch.zeros(2)})
    with pytest.raises(ValueError, match=r"leftover qformer\.layers\.1\.query_ff\.out\.scale"):
        load(**{key.replace("weight", "scale"): torch.zeros(2)})
    with pytest.raises(ValueError, match=r"no qformer\.layers\.1\.query_ff\.out\.weight"):
        load(**{key: None})
    with pytest.raises(ValueError, match=r"mis-shaped .*out\.weight \(128, 95\) for \(128, 96\)"):
        load(**{key: torch.zeros(128, 95)})
    with pytest.raises(ValueError, match="to be tied"):
        load(**{"Qformer.cls.predictions.decoder.weight": torch.zeros(40, 128)})
    with pytest.raises(ValueError, match=r"cross-attention in layers \[0, 1\]"):
        zero = {k: t for k, t in state.items() if "layer.0.cross" in k}
        more = {k.replace("layer.0", "layer.1"): t for k, t in zero.items()}
        load(**(more | {k: None for k in state if "layer.2.cross" in k}))
    with pytest.raises(ValueError, match="no queries"):
        read_official(saved(tmp_path, {"temp": torch.zeros(())}))


def test_nothing_is_changed_when_something_does_not_fit(lavis, tmp_path):
    _, _, state = lavis
    del state["Qformer.bert.encoder.layer.1.output_query.dense.weight"]
    qformer = resampler(ln_vision_eps=1e-5)
    before = {k: t.clone() for k, t in qformer.state_dict().items()}
    with pytest.raises(ValueError, match="found no"):
        load_resampler(saved(tmp_path, state), qformer)
    assert all(torch.equal(before[k], t) for k, t in qformer.state_dict().items())


def test_other_sizes_are_named(folders):
    with pytest.raises(ValueError, match=r"depth=3 \(not 4\), num_heads=2 \(not 4\)"):
        load_resampler(folders["blip2"], resampler(depth=4, num_heads=4))
    with pytest.warns(UserWarning, match="ln_vision_eps=1e-05"):
        load_resampler(folders["blip2"], resampler(ln_vision_eps=1e-5))


def test_folders_that_are_no_checkpoint(folders, tmp_path):
    with pytest.raises(ValueError, match=r"no config\.json"):
        read_official(tmp_path)
    tiny.causal_lm("opt").config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="found a 'opt' model"):
        read_official(tmp_path)
    config = json.loads((folders["blip2"] / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"no model\.safetensors"):
        read_official(tmp_path)


def test_a_folder_in_parts(folders, tmp_path):
    state = load_file(folders["blip2"] / "model.safetensors")
    (tmp_path / "config.json").write_text((folders["blip2"] / "config.json").read_text())
    keys = sorted(state)
    weight_map = {}
    for part, some in enumerate((keys[::2], keys[1::2])):
        save_file({k: state[k] for k in some}, tmp_path / f"part{part}.safetensors")
        weight_map |= {k: f"part{part}.safetensors" for k in some}
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    found, whole = read_official(tmp_path), read_official(folders["blip2"])
    assert found.state.keys() == whole.state.keys() and found.left == whole.left
    assert all(torch.equal(found.state[k], t) for k, t in whole.state.items())
    save_file(state, tmp_path.parent / "part7.safetensors")
    index.write_text(json.dumps({"weight_map": {"a": "../part7.safetensors"}}))
    with pytest.raises(ValueError, match=r"no part7\.safetensors in"):
        read_official(tmp_path)


def test_frozen_keys_that_do_not_fit_are_named(folders, tmp_path):
    whole = load_file(folders["blip2"] / "model.safetensors")
    (tmp_path / "config.json").write_text((folders["blip2"] / "config.json").read_text())
    key = "language_model.model.decoder.layers.0.fc1.weight"
    norm = "vision_model.encoder.layers.0.layer_norm1.weight"
    more = {"language_model.model.more": torch.zeros(2)}
    less = {k: t for k, t in whole.items() if k != norm}
    for state, name in ((whole | more, "model.more"), (less, norm)):
        save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
        with pytest.raises(ValueError, match=f"found 1 weights .*{name}"):
            load_blip2(tmp_path, tokenizer=tiny.make_tokenizer())
    with pytest.raises(ValueError, match=r"no encoder\.layers\.0\.layer_norm1\.weight"):
        load_vision(tmp_path)
    save_file(whole | {key: torch.zeros(3, 3)}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"found 1 weights .*fc1\.weight"):
        load_blip2(tmp_path, tokenizer=tiny.make_tokenizer())


def test_encoder_decoder_lms_are_refused(folders, tmp_path):
    config = json.loads((folders["blip2"] / "config.json").read_text())
    config["text_config"] = hf.T5Config().to_dict()
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="encoder-decoder 't5'"):
        load_blip2(tmp_path)


def test_another_tokenizer_is_refused(folders):
    tokenizer = tiny.make_tokenizer(image_token=False)
    tokenizer.add_tokens(["<other>"])
    with pytest.raises(ValueError, match="image_token_index=99"):
        load_blip2(folders["blip2"], tokenizer=tokenizer)
