"""The samples of a few-shot evaluation, each picture encoded once."""

import hashlib
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from torch import Tensor

from bridges import VisionEncoder
from bridges.fewshot import pooled
from recipes.gallery import name_of
from recipes.samples import CaptionDecoder, read_questions
from recipes.stream import ShardStream


@dataclass(frozen=True)
class Example:
    """What is known of a picture.

    Attributes:
        name: unique among these shards, see `name_of`.
        key: of its sample.
        digest: which equal pictures share.
        captions: at least one (its first answer, where there are only questions).
        questions: with their answers.
        meta: the sample's JSON.
    """

    name: str
    key: str
    digest: str
    captions: list[str]
    questions: list[tuple[str, str]]
    meta: dict[str, Any]


@dataclass(frozen=True)
class Pool:
    """Samples with the features of their pictures.

    Attributes:
        examples: in the order of the shards.
        patches: (n, p, d), on the CPU, as the encoder or the cache gives them.
        pooled: (n, d), see `bridges.fewshot.pooled`.
        skipped: samples left out, by reason.
    """

    examples: list[Example]
    patches: Tensor
    pooled: Tensor
    skipped: dict[str, int]

    @classmethod
    def collect(
        cls,
        shards: Sequence[Path],
        vision: VisionEncoder,
        limit: int,
        *,
        questions: bool = False,
        batch_size: int = 32,
        title: str = "encoding pictures",
    ) -> "Pool":
        """The first samples of some shards, encoded unless they come as features.

        Args:
            shards: of pictures, or of their features.
            vision: the encoder.
            limit: most samples.
            questions: take samples with questions only.
            batch_size: pictures encoded together.
            title: of the progress bar.

        Raises:
            ValueError: no such sample.
        """
        decode = CaptionDecoder(vision.image_decoder(), random_caption=False, questions=questions)

        def named(raw: Mapping[str, Any]) -> dict[str, Any]:
            pairs = read_questions(raw) if questions else []
            return decode(raw) | {"name": name_of(raw, shards), "pairs": pairs}

        stream = ShardStream(
            list(shards), named, seed=0, shuffle=False, on_error="skip", max_bad_fraction=1.0
        )
        # A sample without a question was given its caption as the answer.
        wanted = (s for s in stream.iterate() if not questions or s["question"] is not None)
        total = min(limit, stream.total_samples)
        samples = iter(track(itertools.islice(wanted, limit), title, total, transient=True))
        examples: list[Example] = []
        patches: list[Tensor] = []
        while batch := list(itertools.islice(samples, batch_size)):
            examples += [_example(sample) for sample in batch]
            patches.append(_patches(batch, vision))
        if not examples:
            raise ValueError(
                f"found no {'questions' if questions else 'samples'} in {len(shards)} shards, e.g. "
                f"{shards[0]}; expected some"
                + (': a "qa" list in the JSON of samples' if questions else "")
            )
        together = torch.cat(patches)
        return cls(examples, together, pooled(together), dict(stream.skipped))

    def allowed(self, query: Example) -> Tensor:
        """Which samples may demonstrate for a query, never its own picture: bool (n)."""
        others = [e.key != query.key and e.digest != query.digest for e in self.examples]
        return torch.tensor(others)


def digest_of(content: Tensor) -> str:
    """The same of equal pictures: of their pixels, or of their features.

    Features of one picture are not equal to the last bit if they were encoded in other batches.
    """
    data = content.contiguous().view(torch.uint8).numpy().tobytes()
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def _example(sample: Mapping[str, Any]) -> Example:
    return Example(
        sample["name"],
        sample["key"],
        digest_of(sample["features" if "features" in sample else "image"]),
        sample["captions"],
        sample["pairs"],
        sample["meta"],
    )


def _patches(samples: Sequence[Mapping[str, Any]], vision: VisionEncoder) -> Tensor:
    if "features" in samples[0]:
        return torch.stack([sample["features"] for sample in samples])
    pixels = torch.stack([sample["image"] for sample in samples])
    return vision.encode(pixels[:, None]).patches[:, 0].cpu()
