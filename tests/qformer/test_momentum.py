"""The momentum teacher against ALBEF's formulas, sample by sample."""

from collections import deque
from dataclasses import dataclass, field
from typing import Any

import pytest
import tiny_stage1 as tiny1
import torch
from torch import Tensor

from bridges import Instruction, VisionFeatures
from qformer import MomentumTeacher, Stage1

B, QUEUE = 3, 7


def batch(step: int, b: int = B) -> tuple[VisionFeatures, Instruction, Tensor]:
    """Images that come back every second step, captions that are all the same now and then."""
    text = tiny1.texts_of((5,) * b, seed=step)
    text.input_ids[0] = torch.tensor([2, 4, 5, 6, 3])
    return tiny1.images_of(b, seed=step), text, torch.arange(b) + 10 * (step % 2)


@dataclass
class Albef:
    """Equations 1 and 6 and the queue, with lists."""

    teacher: Stage1
    alpha: float = 0.4
    ramp_steps: int = 0
    queue: deque = field(default_factory=lambda: deque(maxlen=QUEUE))
    step: int = 0

    def loss(self, student: Stage1, vision: VisionFeatures, text: Instruction, ids: Tensor):
        names = [tuple(row) for row in text.input_ids.tolist()]
        with torch.no_grad():
            images, texts = (
                self.teacher.image_embeddings(vision),
                self.teacher.text_embeddings(text),
            )
        new = list(zip(images, texts, ids.tolist(), names, strict=True))
        every = [*new, *self.queue]
        alpha = self.alpha * (min(1, self.step / self.ramp_steps) if self.ramp_steps else 1)
        own_images, own_texts = student.image_embeddings(vision), student.text_embeddings(text)
        losses = []
        for own, (_, _, image_id, name) in enumerate(new):
            candidates = [
                index
                for index, (_, _, other_id, other) in enumerate(every)
                if index == own or (other_id != image_id and other != name)
            ]

            def scores(image=None, text=None, candidates=candidates) -> Tensor:
                """s(I, T) / τ: the best of the image's queries."""
                found = [
                    (
                        (every[c][0] if image is None else image)
                        @ (every[c][1] if text is None else text)
                    ).max()
                    for c in candidates
                ]
                return torch.stack(found) / student.temperature

            hard = torch.tensor([float(c == own) for c in candidates])
            for ours, theirs in (
                (scores(image=own_images[own]), scores(image=images[own])),
                (scores(text=own_texts[own]), scores(text=texts[own])),
            ):
                target = (1 - alpha) * hard + alpha * theirs.detach().softmax(dim=0)
                losses.append(-(target * ours.log_softmax(dim=0)).sum())
        self.queue.extend(new)
        self.step += 1
        return torch.stack(losses).mean()


@pytest.mark.parametrize("ramp_steps", [0, 3])
def test_five_steps_are_albefs(ramp_steps: int):
    student, start = tiny1.stage1_of(), tiny1.stage1_of(1)
    # Its weights stand still; the average has a test of its own.
    teacher = MomentumTeacher(start, queue_size=QUEUE, ramp_steps=ramp_steps, momentum=1.0)
    albef = Albef(start, ramp_steps=ramp_steps)
    for step in range(5):
        teacher.update(student)
        vision, text, ids = batch(step)
        out = student(vision, text, image_ids=ids, objectives=["itc"], teacher=teacher)
        expected = albef.loss(student, vision, text, ids)
        torch.testing.assert_close(out.losses["itc"], expected, msg=f"step {step}")
        tiny1.assert_same_gradients(
            tiny1.gradients(student, out.losses), tiny1.gradients(student, {"itc": expected})
        )
    assert sorted(teacher.image_ids.tolist()) == sorted(ids for _, _, ids, _ in albef.queue)


def test_alpha_grows_over_the_first_steps():
    student = tiny1.stage1_of()
    teacher = MomentumTeacher(student, queue_size=QUEUE, alpha=0.4, ramp_steps=4)
    found = []
    for step in range(6):
        teacher.update(student)
        found.append(teacher.alpha)
        # Two batches of accumulated gradients are one step.
        for part in range(2):
            vision, text, ids = batch(2 * step + part)
            student(vision, text, image_ids=ids, teacher=teacher)
    assert found == pytest.approx([0, 0.1, 0.2, 0.3, 0.4, 0.4])
    assert MomentumTeacher(student, queue_size=QUEUE, alpha=0.3).alpha == 0.3


def test_the_teacher_follows_as_an_exponential_moving_average():
    start, student = tiny1.stage1_of(0), tiny1.stage1_of(1)
    teacher = MomentumTeacher(start, queue_size=QUEUE, momentum=0.9)
    before = {name: p.detach().clone() for name, p in student.named_parameters()}
    for (name, copied), (_, p) in zip(
        teacher.model.named_parameters(), start.named_parameters(), strict=True
    ):
        assert torch.equal(copied, p) and copied is not p, name
    for _ in range(3):
        teacher.update(student)
    share = 0.9**3
    for name, followed in teacher.model.named_parameters():
        expected = share * start.get_parameter(name) + (1 - share) * before[name]
        torch.testing.assert_close(followed, expected.detach())
        assert torch.equal(student.get_parameter(name), before[name])


def test_only_the_student_learns():
    student = tiny1.stage1_of()
    teacher = MomentumTeacher(tiny1.stage1_of(1), queue_size=QUEUE)
    assert not any(p.requires_grad for p in teacher.parameters())
    vision, text, ids = batch(0)
    out = student(vision, text, image_ids=ids, objectives=["itc"], teacher=teacher)
    out.losses["itc"].backward()
    assert all(p.grad is None for p in teacher.parameters())
    assert not any(buffer.requires_grad for buffer in teacher.buffers())
    for name in ("temperature", "qformer.queries", "vision_projection.weight"):
        assert student.get_parameter(name).grad.any(), name
    assert student.text_projection.weight.grad.any()


def test_other_losses_and_the_negatives_are_the_student_s_own():
    student, teacher = tiny1.stage1_of(), MomentumTeacher(tiny1.stage1_of(1), queue_size=QUEUE)
    vision, text, ids = batch(0)
    found = [
        student(vision, text, image_ids=ids, teacher=t, generator=torch.Generator().manual_seed(0))
        for t in (None, teacher)
    ]
    for name in ("itm", "itg"):
        assert torch.equal(found[0].losses[name], found[1].losses[name])
    assert torch.equal(torch.stack(found[0].negatives), torch.stack(found[1].negatives))
    assert not torch.isclose(found[0].losses["itc"], found[1].losses["itc"])


@pytest.mark.parametrize(("queue_size", "b"), [(2, 4), (3, 4), (4, 4), (5, 3), (1, 3)])
def test_the_queue_keeps_what_came_last(queue_size: int, b: int):
    student = tiny1.stage1_of()
    teacher = MomentumTeacher(student, queue_size=queue_size)
    seen: deque[Any] = deque(maxlen=queue_size)
    for step in range(4):
        vision, text, _ = batch(step, b)
        ids = torch.arange(b) + 100 * step
        student(vision, text, image_ids=ids, objectives=["itc"], teacher=teacher)
        features = student.image_embeddings(vision), student.text_embeddings(text)
        seen.extend(zip(ids.tolist(), *(x.detach() for x in features), strict=True))
        place = {int(image): row for row, image in enumerate(teacher.image_ids) if image >= 0}
        assert place.keys() == {image for image, *_ in seen}
        for image, patches, words in seen:
            torch.testing.assert_close(teacher.image_queue[place[image]], patches)
            torch.testing.assert_close(teacher.text_queue[place[image]], words)
        # The next batch takes the oldest places.
        assert int(teacher.next) == (b * (step + 1)) % queue_size


@torch.no_grad()
def test_empty_places_are_no_candidates():
    student = tiny1.stage1_of()
    vision, text, ids = batch(0)
    found = [
        student(vision, text, image_ids=ids, teacher=MomentumTeacher(student, queue_size=size))
        for size in (1, 50)
    ]
    # Softmaxes of two widths: whether their sums round alike is up to the CPU.
    torch.testing.assert_close(found[0].losses["itc"], found[1].losses["itc"], rtol=1e-6, atol=1e-6)


def test_looking_moves_nothing():
    student = tiny1.stage1_of()
    teacher = MomentumTeacher(student, queue_size=QUEUE)
    vision, text, ids = batch(0)
    before = {name: buffer.clone() for name, buffer in teacher.named_buffers()}
    with torch.no_grad():
        student(vision, text, image_ids=ids, teacher=teacher)
    student(vision, text, image_ids=ids, teacher=teacher.eval())
    student(vision, text, image_ids=ids, objectives=["itm"], teacher=teacher.train())
    torch.testing.assert_close(dict(teacher.named_buffers()), before, atol=0, rtol=0)


def test_its_state_can_be_saved_and_restored():
    student = tiny1.stage1_of()
    teacher = MomentumTeacher(tiny1.stage1_of(1), queue_size=QUEUE, ramp_steps=5)
    again = MomentumTeacher(student, queue_size=QUEUE, ramp_steps=5)
    vision, text, ids = batch(0)
    for _ in range(3):
        teacher.update(student)
    student(vision, text, image_ids=ids, teacher=teacher)
    again.load_state_dict(teacher.state_dict())
    vision, text, ids = batch(1)
    found = [
        student(vision, text, image_ids=ids, teacher=t).losses["itc"] for t in (teacher, again)
    ]
    assert torch.equal(*found)
    assert again.alpha == pytest.approx(0.4 * 2 / 5)


def test_without_ids_the_queue_would_not_know_its_images():
    student = tiny1.stage1_of()
    vision, text, _ = batch(0)
    with pytest.raises(ValueError, match="no image_ids"):
        student(vision, text, teacher=MomentumTeacher(student, queue_size=QUEUE))
