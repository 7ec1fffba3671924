"""What makes a comparison unfair, found and refused: other data, other lengths, leaks."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from inspect import signature
from pathlib import Path
from typing import Any

from recipes.ablation_cells import Cell
from recipes.ablation_grid import Match
from recipes.config_keys import get_key
from recipes.data import CaptionData
from recipes.features import MEMBER
from recipes.samples import IMAGE_EXTENSIONS
from recipes.stream import ShardStream
from recipes.training import DEFAULT_DATA

_SOURCE_KEYS = (
    *("shards", "val_shards", "seed", "shuffle_buffer", "batch_size", "task", "weight"),
    *("max_caption_tokens", "max_tokens", "max_images", "min_similarity", "loss_before_image"),
    *("num_frames", "fps", "decode", "on_error"),
)
_DEFAULTS = {
    **{name: one.default for name, one in signature(CaptionData).parameters.items()},
    "weight": 1.0,
    "data_class": DEFAULT_DATA,
    "mixing": "accumulate",
    "accumulate_grad_batches": 1,
}

FAIR_KEYS = (
    "data_class",
    *(f"data.{key}" for key in _SOURCE_KEYS),
    "data.mixing",
    "data.rounds_per_epoch",
    "trainer.accumulate_grad_batches",
    "trainer.overfit_batches",
    "trainer.limit_train_batches",
)
"""Keys that say which samples are seen, in which order, and how many in a step."""

LENGTH_KEYS = ("trainer.max_steps", "trainer.max_epochs", "trainer.max_time")
"""Keys that say how long training goes on."""


class UnfairError(ValueError):
    """A comparison whose cells were not given the same."""


def check_planned(cells: Sequence[Cell], match: Match) -> None:
    """Refuses, before anything is trained, cells whose configs differ in what must be the same.

    Raises:
        UnfairError: naming the cell, the key, both values and what to do.
    """
    reference = cells[0]
    for cell in cells[1:]:
        _compare(cell, reference, lambda one: one.config, FAIR_KEYS, "")
        if cell.first is not None and (other := next(c for c in cells if c.first)) is not cell:
            keys = (*FAIR_KEYS, *LENGTH_KEYS)
            _compare(cell, other, lambda one: one.first or {}, keys, "first.")
        if match in ("flops", "time") and any(cell.first for cell in cells):
            raise UnfairError(
                f"found a first stage with match: {match}; expected match: steps or params: what a "
                "first stage costs is not part of the budget"
            )
        if match in ("steps", "params"):
            _compare(cell, reference, lambda one: one.config, LENGTH_KEYS, "")


def _compare(
    cell: Cell,
    reference: Cell,
    part: Callable[[Cell], Mapping[str, Any]],
    keys: Sequence[str],
    prefix: str,
) -> None:
    own, expected = part(cell), part(reference)
    names = {*(get_key(own, "data.sources") or {}), *(get_key(expected, "data.sources") or {})}
    sources = [f"data.sources.{name}.{key}" for name in sorted(names) for key in _SOURCE_KEYS]
    for key in (*keys, *sources):
        found, wanted = _value(own, key), _value(expected, key)
        if found != wanted:
            what = (
                "would not train as long"
                if key in LENGTH_KEYS
                else "would not see the same samples in the same order"
            )
            raise UnfairError(
                f"found {prefix}{key}: {found!r} in the cell {cell.name!r}; expected {wanted!r}, "
                f"as in {reference.name!r}: the cells {what}; give all cells the same by "
                "`overrides`, or compare them in sweeps of their own"
            )


def _value(config: Mapping[str, Any], key: str) -> Any:
    """The value at a key, where there is none its default."""
    found = get_key(config, key)
    return _DEFAULTS.get(key.rpartition(".")[2]) if found is None else found


def check_leaks(train: Sequence[Path], held_out: Sequence[Path]) -> int:
    """Refuses held-out pictures that are trained on, by the bytes of their pictures.

    Whatever they are called and captioned. Not found: the same picture encoded anew.

    Args:
        train: shards, with pictures or features.
        held_out: likewise.

    Returns:
        How many samples there are to train on.

    Raises:
        UnfairError: with the names of the first few.
    """
    if not held_out:
        raise UnfairError(
            "found no held-out shards; expected some that no cell trains on: val-*.tar or "
            "dev-*.tar beside train-*.tar, or data.val_shards"
        )
    unseen = {}
    for raw in _raw(held_out):
        for digest in _pictures(raw):
            unseen.setdefault(digest, _name(raw))
    leaks: dict[str, str] = {}
    samples = 0
    for raw in _raw(train):
        samples += 1
        for digest in _pictures(raw):
            if digest in unseen:
                leaks.setdefault(unseen[digest], _name(raw))
    if leaks:
        named = "; ".join(f"{out} is {of}" for out, of in list(leaks.items())[:5])
        raise UnfairError(
            f"found {len(leaks)} held-out samples whose pictures are trained on, too: {named}; "
            "expected none: what was learned by heart would count as understood; hold out others, "
            "and split by picture, not by caption"
        )
    return samples


def _raw(shards: Sequence[Path]) -> Any:
    return ShardStream(
        list(shards), dict, seed=0, shuffle=False, on_error="skip", max_bad_fraction=1.0
    ).iterate()


def _pictures(raw: Mapping[str, Any]) -> list[bytes]:
    """A digest of each picture or clip of a sample, or of its features."""
    wanted = {*IMAGE_EXTENSIONS, "mp4", *MEMBER.values()}
    members = [bytes(x) for n, x in raw.items() if n.rpartition(".")[2] in wanted]
    if "json" in raw and b"image_base64" in raw["json"]:  # a document of MMC4
        described = json.loads(raw["json"])
        inside = [one.get("image_base64") for one in described.get("image_info") or ()]
        members += [one.encode() for one in inside if isinstance(one, str)]
    return [hashlib.blake2b(member, digest_size=16).digest() for member in members]


def _name(raw: Mapping[str, Any]) -> str:
    return f"{raw['__key__']} of {Path(raw['__shard__']).name}"


def check_run(
    name: str, found: Mapping[str, Any], wanted: Mapping[str, Any], reference: str
) -> None:
    """Refuses a run that was not given what another one was.

    Args:
        name: of the run.
        found: by what it is called, what it was given.
        wanted: likewise, of the other one.
        reference: name of the other one.

    Raises:
        UnfairError: naming both runs, and both values.
    """
    for what, expected in wanted.items():
        if found[what] != expected:
            raise UnfairError(
                f"found {what} {found[what]!r} in {name!r}; expected {expected!r}, as in "
                f"{reference!r}: the two were not given the same, and are not compared; see what "
                "their configs and their data differ in, and start again with another --out"
            )


def skipped(runs: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What runs have left out, for people; nothing where all took all."""
    said = []
    for name, run in runs.items():
        lost = dict(run["skipped_samples"])
        if run["skipped_steps"]:
            lost["steps that were not finite"] = run["skipped_steps"]
        if lost:
            said.append(f"{name}: {', '.join(f'{n} × {what}' for what, n in lost.items())}")
    return said
