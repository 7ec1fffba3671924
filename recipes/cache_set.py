"""A folder of feature shards: what they were made of, and which of them are there."""

from __future__ import annotations

import json
import logging
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bridges import VisionEncoder
from bridges.decode import DecodeMode
from bridges.files import write_json
from recipes.cache_form import CacheForm
from recipes.features import Storage
from recipes.shard_files import ShardError
from recipes.shard_index import shard_indexes
from recipes.shard_manifest import Entry, read_manifest, write_manifest

logger = logging.getLogger(__name__)

FEATURES_FILE = "features.json"
"""In the folder of feature shards: what they are of. It is written when all of them are there."""

PARTIAL_FILE = "features.partial.json"
"""In its place until then: what they are going to be of."""

_IDENTITY = ("encoder", "transform", "form", "dtype", "patches", "grid", "dim")
_SHARD = {"name", "source", "bytes", "sha256"}
_SPLIT = re.compile(r"([A-Za-z0-9_]+)-.*\.tar")


@dataclass(frozen=True)
class FeatureSet:
    """Feature shards, one for each shard of pictures, and what they are made of.

    Attributes:
        folder: of the feature shards.
        sources: name of each feature shard -> the shard of pictures, in the order of those.
        described: encoder, transform, form, dtype and sizes of the features, and the digests of
            the sources.
    """

    folder: Path
    sources: dict[str, Path]
    described: dict[str, Any]

    @classmethod
    def of(
        cls,
        shards: Sequence[Path],
        folder: Path,
        encoder: VisionEncoder,
        form: CacheForm,
        dtype: Storage,
        decode: DecodeMode = "exact",
        held_out: Sequence[Path] = (),
    ) -> FeatureSet:
        """The set that these shards of pictures give.

        Args:
            shards: of pictures. ``SPLIT-ANYTHING.tar`` keeps its split, others become ``train``;
                those of a split are numbered as they come.
            folder: of the feature shards.
            encoder: frozen.
            form: of the samples.
            dtype: how features are kept.
            decode: how pixels are made.
            held_out: further shards, whose split becomes ``val``.
        """
        numbers: Counter[str] = Counter()
        sources: dict[str, Path] = {}
        splits = [*((_split(path), path) for path in shards), *(("val", path) for path in held_out)]
        for split, path in splits:
            sources[f"{split}-{numbers[split]:06d}.tar"] = path
            numbers[split] += 1
        described: dict[str, Any] = {
            "encoder": encoder.fingerprint,
            "transform": encoder.transform_fingerprint(decode),
            "form": form.described,
            "dtype": dtype,
            "patches": encoder.shape.num_patches,
            "grid": list(encoder.shape.grid),
            "dim": encoder.shape.dim,
            "shards": [],
        }
        for name, path in sources.items():
            # One after the other: all of their keys would be in memory together.
            (index,) = shard_indexes([path])
            described["shards"].append(
                {
                    "name": name,
                    "source": str(path.resolve()),
                    "bytes": index.size,
                    "sha256": index.sha256,
                }
            )
        return cls(folder, sources, described)

    @property
    def identity(self) -> dict[str, Any]:
        """What the bytes of the feature shards depend on, which is not where the sources are."""
        return identity(self.described)

    @property
    def paths(self) -> list[Path]:
        """The feature shards, in the order of the shards of pictures."""
        return [self.folder / name for name in self.sources]

    def begin(self) -> bool:
        """Claims the folder for this set; True if the set is there already.

        Of a set that was complete, shards that are gone or cut off since are to be made again.

        Raises:
            ValueError: the folder holds something else.
        """
        # Listed first: a shard that another rank has made by now is described by now.
        found = sorted(path.name for path in self.folder.glob("*.tar"))
        for file in (PARTIAL_FILE, FEATURES_FILE):
            there = read_description(self.folder / file)
            if there is not None:
                self._check_same(there, file)
                lost = self._drop_lost()
                if file == FEATURES_FILE and lost:
                    write_json(self.folder / PARTIAL_FILE, self.described)
                    (self.folder / FEATURES_FILE).unlink(missing_ok=True)
                return file == FEATURES_FILE and not lost
        if found:
            raise ValueError(
                f"found {found[0]} in {self.folder}, which no {FEATURES_FILE} describes; expected "
                "an empty folder for the features, or one that was begun: name another"
            )
        write_json(self.folder / PARTIAL_FILE, self.described)
        return False

    def at(self, folder: Path) -> FeatureSet:
        """The same set in another folder."""
        return replace(self, folder=folder)

    def finish(self) -> bool:
        """Describes the set if all of it is there; False if shards are missing.

        Any rank may do this, and several at once: each writes the same.

        Raises:
            ShardError: a feature shard that is damaged.
        """
        if not all(path.is_file() for path in self.paths):
            return False
        shards, entries = [], []
        for known, path, source in zip(
            self.described["shards"], self.paths, self.sources.values(), strict=True
        ):
            (features,), (pictures,) = shard_indexes([path]), shard_indexes([source])
            if features.faults:
                raise ShardError(
                    f"{path}: {features.faults[0].problem}; expected the whole shard: delete it "
                    "and start again, it is encoded again"
                )
            kept = set(features.keys)
            left = [key for key in pictures.keys if key not in kept]
            left += [fault.key or fault.kind for fault in pictures.faults]
            shards.append({**known, "samples": len(features), "left_out": left})
            entries.append(Entry.of(path.name, features))
        write_manifest(self.folder, entries, {})
        write_json(self.folder / FEATURES_FILE, {**self.described, "shards": shards})
        (self.folder / PARTIAL_FILE).unlink(missing_ok=True)
        return True

    def _drop_lost(self) -> bool:
        """Takes shards that are gone, or not as long as they were, out of the manifest."""
        entries = read_manifest(self.folder) or {}
        lost = [path for path in self.paths if not _is_whole(path, entries.get(path.name))]
        for path in lost:
            if path.is_file():
                logger.warning("%s is damaged, it is encoded again", path)
                path.unlink(missing_ok=True)
        names = {path.name for path in lost}
        if names & entries.keys():
            # The new ones need not have the same bytes: encoded on another GPU, say.
            kept = [entry for name, entry in entries.items() if name not in names]
            write_manifest(self.folder, kept)
        return bool(lost)

    def _check_same(self, there: Mapping[str, Any], file: str) -> None:
        found, expected = identity(there), self.identity
        names = sorted(found.keys() | expected.keys())
        other = [name for name in names if found.get(name) != expected.get(name)]
        if other:
            values = [{name: side.get(name) for name in other[:3]} for side in (found, expected)]
            raise ValueError(
                f"found {values[0]} in {self.folder / file}; expected {values[1]}, of the shards "
                "and the encoder given: name another folder, or delete this one"
            )


def read_description(file: Path) -> dict[str, Any] | None:
    """What a `FEATURES_FILE` says, or None where there is none.

    Raises:
        ValueError: it is not what this version writes.
    """
    try:
        described = json.loads(file.read_text(encoding="utf-8"))
        whole = all(shard.keys() >= _SHARD for shard in described["shards"])
        if whole and described.keys() >= set(_IDENTITY):
            return described
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise ValueError(_unknown(file)) from error
    raise ValueError(_unknown(file))


def identity(described: Mapping[str, Any]) -> dict[str, Any]:
    """Of a description, what the bytes of the feature shards depend on."""
    known = {name: described[name] for name in _IDENTITY}
    return known | {shard["name"]: shard["sha256"] for shard in described["shards"]}


def left_out(described: Mapping[str, Any]) -> list[str]:
    """The samples that were left out when the features were made, as ``source: key``."""
    return [
        f"{shard['source']}: {key}"
        for shard in described["shards"]
        for key in shard.get("left_out", ())
    ]


def _is_whole(shard: Path, entry: Entry | None) -> bool:
    """Whether a shard is there, and as long as its entry says."""
    try:
        size = shard.stat().st_size
    except FileNotFoundError:
        return False
    return entry is None or size == entry.bytes


def _split(shard: Path) -> str:
    found = _SPLIT.fullmatch(shard.name)
    return found[1] if found else "train"


def _unknown(file: Path) -> str:
    return (
        f"found a {file} that this version does not write; expected one of its own: delete the "
        "folder and make the features again ('bridges cache', or data.feature_cache)"
    )
