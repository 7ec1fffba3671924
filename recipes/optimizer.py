"""The optimiser of all recipes, and its schedule."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatch
from typing import Literal

import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler
from transformers import (
    get_constant_schedule_with_warmup,
    get_cosine_with_min_lr_schedule_with_warmup,
)


@dataclass(frozen=True)
class OptimizerOptions:
    """AdamW with linear warm-up, then cosine decay or a constant rate.

    Attributes:
        lr: peak learning rate.
        min_lr: learning rate at the end of the cosine.
        warmup_steps: optimiser steps from 0 to `lr`.
        betas: of Adam; BLIP-2's by default.
        weight_decay: on matrices only; biases, norms and gates have none.
        lr_scale: factor on the learning rate of the parameters whose names match a pattern.
            ``{"*_gate": 20}`` opens zero-initialised gates in a short run: Adam moves a scalar
            by about one learning rate a step, and until it has, its block learns nothing.
        schedule: after warm-up: ``cosine`` down to `min_lr`, or ``constant`` (Flamingo).
        no_decay: patterns of names of further parameters without weight decay, such as
            ``["*.resampler.*"]`` (Flamingo).
    """

    lr: float = 1e-4
    min_lr: float = 0.0
    warmup_steps: int = 0
    betas: tuple[float, float] = (0.9, 0.98)
    weight_decay: float = 0.05
    lr_scale: dict[str, float] = field(default_factory=dict)
    schedule: Literal["cosine", "constant"] = "cosine"
    no_decay: list[str] = field(default_factory=list)


def adamw(
    options: OptimizerOptions,
    parameters: Iterable[tuple[str, nn.Parameter]],
    total_steps: Callable[[], int],
) -> tuple[torch.optim.AdamW, LRScheduler]:
    """AdamW over the trainable ones of some parameters, and its schedule by optimiser steps.

    Args:
        options: rates and exceptions.
        parameters: with their names.
        total_steps: of the whole run; only a cosine asks.
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = defaultdict(list)
    for name, parameter in parameters:
        if parameter.requires_grad:
            decays = parameter.ndim >= 2 and not _matches(name, options.no_decay)
            decay = options.weight_decay if decays else 0.0
            groups[options.lr * _scale(name, options.lr_scale), decay].append(parameter)
    optimizer = torch.optim.AdamW(
        [{"params": p, "lr": lr, "weight_decay": d} for (lr, d), p in groups.items()],
        lr=options.lr,
        betas=options.betas,
    )
    if options.schedule == "constant":
        return optimizer, get_constant_schedule_with_warmup(optimizer, options.warmup_steps)
    schedule = get_cosine_with_min_lr_schedule_with_warmup(
        optimizer, options.warmup_steps, total_steps(), min_lr=options.min_lr
    )
    return optimizer, schedule


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)


def _scale(name: str, scales: Mapping[str, float]) -> float:
    return next((scale for pattern, scale in scales.items() if fnmatch(name, pattern)), 1.0)
