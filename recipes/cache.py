"""Features of a frozen encoder, computed once and kept as shards."""

import hashlib
import io
import itertools
import json
import logging
from collections import Counter
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
from bridges.vision import Preprocess
from recipes.samples import SampleError, decode_image, image_extension, read_text
from recipes.shard_files import expand_shards, shard_digest
from recipes.shard_writer import encode_sample, write_shards
from recipes.stream import ShardStream

FEATURES_FILE = "features.json"
PATTERN = "features-*.tar"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CacheForm:
    """What of a sample is encoded, and what is kept beside the features.

    Attributes:
        name: goes into the name of the cache's folder, and is written in it; empty for single
            pictures. Names all that the features depend on.
        read: raw sample -> its pictures or frames, preprocessed, and its members txt and json.
            A ValueError is a bad sample.
        most: of a sample with more pictures, only the first so many are kept; None keeps all.
    """

    name: str
    read: Callable[[Mapping[str, Any], Preprocess], tuple[list[torch.Tensor], dict[str, Any]]]
    most: int | None = None

    @property
    def described(self) -> str:
        """For `FEATURES_FILE`, and for messages."""
        return self.name or "single pictures"


def read_picture(
    raw: Mapping[str, Any], preprocess: Preprocess
) -> tuple[list[torch.Tensor], dict[str, Any]]:
    """The one picture of a sample, and its text."""
    return [preprocess(decode_image(raw, image_extension(raw)))], read_text(raw)


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
        shards: with pictures; already cached ones are returned as they are, see `check_cached`.
        encoder: the frozen encoder.
        cache: folder of all caches.
        batch_size: pictures encoded together.
        on_error: stop at a picture that cannot be read, or log it with shard and key and leave
            it out.
        form: of the samples. Single pictures give features (p, d); documents and clips give
            those of all their pictures or frames, (n, p, d).

    Returns:
        The shards with features.

    Raises:
        ValueError: a bad sample, where they are not skipped; cached shards of another encoder or
            form.
    """
    paths = expand_shards(shards)
    if any(is_cached(path) for path in paths):
        check_cached(paths, encoder, form)
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
                "form": form.described,
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


def check_cached(
    shards: Sequence[Path], encoder: VisionEncoder, form: CacheForm | None = None
) -> None:
    """Refuses features of another encoder, or of another form.

    Args:
        shards: any; those with pictures pass.
        encoder: of the run.
        form: that the run reads; None takes any. Caches that name none are of single pictures.

    Raises:
        ValueError: naming the folder and both fingerprints, or both forms.
    """
    for folder in {shard.parent for shard in shards if is_cached(shard)}:
        described = json.loads((folder / FEATURES_FILE).read_text())
        found = described["encoder"]
        if found != encoder.fingerprint:
            raise ValueError(
                f"found features of encoder {found} in {folder}; expected those of "
                f"{encoder.fingerprint}, this run's: give the shards with pictures, they are "
                "cached again"
            )
        kept = described.get("form", PICTURES.described)
        if form is not None and kept != form.described:
            raise ValueError(
                f"found features of {kept} in {folder}; expected those of {form.described}: give "
                "the shards with pictures, they are cached again, or set data.task and data.fps "
                "to what was cached"
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
        # A key is unique in its shard only.
        key = f"{places[raw['__shard__']]:05d}-{raw['__key__']}"
        try:
            pixels, members = form.read(raw, encoder.preprocess)
            # What cannot be written is a bad sample, too: later it would end the whole cache.
            encode_sample({"__key__": key, "npy": b"", **members})
        except (ValueError, RecursionError) as error:
            where = f"{raw['__shard__']}: sample {raw['__key__']!r}"
            named = str(error) if isinstance(error, SampleError) else f"{where}: {error}"
            if on_error == "raise":
                raise ValueError(named) from error
            logger.warning("left out: %s", named)
            return None
        counts["cut"] += form.most is not None and len(pixels) > form.most
        return {"__key__": key, "pixels": pixels[: form.most], **members}

    places = {str(path): place for place, path in enumerate(paths)}
    counts: Counter[str] = Counter()
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
    if counts["cut"]:
        logger.warning(
            "%d of %d samples have more than %d pictures or frames; only the first are cached",
            *(counts["cut"], stream.total_samples, form.most or 0),
        )


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
