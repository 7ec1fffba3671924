"""Cells made equal in trainable parameters, FLOPs or seconds."""

import copy
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

import torch

from bridges import LanguageModel, VisionEncoder, bridge_factory
from bridges.contract import DecoderShape, VisionShape
from bridges.language import LoRA
from recipes.ablation_fair import UnfairError
from recipes.ablation_grid import RESAMPLER
from recipes.config_keys import Config, get_key, set_key

TOLERANCE = 0.05
"""How far apart parameters may be that count as matched."""

STEPS = "trainer.max_steps"

_WIDEST_STEP = 128
_LARGEST = 2**20


def solve_steps(budget: float, per_step: float) -> int:
    """Optimiser steps that cost a budget of FLOPs or seconds, at least one."""
    return max(1, round(budget / per_step))


@lru_cache(maxsize=8)
def _shapes(vision: tuple[Any, ...], lm: tuple[Any, ...]) -> tuple[VisionShape, DecoderShape]:
    sources = dict(vision), dict(lm)
    return VisionEncoder.load(**sources[0]).shape, LanguageModel.load(**sources[1]).shape


def count_trainable(config: Config) -> int:
    """Trainable parameters of the bridge that a config describes; no memory is taken for them.

    Raises:
        ValueError: a config without a bridge, or of one that cannot be built.
    """
    spec = get_key(config, "model.bridge")
    if spec is None:
        raise ValueError(
            "found a config without model.bridge; expected one: only bridges are matched in "
            "parameters, choose another `match`"
        )
    vision, lm = dict(config["model"]["vision"]), dict(config["model"]["lm"])
    if lora := lm.pop("lora", None):
        lm["lora"] = LoRA(**lora)
    lm = {k: tuple(v) if isinstance(v, list) else v for k, v in lm.items()}
    shapes = _shapes(tuple(sorted(vision.items())), tuple(sorted(lm.items())))
    with torch.device("meta"):
        bridge = bridge_factory(copy.deepcopy(spec))(vision=shapes[0], decoder=shapes[1])
    return sum(p.numel() for p in bridge.parameters() if p.requires_grad)


def solve_size(config: Config, key: str, budget: float, name: str) -> dict[str, Any]:
    """The value of a key by which a cell comes nearest to a number of trainable parameters.

    Args:
        config: of the cell; changed in place.
        key: of a whole number by which parameters grow. Within a blind resampler it is that of
            the resampler within.
        budget: parameters to come near to.
        name: of the cell.

    Returns:
        The key with its value.

    Raises:
        ValueError: no number there, no value of it comes within `TOLERANCE`, or parameters that
            do not follow from it.
    """
    if get_key(config, key) is None:
        key = key.replace(RESAMPLER, f"{RESAMPLER}.init_args.resampler", 1)
    start = get_key(config, key)
    if not isinstance(start, int) or start < 1:
        raise ValueError(
            f"found {key}: {start!r} in {name!r}; expected a whole number to solve for: give the "
            "cell one to start from, or name another key by `size_key`"
        )

    def count(value: int) -> int | None:
        tried = copy.deepcopy(config)
        set_key(tried, key, value)
        try:
            return count_trainable(tried)
        except ValueError:  # heads that do not divide a width, for one
            return None

    step = _step(start, count)
    low, high = step, step
    while (found := count(high)) is not None and found < budget and high < _LARGEST:
        low, high = high, high * 2
    while high - low > step:
        middle = (low + high) // 2 // step * step
        found = count(middle)
        if found is None:
            raise ValueError(
                f"found no bridge of {key}: {middle} in {name!r}, though it can be {low} and "
                f"{high}; expected all multiples of {step}: name another key by `size_key`"
            )
        low, high = (middle, high) if found < budget else (low, middle)
    counts = {value: count(value) for value in (low, high)}
    known = {value: found for value, found in counts.items() if found is not None}
    best = min(known, key=lambda value: abs(known[value] - budget), default=None)
    if best is None or abs(known[best] - budget) > TOLERANCE * budget:
        said = ", ".join(f"{found:,} with {value}" for value, found in known.items()) or "none"
        raise ValueError(
            f"found no {key} by which {name!r} has {budget:,.0f} trainable parameters; expected "
            f"them within {TOLERANCE:.0%}, and the nearest are {said}: choose another `budget`, "
            "baseline or `size_key`"
        )
    set_key(config, key, best)
    return {key: best}


def _step(start: int, count: Callable[[int], int | None]) -> int:
    """The smallest step whose multiples, near a value that is known to fit, all fit."""
    for step in range(1, _WIDEST_STEP + 1):
        near = max(1, start // step)
        if all(count(step * (near + more)) is not None for more in range(3)):
            return step
    raise ValueError(
        f"found no step of up to {_WIDEST_STEP} near {start} whose multiples can all be built; "
        "expected one: name another key by `size_key`"
    )


def check_size(name: str, found: int, reference: str, wanted: int) -> None:
    """Refuses a run whose trainable parameters, all of them, are not those of another one.

    Raises:
        UnfairError: more than twice `TOLERANCE` apart: each may be so far from the budget.
    """
    if abs(found - wanted) > 2 * TOLERANCE * wanted:
        raise UnfairError(
            f"found {found:,} trainable parameters in {name!r}; expected about {wanted:,}, as in "
            f"{reference!r}: something beside the bridge is trained, or the size was not heeded; "
            "take it out, or choose another `match`"
        )


PER_STEP = {"flops": "flops_per_step", "time": "seconds_per_step"}
"""What a trial measures, by what is matched."""

TRIAL_STEPS: Mapping[str, int] = {"flops": 1, "time": 8}
"""Steps of a trial. The first is not timed."""
