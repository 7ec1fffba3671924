"""Features of a frozen encoder, computed once and kept as shards.

`bridges cache` (`recipes.cache_command`) and the automatic cache of a training run
(`cache_features`) write the same: a folder with a feature shard for each shard of pictures and
`FEATURES_FILE`, which says what they were made of. Samples keep their keys and texts; see
docs/feature-shards.md.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from bridges import VisionEncoder
from bridges.decode import DecodeMode
from recipes.cache_form import PICTURES, CacheForm
from recipes.cache_set import (
    FEATURES_FILE,
    PARTIAL_FILE,
    FeatureSet,
    left_out,
    read_description,
)
from recipes.cache_writer import Encoding, write_features
from recipes.features import MEMBER, decode_features
from recipes.locks import locked
from recipes.shard_files import expand_shards
from recipes.shard_index import shard_indexes
from recipes.shard_manifest import Entry, read_manifest
from recipes.shard_store import load_index
from recipes.stream import ShardStream

logger = logging.getLogger(__name__)


def cache_features(
    shards: str | Path | Sequence[str | Path],
    encoder: VisionEncoder,
    cache: Path,
    *,
    batch_size: int = 32,
    on_error: Literal["raise", "skip"] = "raise",
    max_bad_fraction: float = 1.0,
    form: CacheForm = PICTURES,
    decode: DecodeMode = "exact",
) -> list[Path]:
    """Encodes every picture of some shards once; later calls find the result.

    The features (fp16) stand in place of the picture, beside the same text, in a folder named by
    the digest of the shards and the encoder, so that a changed shard or another encoder never
    meets stale features. A call that is killed goes on after its last whole shard.

    Args:
        shards: with pictures; already cached ones are returned as they are, see `check_cached`.
        encoder: the frozen encoder.
        cache: folder of all caches.
        batch_size: pictures encoded together.
        on_error: stop at a picture that cannot be read, or log it with shard and key and leave
            it out.
        max_bad_fraction: what stops all the same: more bad samples than this, of those seen.
        form: of the samples. Single pictures give features (p, d); documents and clips give
            those of all their pictures or frames, (n, p, d).
        decode: how pixels are made.

    Returns:
        The shards with features, one for each of `shards`, in their order.

    Raises:
        ValueError: a bad sample, or one that was left out earlier, where they are not skipped;
            cached shards of another encoder or form.
    """
    paths = expand_shards(shards)
    if any(is_cached(path) for path in paths):
        check_cached(paths, encoder, form, decode)
        return paths
    features = FeatureSet.of(paths, cache, encoder, form, "fp16", decode)
    content = json.dumps(features.identity, sort_keys=True)
    name = hashlib.sha256(content.encode()).hexdigest()[:16]
    features = features.at(cache / name)
    cache.mkdir(parents=True, exist_ok=True)
    # Of several ranks on a machine the first encodes, the others wait and find the result.
    with locked(cache / f"{name}.lock"):
        if not features.begin():
            encoding = Encoding(
                encoder, form, "fp16", decode, batch_size, on_error, max_bad_fraction
            )
            write_features(features, encoding)
            features.finish()
    described = read_description(features.folder / FEATURES_FILE)
    assert described is not None
    missing = left_out(described)
    if missing and on_error == "raise":
        raise ValueError(
            f"found features in {features.folder} without {len(missing)} bad samples, first "
            f"{missing[0]}; expected all: mend them in the shards, or skip them (on_error: skip)"
        )
    return features.paths


def is_cached(shard: Path) -> bool:
    """Whether a shard holds features in place of pictures."""
    return (shard.parent / FEATURES_FILE).is_file()


def check_cached(
    shards: Sequence[Path],
    encoder: VisionEncoder,
    form: CacheForm | None = None,
    decode: DecodeMode | None = None,
) -> None:
    """Refuses features of another encoder, transform or form, of other pictures, or half made.

    Args:
        shards: any; those with pictures pass.
        encoder: of the run.
        form: that the run reads; None takes any.
        decode: how the run makes pixels; None takes any way of this encoder.

    Raises:
        ValueError: naming the folder, what was found there and what was expected.
    """
    for folder, own in itertools.groupby(sorted(shards), key=lambda shard: shard.parent):
        described = read_description(folder / FEATURES_FILE)
        if described is None:
            _check_pictures(folder, next(own))
            continue
        found = described["encoder"]
        if found != encoder.fingerprint:
            raise ValueError(
                f"found features of encoder {found} in {folder}; expected those of "
                f"{encoder.fingerprint}, this run's (weights, transform, layer, tokens): give the "
                "shards with pictures, or make the features again with 'bridges cache'"
            )
        transform = described["transform"]
        expected = encoder.transform_fingerprint(decode or _mode(transform))
        if transform != expected:
            raise ValueError(
                f"found features of pixels made by {transform} in {folder}; expected {expected}: "
                f"set data.decode to {_mode(transform)}, or if that is so, make the features again "
                "with 'bridges cache'"
            )
        if form is not None and described["form"] != form.described:
            raise ValueError(
                f"found features of {described['form']} in {folder}; expected those of "
                f"{form.described}: give the shards with pictures, they are cached again, or set "
                "data.task and data.fps to what was cached"
            )
        _check_sources(folder, described, {shard.name for shard in own})


def mean_patches(shards: Sequence[Path], limit: int = 2000) -> torch.Tensor:
    """Mean features over pictures, the place of each patch kept: (p, d), fp32.

    What a blind model sees in the place of every picture.

    Args:
        shards: with features.
        limit: samples read.
    """
    total, count = torch.zeros(()), 0
    stream = ShardStream(list(shards), decode_features, seed=0, shuffle=False)
    for features in itertools.islice(stream.iterate(), limit):
        each = features.float().reshape(-1, *features.shape[-2:])
        total, count = total + each.sum(dim=0), count + len(each)
    return total / count


def _mode(transform: str) -> DecodeMode:
    return "fast" if transform.startswith("fast-") else "exact"


def _check_pictures(folder: Path, shard: Path) -> None:
    """Refuses features that nothing describes; one shard of a folder speaks for all of it."""
    if (folder / PARTIAL_FILE).is_file():
        raise ValueError(
            f"found features in {folder} that are not complete ({PARTIAL_FILE}); expected "
            f"{FEATURES_FILE}: start the same 'bridges cache' again, it goes on where it stopped"
        )
    members = set(shard_indexes([shard])[0].names) & set(MEMBER.values())
    if members:
        raise ValueError(
            f"found {', '.join(sorted(members))} in {shard} and no {FEATURES_FILE} beside it; "
            "expected to know which encoder they are of: copy the whole folder that 'bridges "
            "cache' wrote, or make the features again"
        )


def _check_sources(folder: Path, described: Mapping[str, Any], names: set[str]) -> None:
    """Refuses features of pictures that have changed since, as far as these are there."""
    manifests: dict[Path, Mapping[str, Entry]] = {}
    for shard in described["shards"]:
        source = Path(shard["source"])
        if shard["name"] not in names or not source.is_file():
            continue
        if source.parent not in manifests:
            manifests[source.parent] = read_manifest(source.parent) or {}
        # What is known of it: hashing all pictures again would take as long as reading them.
        known = manifests[source.parent].get(source.name) or load_index(source)
        digest = known.sha256 if known else shard["sha256"]
        found, expected = (source.stat().st_size, digest), (shard["bytes"], shard["sha256"])
        if found != expected:
            raise ValueError(
                f"found {source} with {found[0]:,} bytes, sha256 {found[1]}; expected "
                f"{expected[0]:,} bytes, sha256 {expected[1]}, of which {folder / shard['name']} "
                "was made: make the features again with 'bridges cache' in a new folder, or put "
                "the shard back"
            )
