"""The pictures of an evaluation: encoded once, with their captions and questions."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from rich.progress import track
from torch import Tensor

from bridges import VisionEncoder
from recipes.bad_samples import read_bad_samples
from recipes.cache import cache_features, check_cached
from recipes.cache_form import PICTURES
from recipes.cache_set import FEATURES_FILE, read_description
from recipes.evaluate import HeldOut
from recipes.gallery import name_of
from recipes.retrieve import held_out_shards
from recipes.samples import SampleError, decode_caption_sample, read_meta, read_questions
from recipes.stream import ShardStream


@dataclass(frozen=True)
class Pictures:
    """Held-out pictures.

    Attributes:
        held_out: the good ones; of a sample "name" (see `name_of`), "key", "captions" (maybe
            none), "questions" (with all their answers) and "meta".
        shards: as they were given, for thumbnails.
        skipped: what was left out: "sample" and "problem".
    """

    held_out: HeldOut
    shards: list[Path]
    skipped: list[dict[str, str]]

    @classmethod
    def collect(
        cls,
        data: str,
        vision: VisionEncoder,
        *,
        limit: int | None = None,
        feature_cache: Path | None = None,
        batch_size: int = 32,
    ) -> "Pictures":
        """Reads the first pictures of the held-out shards and encodes them.

        Args:
            data: see `held_out_shards`.
            vision: the encoder.
            limit: most pictures; None for all.
            feature_cache: folder in which features are kept; None for nowhere.
            batch_size: pictures encoded together.

        Raises:
            ValueError: fewer than two good pictures.
        """
        read = given = held_out_shards(data)
        if feature_cache is not None:
            read = cache_features(given, vision, feature_cache, on_error="skip", form=PICTURES)
        check_cached(read, vision, PICTURES)

        def decode(raw: Mapping[str, Any]) -> dict[str, Any]:
            questions = _questions(raw)
            return _picture(raw, vision, bool(questions)) | {
                "questions": questions,
                "name": name_of(raw, read),
            }

        stream = ShardStream(
            list(read), decode, seed=0, shuffle=False, on_error="skip", max_bad_fraction=1.0
        )
        total = min(limit or stream.total_samples, stream.total_samples)
        found = iter(
            track(
                itertools.islice(stream.iterate(), total), "encoding pictures", total,
                transient=True,
            )
        )  # fmt: skip
        patches: list[Tensor] = []
        samples: list[dict[str, Any]] = []
        while batch := list(itertools.islice(found, batch_size)):
            patches.append(_patches(batch, vision))
            samples += batch
        if len(samples) < 2:
            raise ValueError(
                f"found {len(samples)} good pictures in {data}; expected at least 2: there is "
                "nothing to compare"
            )
        held_out = HeldOut(torch.cat(patches), vision.shape.grid, samples)
        return cls(held_out, given, [*_uncached(read), *_bad(stream)])


def spread(total: int, shown: int) -> list[int]:
    """So many places among all, evenly spread: nobody has chosen them."""
    if total <= shown:
        return list(range(total))
    return [round(step * (total - 1) / (shown - 1)) for step in range(shown)]


def _questions(raw: Mapping[str, Any]) -> list[tuple[str, list[str]]]:
    """The questions of a sample, each with all its answers: "answers", else the one "answer"."""
    pairs = read_questions(raw)
    if not pairs:
        return []
    listed = read_meta(raw)["qa"]
    given = [one.get("answers") for one in (listed if isinstance(listed, list) else [listed])]
    return [
        (question, _texts(answers) or [answer])
        for (question, answer), answers in zip(pairs, given, strict=True)
    ]


def _texts(answers: Any) -> list[str]:
    return [one for one in answers if isinstance(one, str)] if isinstance(answers, list) else []


def _picture(raw: Mapping[str, Any], vision: VisionEncoder, asked: bool) -> dict[str, Any]:
    """A decoded sample; one with questions needs no caption."""
    transform = vision.image_decoder()
    try:
        return decode_caption_sample(raw, transform=transform)
    except SampleError as error:
        if not asked or error.kind != "missing caption":
            raise
    return decode_caption_sample({**raw, "txt": b"-"}, transform=transform) | {"captions": []}


def _patches(batch: Sequence[dict[str, Any]], vision: VisionEncoder) -> Tensor:
    """Features of some samples, (b, p, d), whose pictures they then hold no longer."""
    if "features" in batch[0]:
        return torch.stack([sample.pop("features") for sample in batch]).float()
    pixels = torch.stack([sample.pop("image") for sample in batch])
    return vision.encode(pixels[:, None]).patches[:, 0].float().cpu()


def _uncached(shards: Sequence[Path]) -> Iterator[dict[str, str]]:
    for folder, own in itertools.groupby(sorted(shards), key=lambda shard: shard.parent):
        described = read_description(folder / FEATURES_FILE) or {"shards": []}
        names = {shard.name for shard in own}
        for shard in described["shards"]:
            for key in shard.get("left_out", ()) if shard["name"] in names else ():
                sample = f"{shard['source']}: {key}"
                yield {"sample": sample, "problem": "left out of the feature cache"}


def _bad(stream: ShardStream[Any]) -> Iterator[dict[str, str]]:
    with TemporaryDirectory() as folder:
        file = Path(folder) / "skipped.jsonl"
        stream.bad.keep(file, [str(shard) for shard in stream.shards])
        for bad in read_bad_samples(file):
            yield {"sample": f"{bad.shard}: {bad.key}", "problem": f"{bad.kind}: {bad.problem}"}
