"""Retrieval over shards: the figures, by hand; what is left out; the page."""

import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import tiny_run
import torch
from PIL import Image
from torch import Tensor

from bridges import VisionFeatures
from bridges.prompts import encode_text
from recipes import cli
from recipes.gallery import Gallery
from recipes.retrieve import held_out_shards, retrieve, score
from recipes.shard_writer import write_shards

PICTURES = 9


def sample(index: int) -> dict[str, object]:
    """A picture of its own colours with one to three captions, some of them shared."""
    pixels = torch.randint(0, 255, (6, 6, 3), generator=torch.Generator().manual_seed(index))
    png = io.BytesIO()
    Image.fromarray(pixels.byte().numpy()).resize((40, 30)).save(png, "PNG")
    texts = [f"scene {index}", "a cat on a red background", f"a dog on {index} green"]
    return {
        "__key__": f"scene-{index}",
        "png": png.getvalue(),
        "json": {"captions": texts[: 1 + index % 3]},
    }


@pytest.fixture(scope="module")
def stage1(on_disk, tmp_path_factory):
    """The folder, the encoder and the model of a run."""
    folder = tmp_path_factory.mktemp("stage1")
    return folder, *tiny_run.save_stage1_run(folder, on_disk.vision)


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    write_shards((sample(i) for i in range(3)), folder, "train")
    write_shards((sample(i) for i in range(5)), folder, "val")
    # A key is unique in its shard only.
    again = (sample(i) | {"__key__": f"scene-{i - 5}"} for i in range(5, PICTURES))
    write_shards(again, folder, "dev")
    return folder


def run(*arguments: object) -> int:
    return cli.main(["retrieve", *map(str, arguments), "--device=cpu"])


@torch.no_grad()
def by_hand(encoder, model, samples) -> tuple[Tensor, Tensor, list[int]]:
    """ITC and ITM of every pair by itself, and the picture of each text."""
    texts = [(i, text) for i, s in enumerate(samples) for text in s["captions"]]
    images = [encoder.encode(s["image"][None, None]) for s in samples]
    words = [encode_text(model.qformer.tokenizer, [text], 32) for _, text in texts]
    itc, itm = torch.zeros(2, len(images), len(texts))
    for i, image in enumerate(images):
        for j, word in enumerate(words):
            itc[i, j] = (model.image_embeddings(image)[0] @ model.text_embeddings(word)[0]).max()
            itm[i, j] = model.match(image, word)[0, 1]
    return itc, itm, [i for i, _ in texts]


def hits(scores: Tensor, own: list[int], others: list[int], k: int) -> float:
    """Share of rows with a column of the same picture among the first k."""
    best = [row.argsort(descending=True)[:k].tolist() for row in scores]
    return sum(any(others[c] == own[r] for c in row) for r, row in enumerate(best)) / len(best)


def in_memory(encoder) -> list[dict[str, object]]:
    found = []
    for index in range(PICTURES):
        raw = sample(index)
        picture = Image.open(io.BytesIO(raw["png"]))
        captions = [f"{text} {index}" for text in raw["json"]["captions"]]  # no duplicates: no ties
        found.append({"captions": captions, "image": encoder.preprocess(picture)})
    return found


@pytest.mark.parametrize("top_k", [3, 128])
@pytest.mark.parametrize("batch_size", [2, 32])
def test_scores_are_those_of_every_pair_by_itself(stage1, top_k: int, batch_size: int):
    _, encoder, model = stage1
    samples = in_memory(encoder)
    itc, itm, _ = by_hand(encoder, model, samples)
    found = score(model, Gallery.collect(samples, encoder, batch_size), top_k, batch_size, 32)
    torch.testing.assert_close(found.itc, itc)
    for scores, by_itc, by_itm in (
        (found.itm_texts, itc, itc + itm),
        (found.itm_images, itc.T, (itc + itm).T),
    ):
        first = by_itc.argsort(dim=1, descending=True)
        judged, rest = first[:, :top_k], first[:, top_k:]
        torch.testing.assert_close(scores.gather(1, judged), by_itm.gather(1, judged))
        torch.testing.assert_close(scores.gather(1, rest), by_itc.gather(1, rest) - 100)


def test_the_figures_of_both_directions(stage1):
    _, encoder, model = stage1
    samples = in_memory(encoder)
    itc, itm, of = by_hand(encoder, model, samples)
    found, pictures = retrieve(model, encoder, samples), list(range(PICTURES))
    for kind, scores in (("itc", itc), ("itm", itc + itm)):
        for k in (1, 5, 10):
            to_image = found[kind]["text_to_image"][f"recall@{k}"]
            assert to_image == pytest.approx(hits(scores.T, of, pictures, k))
            to_text = found[kind]["image_to_text"][f"recall@{k}"]
            assert to_text == pytest.approx(hits(scores, pictures, of, k))
    assert found["itc"] != found["itm"]
    assert (found["images"], found["texts"]) == (PICTURES, 18)
    assert found["duplicate_captions"] == 0
    assert found["random"]["image_to_text"]["recall@1"] == pytest.approx(18 / PICTURES / 18)


def test_features_do_as_well_as_pictures(stage1):
    _, encoder, model = stage1
    samples = in_memory(encoder)
    features = [
        {
            "captions": s["captions"],
            "features": encoder.encode(s["image"][None, None]).patches[0, 0],
        }
        for s in samples
    ]
    assert retrieve(model, encoder, features) == retrieve(model, encoder, samples)


def test_one_image_may_be_matched_with_many_texts(stage1):
    """What makes re-ranking cheap: the image is projected once for all its candidates."""
    _, encoder, model = stage1
    patches = torch.randn(1, 1, encoder.shape.num_patches, encoder.shape.dim)
    image = VisionFeatures(patches, torch.ones(1, 1, dtype=torch.bool), encoder.shape.grid)
    texts = encode_text(model.qformer.tokenizer, ["a cat", "a dog on a red background", "x"], 32)
    thrice = VisionFeatures(
        patches.expand(3, -1, -1, -1), torch.ones(3, 1, dtype=torch.bool), encoder.shape.grid
    )
    with torch.no_grad():
        together, apart = model.match(image, texts), model.match(thrice, texts)
    torch.testing.assert_close(together, apart)


def test_the_command_writes_figures_and_a_page(stage1, shards, tmp_path, capsys):
    out = tmp_path / "out"
    assert run("--run", stage1[0], "--data", shards, "--out", out, "--top_k=4") == 0
    result = json.loads((out / "retrieval.json").read_text())
    assert (result["images"], result["texts"], result["top_k"]) == (PICTURES, 18, 4)
    # "a cat on a red background" stands under six of the nine pictures.
    assert result["duplicate_captions"] == 6
    assert result["skipped"] == {}
    assert result["random"]["text_to_image"]["recall@1"] == pytest.approx(1 / PICTURES)
    shares = [v for k in ("itc", "itm") for d in result[k].values() for v in d.values()]
    assert len(shares) == 12
    assert all(0 <= share <= 1 for share in shares)
    page = (out / "retrieval.html").read_text()
    HTMLParser().feed(page)
    assert "data:image/jpeg;base64," in page
    assert 'class="item right"' in page
    # Self-contained: nothing is fetched.
    assert not re.search(r"""(src|href)=["'](?!data:|#)""", page)
    assert "recall@10" in capsys.readouterr().out


def test_cached_features_give_the_same(stage1, shards, tmp_path):
    for name, options in {"now": [], "cached": [f"--feature_cache={tmp_path / 'cache'}"]}.items():
        assert run("--run", stage1[0], "--data", shards, "--out", tmp_path / name, *options) == 0
    now, cached = (
        json.loads((tmp_path / n / "retrieval.json").read_text()) for n in ("now", "cached")
    )
    for kind in ("itc", "itm", "random"):
        for direction, shares in now[kind].items():
            assert cached[kind][direction] == pytest.approx(shares)
    # The pictures on the page are found by their names in the shards with pictures.
    pages = [(tmp_path / n / "retrieval.html").read_text() for n in ("now", "cached")]
    pictures = [re.findall(r"data:image/jpeg;base64,[^\"]+", page) for page in pages]
    assert pictures[0] == pictures[1]


def test_shards_of_features_alone_show_texts_for_pictures(stage1, shards, tmp_path):
    arguments = ["--run", stage1[0], "--out", tmp_path, f"--feature_cache={tmp_path / 'cache'}"]
    assert run(*arguments, "--data", shards) == 0
    before = json.loads((tmp_path / "retrieval.json").read_text())
    assert run(*arguments, "--data", tmp_path / "cache" / "*" / "{val,dev}-*.tar") == 0
    assert json.loads((tmp_path / "retrieval.json").read_text()) == before
    page = (tmp_path / "retrieval.html").read_text()
    assert "data:image" not in page
    assert re.search(r'class="item right"><p>scene \d', page)


def test_a_bad_picture_is_counted_and_left_out_once(stage1, tmp_path):
    bad = sample(4) | {"png": b"no picture"}
    samples = [bad if i == 4 else sample(i) for i in range(PICTURES)]
    write_shards(samples, tmp_path / "shards", "val")
    for name, options in {"now": [], "cached": [f"--feature_cache={tmp_path / 'cache'}"]}.items():
        out = tmp_path / name
        assert run("--run", stage1[0], "--data", tmp_path / "shards", "--out", out, *options) == 0
        result = json.loads((out / "retrieval.json").read_text())
        assert result["images"] == PICTURES - 1
        assert list(result["skipped"].values()) == [1]


def test_a_limit_takes_the_first_pictures_with_all_their_texts(stage1, shards, tmp_path):
    arguments = ["--run", stage1[0], "--data", shards, "--out", tmp_path, "--limit=4"]
    assert run(*arguments) == 0
    result = json.loads((tmp_path / "retrieval.json").read_text())
    assert (result["images"], result["texts"]) == (4, 1 + 2 + 3 + 1)


def test_held_out_shards_are_those_of_a_folder(shards, tmp_path, capsys, stage1):
    names = [path.name for path in held_out_shards(str(shards))]
    assert names == ["val-000000.tar", "dev-000000.tar"]
    assert [p.name for p in held_out_shards(f"{shards}/train-*.tar")] == ["train-000000.tar"]
    write_shards([sample(0)], tmp_path / "shards", "train")
    assert run("--run", stage1[0], "--data", tmp_path / "shards", "--out", tmp_path) == 2
    assert "no val-*.tar" in capsys.readouterr().err


def test_one_picture_is_no_gallery(stage1, shards, tmp_path, capsys):
    arguments = ["--run", stage1[0], "--data", shards, "--out", tmp_path, "--limit=1"]
    assert run(*arguments) == 2
    assert "expected at least 2" in capsys.readouterr().err
