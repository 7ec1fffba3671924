"""OpenFlamingo's files in: the same logits and gradients as the restated model, or a clear no."""

import re
from functools import partial
from pathlib import Path
from typing import Any

import parity
import pytest
import tiny
import tiny_openflamingo as reference
import torch
import transformers as hf
from tiny_openflamingo import END, IMAGE, Flamingo
from torch import Tensor

from bridges import (
    LanguageModel,
    LanguageSource,
    Projector,
    VisionFeatures,
    VisionLanguageModel,
    VisionSource,
    bridge_factory,
)
from bridges.sites import SITES, DecoderSites
from gated_xattn import GatedXAttn
from gated_xattn.official import load_openflamingo
from gated_xattn.official_files import is_flamingo
from perceiver import PerceiverResampler
from recipes.module import CaptionModule

KNOWN = len(tiny.make_tokenizer(image_token=False))
"""Tokens of the LM itself; OpenFlamingo's come behind them."""


def flamingo(family: str = "gpt_neox", frames: int = 0) -> Flamingo:
    return Flamingo(family, 16, KNOWN + 2, frames)


def bare_lm(theirs: Flamingo) -> Any:
    """The LM before OpenFlamingo, with a few more rows of padding."""
    untied = {"tie_word_embeddings": False} if theirs.family == "llama" else {}
    lm = tiny.causal_lm(theirs.family, num_hidden_layers=4, **untied)
    trained = theirs.lang_encoder.state_dict()
    for name, tensor in lm.state_dict().items():
        blocks, _, rest = name.partition(f"{reference.BLOCKS[theirs.family]}.")
        number, _, rest = rest.partition(".")
        wrapped = f"{reference.BLOCKS[theirs.family]}.{number}.decoder_layer.{rest}"
        source = trained[name if blocks else wrapped]
        source = source[:KNOWN] if len(source) == KNOWN + 2 else source
        tensor[: len(source)].copy_(source)
    return lm


def ours(
    theirs: Flamingo,
    lm: Any = None,
    *,
    end_of_chunk: str | None = END,
    perceiver: dict[str, Any] | None = None,
    **options: Any,
) -> VisionLanguageModel:
    sizes = {"num_latents": reference.LATENTS, "depth": reference.DEPTH}
    sizes |= {"num_heads": reference.HEADS} | (perceiver or {})
    bridge = {"every": 2, "first": 1, "num_heads": reference.HEADS}
    bridge |= {"resampler": partial(PerceiverResampler, **sizes)} | options
    return VisionLanguageModel.connect(
        tiny.vision_encoder(),
        LanguageModel(lm or bare_lm(theirs), tiny.make_tokenizer(), end_of_chunk=end_of_chunk),
        partial(GatedXAttn, **bridge),
    )


def saved(folder: Path, state: Any, name: str = "checkpoint.pt") -> Path:
    torch.save(state, folder / name)
    return folder / name


def batch(model: VisionLanguageModel, padding: str = "left") -> tuple[Any, VisionFeatures]:
    """Two images after some text, one at the start, none; chunks end by the trained token."""
    prompts = ["ab<image>cd<|endofchunk|><image>ef", "<image>ghi", "jk"]
    return tiny.batch_of(model, prompts, padding_side=padding)


def their_ids(model: VisionLanguageModel, ids: Tensor) -> Tensor:
    """OpenFlamingo puts the end of a chunk before the image."""
    end = model.lm.tokenizer.convert_tokens_to_ids(END)
    image = model.lm.image_token_id
    found = ids.clone()
    found[ids == end], found[ids == image] = KNOWN, KNOWN + 1
    return found


def their_logits(theirs: Flamingo, model: VisionLanguageModel, text: Any, features: Any) -> Tensor:
    """In our columns: the vocabulary, then the end of a chunk."""
    patches = features.patches.nan_to_num(0.0)[:, :, None]
    found = theirs(patches, their_ids(model, text.input_ids), text.attention_mask)
    return found[..., : KNOWN + 1]


def our_logits(model: VisionLanguageModel, text: Any, features: Any) -> Tensor:
    found = model.logits(text.input_ids, text.attention_mask, features)
    end = model.lm.tokenizer.convert_tokens_to_ids(END)
    return torch.cat([found[..., :KNOWN], found[..., [end]]], dim=-1)


# --- the same model


@pytest.fixture
def mpt(monkeypatch) -> None:
    """A type of LM that the table of LM types lacks, added as a user would."""
    sites = DecoderSites("transformer", "transformer.blocks.{i}", "transformer.blocks.{i}.attn")
    monkeypatch.setitem(SITES, "mpt", sites)
    sizes = {"d_model": 32, "n_heads": 4, "n_layers": 3, "max_seq_len": 128}
    ends = {"bos_token_id": 1, "eos_token_id": 2}
    config = partial(hf.MptConfig, vocab_size=tiny.VOCABULARY, **sizes, **ends)
    monkeypatch.setitem(tiny.CONFIGS, "mpt", config)


@pytest.mark.usefixtures("mpt")
@pytest.mark.parametrize("family", ["gpt_neox", "opt", "mpt"])
@pytest.mark.parametrize("names", ["wrapped", "list"])
def test_outputs_and_gradients(tmp_path, family: str, names: str):
    theirs = flamingo(family)
    model = ours(theirs)
    left = load_openflamingo(saved(tmp_path, theirs.checkpoint(names)), model)
    assert any(reason.startswith("the frozen LM") for reason in left.values())
    text, features = batch(model)
    a, b = our_logits(model, text, features), their_logits(theirs, model, text, features)
    real = text.attention_mask
    parity.close(a[real], b[real], "logits")
    a, b = a[real], b[real]
    weights = torch.randn(a.shape, generator=torch.Generator().manual_seed(1)) / a.numel()
    (a * weights).sum().backward()
    (b * weights).sum().backward()
    new = model.lm.new_tokens
    assert new is not None
    rows = theirs.lang_encoder.get_input_embeddings().weight.grad
    parity.close(model.bridge.marker.grad[0], rows[KNOWN + 1], "the image")
    parity.close(new.embedding.grad[0], rows[KNOWN], "the end of a chunk")
    if family == "gpt_neox":  # the others tie the two
        head = theirs.lang_encoder.get_output_embeddings().weight.grad
        parity.close(new.head.grad[0], head[KNOWN], "its output row")
    compared = 0
    for name, parameter in model.bridge.named_parameters():
        if name != "marker":
            parity.close(parameter.grad, their_gradient(theirs, name), name)
            compared += 1
    assert compared == 3 + 2 * 12 + 2 * 12  # latents and norm, two layers, two gated blocks


def their_gradient(theirs: Flamingo, name: str) -> Tensor:
    """Of one of our parameters."""
    table = {
        "features_norm": "0.norm_media",
        "latents_norm": "0.norm_latents",
        "attention.out": "0.to_out",
        "attention.q": "0.to_q",
        "ff_norm": "1.0",
        "ff.up": "1.1",
        "ff.out": "1.3",
        "attn_norm": "attn.norm",
        "attn.q": "attn.to_q",
        "attn.out": "attn.to_out",
    }
    block = {"ff_norm": "ff.0", "ff.up": "ff.1", "ff.out": "ff.3"}
    found = name.replace("resampler.", "perceiver.")
    if found.startswith("blocks."):
        table |= block
        place = 2 * int(found[7]) + 1
        found = f"lang_encoder.gated_cross_attn_layers.{place}.{found[9:]}"
    for a, b in table.items():
        found = re.sub(rf"(?<=\d\.){re.escape(a)}(?=\.|$)", b, found)
    parameters = dict(theirs.named_parameters(remove_duplicate=False))
    for place, letter in enumerate("kv"):
        if found.endswith(f".{letter}.weight"):
            start = found.removesuffix(f"{letter}.weight")
            start = start.replace(".attention.", ".0.")
            return parameters[f"{start}to_kv.weight"].grad.chunk(2)[place]
    gradient = parameters[found].grad
    assert gradient is not None
    return gradient


def test_tokens_written(tmp_path):
    theirs = flamingo()
    model = ours(theirs)
    load_openflamingo(saved(tmp_path, theirs.checkpoint()), model)
    text, features = batch(model)
    end = model.lm.tokenizer.convert_tokens_to_ids(END)
    padding = [row for row in range(KNOWN, tiny.VOCABULARY) if row != end]
    options = {"max_new_tokens": 8, "suppress_tokens": padding}
    found = model.generate(text.input_ids, text.attention_mask, features, **options)
    ids, mask = text.input_ids, text.attention_mask
    written: list[Tensor] = []
    open_rows = torch.ones(3, dtype=torch.bool)
    ends = {model.lm.tokenizer.eos_token_id, model.lm.end_id}
    for _ in range(found.shape[1]):
        step = TextLike(ids, mask)
        best = their_logits(theirs, model, step, features)[:, -1].argmax(dim=-1)
        best = best.where(best < KNOWN, end)
        best = best.where(open_rows, model.lm.tokenizer.pad_token_id)
        open_rows &= torch.tensor([int(i) not in ends for i in best])
        written.append(best)
        ids = torch.cat([ids, best[:, None]], dim=1)
        mask = torch.cat([mask, torch.ones(3, 1, dtype=torch.bool)], dim=1)
    assert found.tolist() == torch.stack(written, dim=1).tolist()
    assert len(found.unique()) > 2


class TextLike:
    def __init__(self, input_ids: Tensor, attention_mask: Tensor) -> None:
        self.input_ids, self.attention_mask = input_ids, attention_mask


def same_bridge(model: VisionLanguageModel, expected: VisionLanguageModel) -> bool:
    found = model.trainable_state()
    return all(torch.equal(t, found[k]) for k, t in expected.trainable_state().items())


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: {f"module.{k}": t for k, t in state.items()},
        lambda state: {"model_state_dict": state, "optimizer_state_dict": {"state": {}}},
        lambda state: {
            k.replace("perceiver.", "perceiver._fsdp_wrapped_module."): t for k, t in state.items()
        },
        lambda state: state | {"vision_encoder.positional_embedding": torch.zeros(2)},
    ],
    ids=["module", "training", "fsdp", "vision"],
)
def test_forms_of_the_file(tmp_path, wrap):
    theirs = flamingo()
    expected, model = ours(theirs), ours(theirs)
    load_openflamingo(saved(tmp_path, theirs.checkpoint(), "plain.pt"), expected)
    load_openflamingo(saved(tmp_path, wrap(theirs.checkpoint("both", frozen=True))), model)
    assert same_bridge(model, expected)


def test_a_padding_token_behind_the_image(tmp_path):
    theirs = flamingo()
    expected, model = ours(theirs), ours(theirs)
    load_openflamingo(saved(tmp_path, theirs.checkpoint(), "plain.pt"), expected)
    state = theirs.checkpoint()
    for key in ("gpt_neox.embed_in.weight", "embed_out.weight"):
        rows = state[f"lang_encoder.{key}"]
        state[f"lang_encoder.{key}"] = torch.cat([rows, torch.ones(1, rows.shape[1])])
    load_openflamingo(saved(tmp_path, state), model)
    assert same_bridge(model, expected)


def test_token_ids_can_be_given(tmp_path):
    theirs = flamingo()
    state = theirs.checkpoint()
    rows = state["lang_encoder.gpt_neox.embed_in.weight"]
    rows = torch.cat([rows, torch.ones(2, rows.shape[1])])
    rows[KNOWN + 3] = 7.0
    state["lang_encoder.gpt_neox.embed_in.weight"] = rows
    head = state["lang_encoder.embed_out.weight"]
    state["lang_encoder.embed_out.weight"] = torch.cat([head, torch.ones(2, rows.shape[1])])
    path, model = saved(tmp_path, state), ours(theirs)
    with pytest.raises(ValueError, match=f"{KNOWN + 4} token embeddings .* vocabulary of {KNOWN}"):
        load_openflamingo(path, model)
    load_openflamingo(path, model, token_ids={IMAGE: KNOWN + 3, END: KNOWN})
    assert model.bridge.marker.unique().tolist() == [7.0]


def test_the_end_of_a_chunk_is_left_out_where_the_lm_has_none(tmp_path):
    theirs = flamingo()
    model = ours(theirs, end_of_chunk=None)
    left = load_openflamingo(saved(tmp_path, theirs.checkpoint()), model)
    assert "lm.new_tokens" in left[f"the token {END}"]
    assert model.lm.new_tokens is None


def test_an_output_row_that_was_not_saved(tmp_path):
    theirs = flamingo("llama")
    model = ours(theirs)
    assert model.lm.new_tokens is not None
    before = model.lm.new_tokens.head.clone()
    state = theirs.checkpoint()
    assert not any("lm_head" in key for key in state)
    with pytest.warns(UserWarning, match="no output row of '<|endofchunk|>'"):
        load_openflamingo(saved(tmp_path, state), model)
    assert torch.equal(model.lm.new_tokens.head, before)
    row = state["lang_encoder.model.embed_tokens.weight"][KNOWN]
    assert torch.equal(model.lm.new_tokens.embedding[0], row)


def test_embeddings_of_time(tmp_path):
    """OpenFlamingo adds the n-th to the n-th frame; so does a resampler that is not longer."""
    theirs = flamingo(frames=4)
    model = ours(theirs, perceiver={"num_frames": 4})
    load_openflamingo(saved(tmp_path, theirs.checkpoint()), model)
    frames = torch.randn(2, 1, 3, 9, 16)
    features = VisionFeatures(
        frames.flatten(2, 3), torch.ones(2, 1).bool(), (3, 3), torch.ones(2, 1, 3).bool()
    )
    parity.close(model.bridge.resampler(features), theirs.perceiver(frames), "clips")
    with pytest.raises(ValueError, match="leftover time_embedding"):
        load_openflamingo(tmp_path / "checkpoint.pt", ours(theirs))
    with pytest.warns(UserWarning, match="no frame_embs"):
        load_openflamingo(saved(tmp_path, flamingo().checkpoint()), model)


def test_a_run_may_start_from_it(tmp_path):
    """By `model.init_from` of a YAML; the rows of new tokens come along."""
    theirs = flamingo()
    path = saved(tmp_path, theirs.checkpoint())
    expected = ours(theirs)
    load_openflamingo(path, expected)
    tiny.vision_model().save_pretrained(tmp_path / "clip")
    hf.CLIPImageProcessor(
        size={"shortest_edge": tiny.IMAGE_SIZE}, crop_size=tiny.IMAGE_SIZE
    ).save_pretrained(tmp_path / "clip")
    bare_lm(theirs).save_pretrained(tmp_path / "lm")
    tiny.make_tokenizer().save_pretrained(tmp_path / "lm")
    sizes = {"num_latents": 3, "depth": 2, "num_heads": 2}
    perceiver = {"class_path": "perceiver.PerceiverResampler", "init_args": sizes}
    settings = {"resampler": perceiver, "every": 2, "first": 1, "num_heads": 2}
    module = CaptionModule(
        VisionSource(str(tmp_path / "clip"), dtype="fp32"),
        LanguageSource(str(tmp_path / "lm"), dtype="fp32", end_of_chunk=END),
        bridge_factory({"class_path": "gated_xattn.GatedXAttn", "init_args": settings}),
        init_from=str(path),
    )
    module.initialise()
    assert same_bridge(module.vlm, expected)


def test_what_is_no_flamingo_goes_to_the_resampler(tmp_path):
    model = ours(flamingo(), resampler=partial(Projector, layers=2))
    torch.save({"Qformer.bert.x": torch.zeros(1)}, tmp_path / "lavis.pth")
    for path in (tmp_path / "lavis.pth", tmp_path, tmp_path / "nothing"):
        assert not is_flamingo(path)
        with pytest.raises(ValueError, match="Projector, which has no form of them"):
            model.bridge.load_pretrained(path, model.lm)


# --- what does not fit


class Bomb:
    """Makes a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return (Path.touch, (self.mark,))


def untouched(model: VisionLanguageModel) -> Any:
    before = {k: t.clone() for k, t in model.trainable_state().items()}
    return lambda: all(torch.equal(t, before[k]) for k, t in model.trainable_state().items())


def test_a_pickle_is_not_run(tmp_path):
    model = ours(flamingo())
    path = saved(tmp_path, {"model_state_dict": Bomb(tmp_path / "run")})
    for load in (
        partial(load_openflamingo, model=model),
        partial(model.bridge.load_pretrained, lm=model.lm),
        model.bridge.resampler.load_pretrained,
    ):
        with pytest.raises(ValueError, match="more than weights"):
            load(path)
    assert not is_flamingo(path)
    assert not (tmp_path / "run").exists()
    (tmp_path / "x.pt").write_bytes(b"no archive")
    with pytest.raises(ValueError, match="more than weights"):
        load_openflamingo(tmp_path / "x.pt", model)
    with pytest.raises(ValueError, match="nothing at"):
        load_openflamingo(tmp_path / "y.pt", model)
    with pytest.raises(ValueError, match="no state dict"):
        load_openflamingo(saved(tmp_path, {"model_state_dict": [1]}), model)


def test_what_is_no_flamingo_is_the_resamplers(tmp_path):
    """A LAVIS file belongs to a Q-Former, also under gated cross-attention."""
    torch.manual_seed(0)
    model = VisionLanguageModel.connect(
        tiny.vision_encoder(), tiny.language_model(), tiny.factory("qformer_gated")
    )
    path = saved(tmp_path, {"model": {"Qformer.bert.x": torch.zeros(1)}})
    given = []
    model.bridge.resampler.load_pretrained = given.append
    model.bridge.load_pretrained(path, model.lm)
    assert given == [path]


WRAPPED = "lang_encoder.gpt_neox.layers.1.gated_cross_attn_layer"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"perceiver.layers.1.0.to_q.weight": None}, r"no layers\.1\.attention\.q\.weight"),
        ({"perceiver.extra": torch.zeros(1)}, r"perceiver\.extra"),
        ({"perceiver.media_time_embs": torch.zeros(4, 1, 16)}, "place of an image"),
        ({"perceiver.latents": torch.zeros(4, 16)}, r"mis-shaped latents \(4, 16\) for \(3, 16\)"),
        ({f"{WRAPPED}.attn_gate": None}, r"no blocks\.0\.attn_gate"),
        ({f"{WRAPPED}.attn.to_kv.weight": torch.zeros(256, 8)}, r"blocks\.0\.attn\.k\.weight"),
        ({f"{WRAPPED}.attn.extra": torch.zeros(1)}, "attn.extra of gated block 1"),
        ({"lang_encoder.gpt_neox.extra": torch.zeros(1)}, r"lang_encoder\.gpt_neox\.extra"),
        ({"classifier.weight": torch.zeros(1)}, r"classifier\.weight"),
        ({"lang_encoder.gpt_neox.embed_in.weight": None}, "LM's token embeddings"),
        (
            {"lang_encoder.gated_cross_attn_layers.1.attn_gate": torch.zeros(1)},
            "two different attn_gate",
        ),
    ],
)
def test_keys_that_do_not_fit_are_named(tmp_path, change, message: str):
    theirs = flamingo()
    model = ours(theirs)
    same = untouched(model)
    state = {k: t for k, t in (theirs.checkpoint() | change).items() if t is not None}
    with pytest.raises(ValueError, match=message):
        load_openflamingo(saved(tmp_path, state), model)
    assert same()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"first": 0}, r"before the LM blocks 1, 3 .* expected 0, 2, .* first = every - 1"),
        ({"num_heads": 4, "head_dim": 32}, "set num_heads to 2 and head_dim to 64"),
        ({"feed_forward": "squared_relu"}, "set feed_forward to gelu"),
        ({"norm": "rms"}, r"leftover blocks\.0\.attn_norm\.bias"),
        ({"perceiver": {"num_heads": 4, "head_dim": 32}}, "num_heads=2 and head_dim=64"),
        ({"perceiver": {"activation": "relu"}}, "activation: gelu"),
        ({"perceiver": {"norm": "rms"}}, r"leftover layers\.0\.features_norm\.bias"),
        ({"resampler": partial(Projector, layers=1)}, "a resampler in .* for a Projector"),
    ],
)
def test_settings_that_do_not_fit(tmp_path, options: dict[str, Any], message: str):
    theirs = flamingo()
    model = ours(theirs, **options)
    same = untouched(model)
    with pytest.raises(ValueError, match=message):
        load_openflamingo(saved(tmp_path, theirs.checkpoint()), model)
    assert same()


def test_another_lm_is_refused(tmp_path):
    theirs = flamingo()
    lm = bare_lm(theirs)
    lm.get_input_embeddings().weight.data[7:9] += 1
    model = ours(theirs, lm)
    same = untouched(model)
    with pytest.raises(ValueError, match=f"differ from the LM's in 2 of {KNOWN} rows"):
        load_openflamingo(saved(tmp_path, theirs.checkpoint()), model)
    assert same()
    other = ours(theirs, tiny.causal_lm("opt"))
    with pytest.raises(ValueError, match=r"lang_encoder\.gpt_neox\.embed_in\.weight"):
        load_openflamingo(tmp_path / "checkpoint.pt", other)


def test_rounding_passes_for_the_same_lm(tmp_path):
    theirs = flamingo()
    state = {k: t.bfloat16() for k, t in theirs.checkpoint().items()}
    load_openflamingo(saved(tmp_path, state), ours(theirs))


def test_only_gated_cross_attention_has_these_weights(tmp_path):
    theirs = flamingo()
    model = VisionLanguageModel.connect(
        tiny.vision_encoder(), tiny.language_model(), tiny.factory("perceiver")
    )
    with pytest.raises(ValueError, match="found a SoftPrefix"):
        load_openflamingo(saved(tmp_path, theirs.checkpoint()), model)


def test_settings_that_change_digits_warn(tmp_path):
    theirs = flamingo()
    path = saved(tmp_path, theirs.checkpoint())
    with pytest.warns(UserWarning, match="norm_eps=1e-06"):
        load_openflamingo(path, ours(theirs, norm_eps=1e-6))
    with pytest.warns(UserWarning, match="visible='all'"):
        load_openflamingo(path, ours(theirs, visible="all"))
