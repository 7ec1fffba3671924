"""The harness that kills training can fail: on a bit, on a sample too few, on one too many."""

import json
import math
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from recipes import reliability_kills
from recipes.reliability_kills import summarise
from recipes.reliability_kills_compare import Comparison, compare, continued
from recipes.reliability_kills_log import Event, Saving, Start, Step, read_events
from recipes.reliability_kills_plan import EPOCHS, MOMENTS, SETTINGS, Kill, plan
from recipes.reliability_kills_run import Run

BATCHES = 4


def steps(first: int, end: int, ranks: int = 2) -> list[Step]:
    """The batches of all ranks in some steps of a run, two samples each."""
    return [
        Step(
            rank,
            epoch := step // BATCHES,
            batch := step % BATCHES,
            step,
            (1 / (1 + step + rank)).hex(),
            tuple(f"{(2 * ranks * (batch + epoch) + 2 * rank + k) % 16:02d}" for k in range(2)),
        )
        for step in range(first, end)
        for rank in range(ranks)
    ]


REFERENCE: list[Event] = [Start(0, 0), *steps(0, 8)]
KILLED: list[Event] = [
    Start(0, 0),
    *steps(0, 5),
    Start(1, 3),
    Start(1, 3),
    Saving(3),
    *steps(3, 6),
    Start(2, 6),
    *steps(6, 8),
]
"""Killed in step 5, resumed from step 3; killed in step 6, resumed from there."""


def changed(events: Sequence[Event], index: int, **changes: object) -> list[Event]:
    """The same events, of which one is another."""
    return [replace(e, **changes) if i == index else e for i, e in enumerate(events)]


def index_of(events: Sequence[Event], step: int, rank: int, attempt: int) -> int:
    """Where a batch of one start stands."""
    begun = events.index(Start(attempt, {0: 0, 1: 3, 2: 6}[attempt]))
    return next(
        i
        for i, e in enumerate(events)
        if i > begun and isinstance(e, Step) and (e.step, e.rank) == (step, rank)
    )


def test_a_run_that_goes_on_exactly_is_the_reference():
    assert continued(KILLED) == steps(0, 8)
    assert compare(REFERENCE, KILLED) == Comparison()


@pytest.mark.parametrize(("step", "attempt"), [(4, 0), (4, 1), (7, 2)])
def test_the_last_bit_of_a_loss_counts_in_every_start(step, attempt):
    index = index_of(KILLED, step, 1, attempt)
    event = KILLED[index]
    assert isinstance(event, Step)
    other = math.nextafter(float.fromhex(event.loss), 1.0).hex()
    result = compare(REFERENCE, changed(KILLED, index, loss=other))
    [difference] = result.differences
    assert f"epoch {step // BATCHES}, batch {step % BATCHES}, rank 1" in difference
    assert other in difference
    assert (result.lost, result.repeated) == (0, 0)


def test_a_sample_that_is_missing_is_lost():
    index = index_of(KILLED, 6, 0, 2)
    event = KILLED[index]
    assert isinstance(event, Step)
    result = compare(REFERENCE, changed(KILLED, index, keys=event.keys[:1]))
    assert (result.lost, result.repeated) == (1, 0)
    assert len(result.differences) == 1


def test_a_sample_that_comes_twice_is_repeated():
    index = index_of(KILLED, 6, 0, 2)
    event = KILLED[index]
    assert isinstance(event, Step)
    result = compare(REFERENCE, changed(KILLED, index, keys=(*event.keys, event.keys[0])))
    assert (result.lost, result.repeated) == (0, 1)
    result = compare(REFERENCE, changed(KILLED, index, keys=(event.keys[0], event.keys[0])))
    assert (result.lost, result.repeated) == (1, 1)


def test_samples_in_another_order_are_a_difference():
    index = index_of(KILLED, 6, 0, 2)
    event = KILLED[index]
    assert isinstance(event, Step)
    result = compare(REFERENCE, changed(KILLED, index, keys=event.keys[::-1]))
    assert (len(result.differences), result.lost, result.repeated) == (1, 0, 0)


def test_a_resume_past_its_checkpoint_loses_what_it_skips():
    """The step between was done by the start before, but is in no weights."""
    found = [Start(0, 0), *steps(0, 5), Start(1, 3), *steps(4, 8)]
    result = compare(REFERENCE, found)
    assert (result.lost, result.repeated) == (4, 0)
    assert len(result.differences) == 2


def test_a_resume_before_its_checkpoint_repeats():
    again = [replace(step, step=step.step + 1) for step in steps(2, 3)]
    result = compare(REFERENCE, [Start(0, 0), *steps(0, 5), Start(1, 3), *again, *steps(3, 8)])
    assert (result.lost, result.repeated) == (0, 4)
    assert result.differences


def test_a_run_that_ends_early_loses_the_rest():
    result = compare(REFERENCE, KILLED[:-2])
    assert (result.lost, len(result.differences)) == (4, 2)


def test_changed_ranks_are_compared_by_the_samples_of_each_epoch():
    alone = [Start(0, 0), *steps(0, 5), Start(1, 3)]
    both = [
        replace(one, rank=0, keys=one.keys + other.keys, loss="0x1p+0")
        for one, other in zip(steps(3, 8)[::2], steps(3, 8)[1::2], strict=True)
    ]
    assert compare(REFERENCE, [*alone, *both], losses=False) == Comparison()
    result = compare(REFERENCE, [*alone, *both[1:]], losses=False)
    assert (result.lost, result.repeated) == (4, 0)


def test_one_difference_counts_against_all_kills_of_the_run(tmp_path):
    kills = [Kill("mid-epoch", 2, 0.0, 0), Kill("epoch border", 4, 0.0, 1)]
    run = Run(tmp_path, tmp_path / "log", kills, [0.1, 0.2])
    assert summarise("x", run, Comparison())["identical"] == 2
    for result in (Comparison(["a bit"]), Comparison(lost=1), Comparison(repeated=1)):
        row = summarise("x", run, result)
        assert (row["kills"], row["identical"]) == (2, 0)
    hung = replace(run, seconds_alone=[0.1, None])
    assert summarise("x", hung, Comparison())["identical"] == 0
    failed = summarise("x", replace(run, failure="start 1 ended with 2"), Comparison())
    assert failed["identical"] == 0 and failed["failures"] == ["x: start 1 ended with 2"]


def test_the_plan_comes_by_every_moment_before_the_end():
    assert len(SETTINGS) * len(MOMENTS) >= 40
    assert len(SETTINGS) == 8
    borders = set()
    for seed in range(50):
        kills = plan(random.Random(seed), MOMENTS, 10)
        assert sorted(kill.moment for kill in kills) == sorted(MOMENTS)
        assert kills[0].moment != "after a resume"
        assert all(1 <= kill.position < 10 * EPOCHS - 3 for kill in kills)
        borders |= {kill.position for kill in kills if kill.moment == "epoch border"}
    assert borders == {10, 11, 20, 21}


def test_a_log_that_ends_in_half_a_line(tmp_path):
    log = tmp_path / "log"
    assert list(read_events(log)) == []
    lines = [json.dumps({"start": {"attempt": 0, "step": 0}}), json.dumps({"saving": {"step": 3}})]
    log.write_text(f"{lines[0]}\n{lines[1][:-3]}")
    assert [event for event, _ in read_events(log)] == [Start(0, 0)]
    [(_, end)] = read_events(log)
    log.write_text("\n".join(lines) + "\n")
    assert [event for event, _ in read_events(log, end)] == [Saving(3)]
    log.write_text('{"step": {}}\n')
    with pytest.raises(ValueError, match="expected an event"):
        list(read_events(log))


@pytest.mark.slow
def test_training_that_is_killed_goes_on_as_if_it_had_not_been(tmp_path: Path):
    found = reliability_kills.measure(tmp_path, quick=True)
    assert not found["failures"]
    counts = {key: found[key] for key in ("runs", "identical", "lost", "repeated", "hung")}
    assert counts == {"runs": 2, "identical": 2, "lost": 0, "repeated": 0, "hung": 0}
    assert sum(found["moments"].values()) == 2
