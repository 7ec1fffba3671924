"""Features of a frozen encoder, computed once and kept as shards."""

import hashlib
import io
import itertools
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from filelock import FileLock
from rich.progress import Progress

from bridges import VisionEncoder
from bridges.files import write_json
from bridges.images import open_image
from bridges.vision import Preprocess
from recipes.samples import SampleError, image_extension
from recipes.shard_files import expand_shards, shard_digest
from recipes.shard_writer import write_shards
from recipes.stream import ShardStream

FEATURES_FILE = "features.json"
PATTERN = "features-*.tar"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CacheForm:
    """What of a sample is encoded, and what is kept beside the features.

    Attributes:
        name: goes into the name of the cache's folder; empty for single pictures.
        read: raw sample -> its pictures or frames, preprocessed, and its members txt and json.
            A ValueError is a bad sample.
    """

    name: str
    read: Callable[[Mapping[str, Any], Preprocess], tuple[list[torch.Tensor], dict[str, Any]]]


def read_picture(
    raw: Mapping[str, Any], preprocess: Preprocess
) -> tuple[list[torch.Tensor], dict[str, Any]]:
    """The one picture of a sample, and its text."""
    picture = open_image(raw[image_extension(raw)])
    text = {"txt": raw["txt"].decode()} if "txt" in raw else {}
    meta = {"json": json.loads(raw["json"])} if "json" in raw else {}
    return [preprocess(picture)], {**text, **meta}


PICTURES = CacheForm("", read_picture)


def cache_features(
    shards: str | Path | Sequence[str | Path],
    encoder: VisionEncoder,
    cache: Path,
    *,
    batch_size: int = 32,
    on_error: Literal["raise", "skip"] = "raise",
    form: CacheForm = PICTURES,
) -> list[Path]:
    """Encodes every picture of some shards once; later calls find the result.

    The features (fp16) stand in place of the picture, beside the same text, in a folder named by
    the digest of the shards and the encoder, so that a changed shard or another encoder never
    meets stale features.

    Args:
        shards: with pictures; already cached ones are returned as they are.
        encoder: the frozen encoder.
        cache: folder of all caches.
        batch_size: pictures encoded together.
        on_error: stop at a picture that cannot be read, or log it with shard and key and leave
            it out.
        form: of the samples. Single pictures give features (p, d); documents and clips give
            those of all their pictures or frames, (n, p, d).

    Returns:
        The shards with features.
    """
    paths = expand_shards(shards)
    if any(is_cached(path) for path in paths):
        return paths
    digests = [shard_digest(path) for path in paths]
    # What was made by stopping at a bad picture has none, and serves whoever would skip them.
    for policy in ("raise", on_error):
        named = [form.name] if form.name else []
        content = "\n".join([encoder.fingerprint, policy, *digests, *named])
        name = hashlib.sha256(content.encode()).hexdigest()[:16]
        folder = cache / name
        if (folder / FEATURES_FILE).is_file():
            return sorted(folder.glob(PATTERN))
    cache.mkdir(parents=True, exist_ok=True)
    # Of several ranks on a machine the first encodes, the others wait and find the result.
    with FileLock(cache / f"{name}.lock"):
        if not (folder / FEATURES_FILE).is_file():
            samples = _encoded(paths, encoder, batch_size, on_error, form)
            write_shards(samples, folder, "features", overwrite=True)
            described = {
                "encoder": encoder.fingerprint,
                "grid": encoder.shape.grid,
                "dim": encoder.shape.dim,
                "shards": dict(zip((path.name for path in paths), digests, strict=True)),
            }
            # Written last: a folder without it is an interrupted run, and is filled again.
            write_json(folder / FEATURES_FILE, described)
    return sorted(folder.glob(PATTERN))


def is_cached(shard: Path) -> bool:
    """Whether a shard holds features in place of pictures."""
    return (shard.parent / FEATURES_FILE).is_file()


def check_cached(shards: Sequence[Path], encoder: VisionEncoder) -> None:
    """Refuses features of another encoder.

    Raises:
        ValueError: naming the folder and both fingerprints.
    """
    for folder in {shard.parent for shard in shards if is_cached(shard)}:
        found = json.loads((folder / FEATURES_FILE).read_text())["encoder"]
        if found != encoder.fingerprint:
            raise ValueError(
                f"found features of encoder {found} in {folder}; expected those of "
                f"{encoder.fingerprint}, this run's: give the shards with pictures, they are "
                "cached again"
            )


def mean_patches(shards: Sequence[Path], limit: int = 2000) -> torch.Tensor:
    """Mean features over pictures, the place of each patch kept: (p, d), fp32.

    What a blind model sees in the place of every picture.

    Args:
        shards: with features.
        limit: samples read.
    """
    total, count = torch.zeros(()), 0
    stream = ShardStream(list(shards), _features, seed=0, shuffle=False)
    for features in itertools.islice(stream.iterate(), limit):
        each = features.float().reshape(-1, *features.shape[-2:])
        total, count = total + each.sum(dim=0), count + len(each)
    return total / count


def _features(raw: dict[str, Any]) -> torch.Tensor:
    array = np.lib.format.read_array(io.BytesIO(raw["npy"]), allow_pickle=False)
    return torch.from_numpy(array)


def _encoded(
    paths: Sequence[Path],
    encoder: VisionEncoder,
    batch_size: int,
    on_error: Literal["raise", "skip"],
    form: CacheForm,
) -> Iterator[dict[str, Any]]:
    def keep(raw: dict[str, Any]) -> dict[str, Any] | None:
        try:
            pixels, members = form.read(raw, encoder.preprocess)
        except ValueError as error:
            where = f"{raw['__shard__']}: sample {raw['__key__']!r}"
            named = str(error) if isinstance(error, SampleError) else f"{where}: {error}"
            if on_error == "raise":
                raise ValueError(named) from error
            logger.warning("left out: %s", named)
            return None
        # A key is unique in its shard only.
        key = f"{places[raw['__shard__']]:05d}-{raw['__key__']}"
        return {"__key__": key, "pixels": pixels, **members}

    places = {str(path): place for place, path in enumerate(paths)}

    stream = ShardStream(list(paths), keep, seed=0, shuffle=False)
    # One consumer, also where several ranks train: each of them needs every picture.
    kept = (sample for sample in stream.iterate() if sample is not None)
    with Progress(*Progress.get_default_columns(), transient=True) as progress:
        task = progress.add_task("encoding pictures", total=stream.total_samples)
        for samples in _groups(kept, batch_size):
            pixels = [picture for sample in samples for picture in sample["pixels"]]
            patches = iter(_patches(pixels, encoder, batch_size))
            for sample in samples:
                own = [next(patches) for _ in sample.pop("pixels")]
                features = torch.stack(own) if own else _no_patches(encoder)
                npy = io.BytesIO()
                np.save(npy, (features if form.name else own[0]).numpy(), allow_pickle=False)
                yield {**sample, "npy": npy.getvalue()}
            progress.advance(task, len(samples))


def _groups(samples: Iterable[dict[str, Any]], size: int) -> Iterator[list[dict[str, Any]]]:
    """Samples together that have about ``size`` pictures; one that has more stands alone."""
    group: list[dict[str, Any]] = []
    count = 0
    for sample in samples:
        if group and count + len(sample["pixels"]) > size:
            yield group
            group, count = [], 0
        group.append(sample)
        count += max(1, len(sample["pixels"]))
    if group:
        yield group


def _patches(
    pixels: Sequence[torch.Tensor], encoder: VisionEncoder, size: int
) -> Iterator[torch.Tensor]:
    """Features (p, d) of each picture, in fp16, encoded ``size`` at a time."""
    for at in range(0, len(pixels), size):
        patches = encoder.encode(torch.stack(list(pixels[at : at + size]))[:, None]).patches
        yield from patches[:, 0].to(torch.float16).cpu()


def _no_patches(encoder: VisionEncoder) -> torch.Tensor:
    shape = encoder.shape
    return torch.zeros(0, shape.num_patches, shape.dim, dtype=torch.float16)
