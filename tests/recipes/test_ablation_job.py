"""A job of an ablation: what makes it another, whose result must not be taken for its own."""

from dataclasses import replace

import pytest

from recipes.ablation_grid import Scoring
from recipes.ablation_job import Job


def job_of(start: str | None, **changes) -> Job:
    config = {"model": {"init_from": start, "optimizer": {"lr": 0.1}}, "trainer": {"max_steps": 2}}
    return replace(Job("a cell, seed 0", config, 16, Scoring()), **changes)


def test_a_first_stage_is_known_by_what_it_is():
    here = job_of("/here/first/run", first="abc")
    assert here.digest == job_of("/there/first/run", first="abc").digest
    assert here.digest != job_of("/here/first/run", first="def").digest
    # Weights of somebody else's are known by their path alone.
    assert job_of("/here/weights").digest != job_of("/there/weights").digest


@pytest.mark.parametrize(
    "changes",
    [
        {"config": job_of("/here").config | {"trainer": {"max_steps": 3}}},
        {"order_samples": 8},
        {"scoring": None},
        {"scoring": Scoring(pictures=7)},
    ],
)
def test_whatever_changes_a_result_makes_another_job(changes):
    assert job_of("/here", **changes).digest != job_of("/here").digest
    assert job_of("/here", name="another name").digest == job_of("/here").digest


@pytest.mark.parametrize("scoring", [None, Scoring(pictures=7)])
def test_it_is_read_as_it_was_written(scoring, tmp_path):
    job = job_of("/here/first/run", first="abc", scoring=scoring)
    job.write(tmp_path)
    assert Job.read(tmp_path) == job
