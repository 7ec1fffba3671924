"""Known faults in shards, and whether each is named and no good sample is lost beside it.

Every shard of a set has one fault (`recipes.reliability_faults_plants`). The set is read as a run
reads it, with and without workers, and each shard by itself with ``on_error="raise"``. A fault
counts as named if in every reading the records of its shard are those of the fault and no others:
one record for each sample that is lost by it and known of, with shard, key and kind. A sample
counts as good if the fault leaves it whole, and as lost if in any reading it is missing, or one
pixel or letter of it is another.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.progress import Progress, TimeRemainingColumn
from torch import Tensor

from bridges.images import open_image
from recipes.bad_samples import BadSample, read_bad_samples
from recipes.loader import SizedLoader
from recipes.reliability_faults_plants import Damaged, Plant, Samples, good_samples, plants
from recipes.samples import CaptionDecoder, SampleError
from recipes.shard_files import ShardError
from recipes.shard_manifest import MANIFEST
from recipes.shard_store import drop_index
from recipes.shard_writer import write_shards
from recipes.stream import ShardStream

SEED = 5
EACH = 8
"""Shards with each fault: 33 × 8 = 264."""

WORKERS = (0, 2)


@dataclass(frozen=True)
class Planted:
    """A shard on disk with one fault, and what of it must be read."""

    shard: Path
    what: str
    damaged: Damaged
    good: dict[str, tuple[Tensor, str]]


@dataclass(frozen=True)
class Reading:
    """What one reading of all shards gave: samples by shard and key, records by shard."""

    samples: dict[tuple[str, str], tuple[Tensor, str]]
    records: dict[str, list[BadSample]]
    counts: Counter[str]


def measure(folder: Path, *, quick: bool = False) -> dict[str, Any]:
    """Plants faults in shards in a folder, and reads them.

    Args:
        folder: an empty one.
        quick: one shard with each fault.

    Returns:
        ``injected`` and ``named`` faults; ``good`` samples beside them, and ``good_lost`` of
        these; ``by_kind``, the records that they must leave; ``miscounted``, readings whose
        counters are others; ``unnamed``, which faults.
    """
    with Progress(*Progress.get_default_columns(), TimeRemainingColumn(), transient=True) as bar:
        planted = plant(folder / "shards", plants(), 1 if quick else EACH)
        task = bar.add_task("reading bad shards", total=len(planted) * (1 + len(WORKERS)))
        readings = []
        for workers in WORKERS:
            log = folder / f"skipped-{workers}.jsonl"
            readings.append(read([one.shard for one in planted], workers, log))
            bar.advance(task, len(planted))
        raised = []
        for one in planted:
            raised.append(is_raised(one))
            bar.advance(task)
    return score(planted, readings, raised)


def plant(folder: Path, faults: dict[str, Plant], each: int) -> list[Planted]:
    """Writes ``each`` shards with each fault; those harmed later keep what was known of them."""
    planted = []
    for what in faults:
        for turn in range(each):
            number = len(planted)
            samples = good_samples(number)
            good = {key: _expected(members) for key, members in samples.items()}
            shard = _written(samples, folder / f"{number:04d}", f"bad{number:04d}")
            key = list(samples)[(turn + 2) % len(samples)]
            rng = random.Random(f"{SEED}/{number}")
            damaged = faults[what](samples, key, rng, shard.read_bytes())
            if "index" not in damaged.known:
                drop_index(shard)
            if "manifest" not in damaged.known:
                (shard.parent / MANIFEST).unlink()
            shard.write_bytes(damaged.data)
            kept = {key: good[key] for key in good if key not in damaged.lost}
            planted.append(Planted(shard, what, damaged, kept))
    return planted


def read(shards: Sequence[Path], workers: int, log: Path) -> Reading:
    """Every sample of some shards through a loader, and the records of those passed over."""
    stream = _stream(shards, "skip")
    stream.bad.keep(log, {str(shard) for shard in shards})
    together: Any = list  # each sample is looked at by itself
    loader: Any = SizedLoader(stream, 8, together, num_workers=workers, drop_last=False)
    samples = {item["place"]: item["content"] for batch in loader for item in batch}
    records: dict[str, list[BadSample]] = {}
    for bad in read_bad_samples(log):
        records.setdefault(bad.shard, []).append(bad)
    return Reading(samples, records, Counter(stream.skipped))


def is_raised(planted: Planted) -> bool:
    """Whether ``on_error="raise"`` stops at the fault, and the message names it."""
    try:
        for _ in _stream([planted.shard], "raise").iterate():
            pass
    except (SampleError, ShardError) as error:
        keys = planted.damaged.keys
        named = None in keys or any(key is not None and key in str(error) for key in keys)
        return named and str(planted.shard) in str(error)
    return False


def score(
    planted: Sequence[Planted], readings: Sequence[Reading], raised: Iterable[bool]
) -> dict[str, Any]:
    """What `measure` returns."""
    named = lost = 0
    unnamed: list[str] = []
    for one, stopped in zip(planted, raised, strict=True):
        known = stopped and all(_is_named(one, reading) for reading in readings)
        named += known
        if not known:
            unnamed.append(f"{one.what} ({one.shard.name})")
        lost += sum(
            any(
                not _same(reading.samples.get((str(one.shard), key)), content)
                for reading in readings
            )
            for key, content in one.good.items()
        )
    kinds = Counter(kind for one in planted for kind in one.damaged.kinds)
    return {
        "injected": len(planted),
        "named": named,
        "good": sum(len(one.good) for one in planted),
        "good_lost": lost,
        "miscounted": sum(reading.counts != kinds for reading in readings),
        "by_kind": dict(sorted(kinds.items())),
        "unnamed": unnamed,
    }


def _is_named(planted: Planted, reading: Reading) -> bool:
    damaged = planted.damaged
    found = reading.records.get(str(planted.shard), [])
    return (
        Counter(bad.kind for bad in found) == Counter(damaged.kinds)
        and all(bad.key in damaged.keys for bad in found)
        and all(str(planted.shard) in bad.problem for bad in found)
    )


def _same(found: tuple[Tensor, str] | None, wanted: tuple[Tensor, str]) -> bool:
    return found is not None and torch.equal(found[0], wanted[0]) and found[1] == wanted[1]


def _expected(members: dict[str, bytes]) -> tuple[Tensor, str]:
    return _Pixels().pixels(members["png"]), json.loads(members["json"])["caption"]


def _written(samples: Samples, folder: Path, split: str) -> Path:
    """One shard, with its index and its manifest, as the project makes them."""
    texts = (
        {"__key__": key, **own, "txt": own["txt"].decode(), "json": json.loads(own["json"])}
        for key, own in samples.items()
    )
    return write_shards(texts, folder, split)[0]


class _Pixels:
    """All pixels as they are: uint8 (h, w, 3)."""

    def __call__(self, image: Image.Image) -> Tensor:
        return torch.from_numpy(np.array(image))

    def pixels(self, data: bytes) -> Tensor:
        return self(open_image(data))


def _stream(shards: Sequence[Path], on_error: Any) -> ShardStream[Any]:
    options: dict[str, Any] = {"on_error": on_error, "max_bad_fraction": 1.0}
    return ShardStream(list(shards), _Decode(), seed=SEED, shuffle=True, **options)


class _Decode:
    """A sample's place, its pixels and its caption, as training decodes it."""

    def __init__(self) -> None:
        self.decode = CaptionDecoder(_Pixels(), random_caption=True)

    def __call__(self, raw: dict[str, Any]) -> dict[str, Any]:
        sample = self.decode(raw)
        content = (sample["image"], sample["captions"][0])
        return {"place": (raw["__shard__"], sample["key"]), "content": content}
