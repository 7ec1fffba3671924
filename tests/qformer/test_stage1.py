"""BLIP-2's first stage: against HF's Q-Former in three full passes, and what it promises."""

import parity
import pytest
import tiny_stage1 as tiny1
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bridges import Instruction, VisionFeatures
from qformer import Stage1
from qformer.stage1 import OBJECTIVES
from recipes.bench_reference import Kernel, Negatives, ReferenceStage1, reference_keys

B = len(tiny1.LENGTHS)
NEGATIVES = (torch.tensor([1, 3, 0, 2]), torch.tensor([2, 2, 1, 0]))


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def pairs() -> tuple[VisionFeatures, Instruction]:
    return tiny1.images_of(), tiny1.texts_of()


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize(("depth", "kernel"), [(3, "eager"), (3, "sdpa"), (1, "sdpa"), (4, "sdpa")])
def test_it_is_three_full_passes_through_hfs_qformer(
    pairs, objective: str, depth: int, kernel: Kernel
):
    """Loss and gradients of every parameter, with the same negatives."""
    vision, text = pairs
    ours = tiny1.stage1_of(depth=depth, max_text=512)
    theirs = ReferenceStage1(
        vision_dim=tiny1.VISION_DIM,
        vocab_size=tiny1.WORDS,
        num_queries=tiny1.QUERIES,
        dim=tiny1.WIDTH,
        depth=depth,
        num_heads=tiny1.HEADS,
        max_text=12,
        embed_dim=6,
    ).train()
    theirs.use(kernel)
    theirs.copy_weights(dict(ours.named_parameters()))
    loss = ours(vision, text, negatives=NEGATIVES).losses[objective]
    expected = theirs(
        vision.patches[:, 0], text.input_ids, text.attention_mask, Negatives(*NEGATIVES)
    )[objective]
    parity.close(loss, expected, objective)
    theirs_by_name = dict(theirs.named_parameters())
    keys = reference_keys([name for name, _ in ours.named_parameters()], depth)
    assert sorted(keys.values()) == sorted(theirs_by_name)
    parameters = [theirs_by_name[key] for key in keys.values()]
    gradients = torch.autograd.grad(expected, parameters, materialize_grads=True)
    found = tiny1.gradients(ours, {objective: loss})
    tiny1.assert_same_gradients(found, dict(zip(keys, gradients, strict=True)))


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
@pytest.mark.parametrize("image_ids", [None, [0, 1, 0, 2]])
def test_losses_and_statistics_from_what_can_be_seen(
    pairs, smoothing: float, image_ids: list[int] | None
):
    """ITC and ITM again, sample by sample, from the embeddings and from `match`."""
    vision, text = pairs
    stage1 = tiny1.stage1_of(label_smoothing=smoothing)
    ids = image_ids or list(range(B))
    out = stage1(
        vision, text, image_ids=torch.tensor(image_ids) if image_ids else None, generator=seeded()
    )
    images, texts = stage1.image_embeddings(vision), stage1.text_embeddings(text)
    for embeddings in (images, texts):
        assert embeddings.dtype == torch.float32
        torch.testing.assert_close(embeddings.norm(dim=-1), torch.ones(embeddings.shape[:-1]))
    scores = torch.stack([(images @ one).amax(dim=1) for one in texts], dim=1) / stage1.temperature
    losses, nearest = [], []
    for own in range(B):
        for row in (scores[own], scores[:, own]):
            candidates = [c for c in range(B) if c == own or ids[c] != ids[own]]
            place = torch.tensor(candidates.index(own))
            losses.append(F.cross_entropy(row[candidates], place, label_smoothing=smoothing))
            nearest.append(float(row.argmax() == own))
    torch.testing.assert_close(out.losses["itc"], torch.stack(losses).mean())
    assert out.stats["itc_accuracy"] == pytest.approx(sum(nearest) / len(nearest))

    own = torch.arange(B)
    other_texts, other_images = out.negatives
    logits = torch.cat(
        [
            stage1.match(tiny1.pick(vision, i), tiny1.pick(text, t))
            for i, t in ((own, own), (own, other_texts), (other_images, own))
        ]
    )
    labels = torch.tensor([1] * B + [0] * 2 * B)
    torch.testing.assert_close(out.losses["itm"], F.cross_entropy(logits, labels))
    assert out.stats["itm_accuracy"] == (logits.argmax(dim=1) == labels).float().mean()


def test_a_batch_of_one(pairs):
    vision, text = (tiny1.pick(part, [1]) for part in pairs)
    stage1 = tiny1.stage1_of()
    out = stage1(vision, text)
    # There is nothing to tell it from, and nothing that does not match.
    assert out.losses["itc"] == 0
    positive = F.cross_entropy(stage1.match(vision, text), torch.tensor([1]))
    torch.testing.assert_close(out.losses["itm"], positive)
    assert out.stats["itm_accuracy"] in (0, 1)
    found = tiny1.gradients(stage1, out.losses)
    assert all(gradient.isfinite().all() for gradient in found.values())
    expected = torch.autograd.grad(positive, list(stage1.itm_head.parameters()))
    only = tiny1.gradients(stage1, stage1(vision, text, objectives=["itm"]).losses)
    torch.testing.assert_close(only["itm_head.weight"], expected[0])


def test_samples_without_negatives_count_as_pairs_only(pairs):
    vision, text = pairs
    stage1 = tiny1.stage1_of()
    out = stage1(vision, text, image_ids=torch.zeros(B, dtype=torch.long))
    positives = F.cross_entropy(stage1.match(vision, text), torch.ones(B, dtype=torch.long))
    torch.testing.assert_close(out.losses["itm"], positives)
    assert out.losses["itc"] == 0


@torch.no_grad()
def test_the_same_image_and_the_same_caption_are_never_negatives():
    vision, text = tiny1.images_of(5), tiny1.texts_of((4, 5, 3, 5, 6))
    text.input_ids[3] = text.input_ids[1]
    image_ids = torch.tensor([7, 7, 2, 9, 4])
    same = {(0, 1), (1, 0), (1, 3), (3, 1)} | {(i, i) for i in range(5)}
    allowed = {(i, j) for i in range(5) for j in range(5)} - same
    stage1 = tiny1.stage1_of(temperature=1.0)
    found = [set(), set()]
    for seed in range(150):
        out = stage1(vision, text, image_ids=image_ids, generator=seeded(seed), objectives=["itc"])
        for drawn, negatives in zip(found, out.negatives, strict=True):
            drawn |= set(enumerate(negatives.tolist()))
    assert found == [allowed, allowed]
    # Without ids of the images, captions alone tell.
    out = [stage1(vision, text, generator=seeded(s), objectives=["itc"]) for s in range(30)]
    assert any(o.negatives[0][0] == 1 for o in out)
    assert not any(o.negatives[0][1] == 3 for o in out)


@torch.no_grad()
def test_negatives_are_the_hard_ones(pairs):
    vision, text = pairs
    stage1 = tiny1.stage1_of(temperature=1e-5)
    images, texts = stage1.image_embeddings(vision), stage1.text_embeddings(text)
    scores = torch.einsum("ind,td->itn", images, texts).amax(dim=-1).fill_diagonal_(-2)
    out = stage1(vision, text, generator=seeded())
    assert torch.equal(out.negatives[0], scores.argmax(dim=1))
    assert torch.equal(out.negatives[1], scores.argmax(dim=0))
    assert not torch.equal(*out.negatives)


@pytest.mark.parametrize("chunk_size", [1, 3, B, 100])
def test_chunks_change_nothing(pairs, chunk_size: int):
    stage1 = tiny1.stage1_of()
    whole = stage1(*pairs, generator=seeded(1))
    chunked = stage1(*pairs, generator=seeded(1), chunk_size=chunk_size)
    assert torch.equal(torch.stack(whole.negatives), torch.stack(chunked.negatives))
    torch.testing.assert_close(chunked.losses, whole.losses)
    torch.testing.assert_close(chunked.stats, whole.stats)
    tiny1.assert_same_gradients(
        tiny1.gradients(stage1, chunked.losses), tiny1.gradients(stage1, whole.losses)
    )


def kept_for_backward(stage1: Stage1, chunk_size: int | None) -> int:
    """Bytes that a forward pass saves."""
    sizes = {}

    def pack(x: Tensor) -> Tensor:
        sizes[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    parameters = {p.untyped_storage().data_ptr() for p in stage1.parameters()}
    vision, text = tiny1.images_of(16), tiny1.texts_of((6,) * 16)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out = stage1(vision, text, generator=seeded(), chunk_size=chunk_size)
    assert out.losses["itc"].requires_grad
    return sum(size for place, size in sizes.items() if place not in parameters)


def test_chunks_keep_no_activations():
    stage1 = tiny1.stage1_of()
    assert kept_for_backward(stage1, 2) < kept_for_backward(stage1, None) / 10


def test_only_the_losses_that_are_wanted(pairs):
    stage1 = tiny1.stage1_of()
    every = stage1(*pairs, generator=seeded())
    assert every.losses.keys() == set(OBJECTIVES)
    for objective in OBJECTIVES:
        for chunk_size in (None, 3):
            one = stage1(*pairs, generator=seeded(), objectives=[objective], chunk_size=chunk_size)
            assert one.losses.keys() == {objective}
            torch.testing.assert_close(one.losses[objective], every.losses[objective])
            assert torch.equal(torch.stack(one.negatives), torch.stack(every.negatives))
            tiny1.assert_same_gradients(
                tiny1.gradients(stage1, one.losses),
                tiny1.gradients(stage1, {objective: every.losses[objective]}),
            )


def test_text_to_be_written_begins_with_dec(pairs):
    vision, text = pairs
    changed = Instruction(text.input_ids.clone(), text.attention_mask)
    changed.input_ids[:, 0] = 7
    stage1 = tiny1.stage1_of()
    options = {"negatives": NEGATIVES}
    before, after = stage1(vision, text, **options), stage1(vision, changed, **options)
    assert torch.equal(before.losses["itg"], after.losses["itg"])
    assert not torch.isclose(before.losses["itc"], after.losses["itc"])
    other = Stage1(stage1.qformer, embed_dim=6, dec_token_id=0)
    other.load_state_dict(stage1.state_dict())
    assert not torch.isclose(other(vision, text, **options).losses["itg"], before.losses["itg"])


def test_text_of_one_token_has_nothing_to_be_written():
    stage1 = tiny1.stage1_of()
    vision, text = (
        tiny1.images_of(2),
        Instruction(torch.tensor([[2], [3]]), torch.ones(2, 1).bool()),
    )
    out = stage1(vision, text)
    assert out.losses["itg"] == 0
    found = tiny1.gradients(stage1, out.losses)
    assert all(gradient.isfinite().all() for gradient in found.values())


def left_out(module: nn.Module, loss: Tensor) -> list[str]:
    """Trained parameters that a loss does not reach: DDP would wait for them in vain."""
    loss.backward()
    return [n for n, p in module.named_parameters() if p.requires_grad and p.grad is None]


@pytest.mark.parametrize("b", [1, B])
def test_every_parameter_takes_part(b: int):
    stage1 = tiny1.stage1_of()
    out = stage1(tiny1.images_of(b), tiny1.texts_of(tiny1.LENGTHS[:b]))
    assert left_out(stage1, torch.stack(list(out.losses.values())).sum()) == []


def test_every_parameter_takes_part_in_reading_an_instruction(pairs):
    """On several ranks too, instructions are what a text branch is trained with in stage 2."""
    qformer = tiny1.qformer_of()
    assert left_out(qformer, qformer(*pairs).sum()) == []


def test_in_bf16(pairs):
    stage1 = tiny1.stage1_of()
    exact = stage1(*pairs, negatives=NEGATIVES)
    expected = tiny1.gradients(stage1, exact.losses)
    for chunk_size in (None, 3):
        with torch.autocast("cpu", torch.bfloat16):
            out = stage1(*pairs, negatives=NEGATIVES, chunk_size=chunk_size)
            assert stage1.text_embeddings(pairs[1]).dtype == torch.float32
            assert stage1.image_embeddings(pairs[0]).dtype == torch.float32
        for name, loss in out.losses.items():
            assert loss.dtype == torch.float32
            assert loss.item() == pytest.approx(exact.losses[name].item(), abs=0.03), name
        found = tiny1.gradients(stage1, out.losses)
        a, b = (torch.cat([g.flatten() for g in side.values()]) for side in (found, expected))
        assert a.isfinite().all()
        assert torch.cosine_similarity(a, b, dim=0) > 0.99
        assert found["qformer.queries"].dtype == torch.float32


def test_saying_no_match_always_is_right_for_two_thirds(pairs):
    stage1 = tiny1.stage1_of()
    with torch.no_grad():
        stage1.itm_head.weight.zero_()
        stage1.itm_head.bias.copy_(torch.tensor([1.0, 0.0]))
    assert stage1(*pairs).stats["itm_accuracy"] == pytest.approx(2 / 3)


def test_what_it_refuses(pairs):
    vision, text = pairs
    stage1 = tiny1.stage1_of()
    for call in (stage1, stage1.match):
        with pytest.raises(ValueError, match="found 2 images a sample; expected 1"):
            call(tiny1.images_of(images=2), text)
    with pytest.raises(ValueError, match="found 2 images a sample; expected 1"):
        stage1.image_embeddings(tiny1.images_of(images=2))
    left = Instruction(text.input_ids.flip(1), text.attention_mask.flip(1))
    with pytest.raises(ValueError, match="padded on the left; expected padding on the right"):
        stage1(vision, left)
    long = tiny1.texts_of((13, 4, 4, 4))
    for call in (lambda: stage1(vision, long), lambda: stage1.text_embeddings(long)):
        with pytest.raises(ValueError, match="found text of 13 tokens; expected at most 12"):
            call()
    stage1(vision, tiny1.texts_of((12, 4, 4, 4)))
    with pytest.raises(ValueError, match="without a text branch; expected one"):
        Stage1(tiny1.qformer_of(vocab_size=None))


def test_the_names_that_runs_and_conversions_rely_on():
    stage1 = tiny1.stage1_of()
    heads = {name for name in stage1.state_dict() if not name.startswith("qformer.")}
    assert heads == {
        *("vision_projection.weight", "vision_projection.bias"),
        *("text_projection.weight", "text_projection.bias"),
        *("itm_head.weight", "itm_head.bias"),
        *("lm_head.dense.weight", "lm_head.dense.bias", "lm_head.norm.weight"),
        *("lm_head.norm.bias", "lm_head.bias", "temperature"),
    }
    assert stage1.dec_token_id == tiny1.DEC
