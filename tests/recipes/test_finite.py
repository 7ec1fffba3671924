"""A step that is not finite changes nothing, on no rank, and too many of them end the run."""

import copy
import itertools
import json
import subprocess
import sys
from pathlib import Path

import lightning as L
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import DataLoader

from bridges.run import RUN_FILE, WEIGHTS_FILE
from recipes import cli
from recipes.checkpoints import LAST
from recipes.finite import SkipNonFinite
from recipes.train import UNHELPFUL_WARNINGS, train

pytestmark = [pytest.mark.filterwarnings(f"ignore:{text}") for text in UNHELPFUL_WARNINGS]

POISONED = '''
"""A module whose loss, but no gradient, is NaN at some steps of one rank."""

import torch

from recipes.module import CaptionModule


class Poisoned(CaptionModule):
    def __init__(self, *args, steps: list[int], rank: int = 0, out: str = "", **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.steps, self.rank, self.out = steps, rank, out
        self.weights = []

    def training_step(self, batch, index):
        poisoned = self.global_rank == self.rank and self.trainer.global_step in self.steps
        return super().training_step(batch, index) + (torch.nan if poisoned else 0.0)

    def on_train_batch_end(self, *_) -> None:
        self.weights.append({n: t.clone() for n, t in self.state_dict().items()})

    def on_train_end(self) -> None:
        if self.out:
            torch.save(self.weights, f"{self.out}/rank{self.global_rank}.pt")
'''


class Line(L.LightningModule):
    """One layer; `poison` says which batches spoil the loss, the gradients, or both."""

    def __init__(self, poison: dict[int, str]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(3, 2)
        self.poison = poison
        self.states: list[tuple[list[Tensor], dict]] = []

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        loss = self.layer(batch).square().mean()
        if self.poison.get(index) == "loss":
            return loss + torch.nan
        if self.poison.get(index) == "gradients":  # the root's derivative at 0 is infinite
            return loss + (0 * self.layer.weight.sum()).sqrt()
        return loss * torch.inf if self.poison.get(index) == "both" else loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.1, weight_decay=0.1)

    def optimizer_step(self, *args, **kwargs) -> None:
        super().optimizer_step(*args, **kwargs)
        weights = [p.detach().clone() for p in self.parameters()]
        optimizer = self.optimizers(use_pl_optimizer=False)
        assert isinstance(optimizer, torch.optim.Optimizer)
        self.states.append((weights, copy.deepcopy(optimizer.state_dict()["state"])))


def fit(module: Line, skips: SkipNonFinite | None, steps: int, **options) -> L.Trainer:
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=steps,
        callbacks=skips,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
        **options,
    )
    data = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))
    trainer.fit(module, DataLoader(data, batch_size=2))  # pyright: ignore[reportArgumentType]
    return trainer


def unchanged(before, after) -> bool:
    """Whether a step left weights and Adam's moments and counts as they were."""
    weights = all(torch.equal(a, b) for a, b in zip(before[0], after[0], strict=True))
    return weights and all(
        torch.equal(before[1][index][name], moment)
        for index, state in after[1].items()
        for name, moment in state.items()
    )


@pytest.mark.parametrize("kind", ["loss", "gradients", "both"])
@pytest.mark.parametrize("options", [{}, {"gradient_clip_val": 0.5}], ids=["plain", "clipped"])
def test_a_step_that_is_not_finite_changes_nothing(kind, options):
    module, skips = Line({2: kind, 4: kind}), SkipNonFinite(2)
    trainer = fit(module, skips, 6, **options)
    kept = [unchanged(*pair) for pair in itertools.pairwise(module.states)]
    assert kept == [False, True, False, True, False]
    assert all(w.isfinite().all() for w in module.states[-1][0])
    assert skips.skipped == 2
    assert trainer.callback_metrics["skipped_steps"] == 2


def test_the_first_step_can_be_left_out():
    module = Line({0: "loss"})
    fit(module, SkipNonFinite(2), 2)
    (_, first), (_, second) = module.states
    assert not first
    assert [float(state["step"]) for state in second.values()] == [1.0, 1.0]


def test_one_bad_batch_spoils_the_gradients_it_is_summed_with():
    # Batches 2 and 3 are the second step; the third must not inherit anything of them.
    module, skips = Line({2: "loss"}), SkipNonFinite(2)
    fit(module, skips, 3, accumulate_grad_batches=2)
    first, second, third = module.states
    assert unchanged(first, second)
    assert not unchanged(second, third)
    assert (skips.skipped, skips.in_a_row) == (1, 0)


def test_without_a_bad_step_nothing_is_different():
    skips, module, alone = SkipNonFinite(1), Line({}), Line({})
    trainer = fit(module, skips, 4)
    assert "skipped_steps" not in trainer.callback_metrics
    fit(alone, None, 4)
    assert unchanged(alone.states[-1], module.states[-1])


def test_too_many_in_a_row_end_the_run():
    module = Line({1: "loss", 2: "gradients", 4: "loss", 5: "loss", 6: "loss"})
    skips = SkipNonFinite(3)
    with pytest.raises(RuntimeError, match="not finite in 3 steps in a row, the last of them"):
        fit(module, skips, 10)
    assert (skips.skipped, skips.in_a_row) == (5, 3)
    again = SkipNonFinite(3)
    again.load_state_dict(skips.state_dict())
    assert (again.skipped, again.in_a_row) == (5, 3)
    with pytest.raises(ValueError, match="max_skipped_in_a_row"):
        SkipNonFinite(0)


@pytest.fixture
def poisoned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Options of `bridges train` that choose a module of the test's own."""
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "poisoned_module.py").write_text(POISONED)
    monkeypatch.syspath_prepend(str(tmp_path / "code"))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "code"))
    return ["--module=poisoned_module.Poisoned"]


def test_a_run_counts_what_it_skips_and_resumes(on_disk, tmp_path, poisoned):
    schedule = ["--model.optimizer.min_lr=1e-3", "--model.optimizer.warmup_steps=0"]
    options = [*poisoned, *schedule, "--model.steps=[1,3]"]
    whole = train(on_disk.arguments(tmp_path / "whole", *options, "--trainer.max_steps=6"))
    part = tmp_path / "part"
    train(on_disk.arguments(part, *options, "--trainer.max_steps=3"))
    train(on_disk.arguments(part, *options, "--trainer.max_steps=6", "--resume=true"))
    for run in (whole, part):
        provenance = json.loads((run / "provenance.json").read_text())
        assert (provenance["steps"], provenance["skipped_steps"]) == (6, 2)
    assert "skipped_steps" in (whole / "csv-0" / "metrics.csv").read_text()
    expected, found = load_file(whole / WEIGHTS_FILE), load_file(part / WEIGHTS_FILE)
    assert all(torch.equal(expected[n], found[n]) for n in expected)


def test_a_run_that_is_not_finite_says_what_to_do(on_disk, tmp_path, poisoned, capsys):
    run = tmp_path / "run"
    options = ["--model.steps=[0,1,2,3]", "--max_skipped_in_a_row=3"]
    assert cli.main(["train", *on_disk.arguments(run, *poisoned, *options)]) == 2
    message = capsys.readouterr().err
    assert "3 steps in a row" in message
    assert "model.optimizer.lr" in message
    assert not (run / RUN_FILE).exists()


def test_all_ranks_skip_what_one_of_them_must(on_disk, tmp_path, poisoned):
    """The gradients are finite on both ranks: only asking the other one tells."""
    options = ["--trainer.devices=2", "--trainer.strategy=ddp", "--trainer.max_steps=5"]
    options += ["--model.steps=[1,3]", "--model.rank=1", f"--model.out={tmp_path}"]
    run = tmp_path / "run"
    done = subprocess.run(
        [sys.executable, "-m", "recipes", "train", *on_disk.arguments(run, *poisoned, *options)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    first, second = (torch.load(tmp_path / f"rank{r}.pt", weights_only=True) for r in (0, 1))
    assert len(first) == 5
    for one, other in zip(first, second, strict=True):
        assert all(torch.equal(one[n], other[n]) for n in one)
    kept = [all(torch.equal(a[n], b[n]) for n in a) for a, b in itertools.pairwise(first)]
    assert kept == [True, False, True, False]
    assert json.loads((run / "provenance.json").read_text())["skipped_steps"] == 2
    assert torch.load(run / LAST, weights_only=True)["global_step"] == 5
