"""A packed batch is the padded one: its loss, its gradients, its samples."""

import csv
import pickle
import random
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import tiny
import tiny_run
import torch
from torch import Tensor

from bridges import LoRA, VisionLanguageModel, bridge_factory
from bridges.loss import IGNORE
from gated_xattn import reading
from recipes.batch import CaptionBatch, CaptionCollator
from recipes.documents_window import DocumentCollator, Excerpt, Window
from recipes.packing import PackingCollator, full_rows, pack
from recipes.train import train
from recipes.video import Clips

TEXTS = ["a cat", "x", "two dogs on a red sofa, and a lamp", "no", "some birds", "a long, long day"]

# --- which samples share a row


def width(rows: Sequence[Sequence[int]], lengths: Sequence[int]) -> int:
    return max(sum(lengths[sample] for sample in row) for row in rows)


def cost(rows: Sequence[Sequence[int]], lengths: Sequence[int], dim: int) -> int:
    """FLOPs of an LM's block but for a factor."""
    return len(rows) * width(rows, lengths) * (6 * dim + width(rows, lengths))


def test_every_sample_has_a_place_and_rows_cost_least():
    draw = random.Random(0)
    for _ in range(300):
        lengths = [1 + int(draw.expovariate(0.02)) for _ in range(draw.randint(1, 40))]
        limit = draw.choice([None, max(lengths), 2 * max(lengths), max(lengths) // 2 + 1])
        dim = draw.choice([32, 576, 4096])
        rows = full_rows(lengths, dim, limit)
        assert sorted(sample for row in rows for sample in row) == list(range(len(lengths)))
        assert width(rows, lengths) <= max(limit or sum(lengths), max(lengths))
        alone, together = [[k] for k in range(len(lengths))], [list(range(len(lengths)))]
        assert cost(rows, lengths, dim) <= cost(alone, lengths, dim)
        if limit is None:
            assert cost(rows, lengths, dim) <= cost(together, lengths, dim)
        assert full_rows(lengths, dim, limit) == rows


def test_rows_are_longer_where_that_saves_enough():
    assert full_rows([9, 9, 9], 576) == [[0], [1], [2]]
    assert full_rows([10, 5, 5, 10, 4, 3, 3], 576) == [[0], [1, 2], [3], [4, 5, 6]]
    # Three rows of 12 are 94 % full; one of 34 is longer, which a wide LM hardly sees.
    assert full_rows([6, 6, 6, 6, 10], 32) == [[0, 1], [2, 3], [4]]
    assert full_rows([6, 6, 6, 6, 10], 4096) == [[0, 1, 2, 3, 4]]
    # Where the limit leaves no other way, each has a row.
    assert full_rows([6, 6, 6, 6, 10], 576, limit=11) == [[0], [1], [2], [3], [4]]
    assert full_rows([6, 30, 6], 576, limit=11) == [[0, 2], [1]]


# --- what is computed

_SIZES = {"every": 1, "num_heads": 2, "head_dim": 8, "ff_mult": 2}
_CLIPS = {"num_latents": 3, "depth": 2, "num_heads": 2, "head_dim": 8, "num_frames": 4}
BRIDGES: dict[str, dict[str, Any]] = {
    **{kind: tiny.BRIDGES[kind] for kind in ("qformer", "perceiver", "perceiver_gated")},
    "gated_all": {
        "class_path": "gated_xattn.GatedXAttn",
        "init_args": {
            **_SIZES,
            "resampler": {"class_path": "perceiver.PerceiverResampler", "init_args": _CLIPS},
            "visible": "all",
        },
    },
    "gated_next": {
        "class_path": "gated_xattn.GatedXAttn",
        "init_args": {
            **_SIZES,
            "resampler": {"class_path": "perceiver.PerceiverResampler", "init_args": _CLIPS},
            "next_image_probability": 0.5,
        },
    },
}


def picture(seed: int, *shape: int) -> Tensor:
    size = (3, tiny.IMAGE_SIZE, tiny.IMAGE_SIZE)
    return torch.randn(*(shape or size), generator=torch.Generator().manual_seed(seed))


def described(index: int, text: str) -> dict[str, Any]:
    return {"key": f"{index}", "captions": [text], "meta": {}}


def captions() -> list[dict[str, Any]]:
    return [{**described(k, text), "image": picture(k)} for k, text in enumerate(TEXTS)]


def cached() -> list[dict[str, Any]]:
    samples = enumerate(TEXTS)
    return [{**described(k, text), "features": picture(k, 9, 16)} for k, text in samples]


def clips() -> list[dict[str, Any]]:
    size = (4, 3, tiny.IMAGE_SIZE, tiny.IMAGE_SIZE)
    return [
        {
            **described(k, text),
            "image": picture(k, *size),
            "frame_mask": torch.arange(4) < 1 + k % 4,
        }
        for k, text in enumerate(TEXTS)
    ]


def questions() -> list[dict[str, Any]]:
    asked = ["what is it?", "a", "where are the dogs, and whose?", "is it?", "b c", "when was it?"]
    return [
        {**sample, "question": question, "answer": sample["captions"][0]}
        for sample, question in zip(captions(), asked, strict=True)
    ]


def documents(model: VisionLanguageModel) -> list[dict[str, Any]]:
    """Windows of 0 to 3 pictures, some with text before the first."""
    encode = model.prompt_encoder()
    layouts = ["ab", "iat", "iaib", "aibiici", "b", "iiiab", "ti"]
    samples = []
    for k, layout in enumerate(layouts):
        ids, labels, images = encode.bos(), [IGNORE], []
        for letter in layout:
            if letter == "i":
                images.append(picture(10 * k + len(images)))
                new, lossy = encode.document([None])
            else:
                new, lossy = encode.document([letter * (1 + 3 * k)])
            ids = ids + new
            labels = labels + [t if may else IGNORE for t, may in zip(new, lossy, strict=True)]
        excerpt = Excerpt(ids, labels, list(range(len(images))))
        samples.append({**described(k, layout), "excerpt": excerpt, "images": images})
    return samples


def model_of(family: str, bridge: dict[str, Any], **options: Any) -> VisionLanguageModel:
    torch.manual_seed(0)
    lm = tiny.language_model(family, **options)
    model = VisionLanguageModel.connect(tiny.vision_encoder(), lm, bridge_factory(bridge))
    tiny.randomise(model.bridge)
    tiny.open_gates(model.bridge)
    return model


def step(model: VisionLanguageModel, batch: CaptionBatch) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients of all that is trained."""
    model.zero_grad()
    text = batch.text
    features = batch.features(model.vision)
    loss = model(
        text.input_ids,
        text.attention_mask,
        text.labels,
        features,
        batch.instruction,
        segments=batch.segments,
    ).loss
    loss.backward()
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    assert trained
    return loss.detach(), {n: p.grad.clone() for n, p in trained if p.grad is not None}


def difference(model: VisionLanguageModel, one: CaptionBatch, two: CaptionBatch) -> float:
    """Largest difference of the loss, and of any gradient beside the largest of its tensor."""
    (loss, gradients), (other, others) = step(model, one), step(model, two)
    assert gradients.keys() == others.keys()
    found = [float((loss - other).abs())]
    for name, gradient in gradients.items():
        scale = max(1.0, float(gradient.abs().max()))
        found.append(float((gradient - others[name]).abs().max()) / scale)
    return max(found)


def both(collate: CaptionCollator | DocumentCollator, model: VisionLanguageModel, samples: Any):
    """A batch, padded and packed."""
    return collate(samples), PackingCollator.of(model, collate)(samples)


@pytest.mark.parametrize(
    ("kind", "grouped"),
    [*((kind, False) for kind in BRIDGES), ("perceiver_gated", True), ("gated_next", True)],
)
def test_packed_documents_are_the_padded_ones(
    kind: str, grouped: bool, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(reading, "grouping_is_faster", lambda *_: grouped)
    model = model_of("llama", BRIDGES[kind], end_of_chunk="<eoc>", lora=LoRA(r=2))
    collate = DocumentCollator.of(model, Window(max_tokens=100, loss_before_image=True))
    padded, packed = both(collate, model, documents(model))
    assert len(packed.text.input_ids) < len(padded.text.input_ids)
    assert packed.fill > padded.fill
    assert difference(model, padded, packed) < 1e-5
    # Without segments, samples see each other's text and pictures: the test can fail.
    assert packed.segments is not None
    real = packed.image_mask
    assert real is not None
    counts = (packed.text.input_ids == model.lm.image_token_id).sum(1) // model.bridge.num_tokens
    mixed = packed.images.new_zeros(len(counts), int(counts.max()), *packed.images.shape[2:])
    mask = torch.arange(mixed.shape[1]) < counts[:, None]
    mixed[mask] = packed.images[real]
    joined = CaptionBatch(mixed, None, packed.samples, mask, text=packed.text)
    assert difference(model, padded, joined) > 1e-3


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
@pytest.mark.parametrize("samples", [captions, cached])
@pytest.mark.parametrize("kind", ["qformer", "perceiver", "perceiver_gated"])
def test_packed_captions_are_the_padded_ones(
    kind: str, samples: Callable[[], list[dict[str, Any]]], family: str
):
    model = model_of(family, BRIDGES[kind])
    padded, packed = both(CaptionCollator.of(model), model, samples())
    assert len(packed.text.input_ids) < len(padded.text.input_ids)
    assert difference(model, padded, packed) < 1e-5
    # In another order, samples stand in other rows.
    shuffled = samples()
    random.Random(1).shuffle(shuffled)
    _, other = both(CaptionCollator.of(model), model, shuffled)
    assert [s["key"] for s in other.samples] != [s["key"] for s in packed.samples]
    assert difference(model, padded, other) < 1e-5


def test_packed_clips_are_the_padded_ones():
    model = model_of("llama", BRIDGES["gated_all"])
    padded, packed = both(CaptionCollator.of(model, clips=Clips(4, 1.0)), model, clips())
    assert difference(model, padded, packed) < 1e-5


def test_an_instruction_stays_with_its_picture(tmp_path: Path):
    tiny_run.save_tokenizer(tmp_path)
    sizes = {"num_queries": 3, "dim": 16, "depth": 2, "num_heads": 2, "tokenizer": str(tmp_path)}
    resampler = {"class_path": "qformer.QFormer", "init_args": sizes}
    bridge = {"class_path": "bridges.SoftPrefix", "init_args": {"resampler": resampler}}
    model = model_of("llama", bridge)
    model.prompt = "<image>Q: {question} A:"
    padded, packed = both(CaptionCollator.of(model, questions=True), model, questions())
    assert padded.instruction is not None
    assert len(packed.text.input_ids) < len(padded.text.input_ids)
    assert difference(model, padded, packed) < 1e-5
    wrong = packed.to("cpu")
    assert wrong.instruction is not None
    wrong.instruction.input_ids[:] = packed.instruction.input_ids.roll(1, 0)
    wrong.instruction.attention_mask[:] = packed.instruction.attention_mask.roll(1, 0)
    assert difference(model, padded, wrong) > 1e-5


@pytest.mark.parametrize("kind", ["perceiver", "perceiver_gated"])
def test_packed_text_alone_gives_every_parameter_a_gradient(kind: str):
    model = model_of("llama", BRIDGES[kind])
    collate = DocumentCollator.of(model, Window(max_tokens=100, loss_before_image=True))
    texts = [sample for sample in documents(model) if not sample["images"]]
    padded, packed = both(collate, model, [*texts, *texts[:1]])
    assert len(packed.text.input_ids) < len(padded.text.input_ids)
    assert difference(model, padded, packed) < 1e-5
    _, gradients = step(model, packed)
    assert {f"bridge.{name}" for name, _ in model.bridge.named_parameters()} <= gradients.keys()


def test_the_next_picture_is_drawn_for_each_sample(monkeypatch: pytest.MonkeyPatch):
    """Of a packed row, too, one sample may read its next pictures and another its latest."""
    model = model_of("llama", BRIDGES["gated_next"]).train()
    collate = DocumentCollator.of(model, Window(max_tokens=100, loss_before_image=True))
    padded, packed = both(collate, model, documents(model))
    order = [int(sample["key"]) for sample in packed.samples]
    draws = torch.tensor([0.9, 0.9, 0.1, 0.1, 0.9, 0.1, 0.9])
    followed: dict[str, Any] = {}
    for name, batch, drawn in (("padded", padded, draws), ("packed", packed, draws[order])):
        monkeypatch.setattr(torch, "rand", lambda *_, found=drawn, **__: found)
        followed[name] = step(model, batch)
    torch.testing.assert_close(followed["packed"], followed["padded"], rtol=1e-4, atol=1e-5)
    monkeypatch.setattr(torch, "rand", lambda *_, **__: draws.roll(1))
    assert not torch.allclose(step(model, packed)[0], followed["padded"][0], atol=1e-4)


# --- what a batch holds


def test_a_packed_batch_says_where_its_samples_are():
    model = model_of("llama", BRIDGES["perceiver"])
    collate = CaptionCollator.of(model)
    samples = captions()
    padded, packed = both(collate, model, samples)
    order = [int(sample["key"]) for sample in packed.samples]
    assert sorted(order) == list(range(len(samples)))
    assert len(packed) == len(samples)
    segments, text = packed.segments, packed.text
    assert segments is not None
    for place, sample in enumerate(order):
        assert torch.equal(packed.images[place, 0], samples[sample]["image"])
        columns = (segments == place) & text.attention_mask
        real = padded.text.attention_mask[sample]
        assert torch.equal(text.input_ids[columns], padded.text.input_ids[sample][real])
        assert torch.equal(text.labels[columns], padded.text.labels[sample][real])
    assert not (text.labels[~text.attention_mask] != IGNORE).any()
    moved = packed.to("meta")
    assert moved.segments is not None
    assert moved.segments.device.type == "meta"


def test_rows_stay_within_the_context():
    model = model_of("llama", BRIDGES["perceiver"])
    encode = model.prompt_encoder()
    batch = CaptionCollator.of(model)(captions())
    longest = int(batch.text.attention_mask.sum(dim=1).max())
    assert pack(batch, encode, 32, longest).text.input_ids.shape[1] <= longest
    assert pack(batch, encode, 4096).text.input_ids.shape[1] > longest
    assert PackingCollator.of(model, CaptionCollator.of(model)).limit == 128


def test_the_collator_is_pickled_for_spawned_workers():
    model = model_of("llama", BRIDGES["perceiver"])
    collate = PackingCollator.of(model, CaptionCollator.of(model))
    again: PackingCollator = pickle.loads(pickle.dumps(collate))
    found, expected = again(captions()), collate(captions())
    assert torch.equal(found.text.input_ids, expected.text.input_ids)
    decode = again.decoder(tiny.DECODER, training=True)
    assert type(decode) is type(collate.collate.decoder(tiny.DECODER, training=True))


def test_an_lm_that_would_mix_samples_is_refused_before_the_first_step():
    model = model_of("opt", BRIDGES["perceiver"])
    with pytest.raises(ValueError, match=r"type 'opt'.*leave data\.pack"):
        PackingCollator.of(model, CaptionCollator.of(model))


# --- from the command line


def metrics(run: Path) -> list[dict[str, str]]:
    with (run / "csv-0" / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def test_a_packed_run_is_the_padded_one(on_disk, tmp_path):
    runs = {
        pack: metrics(train(on_disk.arguments(tmp_path / pack, f"--data.pack={pack}")))
        for pack in ("false", "true")
    }
    for name in ("loss", "val_loss"):
        padded, packed = ([float(r[name]) for r in runs[p] if r[name]] for p in runs)
        assert padded
        assert packed == pytest.approx(padded, abs=1e-4)
    fills = {pack: [float(r["fill"]) for r in rows if r["fill"]] for pack, rows in runs.items()}
    assert min(fills["true"]) > 0.8
    assert len(fills["false"]) == 4


def test_a_run_of_opt_cannot_be_packed(on_disk, tmp_path):
    folder = tmp_path / "opt"
    tiny.causal_lm("opt").save_pretrained(folder)
    tiny.make_tokenizer(image_token=False).save_pretrained(folder)
    arguments = on_disk.arguments(tmp_path / "run", "--data.pack=true")
    arguments = [re.sub(r"(--model\.lm\.name)=.*", rf"\1={folder}", a) for a in arguments]
    with pytest.raises(ValueError, match=r"leave data\.pack"):
        train(arguments)
    assert not (tmp_path / "run").exists()
