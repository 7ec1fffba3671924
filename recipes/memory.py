"""How much memory a computation needs at its peak, on CPU and CUDA alike."""

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors that are made, and not yet freed, inside the context.

    Tensors that were there before cost nothing, views nothing, and a tensor counts until the last
    view of it is gone. Not seen: buffers that a kernel makes and frees within one call. Slow
    (Python runs at every operation): not for timed runs.

    Attributes:
        live: bytes alive now.
        peak: largest `live` so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = 0
        self.peak = 0
        self._known: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        # What an operation reads and nobody here made was there before.
        for tensor in tree_leaves((args, kwargs)):
            self._count(tensor, made=False)
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            self._count(tensor, made=True)
        return result

    def _count(self, tensor: Any, *, made: bool) -> None:
        if not isinstance(tensor, Tensor):
            return
        storage = tensor.untyped_storage()
        if storage in self._known:
            return
        self._known.add(storage)
        if made:
            size = storage.nbytes()
            self.live += size
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._freed, size)

    def _freed(self, size: int) -> None:
        self.live -= size


def peak_bytes(step: Callable[[], object], device: torch.device) -> int:
    """Bytes that `step` allocates at its peak, beyond what is allocated before it.

    Weights and inputs are not in it; activations and gradients are. On CUDA the allocator says
    it; elsewhere `LiveBytes` counts.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        step()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with LiveBytes() as counted:
        step()
    return counted.peak
