"""What an ablation notes of a training run: order of samples, FLOPs, memory, time."""

import hashlib
from contextlib import ExitStack
from pathlib import Path
from time import perf_counter
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch.utils.flop_counter import FlopCounterMode

from bridges.files import write_json
from recipes.batch import Batch
from recipes.memory import LiveBytes

MEASURED_FILE = "measured.json"
"""In the run directory."""

_CPU_ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_CPU_ATTENTION_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class Measure(Callback):
    """Notes what makes runs comparable, and what they cost, into ``measured.json``.

    - The order of samples: a digest over keys and captions of all samples trained on, one after
      another, and one over the first `order_samples` of them, for runs of different length.
    - FLOPs and peak memory of the first optimiser step, which is as slow as that and left out of
      the times. FLOPs are those of matrix products and attention, forward and backward, frozen
      parts included. Memory is what the step allocates beyond weights and inputs: activations,
      gradients, Adam's moments.
    - Time and samples of the other steps, loading included, validation not.

    A run that is resumed goes on with all of them.

    Args:
        folder: the run directory.
        order_samples: samples that the shorter digest is over; all of them, if there are fewer
            or it is 0.
    """

    def __init__(self, folder: str, order_samples: int = 0) -> None:
        self.folder = Path(folder)
        self.order_samples = order_samples
        self.noted: dict[str, Any] = {
            "samples": 0,
            "order_digest": "",
            "sample_order_digest": "",
            "flops_per_step": None,
            "peak_bytes": None,
            "timed_seconds": 0.0,
            "timed_samples": 0,
            "timed_batches": 0,
        }
        self._modes = ExitStack()
        self._counter: FlopCounterMode | None = None
        self._memory: LiveBytes | None = None
        self._allocated = 0
        self._since = 0.0

    def on_train_batch_start(
        self, trainer: L.Trainer, module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Looks at the first step from within."""
        if self.noted["flops_per_step"] is None and self._counter is None:
            self._begin(module.device)

    def on_train_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, batch: Any, index: int
    ) -> None:
        """Notes a batch; the last of the first step ends the look at it."""
        assert isinstance(batch, Batch)
        now = perf_counter()
        self._note_order(batch)
        if self._counter is not None:
            if trainer.global_step:
                self._end(module.device)
        else:
            self.noted["timed_seconds"] += now - self._since
            self.noted["timed_samples"] += len(batch)
            self.noted["timed_batches"] += 1
        self._since = perf_counter()

    def on_train_start(self, *_: Any) -> None:
        """Starts the clock, of a resumed run too."""
        self._since = perf_counter()

    def on_validation_end(self, *_: Any) -> None:
        """Leaves validation out."""
        self._since = perf_counter()

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Writes the file."""
        batches, accumulated = self.noted["timed_batches"], trainer.accumulate_grad_batches
        seconds, samples = self.noted["timed_seconds"], self.noted["timed_samples"]
        derived = {
            "sample_order_digest": self.noted["sample_order_digest"] or self.noted["order_digest"],
            "steps": trainer.global_step,
            "samples_per_s": samples / seconds if samples else None,
            "seconds_per_step": seconds / batches * accumulated if batches else None,
        }
        write_json(self.folder / MEASURED_FILE, self.noted | derived)

    def on_exception(self, *_: Any) -> None:
        """Lets go of the step that is looked at."""
        self._modes.close()

    def state_dict(self) -> dict[str, Any]:
        """All that is noted, for a run that is resumed."""
        return dict(self.noted)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on."""
        self.noted = dict(state_dict)

    def _note_order(self, batch: Batch) -> None:
        for sample in batch.samples:
            # A chain, for a hash object cannot be stored in a checkpoint.
            said = "\n".join([self.noted["order_digest"], sample["key"], *sample["captions"]])
            self.noted["order_digest"] = hashlib.sha256(said.encode()).hexdigest()[:16]
            self.noted["samples"] += 1
            if self.noted["samples"] == self.order_samples:
                self.noted["sample_order_digest"] = self.noted["order_digest"]

    def _begin(self, device: torch.device) -> None:
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self._allocated = torch.cuda.memory_allocated(device)
        else:
            self._memory = self._modes.enter_context(LiveBytes())
        # torch's counter does not know the CPU's fused attention.
        attention = {_CPU_ATTENTION: _attention, _CPU_ATTENTION_BACKWARD: _attention_backward}
        counter = FlopCounterMode(display=False, custom_mapping=attention)
        self._counter = self._modes.enter_context(counter)

    def _end(self, device: torch.device) -> None:
        assert self._counter is not None
        self._modes.close()
        self.noted["flops_per_step"] = self._counter.get_total_flops()
        if self._memory is not None:
            self.noted["peak_bytes"] = self._memory.peak
        else:
            peak = torch.cuda.max_memory_allocated(device)
            self.noted["peak_bytes"] = peak - self._allocated
        self._counter = self._memory = None


def _attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    """Two products: of queries with keys, and of weights with values."""
    b, h, t, d = query
    return 2 * b * h * t * key[-2] * (d + value[-1])


def _attention_backward(_: Any, query: Any, key: Any, value: Any, *__: Any, **___: Any) -> int:
    """Five products: the weights again, and the gradients of weights, queries, keys and values."""
    b, h, t, d = query
    return 2 * b * h * t * key[-2] * (3 * d + 2 * value[-1])
