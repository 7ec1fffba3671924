"""HF's ``generate`` at its speed for many rows."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


@contextmanager
def compact_head(head: nn.Module) -> Iterator[None]:
    """Gives an LM's head its input in one piece.

    After the prompt, ``generate`` gives the head the last column, a view of which torch can make no
    single product: it copies the head's weight once for each row. 100 rows of SmolLM2 take 26 s on
    a core up to their first token, 1.7 s with the view copied instead.
    """

    def compact(_: Any, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return tuple(tensor.contiguous() for tensor in inputs)

    hook = head.register_forward_pre_hook(compact)
    try:
        yield
    finally:
        hook.remove()
