"""Our models out: HF folders that `from_pretrained` loads whole, with the same outputs."""

from functools import partial
from pathlib import Path
from typing import Any

import parity
import pytest
import tiny
import tiny_blip2
import torch
import transformers as hf
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from bridges import (
    LanguageModel,
    Projector,
    SoftPrefix,
    VisionEncoder,
    VisionLanguageModel,
    caption,
)
from bridges.build import bridge_factory
from bridges.language import LoRA
from bridges.run import LanguageSource, RunSpec, VisionSource, save_run
from gated_xattn import GatedXAttn
from qformer import QFormer
from qformer.hf_export import export_blip2, export_retrieval
from qformer.objectives import similarity
from qformer.official import load_resampler
from qformer.official_models import load_blip2, load_official_stage1, load_vision
from qformer.runs import Stage1Spec, save_stage1
from qformer.stage1 import Stage1
from recipes.export import main

SIZES: dict[str, Any] = {"num_queries": 5, "dim": 128, "depth": 3, "num_heads": 2, "ff_dim": 96}
EPS: dict[str, Any] = {"ln_vision_eps": 1e-6}
TEXT: dict[str, Any] = {"vocab_size": tiny_blip2.VOCABULARY, "max_text": tiny_blip2.MAX_TEXT}


class Processed:
    """A preprocessing that has HF's image processor in it, as `VisionEncoder.load` makes it."""

    def __init__(self) -> None:
        side = {"height": tiny.IMAGE_SIZE, "width": tiny.IMAGE_SIZE}
        self.processor = hf.BlipImageProcessor(size=side)

    def __call__(self, image):
        return self.processor(image, return_tensors="pt")["pixel_values"][0]


def encoder(kind: str = "blip2", **options: Any) -> VisionEncoder:
    model = getattr(tiny_blip2, kind)().vision_model
    size = (tiny.IMAGE_SIZE, tiny.IMAGE_SIZE)
    chosen = {"layer": -1, "drop_prefix": False} | options
    return VisionEncoder(model, Processed(), image_size=size, **chosen)


def whole(
    *,
    family: str = "opt",
    vision: VisionEncoder | None = None,
    lm: dict[str, Any] | None = None,
    rows: int = tiny.VOCABULARY,
    prefix: dict[str, Any] | None = None,
    **options: Any,
) -> VisionLanguageModel:
    language = tiny.randomise(tiny.causal_lm(family, vocab_size=rows), seed=3, std=0.3)
    resampler = partial(QFormer, **SIZES, **(EPS | options))
    model = VisionLanguageModel.connect(
        vision or encoder(),
        LanguageModel(language, tiny.make_tokenizer(), **(lm or {})),
        partial(SoftPrefix, resampler=resampler, **(prefix or {})),
    )
    tiny.randomise(model.bridge, seed=5, std=tiny_blip2.STD)
    return model


def stage1_of(vision: VisionEncoder, **options: Any) -> Stage1:
    stage1 = Stage1(QFormer(vision=vision.shape, **SIZES, **(TEXT | EPS | options)), embed_dim=8)
    tiny.randomise(stage1, seed=5, std=tiny_blip2.STD)
    return stage1


def loaded(cls: Any, folder: Path) -> Any:
    """From the folder alone, without one key missing or left over."""
    model, report = cls.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    return model.eval()


CLASSES = {
    "blip2": hf.Blip2ForConditionalGeneration,
    "instructblip": hf.InstructBlipForConditionalGeneration,
}


def assert_same_generation(ours: VisionLanguageModel, theirs: Any, kind: str) -> None:
    instruction = tiny_blip2.text() if kind == "instructblip" else None
    pixels = tiny_blip2.pixels()
    features = ours.vision.encode(pixels[:, None])
    text = ours.prompt_encoder()(["<image>a", "<image>longer"], padding_side="left")
    inputs = {"pixel_values": pixels, "input_ids": text.input_ids}
    inputs["attention_mask"] = text.attention_mask.long()
    if instruction is not None:
        inputs["qformer_input_ids"] = instruction.input_ids
        inputs["qformer_attention_mask"] = instruction.attention_mask.long()
    soft = ours.bridge(features, instruction).soft_tokens[:, 0]
    images = {k: v for k, v in inputs.items() if k in ("pixel_values", "qformer_input_ids")}
    images |= {k: v for k, v in inputs.items() if k == "qformer_attention_mask"}
    parity.close(soft, theirs.get_image_features(**images).pooler_output, "soft tokens")
    for beams in (1, 3):
        options = {"max_new_tokens": 12, "num_beams": beams, "do_sample": False}
        options |= {"pad_token_id": 0}
        # Ours never writes the placeholder.
        rest = {"suppress_tokens": [ours.lm.image_token_id]}
        found = ours.generate(text.input_ids, text.attention_mask, features, instruction, **options)
        expected = theirs.generate(**inputs, **options, **rest)[:, text.input_ids.shape[1] :]
        assert found.tolist() == expected.tolist()
        assert len(found.unique()) > 2


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize("family", ["opt", "llama"])  # embeddings tied and not, norms of both kinds
@torch.no_grad()
def test_generation_folder(tmp_path, kind: str, family: str):
    ours = whole(family=family, vision=encoder(kind), **(TEXT if kind == "instructblip" else {}))
    ours.lm.model.config.eos_token_id = 7  # the tokenizer's, with which captions end, counts
    export_blip2(ours, tmp_path / "out")
    theirs = loaded(CLASSES[kind], tmp_path / "out")
    assert theirs.config.text_config.eos_token_id == ours.lm.tokenizer.eos_token_id
    assert_same_generation(ours, theirs, kind)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]

    back = load_blip2(tmp_path / "out", tokenizer=tiny.make_tokenizer(), dtype="fp32")
    state = back.bridge.state_dict()
    assert all(torch.equal(state[k], t) for k, t in ours.bridge.state_dict().items())
    pixels = tiny_blip2.pixels()[:, None]
    assert torch.equal(back.vision.encode(pixels).patches, ours.vision.encode(pixels).patches)


@torch.no_grad()
def test_the_placeholder_gets_a_row_where_the_lm_has_none(tmp_path):
    ours = whole(rows=99)  # <image> is number 99
    export_blip2(ours, tmp_path / "out")
    theirs = loaded(CLASSES["blip2"], tmp_path / "out")
    embedding = theirs.get_input_embeddings().weight
    assert embedding.shape[0] == theirs.config.text_config.vocab_size == 100
    assert torch.allclose(embedding[99], embedding[:99].mean(dim=0))
    assert_same_generation(ours, theirs, "blip2")


def test_processor_goes_along(tmp_path):
    export_blip2(whole(), tmp_path / "out")
    processor = hf.AutoProcessor.from_pretrained(tmp_path / "out")
    picture = tiny.Image.new("RGB", (20, 30), "red")
    inputs = processor(text="a b", images=picture, return_tensors="pt")
    model = load_blip2(tmp_path / "out")
    assert inputs.input_ids.tolist() == model.prompt_encoder()(["<image>a b"]).input_ids.tolist()
    assert torch.equal(inputs.pixel_values[0], model.vision.preprocess(picture))


def bert_tokenizer(folder: Path) -> str:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "what", "is", "this"]
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = {f"{n}_token": f"[{n.upper()}]" for n in ("pad", "unk", "cls", "sep")}
    hf.PreTrainedTokenizerFast(tokenizer_object=core, **names).save_pretrained(folder)
    return str(folder)


def test_both_processors_of_instructblip_go_along(tmp_path):
    tokenizer = bert_tokenizer(tmp_path / "bert")
    ours = whole(vision=encoder("instructblip"), tokenizer=tokenizer, max_text=16)
    export_blip2(ours, tmp_path / "out")
    processor = hf.AutoProcessor.from_pretrained(tmp_path / "out")
    picture = tiny.Image.new("RGB", (20, 30), "red")
    inputs = processor(text="what is this", images=picture, return_tensors="pt")
    assert inputs.qformer_input_ids.tolist() == [[2, 4, 5, 6, 3]]

    back = load_blip2(tmp_path / "out", dtype="fp32")
    assert back.bridge.resampler.tokenizer("what")["input_ids"] == [2, 4, 3]
    questions = ["what is this"]
    text = back.prompt_encoder()([back.prompt], questions=questions)
    assert text.input_ids.tolist() == inputs.input_ids.tolist()
    export_blip2(back, tmp_path / "again")  # with {question} in its prompt
    theirs = loaded(CLASSES["instructblip"], tmp_path / "again")
    options = {"max_new_tokens": 6, "do_sample": False}
    expected = theirs.generate(**inputs, **options)[0, text.input_ids.shape[1] :]
    expected = back.lm.tokenizer.decode(expected, skip_special_tokens=True)
    assert caption(back, [picture], question=questions[0], **options) == [expected.strip()]


@torch.no_grad()
def test_retrieval_folder(tmp_path):
    vision = encoder()
    ours = stage1_of(vision)
    left = export_retrieval(vision, ours, tmp_path / "out")
    assert {name.partition(".")[0] for name in left} == {"lm_head", "temperature"}
    theirs = loaded(hf.Blip2ForImageTextRetrieval, tmp_path / "out")
    text, pixels = tiny_blip2.text(), tiny_blip2.pixels()
    features = vision.encode(pixels[:, None])
    inputs: dict[str, Any] = {"pixel_values": pixels, "input_ids": text.input_ids}
    inputs["attention_mask"] = text.attention_mask.long()
    itc = similarity(ours.image_embeddings(features), ours.text_embeddings(text))
    parity.close(itc, theirs(**inputs).logits_per_image, "ITC")
    itm = theirs(**inputs, use_image_text_matching_head=True).logits_per_image
    parity.close(ours.match(features, text), itm, "ITM")

    again = load_vision(tmp_path / "out", dtype="fp32")
    assert torch.equal(again.encode(pixels[:, None]).patches, features.patches)
    back, fresh = load_official_stage1(tmp_path / "out", vision=again.shape)
    assert fresh == list(left)
    state = back.state_dict()
    assert all(torch.equal(state[k], t) for k, t in ours.state_dict().items() if k not in left)
    # Its queries and their branch can start a stage 2.
    qformer = QFormer(vision=vision.shape, **SIZES, **EPS)
    load_resampler(tmp_path / "out", qformer)
    assert torch.equal(qformer.queries, ours.qformer.queries)


# --- what HF has no place for


def test_other_encoders_are_refused(tmp_path):
    vision = tiny.vision_encoder("clip")
    with pytest.raises(ValueError, match="found a CLIPVisionModel as vision encoder"):
        export_retrieval(vision, stage1_of(vision), tmp_path / "out")
    with pytest.raises(ValueError, match="found a CLIPVisionModel as vision encoder"):
        export_blip2(whole(vision=vision), tmp_path / "out")
    for options in ({"layer": -2}, {"drop_prefix": True}, {"layer": None}):
        vision = encoder(**options)
        with pytest.raises(ValueError, match="expected layer=-1"):
            export_retrieval(vision, stage1_of(vision), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_other_bridges_are_refused(tmp_path):
    vision, lm = encoder(), tiny.language_model("opt")
    gated = partial(GatedXAttn, resampler=partial(QFormer, **SIZES), every=2, num_heads=2)
    for factory in (gated, partial(SoftPrefix, resampler=partial(Projector, layers=1))):
        model = VisionLanguageModel.connect(vision, lm, factory)
        with pytest.raises(ValueError, match="expected a SoftPrefix with a QFormer"):
            export_blip2(model, tmp_path / "out")
        model.hooks.remove()
    with pytest.raises(ValueError, match="match_embedding_scale=True"):
        export_blip2(whole(prefix={"match_embedding_scale": True}), tmp_path / "out")


def test_lora_is_refused(tmp_path):
    pytest.importorskip("peft")
    model = whole(lm={"lora": LoRA(r=2, targets=["q_proj"])})
    with pytest.raises(ValueError, match="LoRA"):
        export_blip2(model, tmp_path / "out")


def test_what_hf_does_otherwise_is_said(tmp_path):
    with pytest.warns(UserWarning, match="ln_vision_eps=1e-05"):
        export_blip2(whole(ln_vision_eps=1e-5), tmp_path / "a")
    model = whole()
    model.prompt = "Look: <image>"
    with pytest.warns(UserWarning, match="not beginning with the image"):
        export_blip2(model, tmp_path / "b")


def test_nothing_is_overwritten_and_nothing_half_written(tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("x")
    with pytest.raises(ValueError, match="found files at"):
        export_blip2(whole(), tmp_path / "out")

    def fail(*_: Any, **__: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(hf.PreTrainedTokenizerBase, "save_pretrained", fail)
    with pytest.raises(OSError, match="disk full"):
        export_blip2(whole(), tmp_path / "new")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_the_page_on_official_weights_runs(tmp_path, monkeypatch, capsys):
    """Its names are those of the published models; here stand tiny ones in their places."""
    page = Path(__file__).parents[2] / "docs" / "official-weights.md"
    block = page.read_text(encoding="utf-8").split("<!-- test: load -->\n```python\n")[1]
    vision = encoder()
    export_blip2(whole(), tmp_path / "blip2-opt-2.7b")
    export_retrieval(vision, stage1_of(vision), tmp_path / "blip2-itm-vit-g")
    tiny.Image.new("RGB", (20, 30), "red").save(tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    exec(block.split("```")[0], {})
    assert "lm_head.bias" in capsys.readouterr().out


# --- `bridges export`


def vision_source(folder: Path) -> VisionSource:
    """An encoder that a run can name: the folder of an official checkpoint."""
    vision = encoder()
    export_retrieval(vision, stage1_of(vision), folder)
    return VisionSource(str(folder), layer=-1, drop_prefix=False, dtype="fp32")


def test_command_on_a_stage_1_run(tmp_path, capsys):
    source = vision_source(tmp_path / "eva")
    vision = VisionEncoder.load(**vars(source))
    stage1 = stage1_of(vision)
    spec = Stage1Spec(source, SIZES | TEXT | EPS, {"embed_dim": 8})
    save_stage1(tmp_path / "run", stage1, spec, vision)
    main(["--run", str(tmp_path / "run"), "--out", str(tmp_path / "out")])
    assert "without temperature" in capsys.readouterr().out
    theirs = loaded(hf.Blip2ForImageTextRetrieval, tmp_path / "out")
    assert torch.equal(theirs.query_tokens[0], stage1.qformer.queries)


def test_command_on_a_captioning_run(tmp_path, capsys):
    source = vision_source(tmp_path / "eva")
    language = LanguageSource(str(tmp_path / "opt"), dtype="fp32")
    tiny.causal_lm("opt").save_pretrained(tmp_path / "opt")
    tiny.make_tokenizer().save_pretrained(tmp_path / "opt")
    bridge = {
        "class_path": "bridges.SoftPrefix",
        "init_args": {"resampler": {"class_path": "qformer.QFormer", "init_args": SIZES | EPS}},
    }
    model = VisionLanguageModel.connect(
        VisionEncoder.load(**vars(source)),
        LanguageModel.load(str(tmp_path / "opt"), dtype="fp32"),
        bridge_factory(bridge),
    )
    save_run(tmp_path / "run", model, RunSpec(source, language, bridge))
    main(["--run", str(tmp_path / "run"), "--out", str(tmp_path / "out")])
    assert "Blip2ForConditionalGeneration" in capsys.readouterr().out
    theirs = loaded(CLASSES["blip2"], tmp_path / "out")
    bridge_state = model.bridge.state_dict()
    assert torch.equal(theirs.language_projection.weight, bridge_state["projection.weight"])
