"""What words look at: maps that are the model's own attention, drawn where they belong."""

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import tiny
import torch
import transformers as hf
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

import bridges
import recipes.attention_words
from bridges import VisionLanguageModel, bridge_factory
from bridges.run import LanguageSource, RunSpec, VisionSource, save_run
from recipes import cli
from recipes.attention_maps import text_maps, token_origins, token_reads
from recipes.attention_tokens import words_of
from recipes.attention_words import choose, drawn, readings

PERCEIVER = tiny.BRIDGES["perceiver_gated"]["init_args"]["resampler"]
LINEAR = tiny.BRIDGES["linear"]["init_args"]["resampler"]


def gated(resampler: dict[str, object] = PERCEIVER, **options: object) -> dict[str, object]:
    sizes = {"every": 2, "num_heads": 2, "head_dim": 8, "ff_mult": 2}
    return {
        "class_path": "gated_xattn.GatedXAttn",
        "init_args": {"resampler": resampler} | sizes | options,
    }


def model_of(bridge: str | dict[str, object], **options: object) -> VisionLanguageModel:
    torch.manual_seed(0)
    config = tiny.BRIDGES[bridge] if isinstance(bridge, str) else bridge
    lm = tiny.language_model("llama", **options)
    model = VisionLanguageModel.connect(tiny.vision_encoder(), lm, bridge_factory(config))
    tiny.randomise(model.bridge, std=0.6)
    tiny.open_gates(model.bridge)
    return model.eval()


def document(model: VisionLanguageModel, text: str = "ab<image>cd<image>e"):
    return tiny.batch_of(model, [text])


def maps_of(model: VisionLanguageModel, text: str = "ab<image>cd<image>e", **options: object):
    batch, features = document(model, text)
    return text_maps(model, batch.input_ids, features, **options), batch, features


READERS = ["linear", "mlp", "qformer", "perceiver"]
GATED = ["perceiver_gated", "qformer_gated", "projector_gated"]


@pytest.mark.parametrize("kind", GATED)
def test_a_position_looks_at_its_latest_picture_and_at_nothing_else(kind):
    maps, batch, _ = maps_of(model_of(kind))
    share = maps.sum(dim=-1)
    places = [i for i, x in enumerate(batch.input_ids[0]) if x == batch.input_ids[0, 2]]
    assert places == [2, 5]
    expected = torch.zeros(7, 2)
    expected[2:5, 0] = expected[5:, 1] = 1
    torch.testing.assert_close(share, expected)
    assert (maps >= 0).all()


def test_of_all_pictures_each_has_its_share():
    maps, _, _ = maps_of(model_of(gated(visible="all")))
    share = maps.sum(dim=-1)
    torch.testing.assert_close(share.sum(dim=1), torch.tensor([0.0, 0, 1, 1, 1, 1, 1]))
    assert (share[2:5, 1] == 0).all()
    assert (share[5:] > 0).all()


@pytest.mark.parametrize("kind", READERS)
def test_soft_tokens_share_attention_with_the_text(kind):
    model = model_of(kind)
    maps, batch, _ = maps_of(model)
    share, n = maps.sum(dim=-1), model.bridge.num_tokens
    second = 2 + n + 2  # its first placeholder
    assert (share[:2] == 0).all() and (share[:second, 1] == 0).all()
    assert (share[2 + n :, 0] > 0).all() and (share[second:, 1] > 0).all()
    assert (share.sum(dim=1)[2 + n :] < 1).all()
    assert maps.shape == (batch.input_ids.shape[1], 2, 9)


@pytest.mark.parametrize("visible", ["latest", "all"])
def test_reads_of_a_gated_block_are_its_own(visible):
    """With one head and a closed feed-forward, the block's output follows from them."""
    model = model_of(gated(num_heads=1, visible=visible))
    batch, features = document(model)
    given = {}

    def note(block, arguments, output):
        given[block] = (*arguments, output)

    blocks = list(model.bridge.blocks)
    for block in blocks:
        with torch.no_grad():
            block.ff_gate.zero_()
        block.register_forward_hook(note)
    for place, layer in ((0, "mean"), (1, "last")):
        if layer == "mean":  # all weight on the first block
            with torch.no_grad():
                blocks[1].attn_gate.zero_()
        else:
            tiny.open_gates(model.bridge)
            with torch.no_grad():
                for block in blocks:
                    block.ff_gate.zero_()
        reads = token_reads(model, batch.input_ids, features, None, layer)
        block = blocks[place]
        hidden, condition, output = given[block]
        _, values = block.attn.project(condition.memory.flatten(1, 2))
        attended = block.attn.out(reads.flatten(1) @ values[0, 0])
        expected = hidden + block.attn_gate.tanh() * attended
        torch.testing.assert_close(output, expected, rtol=0, atol=1e-5)


def test_reads_of_soft_tokens_are_the_lms_own():
    model = model_of("perceiver")
    batch, features = document(model)
    reads = token_reads(model, batch.input_ids, features, None, "last")
    lm = model.lm
    with torch.no_grad():
        embeddings = model._fill(batch.input_ids, model.bridge(features), features)
        lm.model.set_attn_implementation("eager")
        attentions = lm.model.base_model(
            inputs_embeds=embeddings, output_attentions=True
        ).attentions
    places = batch.input_ids[0] == lm.image_token_id
    expected = attentions[-1][0].mean(dim=0)[:, places]
    torch.testing.assert_close(reads.flatten(1), expected)
    mean = token_reads(model, batch.input_ids, features, None, "mean")
    expected = torch.stack(attentions)[:, 0].mean(dim=(0, 1))[:, places]
    torch.testing.assert_close(mean.flatten(1), expected)


def test_a_block_counts_as_far_as_its_gate_is_open():
    model = model_of("perceiver_gated")
    batch, features = document(model)
    layers = []
    for opened in (0, 1):
        with torch.no_grad():
            for place, block in enumerate(model.bridge.blocks):
                block.attn_gate.fill_(float(place == opened))
        # The second block sees what the first did, so each is noted with its own gates.
        layers.append(token_reads(model, batch.input_ids, features, None, "mean"))
    with torch.no_grad():
        for block in model.bridge.blocks:
            block.attn_gate.zero_()
    closed = [
        token_reads(model, batch.input_ids, features, None, layer) for layer in ("mean", "last")
    ]
    torch.testing.assert_close(layers[1], closed[1])  # a closed first block changes nothing
    torch.testing.assert_close(closed[0], (layers[0] + closed[1]) / 2)
    assert not torch.allclose(layers[0], layers[1])


def test_without_gates_all_blocks_count_alike():
    model = model_of(gated(gate="none"))
    maps, _, _ = maps_of(model)
    last, _, _ = maps_of(model, layer="last")
    assert not torch.allclose(maps, last)
    torch.testing.assert_close(maps[2:].sum(dim=(1, 2)), torch.ones(5))


def test_origins_of_a_perceivers_latents_are_its_attention():
    """In one layer with one head, the output of its attention follows from the map."""
    shape = tiny.vision_encoder().shape
    config = {"num_latents": 3, "depth": 1, "num_heads": 1, "head_dim": 8}
    resampler = bridge_factory(gated(PERCEIVER | {"init_args": config}))(
        vision=shape, decoder=tiny.language_model().shape
    ).resampler
    tiny.randomise(resampler, std=0.6)
    given = []
    resampler.layers[0].attention.register_forward_hook(lambda *noted: given.append(noted))
    _, features = document(model_of("perceiver_gated"), "<image>")
    with torch.no_grad():
        origins = token_origins(resampler, features)
        attention, (queries, (keys, values), *mask), output = given[0]
        weights = attention.weights(queries, keys, *mask)
        torch.testing.assert_close(
            attention.out((weights @ values)[:, 0]), output, rtol=0, atol=1e-5
        )
    patches = weights[0, 0, :, :9]
    torch.testing.assert_close(origins[0, 0], patches / patches.sum(dim=-1, keepdim=True))


def test_rollout_goes_through_the_latents():
    """Two layers, by hand: a latent is half itself, half what it attends to."""
    model = model_of("perceiver_gated")
    _, features = document(model, "<image>")
    found = []
    for layer in model.bridge.resampler.layers:
        layer.attention.register_forward_hook(
            lambda attention, inputs, _: found.append(
                attention.weights(inputs[0], inputs[1][0], *inputs[2:]).mean(dim=1)[0]
            )
        )
    with torch.no_grad():
        origins = token_origins(model.bridge.resampler, features)[0, 0]
    first, second = found
    made = first[:, :9] / 2
    made = made / 2 + (second[:, :9] + second[:, 9:] @ made) / 2
    torch.testing.assert_close(origins, made / made.sum(dim=-1, keepdim=True))


def test_a_projectors_token_is_its_patch():
    model = model_of("linear")
    batch, features = document(model, "a<image>b")
    maps = text_maps(model, batch.input_ids, features)
    reads = token_reads(model, batch.input_ids, features, None, "mean")
    torch.testing.assert_close(maps, reads)


def test_looking_changes_nothing():
    for kind in ("perceiver_gated", "qformer"):
        model = model_of(kind)
        batch, features = document(model)
        inputs = batch.input_ids, batch.attention_mask, features
        with torch.no_grad():
            before = model.logits(*inputs)
        kernel = model.lm.model.config._attn_implementation
        text_maps(model, batch.input_ids, features)
        assert model.lm.model.config._attn_implementation == kernel
        assert all(p.grad is None for p in model.parameters())
        with torch.no_grad():
            assert torch.equal(model.logits(*inputs), before)


def test_in_bf16_too():
    model = model_of("perceiver_gated")
    maps, batch, features = maps_of(model)
    model.lm.model.to(torch.bfloat16)
    low = text_maps(model, batch.input_ids, features)
    torch.testing.assert_close(low, maps, rtol=0, atol=0.05)


def test_other_parts_are_refused():
    model = model_of("third_party")
    batch, features = document(model)
    with pytest.raises(ValueError, match="found a BandResampler as resampler"):
        text_maps(model, batch.input_ids, features)
    with pytest.raises(ValueError, match="found a AdapterBridge; expected"):
        token_reads(model, batch.input_ids, features, None, "mean")


# --- words


def test_words_are_letters_and_their_tokens():
    tokenizer = tiny.make_tokenizer()
    ids = tokenizer("it's a cat, a dog-house (2)")["input_ids"]
    found = words_of(tokenizer, ids, set(), 0)
    assert [w.text for w in found] == ["it's", "a", "cat", "a", "dog-house", "2"]
    assert found[2].positions == [7, 8, 9]


def test_an_image_or_a_special_token_ends_a_word():
    tokenizer = tiny.make_tokenizer()
    image = tokenizer.convert_tokens_to_ids("<image>")
    ids = tokenizer("ab<image>cd</s>ef")["input_ids"]
    assert image in ids
    found = words_of(tokenizer, ids, {image, *tokenizer.all_special_ids}, 0)
    assert [(w.text, w.positions) for w in found] == [
        ("ab", [0, 1]),
        ("cd", [3, 4]),
        ("ef", [6, 7]),
    ]
    later = words_of(tokenizer, ids, {image, *tokenizer.all_special_ids}, 4)
    assert [(w.text, w.positions) for w in later] == [("d", [4]), ("ef", [6, 7])]


def test_letters_of_several_bytes_are_whole():
    alphabet = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    core = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = hf.PreTrainedTokenizerFast(tokenizer_object=core)
    ids = tokenizer("où été")["input_ids"]
    assert len(ids) == 3 + 1 + 5
    found = words_of(tokenizer, ids, set(), 0)
    assert [(w.text, w.positions) for w in found] == [
        ("où", [0, 1, 2]),
        ("été", [4, 5, 6, 7, 8]),
    ]


# --- the page


@pytest.fixture
def photos(tmp_path) -> list[Path]:
    paths = []
    for seed in range(2):
        generator = torch.Generator().manual_seed(seed)
        pixels = torch.randint(40, 215, (3, 4, 3), generator=generator).byte().numpy()
        paths.append(tmp_path / f"photo{seed} & co.png")
        Image.fromarray(pixels).resize((30, 20), Image.Resampling.NEAREST).save(paths[-1])
    return paths


def saved(folder: Path, on_disk, bridge: dict[str, object], prompt: str = "P <image>") -> Path:
    vision = VisionSource(str(on_disk.vision), dtype="fp32")
    lm = LanguageSource(str(on_disk.lm), dtype="fp32")
    model = VisionLanguageModel.connect(
        bridges.VisionEncoder.load(**vars(vision)),
        bridges.LanguageModel.load(**vars(lm)),
        bridge_factory(bridge),
        prompt=prompt,
    )
    tiny.randomise(model.bridge)
    tiny.open_gates(model.bridge)
    save_run(folder, model, RunSpec(vision, lm, bridge, prompt))
    return folder


@pytest.fixture(scope="module")
def run(on_disk, tmp_path_factory) -> Path:
    return saved(tmp_path_factory.mktemp("gated"), on_disk, gated())


def page_of(out: Path, *arguments: object) -> str:
    assert cli.main(["attention", *map(str, arguments), "--out", str(out)]) == 0
    page = out.read_text()
    HTMLParser().feed(page)
    # Self-contained: nothing is fetched.
    assert not re.search(r"""(src|href)=["'](?!data:|#)""", page)
    return page


def pictures(page: str) -> list[str]:
    return re.findall(r"base64,[^\"]+", page)


def test_every_word_of_a_caption_over_its_picture(run, photos, tmp_path):
    page = page_of(tmp_path / "page.html", *photos, "--run", run, "--text", "a green cat, a dog")
    # For each picture: itself, the mean, and five words.
    assert len(pictures(page)) == 2 * (1 + 1 + 5)
    assert page.count("<b>a</b>") == 4 and page.count("<b>green</b>") == 2
    assert "photo0 &amp; co.png" in page and "written by the model" not in page


def test_chosen_words_only(run, photos, tmp_path):
    words = ["--words", "Cat, green", "--text", "a green cat"]
    page = page_of(tmp_path / "page.html", photos[0], "--run", run, *words)
    assert len(pictures(page)) == 1 + 1 + 2
    assert "<b>cat</b>" in page and "<b>a</b>" not in page


def test_what_the_model_writes_by_default(run, photos, tmp_path, monkeypatch):
    written = iter(["a cat", "dogs"])
    monkeypatch.setattr(
        recipes.attention_words, "caption_features", lambda *_, **__: [next(written)]
    )
    page = page_of(tmp_path / "page.html", *photos, "--run", run)
    assert page.count("written by the model") == 2
    assert len(pictures(page)) == (1 + 1 + 2) + (1 + 1 + 1)
    assert "<b>dogs</b>" in page


def test_a_text_of_several_pictures(run, photos, tmp_path):
    text = "two <image>a cat<image>dogs run"
    page = page_of(tmp_path / "page.html", *photos, "--run", run, "--text", text)
    # Each word over the picture that it reads; "two" stands before the first.
    first, second = page.split("<h3>")[1:]
    assert re.findall(r"<b>(\w+)</b>", first) == ["a", "cat"]
    assert re.findall(r"<b>(\w+)</b>", second) == ["dogs", "run"]
    assert "No picture is read by: two." in page
    assert "&lt;image&gt;a cat" in page


def test_a_word_is_drawn_by_what_predicts_it_or_by_itself(run, photos):
    model = bridges.load(run)
    (reading,) = choose(readings(model, photos[:1], "ab c", None), ["c"])
    maps = text_maps(model, reading.input_ids, reading.vision)
    (position,) = reading.words[0].positions
    assert position == len("P ") + 1 + len("ab ")
    for at, place in (("word", position), ("before", position - 1)):
        (shown,) = drawn(model, reading, "mean", at)["pictures"][0]["words"]
        assert shown["peak"] == pytest.approx(float(maps[place, 0].max()))
        assert shown["lowest"] == pytest.approx(float(maps[place, 0].min()))
        assert shown["share"] == pytest.approx(1.0)


def test_layers_and_places_give_other_maps(run, photos, tmp_path):
    found = []
    for name, options in {"a": [], "b": ["--layer=last"], "c": ["--at=word"]}.items():
        arguments = [photos[0], "--run", run, "--text", "cat", *options]
        found.append(pictures(page_of(tmp_path / f"{name}.html", *arguments)))
    assert found[0][0] == found[1][0] == found[2][0]  # the picture
    assert found[0][1:] != found[1][1:] and found[0][1:] != found[2][1:]


def test_a_soft_prefix_states_the_pictures_share(on_disk, photos, tmp_path):
    folder = saved(tmp_path / "run", on_disk, tiny.BRIDGES["mlp"])
    page = page_of(tmp_path / "page.html", photos[0], "--run", folder, "--text", "cat")
    assert "soft tokens" in page
    share = re.search(r"picture: (\d+) %", page)
    assert share and 0 < int(share[1]) < 100


def test_a_q_former_shows_words_when_asked(on_disk, photos, tmp_path):
    folder = saved(tmp_path / "run", on_disk, tiny.BRIDGES["qformer_gated"])
    queries = page_of(tmp_path / "a.html", photos[0], "--run", folder)
    assert "What the queries look at" in queries
    words = page_of(tmp_path / "b.html", photos[0], "--run", folder, "--text", "cat")
    assert "What the words look at" in words and "Q-Former" in words


def test_prefix_tokens_have_no_place_in_the_picture():
    lm = tiny.language_model("llama")
    vision = tiny.vision_encoder("clip", drop_prefix=False)
    model = VisionLanguageModel.connect(vision, lm, bridge_factory(gated(LINEAR)))
    tiny.randomise(model.bridge)
    batch, features = tiny.batch_of(model, ["<image>ab"])
    maps = text_maps(model, batch.input_ids, features)
    assert maps.shape[-1] == 10 and (maps[:, 0, 0] > 0).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--text", "<image>a<image>b"], "2 × <image> in the text for 1 pictures"),
        (["--text", "a cat", "--words", "cat,dog"], "found no word 'dog'"),
        (["--text", "..."], "found no word in the text"),
        (["--text", "a", "--question", "what?"], "leave --question out"),
        (["--of", "queries"], "leave --of out for words"),
        (["--of", "queries", "--words", "cat"], "queries read no caption"),
    ],
)
def test_what_cannot_be_drawn_is_said(run, photos, tmp_path, capsys, options, message):
    out = tmp_path / "page.html"
    assert cli.main(["attention", str(photos[0]), f"--run={run}", f"--out={out}", *options]) == 2
    assert message in capsys.readouterr().err
    assert not out.exists()
