"""Instruction tuning: which question and answer are read, where they go, what the loss is on."""

import io
import json
from pathlib import Path

import pytest
import tiny
import torch
import transformers as hf
from tokenizers import Regex, Tokenizer, models, pre_tokenizers

import bridges
from bridges import PromptEncoder, VisionLanguageModel, bridge_factory, caption_features
from bridges.loss import IGNORE
from bridges.prompts import CAPTION_INSTRUCTION, encode_instruction, encode_text
from qformer import QFormer
from qformer.tokens import load_tokenizer
from recipes import cli
from recipes.batch import CaptionBatch, CaptionCollator, CaptionDecoder
from recipes.evaluate import HeldOut, caption_nll
from recipes.samples import SampleError, read_questions
from recipes.shard_writer import write_shards
from recipes.train import train

PROMPT = "<image>Question: {question} Answer:"
QA = [{"question": f"which {n}?", "answer": f"the {n}"} for n in ("one", "two", "three")]


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tokenizer with [CLS] and [SEP], one token for each small letter and space."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    vocabulary = {t: i for i, t in enumerate([*special, *"abcdefghijklmnopqrstuvwxyz ?.[]DEC"])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    names = ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token")
    folder = tmp_path_factory.mktemp("bert")
    hf.PreTrainedTokenizerFast(
        tokenizer_object=core, **dict(zip(names, special, strict=True))
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def qformer(bert) -> dict:
    sizes = {"num_queries": 3, "dim": 16, "depth": 2, "num_heads": 2, "tokenizer": str(bert)}
    return {
        "class_path": "bridges.SoftPrefix",
        "init_args": {"resampler": {"class_path": "qformer.QFormer", "init_args": sizes}},
    }


@pytest.fixture(scope="module")
def model(qformer) -> VisionLanguageModel:
    torch.manual_seed(0)
    model = VisionLanguageModel.connect(
        tiny.vision_encoder(), tiny.language_model(), bridge_factory(qformer), prompt=PROMPT
    )
    tiny.randomise(model.bridge)
    return model


def raw_of(meta: dict, seed: str = "0", **more: bytes) -> dict:
    tiny.Image.new("RGB", (8, 8)).save(png := io.BytesIO(), "PNG")
    named = {"__key__": "a", "__shard__": "s", "__seed__": seed}
    return {"png": png.getvalue(), "json": json.dumps(meta).encode(), **more, **named}


def sample_of(question: str | None, answer: str) -> dict:
    image = torch.zeros(3, tiny.IMAGE_SIZE, tiny.IMAGE_SIZE)
    found = {"key": "a", "captions": [answer], "meta": {}, "image": image}
    return found if question is None else {**found, "question": question, "answer": answer}


def words(encoder: PromptEncoder, ids: torch.Tensor) -> str:
    return "".join(encoder.tokenizer.convert_ids_to_tokens(ids.tolist()))


# --- what a sample says


def test_a_question_is_drawn_by_the_seed_and_the_first_one_validates():
    def drawn(seed: int, training: bool) -> tuple[str, str]:
        decode = CaptionDecoder(tiny.DECODER, random_caption=training, questions=True)
        sample = decode(raw_of({"qa": QA, "caption": "c"}, str(seed)))
        return sample["question"], sample["answer"]

    pairs = {(pair["question"], pair["answer"]) for pair in QA}
    assert {drawn(seed, True) for seed in range(40)} == pairs
    assert [drawn(seed, True) for seed in range(9)] == [drawn(seed, True) for seed in range(9)]
    assert {drawn(seed, False) for seed in range(9)} == {("which one?", "the one")}


def test_a_sample_may_have_only_questions_or_only_captions():
    decode = CaptionDecoder(tiny.DECODER, random_caption=True, questions=True)
    assert decode(raw_of({"qa": QA}))["question"]
    for meta in ({"caption": "a cat"}, {"caption": "a cat", "qa": []}):
        sample = decode(raw_of(meta))
        assert (sample["question"], sample["answer"]) == (None, "a cat")
    plain = CaptionDecoder(tiny.DECODER, random_caption=True)(raw_of({"caption": "c", "qa": QA}))
    assert "question" not in plain


def test_one_question_needs_no_list():
    assert read_questions(raw_of({"qa": QA[0]})) == read_questions(raw_of({"qa": QA[:1]}))
    assert read_questions({}) == []


@pytest.mark.parametrize("meta", [b"[1]", b'{"qa": "\\ud800"}', b"no json"])
def test_questions_in_damaged_json_are_a_bad_sample(meta):
    with pytest.raises(SampleError, match="json") as error:
        read_questions({**raw_of({}), "json": meta})
    assert error.value.kind == "unreadable json"


@pytest.mark.parametrize(
    "qa", [[{"question": "q"}], [{"question": "q", "answer": " "}], ["q"], {"q": "a"}, [None]]
)
def test_a_question_without_an_answer_is_refused(qa):
    decode = CaptionDecoder(tiny.DECODER, random_caption=False, questions=True)
    with pytest.raises(ValueError, match="in qa; expected"):
        decode(raw_of({"qa": qa, "caption": "c"}))


# --- where the question goes


def test_the_loss_is_on_the_answer_only(model):
    batch = CaptionCollator.of(model)([sample_of("which?", "this"), sample_of(None, "a cat")])
    encoder, text = model.prompt_encoder(), batch.text
    labels = [words(encoder, row[row != IGNORE]) for row in text.labels]
    assert labels == [" this</s>", " a cat</s>"]
    rows = [words(encoder, r[m]) for r, m in zip(text.input_ids, text.attention_mask, strict=True)]
    assert rows[0] == "<image>" * 3 + "Question: which? Answer: this</s>"
    assert rows[1] == "<image>" * 3 + f"Question: {CAPTION_INSTRUCTION} Answer: a cat</s>"


@pytest.mark.parametrize("template", [PROMPT, "<image><{question}>", "{question}<image>"])
@pytest.mark.parametrize("question", ["<image>", "a <image></s> b", "image", "{question}", "</s>"])
def test_a_question_is_text_whatever_it_says(template, question):
    encoder = PromptEncoder(tiny.make_tokenizer(), "<image>", 2)
    text = encoder([template], questions=[question])
    ids = text.input_ids[0]
    image_id, eos = (encoder.tokenizer.convert_tokens_to_ids(t) for t in ("<image>", "</s>"))
    assert (ids == image_id).sum() == 2
    assert not (ids == eos).any()
    read = words(encoder, ids)
    assert read == template.replace("<image>", "<image>" * 2).replace("{question}", question)


def test_special_tokens_of_the_prompt_itself_stay_special():
    encoder = PromptEncoder(tiny.make_tokenizer(), "<image>", 1)
    eos = encoder.tokenizer.eos_token_id
    for question in ("plain", "<image> </s>"):
        ids = encoder(["</s><image></s>{question}</s>"], questions=[question]).input_ids
        assert (ids == eos).sum() == 3


def test_a_prompt_with_a_question_needs_one():
    encoder = PromptEncoder(tiny.make_tokenizer(), "<image>", 1)
    with pytest.raises(ValueError, match=r"found '\{question\}' in prompt"):
        encoder([PROMPT])


def test_long_questions_are_cut_and_counted(model):
    samples = [sample_of("q" * n, "a") for n in (3, 4, 5)]
    batch = CaptionCollator.of(model, 4)(samples)
    assert batch.truncated_questions == 1
    assert batch.text.attention_mask.sum(dim=1).diff().tolist() == [1, 0]


def test_of_a_long_instruction_the_end_is_read(bert):
    tokenizer = load_tokenizer(str(bert))
    texts = ["a" * 200 + "b?", "[SEP] [DEC]", "a"]
    expected = encode_text(tokenizer, texts, 128, "left")
    found = encode_instruction(tokenizer, texts)
    assert torch.equal(expected.input_ids, found.input_ids)
    assert torch.equal(expected.attention_mask, found.attention_mask)
    assert tokenizer.convert_ids_to_tokens(found.input_ids[0, -3:]) == ["b", "?", "[SEP]"]


def test_a_batch_carries_its_instructions(model):
    batch = CaptionCollator.of(model)([sample_of("which?", "this"), sample_of(None, "a cat")])
    read = model.bridge.resampler.tokenizer.batch_decode(batch.instruction.input_ids)
    assert [r.replace(" ", "").startswith("[CLS]which?") for r in read] == [True, False]
    moved = batch.to("meta")
    assert isinstance(moved, CaptionBatch)
    for text in (moved.instruction, moved.text):
        assert text.input_ids.device.type == text.attention_mask.device.type == "meta"
    assert moved.images.device.type == "meta"


def test_the_question_changes_what_is_written(model):
    features = tiny.features_of(model, [1, 1])
    options = {"max_new_tokens": 6, "min_new_tokens": 6}
    blank = {**options, "prompt": "<image>Answer:"}  # the resampler alone reads the question
    usual = caption_features(model, features, **blank)
    assert usual == caption_features(model, features, question=CAPTION_INSTRUCTION, **blank)
    assert usual != caption_features(model, features, question="which?", **blank)
    assert caption_features(model, features, **options) != caption_features(
        model, features, question="which?", **options
    )


def test_a_question_that_nobody_reads_is_refused():
    model = VisionLanguageModel.connect(
        tiny.vision_encoder(), tiny.language_model(), tiny.factory("qformer")
    )
    with pytest.raises(ValueError, match="found question 'which"):
        caption_features(model, tiny.features_of(model, [1]), question="which?")


def test_scores_give_the_resampler_its_instruction(model, monkeypatch):
    seen = []
    inside = model.bridge.resampler.forward
    monkeypatch.setattr(
        model.bridge.resampler, "forward", lambda v, t=None: seen.append(t) or inside(v, t)
    )
    shape = model.vision.shape
    patches = torch.randn(3, shape.num_patches, shape.dim)
    caption_nll(model, HeldOut(patches, shape.grid, [sample_of(None, "a cat")] * 3))
    assert [text.input_ids.shape[0] for text in seen] == [3]


# --- from the command line


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("asked")
    samples = [raw_of({"qa": QA} if n % 2 else {"caption": "a cat"}) for n in range(16)]
    rows = [{"__key__": f"{n}", "png": s["png"], "json": json.loads(s["json"])}
            for n, s in enumerate(samples)]  # fmt: skip
    write_shards(iter(rows), folder, "train")
    write_shards(iter(rows[:4]), folder, "val")
    return folder


def arguments(on_disk, run: Path, asked: Path, bridge: dict, *more: str) -> list[str]:
    kept = [a for a in on_disk.arguments(run) if not a.startswith(("--model.bridge", "--data="))]
    return [
        *kept,
        f"--data={asked}",
        f"--model.bridge={json.dumps(bridge)}",
        "--data.task=instruction",
        f"--model.prompt={PROMPT}",
        *more,
    ]


def test_instruction_tuning_trains_and_answers(on_disk, tmp_path, asked, qformer, monkeypatch):
    seen, inside = [], QFormer.forward
    with monkeypatch.context() as patch:
        patch.setattr(QFormer, "forward", lambda q, v, t=None: seen.append(t) or inside(q, v, t))
        run = train(arguments(on_disk, tmp_path / "run", asked, qformer))
    assert seen
    assert None not in seen
    assert "val_loss" in (run / "csv-0" / "metrics.csv").read_text()
    model = bridges.load(run)
    assert model.prompt == PROMPT
    picture = [tiny.Image.new("RGB", (9, 9))]
    assert len(bridges.caption(model, picture, question="which?", max_new_tokens=4)) == 1
    picture[0].save(tmp_path / "a.png")
    command = ["caption", str(tmp_path / "a.png"), "--run", str(run), "--max_new_tokens=4"]
    assert cli.main(command) == 0


def test_clips_answer_no_questions(on_disk, tmp_path, asked, qformer, capsys):
    command = ["train", *arguments(on_disk, tmp_path / "run", asked, qformer)]
    assert cli.main([*command, "--data.task=video"]) == 2
    assert "with data.task: video; expected questions" in capsys.readouterr().err


def test_prompt_and_task_must_fit(on_disk, tmp_path, asked, qformer, capsys):
    for options, expected in (
        (["--data.task=caption"], "data.task to instruction"),
        ([f"--model.bridge={json.dumps(tiny.BRIDGES['perceiver'])}", "--model.prompt=<image>"],
         "nor a resampler that reads text"),
    ):  # fmt: skip
        run = tmp_path / "run"
        command = ["train", *arguments(on_disk, run, asked, qformer, *options)]
        assert cli.main(command) == 2
        assert expected in capsys.readouterr().err
        assert not run.exists()
