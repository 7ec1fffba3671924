"""Gates over training: logged while a run goes on, drawn when it ends."""

import io
import logging
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from bridges.contract import Bridge
from bridges.files import write_text
from recipes.run_log import Series, read_log

GATES_FILE = "gates.svg"
"""The plot, in the run directory."""

PREFIX = "gate/"
PANELS = {"attn": "attention gate", "ff": "feed-forward gate"}

LEGEND_ROWS = 14

logger = logging.getLogger(__name__)


class GateRecorder(Callback):
    """Logs how far each gate is open, and draws it into the run directory at the end.

    The value of step n is the one after n optimiser steps. A bridge without gates is left alone.

    Args:
        folder: the run directory.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._logged_at = -1

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """The gates that training starts from."""
        self._log(trainer, pl_module)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        """Every ``log_every_n_steps``; accumulated batches are one step."""
        every = trainer.log_every_n_steps  # pyright: ignore[reportAttributeAccessIssue]
        if every and trainer.global_step % every == 0:
            self._log(trainer, pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """The gates that training ends with, and the plot."""
        self._log(trainer, pl_module)
        self._draw(trainer)

    def on_exception(self, trainer: L.Trainer, *_: Any) -> None:
        """What there is of a run that is interrupted."""
        self._draw(trainer)

    def _log(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        step = trainer.global_step
        if not trainer.is_global_zero or step == self._logged_at:
            return
        self._logged_at = step
        values = gate_values(module)
        if values:
            for log in trainer.loggers:
                log.log_metrics(values, step=step)

    def _draw(self, trainer: L.Trainer) -> None:
        if not trainer.is_global_zero or self._logged_at < 0:
            return
        for log in trainer.loggers:
            log.save()  # what is drawn is what the files say
        try:
            plot_gates(self.folder)
        except ImportError as error:
            logger.warning("%s; the gates are in csv-*/metrics.csv", error)


@torch.no_grad()
def gate_values(module: torch.nn.Module) -> dict[str, float]:
    """tanh of every gate of the bridge in a module; of a gate for each channel the mean magnitude.

    Returns:
        By name, ``gate/attn.4`` for the attention gate before LM block 4 and ``gate/ff.4`` for
        the feed-forward gate; empty where no layer that the bridge inserts has a gate.
    """
    bridge = next((part for part in module.modules() if isinstance(part, Bridge)), None)
    found: dict[str, Tensor] = {}
    for insert in () if bridge is None else bridge.inserts():
        for kind in PANELS:
            gate = getattr(insert.module, f"{kind}_gate", None)
            if isinstance(gate, Tensor) and gate.numel():
                opened = gate.float().tanh()
                opened = opened.abs().mean() if gate.numel() > 1 else opened.reshape(())
                found[f"{PREFIX}{kind}.{insert.layer}"] = opened
    # One copy from the device, not one for each gate.
    values = torch.stack([*found.values()]).tolist() if found else []
    return dict(zip(found, values, strict=True))


def read_gates(run: Path) -> Series:
    """The logged gates of a run, see `read_log`."""
    return read_log(run, lambda name: name.startswith(PREFIX))


def plot_gates(run: str | Path) -> Path | None:
    """Draws every gate of a run over its steps into ``gates.svg``, one line per layer.

    Returns:
        Where the plot is; None where the run has logged no gates.

    Raises:
        ImportError: matplotlib is not there (extra ``demo``).
    """
    series = read_gates(Path(run))
    if not series:
        return None
    try:
        from matplotlib import colormaps
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("drawing gates needs matplotlib: pip install 'bridges[demo]'") from error
    blocks = sorted({_block(name) for name in series})
    # From dark to bright with depth; the brightest yellow is not seen on white.
    colours = {
        block: colormaps["plasma"](0.88 * place / max(1, len(blocks) - 1))
        for place, block in enumerate(blocks)
    }
    figure = Figure(figsize=(10, 3.8), layout="constrained")
    panels = figure.subplots(1, 2, sharex=True)
    lines = {}
    for axes, (kind, title) in zip(panels, PANELS.items(), strict=True):
        for block in blocks:
            points = sorted(series.get(f"{PREFIX}{kind}.{block}", {}).items())
            if points:
                marker = "o" if len(points) == 1 else ""
                (lines[block],) = axes.plot(
                    *zip(*points, strict=True), marker=marker, color=colours[block], lw=1.3
                )
        axes.axhline(0, color="#9ca3af", lw=0.6, zorder=0)
        axes.set_title(title, fontsize=11)
        axes.set_xlabel("step")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("tanh of the gate\n(per channel: mean magnitude)")
    figure.legend(
        [lines[block] for block in blocks],
        [str(block) for block in blocks],
        title="before\nLM block",
        loc="outside right center",
        frameon=False,
        fontsize=9,
        ncols=-(-len(blocks) // LEGEND_ROWS),
        columnspacing=1.0,
        handlelength=1.3,
    )
    svg = io.StringIO()
    figure.savefig(svg, format="svg", metadata={"Date": None})
    path = Path(run) / GATES_FILE
    write_text(path, svg.getvalue())
    return path


def _block(name: str) -> int:
    return int(name.rpartition(".")[2])
