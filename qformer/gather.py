"""Batches of all ranks joined, with gradients that find their way back."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def world_size() -> int:
    """Number of ranks; 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """This process's place among the ranks; 0 without a process group."""
    return dist.get_rank() if world_size() > 1 else 0


def gather(x: Tensor) -> Tensor:
    """Concatenates a tensor of equal shape from all ranks along its first axis.

    The gradient of a rank's own part is the sum of what all ranks' losses say of it. Together
    with DDP, which averages parameters' gradients over ranks, one process with the joined batch
    and several processes take the same step. A gather under ``no_grad`` (LAVIS) gives candidates no
    gradient at all, on one process either: half of what contrast says is lost.

    Shape: (b, …) -> (world_size · b, …).
    """
    if world_size() == 1:
        return x
    return _Gather.apply(x.contiguous())  # pyright: ignore[reportReturnType]


def total(x: Tensor) -> Tensor:
    """Sum over ranks, without gradient."""
    x = x.detach().clone()
    if world_size() > 1:
        dist.all_reduce(x)
    return x


def joined_mean(losses: Tensor) -> Tensor:
    """This rank's part of the mean over all ranks' losses, which is the mean of all parts.

    Shape: (m) -> (), where m may differ by rank.
    """
    count = total(torch.tensor(float(len(losses)), device=losses.device))
    return losses.sum() * world_size() / count.clamp(min=1)


def longest(length: int, device: torch.device) -> int:
    """The largest of all ranks' lengths."""
    if world_size() == 1:
        return length
    found = torch.tensor(length, device=device)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return int(found)


class _Gather(torch.autograd.Function):
    # torch.distributed.nn has an all_gather with gradients too, but under gloo its backward sends
    # one scatter for each rank.
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.size = len(x)
        parts = [torch.empty_like(x) for _ in range(world_size())]
        dist.all_gather(parts, x)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        gradient = gradient.contiguous().clone()
        dist.all_reduce(gradient)
        return gradient[rank() * ctx.size :][: ctx.size]
