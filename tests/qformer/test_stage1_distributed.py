"""Stage 1 on two ranks is stage 1 on one process that has both batches.

The file is also the program of a rank: `python test_stage1_distributed.py RANK FOLDER`.
"""

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import tiny_stage1 as tiny1
import torch
import torch.distributed as dist
from torch import Tensor

from bridges import Instruction, VisionFeatures
from qformer import MomentumTeacher, stage1

RANKS, B = 2, 3
LENGTHS = (7, 4, 3, 2, 5, 3)
"""The texts of rank 0 have seven columns, those of rank 1 five."""

DUPLICATES = [5, 0, 1, 0, 2, 3]
"""Images 1 and 3, on both ranks, are one; so are the captions 2 and 5."""

LONELY = [0, 0, 0, 0, 0, 1]
"""Sample 2 has no negative: the only other image has its caption."""

CASES: dict[str, dict[str, Any]] = {
    "duplicates": {"image_ids": DUPLICATES},
    "without_ids": {},
    "lonely": {"image_ids": LONELY},
    "chunks": {"image_ids": DUPLICATES, "chunk_size": 2},
    "one_loss": {"image_ids": DUPLICATES, "objectives": ["itm"]},
    "teacher": {"image_ids": DUPLICATES, "teacher": True},
    "teacher_chunks": {"image_ids": DUPLICATES, "teacher": True, "chunk_size": 1},
    "lavis_gather": {"image_ids": DUPLICATES},
    "apart": {"image_ids": DUPLICATES},
}
"""In the last two the ranks do what they must not, so that it can be seen to matter."""

Result = dict[str, dict[str, Tensor]]


def batch(rows: slice, step: int) -> tuple[VisionFeatures, Instruction]:
    """Some samples of the joined batch, with no more padding than they need."""
    vision, text = tiny1.images_of(len(LENGTHS), seed=step), tiny1.texts_of(LENGTHS, seed=step)
    text.input_ids[5] = text.input_ids[2]
    text = tiny1.pick(text, torch.arange(len(LENGTHS))[rows])
    columns = int(text.attention_mask.sum(dim=1).max())
    text = Instruction(text.input_ids[:, :columns], text.attention_mask[:, :columns])
    return tiny1.pick(vision, torch.arange(len(LENGTHS))[rows]), text


def steps(case: Mapping[str, Any], rows: slice) -> Result:
    """Losses, gradients, negatives and the queue of two steps."""
    model = tiny1.stage1_of()
    options = dict(case)
    if options.pop("teacher", False):
        # A queue of 8: the second batch of 6 goes round its end.
        options["teacher"] = teacher = MomentumTeacher(tiny1.stage1_of(1), queue_size=8)
    if "image_ids" in options:
        options["image_ids"] = torch.tensor(options["image_ids"])[rows]
    found: Result = {"losses": {}, "gradients": {}, "negatives": {}, "queue": {}}
    for step in range(2):
        out = model(*batch(rows, step), generator=torch.Generator().manual_seed(step), **options)
        found["losses"] |= {f"{name} {step}": x.detach() for name, x in out.losses.items()}
        gradients = tiny1.gradients(model, out.losses)
        found["gradients"] |= {f"{name} {step}": x for name, x in gradients.items()}
        names = (f"texts {step}", f"images {step}")
        found["negatives"] |= dict(zip(names, out.negatives, strict=True))
        if "image_ids" in options:
            options["image_ids"] = options["image_ids"] + 10
    if "teacher" in options:
        found["queue"] = dict(teacher.named_buffers())
    return found


def run_rank(rank: int, folder: Path) -> None:
    dist.init_process_group(
        "gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=RANKS
    )
    rows = slice(rank * B, (rank + 1) * B)
    found = {name: steps(case, rows) for name, case in CASES.items() if name not in WRONG}
    for name, wrong in WRONG.items():
        right = {place: getattr(stage1, place) for place in wrong}
        vars(stage1).update(wrong)
        found[name] = steps(CASES[name], rows)
        vars(stage1).update(right)
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()


def gather_like_lavis(x: Tensor) -> Tensor:
    """`concat_all_gather`: without gradient."""
    parts = [torch.empty_like(x) for _ in range(RANKS)]
    dist.all_gather(parts, x.detach().contiguous())
    return torch.cat(parts)


WRONG = {
    "lavis_gather": {"gather": gather_like_lavis},
    # Each rank takes the mean of its own.
    "apart": {"joined_mean": lambda losses: losses.mean()},
}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Result]]:
    """What two processes found, for every case."""
    folder = tmp_path_factory.mktemp("ranks")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, str(rank), str(folder)],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(RANKS)
    ]
    try:
        for process in processes:
            _, errors = process.communicate(timeout=120)
            assert process.returncode == 0, errors
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(RANKS)]


def averaged(ranks: list[dict[str, Result]], case: str, what: str) -> dict[str, Tensor]:
    """The mean over ranks, as DDP takes it of gradients."""
    first, *_ = parts = [rank[case][what] for rank in ranks]
    return {name: torch.stack([p[name] for p in parts]).mean(dim=0) for name in first}


@pytest.mark.parametrize("case", [case for case in CASES if case not in WRONG])
def test_two_ranks_are_one_process(ranks, case: str):
    expected = steps(CASES[case], slice(None))
    torch.testing.assert_close(averaged(ranks, case, "losses"), expected["losses"])
    for name, drawn in expected["negatives"].items():
        # What a sample that may draw none has drawn means nothing.
        counts = torch.arange(len(LENGTHS)) != 2 if case == "lonely" else slice(None)
        found = torch.cat([rank[case]["negatives"][name] for rank in ranks])
        assert torch.equal(found[counts], drawn[counts]), name
    for rank in ranks:
        torch.testing.assert_close(rank[case]["queue"], expected["queue"])
    assert bool(expected["queue"]) == case.startswith("teacher")
    tiny1.assert_same_gradients(averaged(ranks, case, "gradients"), expected["gradients"])


def test_duplicates_on_the_other_rank_are_no_negatives(ranks):
    for step in range(2):
        for kind in ("texts", "images"):
            drawn = torch.cat([r["duplicates"]["negatives"][f"{kind} {step}"] for r in ranks])
            same = {(1, 3), (3, 1), (2, 5), (5, 2)}
            assert not same & set(enumerate(drawn.tolist()))
    assert any(
        bool((rank["duplicates"]["negatives"][f"texts {step}"] // B != index).any())
        for index, rank in enumerate(ranks)
        for step in range(2)
    ), "none was drawn from the other rank"


@pytest.mark.parametrize(("case", "loss"), [("lavis_gather", None), ("apart", "itg")])
def test_it_would_show(ranks, case: str, loss: str | None):
    """A gather without gradient gives other gradients; a mean for each rank another loss."""
    expected = steps(CASES[case], slice(None))
    with pytest.raises(AssertionError):
        tiny1.assert_same_gradients(averaged(ranks, case, "gradients"), expected["gradients"])
    losses = averaged(ranks, case, "losses")
    for name, value in expected["losses"].items():
        assert torch.isclose(losses[name], value) == (loss is None or not name.startswith(loss))


if __name__ == "__main__":
    torch.set_num_threads(1)
    run_rank(int(sys.argv[1]), Path(sys.argv[2]))
