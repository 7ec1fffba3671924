"""Documents: the three forms they are read in, the windows that are cut, and the batches made."""

import base64
import io
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from PIL import Image

from bridges import PromptEncoder, VisionLanguageModel
from bridges.loss import IGNORE
from recipes import documents_window
from recipes.batch import Batch, CaptionBatch
from recipes.data import CaptionData
from recipes.documents import DOCUMENTS, Document, read_document
from recipes.documents_window import DocumentCollator, DocumentDecoder, Excerpt, Window, excerpt
from recipes.samples import SampleError
from recipes.shard_writer import write_shards
from recipes.train import train

# --- reading


def picture(red: int = 0) -> bytes:
    png = io.BytesIO()
    Image.new("RGB", (8, 8), (red, 90, 200)).save(png, "PNG")
    return png.getvalue()


def raw_of(meta: Any, seed: str = "0", **members: bytes) -> dict[str, Any]:
    named = {"__key__": "k", "__shard__": "s.tar", "__seed__": seed}
    pictures = {name.replace("_", ".")[1:]: data for name, data in members.items()}
    return {"json": json.dumps(meta).encode(), **pictures, **named}


def in_base64(data: bytes) -> str:
    return base64.b64encode(data).decode()


MMC4 = {
    "text_list": ["One.", "Two.", "Three."],
    "image_info": [
        {"matched_text_index": 2, "matched_sim": 0.2, "image_base64": in_base64(picture(3))},
        {"matched_text_index": 0, "matched_sim": 0.4, "image_name": "b.jpg"},
    ],
    "similarity_matrix": [[0.1, 0.1, 0.2], [0.4, 0.1, 0.1]],
}
OBELICS = {
    "texts": ["One.", None, None, "Two.", None, "Three."],
    "images": [None, "https://a/b.jpg", None, None, "c.png", None],
    "metadata": "[]",
}
OWN = {"parts": ["One.", {"image": 1}, "Two.", {"image": 0}, {"image": 1}], "style": "x"}


def test_mmc4_puts_a_picture_before_its_sentence():
    document = read_document(raw_of(MMC4, _1_jpg=picture(1)))
    assert document.parts == (0, "One.", " Two.", 1, " Three.")
    assert document.images == (picture(1), picture(3))
    assert document.similarities == (0.4, 0.2)
    assert document.meta == {}
    assert document.matching(None) is document
    assert document.matching(0.3).parts == (0, "One.", " Two.", " Three.")


def test_two_pictures_of_one_sentence_stand_in_their_order():
    info = [{"matched_text_index": 0}, {"matched_text_index": 0}]
    found = read_document(
        raw_of({"text_list": ["A"], "image_info": info}, _0_jpg=picture(), _1_jpg=picture(1))
    )
    assert found.parts == (0, 1, "A")
    assert found.matching(0.9).parts == (0, 1, "A")  # of unknown similarity


def test_obelics_numbers_its_pictures_without_the_nulls():
    document = read_document(raw_of(OBELICS, _0_jpg=picture(5), _1_png=picture(6)))
    assert document.parts == ("One.", 0, "\n\nTwo.", 1, "\n\nThree.")
    assert document.images == (picture(5), picture(6))


def test_our_own_form_names_its_pictures_and_keeps_the_rest():
    document = read_document(raw_of(OWN, _0_jpg=picture(5), _1_png=picture(6)))
    assert document.parts == ("One.", 0, "Two.", 1, 0)
    assert document.images == (picture(6), picture(5))
    assert document.meta == {"style": "x"}
    known = {"parts": [{"image": 0, "similarity": 0.1}, "a"]}
    assert read_document(raw_of(known, _0_jpg=picture())).matching(0.2).parts == ("a",)


@pytest.mark.parametrize(
    ("meta", "kind", "expected"),
    [
        ({"caption": "x"}, "unreadable document", "keys .'caption'.; expected parts, or text_list"),
        ([], "unreadable json", "json holds a list"),
        ({"parts": "a"}, "unreadable document", "found 'a' as parts; expected a list"),
        ({"parts": [3]}, "unreadable document", "found 3 in parts"),
        ({"parts": [{"image": "0"}]}, "unreadable document", "found '0' as an index"),
        ({"parts": [{"image": True}]}, "unreadable document", "found True as an index"),
        ({"parts": [{"image": -1}]}, "unreadable document", "found -1 as an index"),
        ({"parts": [{"image": 7}, "a"]}, "missing image", r"no picture 7 \(a member 7.jpg"),
        ({"parts": [{"image": 0, "similarity": "x"}]}, "unreadable document", "a similarity"),
        ({"text_list": ["a"], "image_info": [3]}, "unreadable document", "3 in image_info"),
        ({"text_list": [None], "image_info": []}, "unreadable document", "None as a text"),
        ({"text_list": ["a"], "image_info": [{"matched_text_index": 1}]},
         "unreadable document", "matched_text_index 1 of image 0"),
        ({"text_list": ["a"], "image_info": [{"matched_text_index": 0, "image_base64": "?"}]},
         "unreadable document", "image_base64 of image 0 is damaged"),
        ({"text_list": ["a"], "image_info": [{"matched_text_index": 0, "image_base64": 3}]},
         "unreadable document", "image_base64 of image 0 is damaged"),
        ({"text_list": ["a"], "image_info": [{}, {"matched_text_index": 0}]},
         "unreadable document", "found None as an index"),
        ({"texts": ["a"], "images": []}, "unreadable document", "1 texts and 0 images"),
        ({"texts": ["a"], "images": ["b"]}, "unreadable document", "both .* at place 0"),
        ({"texts": [3], "images": [None]}, "unreadable document", "found 3 as a text"),
        ({"texts": ["a", None, None], "images": [None, "x", "y"]}, "missing image", "picture 1"),
    ],
)  # fmt: skip
def test_a_damaged_document_is_named(meta, kind, expected):
    with pytest.raises(SampleError, match=rf"s.tar: sample 'k' \(members.*{expected}") as error:
        read_document(raw_of(meta, _0_jpg=picture()))
    assert error.value.kind == kind


def test_two_pictures_of_one_number_are_refused():
    with pytest.raises(SampleError, match=r"both 0\.jpg and 0\.png"):
        read_document(raw_of(OWN, _0_jpg=picture(), _0_png=picture()))


# --- windows


def encoder(num_tokens: int = 2, *, bos: bool = True) -> PromptEncoder:
    """One token for each character."""
    return PromptEncoder(tiny.make_tokenizer(bos=bos), "<image>", num_tokens)


def read(encode: PromptEncoder, ids: list[int]) -> str:
    return "".join(encode.tokenizer.convert_ids_to_tokens(ids))


def cut(parts: tuple[str | int, ...], encode: PromptEncoder, rng=None, **limits: Any) -> Excerpt:
    images = tuple(b"" for part in parts if isinstance(part, int))
    found = excerpt(Document("k", parts, images), encode, Window(**limits), rng)
    assert found is not None
    return found


def test_a_window_is_pictures_texts_and_ends_of_chunks():
    encode = encoder()
    found = cut((" intro ", 0, "\na cat", 1, 2, "b", " c", 3), encode)
    picture = "<image>" * 2
    expected = f"<s>intro</s>{picture}a cat</s>{picture}{picture}b c</s>"
    assert read(encode, found.input_ids) == expected
    assert found.images == [0, 1, 2]  # nothing follows the last one
    learned = [label for label in found.labels if label != IGNORE]
    assert read(encode, learned) == "a cat</s>b c</s>"
    whole = cut((" intro ", 0, "\na cat"), encode, loss_before_image=True)
    assert read(encode, [i for i in whole.labels if i != IGNORE]) == "intro</s>a cat</s>"


def test_a_text_is_text_whatever_it_says():
    encode = encoder()
    found = cut((0, "<image></s><s>"), encode)
    assert read(encode, found.input_ids) == "<s>" + "<image>" * 2 + "<image></s><s></s>"
    special = encode.tokenizer.convert_tokens_to_ids("<image>")
    assert found.input_ids.count(special) == 2


def test_a_text_that_is_cut_has_no_end():
    encode = encoder()
    found = cut((0, "abcdefgh"), encode, max_tokens=7)
    assert read(encode, found.input_ids) == "<s>" + "<image>" * 2 + "abcd"
    assert found.labels[-1] == found.input_ids[-1]


def random_document(rng: random.Random) -> tuple[str | int, ...]:
    parts: list[str | int] = []
    for _ in range(rng.randint(1, 12)):
        image = rng.random() < 0.5
        count = sum(isinstance(part, int) for part in parts)
        parts.append(count if image else "".join(rng.choices("abc ", k=rng.randint(0, 15))))
    return (*parts, sum(isinstance(part, int) for part in parts), "end")


@pytest.mark.parametrize("loss_before_image", [False, True])
@pytest.mark.parametrize("num_tokens", [1, 3])
def test_windows_keep_their_limits_and_every_picture_its_text(num_tokens, loss_before_image):
    encode = encoder(num_tokens)
    image_id = encode.tokenizer.convert_tokens_to_ids("<image>")
    for seed in range(300):
        rng = random.Random(seed)
        parts = random_document(rng)
        window = {"max_tokens": rng.randint(num_tokens + 2, 40), "max_images": rng.randint(1, 4)}
        options = {**window, "loss_before_image": loss_before_image}
        found = cut(parts, encode, random.Random(seed), **options)
        assert found == cut(parts, encode, random.Random(seed), **options)
        ids = found.input_ids
        assert len(ids) == len(found.labels) <= window["max_tokens"]
        assert ids[0] == encode.bos()[0]
        assert image_id not in found.labels
        assert ids.count(image_id) == len(found.images) * num_tokens
        assert len(found.images) <= window["max_images"]
        assert found.images == sorted(set(found.images))
        # Whole pictures only, and text after the last of them.
        runs = "".join("i" if token == image_id else "t" for token in ids).split("t")
        assert all(len(run) % num_tokens == 0 for run in runs)
        assert ids[-1] != image_id
        if not loss_before_image:
            assert found.images
            seen = ids.index(image_id)
            assert set(found.labels[:seen]) == {IGNORE}
        learned = [label for label in found.labels if label != IGNORE]
        assert learned == [i for i, label in zip(ids, found.labels, strict=True) if label == i]
        assert learned


def texts(parts: tuple[str | int, ...], encode: PromptEncoder, **limits: Any) -> set[str]:
    found = (cut(parts, encode, random.Random(seed), **limits) for seed in range(60))
    return {read(encode, one.input_ids).replace("<image>", "I") for one in found}


def test_a_window_begins_anywhere_where_it_is_full():
    encode = encoder(1)
    parts = (0, "a", 1, "b", 2, "c", 3, "d")
    assert texts(parts, encode) == {"<s>Ia</s>Ib</s>Ic</s>Id</s>"}
    assert texts(parts, encode, max_images=3) == {
        "<s>Ia</s>Ib</s>Ic</s>",
        "<s>Ib</s>Ic</s>Id</s>",
    }
    assert texts(parts, encode, max_tokens=7) == {
        "<s>Ia</s>Ib</s>",
        "<s>Ib</s>Ic</s>",
        "<s>Ic</s>Id</s>",
    }
    first = cut(parts, encode, max_images=3)
    assert read(encode, first.input_ids).replace("<image>", "I") == "<s>Ia</s>Ib</s>Ic</s>"


def test_long_text_before_the_first_picture_is_left_out():
    encode = encoder(1)
    assert texts(("intro", 0, "ab"), encode, max_tokens=9) == {"<s>intro</s>Ia", "<s>Iab</s>"}
    assert texts(("intro", 0, "ab"), encode, max_tokens=8) == {"<s>Iab</s>"}
    learned = texts(("intro", 0, "ab"), encode, max_tokens=8, loss_before_image=True)
    assert learned == {"<s>intro</s>", "<s>Iab</s>"}


def test_of_a_long_row_of_pictures_the_last_are_kept():
    encode = encoder(2)
    assert cut((0, 1, 2, "a"), encode, max_images=2).images == [1, 2]
    assert cut((0, 1, 2, "a"), encode, max_tokens=6).images == [1, 2]
    assert cut((0, 1, 2, "a"), encode, max_tokens=5).images == [2]


def test_without_text_that_is_learned_there_is_no_window():
    encode = encoder()
    for parts in ((), (0,), ("a",), ("a", 0), (0, " ")):
        document = Document("k", parts, (b"",))
        assert excerpt(document, encode, Window()) is None
    for parts in ((), (0,), (0, " ")):
        assert excerpt(Document("k", parts, (b"",)), encode, Window(loss_before_image=True)) is None
    assert cut(("a",), encode, loss_before_image=True).images == []


def test_only_pictures_of_the_window_are_decoded(monkeypatch):
    decoded = []

    def count(data: bytes) -> Image.Image:
        decoded.append(data)
        return Image.new("RGB", (4, 4))

    monkeypatch.setattr("bridges.preprocess.open_image", count)
    parts = [part for k in range(9) for part in ({"image": k}, f"text {k}")]
    members = {f"_{k}_jpg": bytes([k]) for k in range(9)}
    decode = DocumentDecoder(tiny.DECODER, encoder(), Window(max_images=2), random_start=True)
    sample = decode(raw_of({"parts": parts}, seed="4", **members))
    assert len(sample["images"]) == 2
    assert decoded == [bytes([k]) for k in sample["excerpt"].images]


@pytest.mark.parametrize("cached", [False, True])
def test_a_picture_in_several_places_is_decoded_once(monkeypatch, cached):
    decoded = []
    monkeypatch.setattr(
        "bridges.preprocess.open_image",
        lambda data: decoded.append(data) or Image.new("RGB", (4, 4)),
    )
    raw = raw_of(
        {"parts": [part for k in range(4) for part in ({"image": 0}, f"{k}")]}, _0_jpg=b"x"
    )
    if cached:
        assert len(DOCUMENTS.read(raw, tiny.DECODER)[0]) == 1
    else:
        decode = DocumentDecoder(tiny.DECODER, encoder(), Window(), random_start=False)
        assert len(decode(raw)["images"]) == 4
    assert decoded == [b"x"]


def test_the_seed_of_the_sample_draws_the_window():
    parts = [part for k in range(9) for part in ({"image": k}, f"text {k}")]
    members = {f"_{k}_jpg": picture(k) for k in range(9)}

    def drawn(seed: int, training: bool) -> tuple[int, ...]:
        decode = DocumentDecoder(tiny.DECODER, encoder(), Window(max_images=2), training)
        return tuple(decode(raw_of({"parts": parts}, seed=str(seed), **members))["excerpt"].images)

    assert {drawn(seed, True) for seed in range(60)} == {(k, k + 1) for k in range(8)}
    assert [drawn(seed, True) for seed in range(9)] == [drawn(seed, True) for seed in range(9)]
    assert {drawn(seed, False) for seed in range(9)} == {(0, 1)}


def test_a_document_without_a_picture_is_a_bad_sample_unless_its_text_is_learned():
    text_only = raw_of({"parts": ["only text"]})
    decode = DocumentDecoder(tiny.DECODER, encoder(), Window(), random_start=False)
    with pytest.raises(SampleError, match=r"no text after a picture.*loss_before_image") as error:
        decode(text_only)
    assert error.value.kind == "no text after a picture"
    weak = {"parts": [{"image": 0, "similarity": 0.1}, "a"]}
    with pytest.raises(SampleError, match="no text after a picture"):
        DocumentDecoder(tiny.DECODER, encoder(), Window(min_similarity=0.2), False)(
            raw_of(weak, _0_jpg=picture())
        )
    lenient = DocumentDecoder(tiny.DECODER, encoder(), Window(loss_before_image=True), False)
    assert lenient(text_only)["images"] == []
    with pytest.raises(SampleError, match="no text; expected some"):
        lenient(raw_of({"parts": []}))


def test_a_broken_picture_is_named():
    decode = DocumentDecoder(tiny.DECODER, encoder(), Window(), random_start=False)
    with pytest.raises(SampleError, match=r"sample 'k'.*picture 0: .*begins with b'no") as error:
        decode(raw_of({"parts": [{"image": 4}, "a"]}, _4_jpg=b"no picture"))
    assert error.value.kind == "unreadable image"


# --- batches


@pytest.fixture(scope="module")
def model() -> VisionLanguageModel:
    torch.manual_seed(0)
    model = VisionLanguageModel.connect(
        tiny.vision_encoder(), tiny.language_model(), tiny.factory("perceiver_gated")
    )
    tiny.randomise(model.bridge)
    tiny.open_gates(model.bridge)
    return model


def in_each_form(n: int) -> Iterator[dict[str, Any]]:
    """Documents of one to four pictures, turn by turn in the three forms."""
    for k in range(n):
        images = [picture(20 * k + j) for j in range(1 + k % 4)]
        count = len(images)
        members = {f"{j}.png": data for j, data in enumerate(images)}
        if k % 3 == 0:
            parts = [p for j in range(count) for p in ({"image": j}, f"text {k} {j}")]
            yield {"__key__": f"{k}", "json": {"parts": parts}, **members}
        elif k % 3 == 1:
            info = [
                {
                    "matched_text_index": j,
                    "matched_sim": 0.3 - j / 10,
                    "image_base64": in_base64(data),
                }
                for j, data in enumerate(images)
            ]
            sentences = [f"text {k} {j}" for j in range(count)]
            yield {"__key__": f"{k}", "json": {"text_list": sentences, "image_info": info}}
        else:
            rows = [pair for j in range(count) for pair in ((f"u{j}", None), (None, f"t {k} {j}"))]
            urls, rows = zip(*rows, strict=True)
            meta = {"images": list(urls), "texts": list(rows)}
            yield {"__key__": f"{k}", "json": meta, **members}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("documents")
    write_shards(in_each_form(12), folder, "train", samples_per_shard=5)
    write_shards(in_each_form(5), folder, "val")
    return folder


def data_of(shards: Path, model: VisionLanguageModel, **options: Any) -> CaptionData:
    limits = {"batch_size": 3, "max_tokens": 40, "max_images": 3}
    data = CaptionData(str(shards), task="interleaved", **(limits | options))
    data.connect(model.vision, data.collator(model))
    return data


def loss_of(model: VisionLanguageModel, batch: Batch) -> torch.Tensor:
    assert isinstance(batch, CaptionBatch)
    text = batch.text
    features = batch.features(model.vision)
    return model(text.input_ids, text.attention_mask, text.labels, features).loss


class Trainer:
    """As much of one as a data module asks."""

    current_epoch = 1


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("num_workers", [0, 2])
def test_documents_become_batches_with_a_loss(shards, model, num_workers):
    data = data_of(shards, model, num_workers=num_workers)
    data.trainer = Trainer()  # pyright: ignore[reportAttributeAccessIssue]
    batches = list(data.train_dataloader())
    assert len(batches) == len(data.train_dataloader()) == 4
    keys = [s["key"] for batch in batches for s in batch.samples]
    assert sorted(keys) == sorted(str(k) for k in range(12))
    again = list(data.train_dataloader())
    for batch, same in zip(batches, again, strict=True):
        assert isinstance(batch, CaptionBatch)
        assert isinstance(same, CaptionBatch)
        assert torch.equal(batch.images, same.images)
        assert torch.equal(batch.text.input_ids, same.text.input_ids)
        assert batch.image_mask is not None
        assert batch.images.shape[:2] == batch.image_mask.shape
        assert batch.images.shape[2:] == (3, tiny.IMAGE_SIZE, tiny.IMAGE_SIZE)
        placeholders = (batch.text.input_ids == model.lm.image_token_id).sum(dim=1)
        assert torch.equal(placeholders, batch.image_mask.sum(dim=1) * model.bridge.num_tokens)
        assert not batch.images[~batch.image_mask].any()
        loss = loss_of(model, batch)
        loss.backward()
        assert torch.isfinite(loss)


def test_an_epoch_resumes_at_the_same_batch(shards, model):
    data = data_of(shards, model)
    data.trainer = Trainer()  # pyright: ignore[reportAttributeAccessIssue]
    whole = [batch.images for batch in data.train_dataloader()]
    loader = data.train_dataloader()
    loader.go_to(2)
    for batch, expected in zip(loader, whole[2:], strict=True):
        assert torch.equal(batch.images, expected)


def test_cached_features_are_those_of_the_pictures(shards, model, tmp_path):
    online, cached = data_of(shards, model), data_of(shards, model, feature_cache=str(tmp_path))
    pairs = zip(online.val_dataloader(), cached.val_dataloader(), strict=True)
    count = 0
    for batch, found in pairs:
        assert isinstance(batch, CaptionBatch)
        assert isinstance(found, CaptionBatch)
        assert found.grid == model.vision.shape.grid
        assert batch.image_mask is not None
        assert torch.equal(batch.image_mask, found.image_mask)
        for name in ("input_ids", "attention_mask", "labels"):
            assert torch.equal(getattr(batch.text, name), getattr(found.text, name))
        expected = batch.features(model.vision)
        real = batch.image_mask
        patches = found.features(model.vision).patches.float()
        torch.testing.assert_close(patches[real], expected.patches[real], rtol=2e-3, atol=2e-3)
        count += int(real.sum())
    assert count == 10
    # What a picture is worth is decided when the features are read, not when they are made.
    strict = data_of(shards, model, feature_cache=str(tmp_path), min_similarity=0.25)
    kept = [b.image_mask.sum() for b in strict.val_dataloader() if b.image_mask is not None]
    assert sum(kept) == 9
    assert len(list(tmp_path.glob("*/features.json"))) == 2


def test_text_alone_still_gives_every_parameter_a_gradient(model):
    collate = DocumentCollator.of(model, Window(max_tokens=40, loss_before_image=True))
    decode = collate.decoder(model.vision.image_decoder(), training=True)
    batch = collate([decode(raw_of({"parts": ["only text"]}, seed=str(s))) for s in range(2)])
    assert batch.images.shape == (2, 1, 3, tiny.IMAGE_SIZE, tiny.IMAGE_SIZE)
    assert batch.image_mask is not None
    assert not batch.image_mask.any()
    model.zero_grad()
    loss_of(model, batch).backward()
    assert all(p.grad is not None for p in model.bridge.parameters())


def test_a_window_that_cannot_hold_a_picture_is_refused(model):
    for limits in ({"max_tokens": 1}, {"max_images": 0}):
        with pytest.raises(ValueError, match=r"found max_images=.*data.max_tokens"):
            DocumentCollator.of(model, Window(**limits))
    with pytest.raises(ValueError, match="128"):
        DocumentCollator.of(model, Window(max_tokens=129))


def test_documents_are_trained_on_from_the_command_line(on_disk, shards, tmp_path):
    kept = [a for a in on_disk.arguments(tmp_path / "run") if not a.startswith("--data=")]
    options = [f"--data={shards}", "--data.task=interleaved", "--data.max_tokens=64"]
    run = train([*kept, *options, f"--data.feature_cache={tmp_path / 'cache'}"])
    assert "val_loss" in (run / "csv-0" / "metrics.csv").read_text()


def test_a_batch_is_pickled_for_spawned_workers(model):
    import pickle

    collate = DocumentCollator.of(model, Window(max_tokens=40))
    again = pickle.loads(pickle.dumps(collate))
    assert again.window == collate.window
    decode = pickle.loads(pickle.dumps(collate.decoder(tiny.DECODER, training=True)))
    sample = decode(raw_of({"parts": [{"image": 0}, "a"]}, _0_png=picture()))
    assert again([sample]).text.input_ids.shape[0] == 1
    assert isinstance(documents_window.Excerpt([1], [1], []), Excerpt)
