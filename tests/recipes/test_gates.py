"""Gates over training: what is logged, that starts are joined, and what is drawn."""

import csv
import math
import re
import sys
from pathlib import Path

import lightning as L
import pytest
import tiny
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import recipes.train
from bridges import VisionLanguageModel
from bridges.run import WEIGHTS_FILE
from recipes.demo import RUN_FILES
from recipes.gates import gate_values, plot_gates, read_gates
from recipes.train import train


def gated(on_disk, run: Path, *more: str) -> Path:
    """A run of three LM blocks, two of them with a gated block."""
    bridge = ["--config=gated_xattn_small", f"--model.vision.name={on_disk.vision}"]
    rest = on_disk.arguments(run, "--model.bridge.init_args.every=2", *more)
    small = [a for a in rest if not a.startswith(("--config", "--model.vision.name"))]
    return train([*bridge, *small])


@pytest.fixture(scope="module")
def run(on_disk, tmp_path_factory) -> Path:
    return gated(on_disk, tmp_path_factory.mktemp("gates") / "run")


def panels(svg: Path) -> int:
    return len(re.findall(r'id="axes_\d+"', svg.read_text()))


def lines(svg: Path) -> int:
    """Lines of gates; the zero line and the grid have other colours or widths."""
    return len(re.findall(r"stroke-width: 1.3", svg.read_text()))


def test_every_gate_is_logged_at_every_step(run):
    series = read_gates(run)
    assert set(series) == {f"gate/{kind}.{block}" for kind in ("attn", "ff") for block in (0, 2)}
    for points in series.values():
        assert list(points) == [0, 1, 2, 3, 4]
        assert points[0] == 0.0 != points[4]


def test_the_last_values_are_those_of_the_weights(run):
    weights = load_file(run / WEIGHTS_FILE)
    for name, points in read_gates(run).items():
        kind, block = re.fullmatch(r"gate/(\w+)\.(\d+)", name).groups()
        gate = weights[f"bridge.blocks.{int(block) // 2}.{kind}_gate"]
        assert points[4] == pytest.approx(math.tanh(gate.item()), abs=1e-7)


def test_tensorboard_has_them_too(run):
    events = EventAccumulator(str(run / "tensorboard")).Reload()
    assert [e.step for e in events.Scalars("gate/attn.2")] == [0, 1, 2, 3, 4]


def test_the_plot_has_two_panels_and_a_line_for_each_layer(run):
    svg = run / "gates.svg"
    assert panels(svg) == 2
    assert lines(svg) == 4 + 2  # and two in the legend
    # A second demo replaces its run, if it finds nothing foreign there.
    assert all(any(map(path.match, RUN_FILES)) for path in run.iterdir())


def test_gates_are_logged_as_often_as_the_loss(on_disk, tmp_path):
    often = ["--trainer.log_every_n_steps=2", "--trainer.max_steps=5"]
    folder = gated(on_disk, tmp_path / "run", *often)
    assert all(list(points) == [0, 2, 4, 5] for points in read_gates(folder).values())


def test_accumulated_batches_are_one_step(on_disk, tmp_path):
    folder = gated(
        on_disk, tmp_path / "run", "--trainer.accumulate_grad_batches=2", "--trainer.max_steps=2"
    )
    assert all(list(points) == [0, 1, 2] for points in read_gates(folder).values())
    with (folder / "csv-0" / "metrics.csv").open() as file:
        steps = [row["step"] for row in csv.DictReader(file) if row["gate/attn.0"]]
    assert steps == ["0", "1", "2"]


def test_without_gates_nothing_is_drawn(on_disk, tmp_path):
    folder = train(on_disk.arguments(tmp_path / "run"))
    assert not (folder / "gates.svg").exists()
    assert plot_gates(folder) is None
    assert "gate/" not in (folder / "csv-0" / "metrics.csv").read_text()


def write_log(run: Path, start: int, rows: dict[int, float]) -> None:
    folder = run / f"csv-{start}"
    folder.mkdir(parents=True)
    with (folder / "metrics.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["step", "loss", "gate/attn.0"])
        writer.writeheader()
        for step, value in rows.items():
            writer.writerow({"step": step, "loss": 1.0})
            writer.writerow({"step": step, "gate/attn.0": value})


def test_starts_are_joined_and_lost_steps_left_out(tmp_path):
    # The second start goes on from step 4: what the first did past it is lost. 10 follows 2.
    write_log(tmp_path, 0, {0: 0.0, 3: 0.1, 5: 0.8, 6: 0.9})
    write_log(tmp_path, 2, {4: 0.2, 6: 0.3})
    write_log(tmp_path, 10, {6: 0.4, 9: 0.5})
    assert read_gates(tmp_path) == {"gate/attn.0": {0: 0.0, 3: 0.1, 4: 0.2, 6: 0.4, 9: 0.5}}
    svg = plot_gates(str(tmp_path))
    assert svg == tmp_path / "gates.svg" and panels(svg) == 2


def test_a_resumed_run_is_drawn_whole(on_disk, tmp_path):
    folder = gated(on_disk, tmp_path / "run", "--trainer.max_steps=2")
    gated(on_disk, folder, "--trainer.max_steps=4", "--resume=true")
    assert (folder / "csv-1").is_dir()
    assert list(read_gates(folder)["gate/ff.2"]) == [0, 1, 2, 3, 4]


def test_an_interrupted_run_is_drawn_as_far_as_it_went(on_disk, tmp_path, monkeypatch):
    class Stop(L.Callback):
        def on_train_batch_end(self, trainer, *_):
            if trainer.global_step == 3:
                raise RuntimeError("stopped")

    # In the place of a callback that this test does not need.
    monkeypatch.setattr(recipes.train, "RichModelSummary", lambda **_: Stop())
    with pytest.raises(RuntimeError, match="stopped"):
        gated(on_disk, tmp_path / "run")
    assert list(read_gates(tmp_path / "run")["gate/attn.0"])[:3] == [0, 1, 2]
    assert lines(tmp_path / "run" / "gates.svg") == 4 + 2


def test_without_matplotlib_the_run_ends_and_says_so(on_disk, tmp_path, caplog, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    folder = gated(on_disk, tmp_path / "run")
    assert "bridges[demo]" in caplog.text
    assert read_gates(folder)
    assert not (folder / "gates.svg").exists()
    with pytest.raises(ImportError, match=r"bridges\[demo\]"):
        plot_gates(folder)


def test_gates_of_channels_count_by_their_mean_magnitude():
    lm = tiny.language_model("llama")
    model = VisionLanguageModel.connect(tiny.vision_encoder(), lm, tiny.factory("perceiver_gated"))
    first, second = model.bridge.blocks
    first.attn_gate = torch.nn.Parameter(torch.tensor([-1.0, 1.0, 0.0, 2.0]))
    second.attn_gate = torch.nn.Parameter(torch.tensor([-1.0]))
    second.ff_gate = None
    expected = (2 * math.tanh(1) + math.tanh(2)) / 4
    values = gate_values(model)
    assert values == {
        "gate/attn.0": pytest.approx(expected),
        "gate/ff.0": 0.0,
        "gate/attn.2": pytest.approx(-math.tanh(1)),
    }
