"""Short samples side by side in rows that are nearly full, in the place of one padded row each.

The samples of a batch are the same, in the same order of steps: what changes is where they stand.
`VisionLanguageModel.forward` keeps them apart by `segments`, so that the loss and the gradients
are those of padded rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from bridges import Instruction, PromptEncoder, VisionLanguageModel
from bridges.decode import ImageDecoder
from recipes.batch import CaptionBatch, CaptionCollator, Decode
from recipes.documents_window import DocumentCollator


@dataclass(frozen=True)
class PackingCollator:
    """Packs the batches that another collator makes; see `of`.

    Attributes:
        collate: makes a padded batch.
        dim: width of the LM.
        limit: longest row; None for no limit.
    """

    collate: CaptionCollator | DocumentCollator
    dim: int
    limit: int | None = None

    @classmethod
    def of(
        cls, model: VisionLanguageModel, collate: CaptionCollator | DocumentCollator
    ) -> "PackingCollator":
        """The packing collator for a model, whose context length limits the rows.

        Raises:
            ValueError: the LM cannot keep the samples of a row apart.
        """
        model.lm.check_packable()
        return cls(collate, model.lm.shape.dim, model.lm.max_length)

    def decoder(self, preprocess: ImageDecoder, *, training: bool) -> Decode:
        return self.collate.decoder(preprocess, training=training)

    def __call__(self, samples: Sequence[dict[str, Any]]) -> CaptionBatch:
        return pack(self.collate(samples), self.collate.encode, self.dim, self.limit)


def pack(
    batch: CaptionBatch, encode: PromptEncoder, dim: int, limit: int | None = None
) -> CaptionBatch:
    """A batch with its texts in packed rows, and its samples in the order of the rows.

    Args:
        batch: of padded texts.
        encode: pads the rows.
        dim: width of the LM.
        limit: longest row, where no text is longer.
    """
    text, real = batch.text, batch.text.attention_mask
    lengths = real.sum(dim=1)
    rows = full_rows(lengths.tolist(), dim, limit)

    def joined(x: Tensor, row: Sequence[int]) -> list[int]:
        return torch.cat([x[sample][real[sample]] for sample in row]).tolist()

    packed = encode.pad(
        [(joined(text.input_ids, row), joined(text.labels, row)) for row in rows],
        truncated=text.truncated,
    )
    segments = torch.empty_like(packed.input_ids)
    order: list[int] = []
    for place, row in zip(segments, rows, strict=True):
        numbers = torch.arange(len(order), len(order) + len(row))
        numbers = numbers.repeat_interleave(lengths[row])
        place[: len(numbers)], place[len(numbers) :] = numbers, numbers[-1]
        order += row
    instruction = batch.instruction
    if instruction is not None:
        ids, mask = instruction.input_ids[order], instruction.attention_mask[order]
        instruction = Instruction(ids, mask)
    return replace(
        batch.each(lambda tensor: tensor[order]),
        samples=[batch.samples[sample] for sample in order],
        text=packed,
        segments=segments,
        instruction=instruction,
    )


def full_rows(lengths: Sequence[int], dim: int, limit: int | None = None) -> list[list[int]]:
    """Which samples share a row: as long as the longest sample, or longer where that costs less.

    Longer rows waste fewer positions, but each position is scored against its whole row: a
    position costs a block of the LM 24 · dim² FLOPs in its matrices, and 4 · dim · width in its
    attention.

    Args:
        lengths: of the samples, at least one, each at least 1.
        dim: width of the LM.
        limit: longest row, where no sample is longer.

    Returns:
        Indexes of the samples in each row.
    """
    total, room = sum(lengths), max(lengths)
    most = max(room, total if limit is None else limit)
    best, least = _first_fit(lengths, dim, room)
    # Beyond, rows without any padding would cost more.
    while room < most and total * (6 * dim + room) < least:
        room = min(most, room + 1 + room // 32)
        rows, cost = _first_fit(lengths, dim, room)
        if cost < least:
            best, least = rows, cost
    return sorted(sorted(row) for row in best)


def _first_fit(lengths: Sequence[int], dim: int, room: int) -> tuple[list[list[int]], int]:
    """Each sample, the longest first, in the first row with room for it; and what that costs."""
    rows: list[list[int]] = []
    used: list[int] = []
    for sample in sorted(range(len(lengths)), key=lambda sample: -lengths[sample]):
        length = lengths[sample]
        row = next((row for row, taken in enumerate(used) if taken + length <= room), len(rows))
        if row == len(rows):
            rows.append([])
            used.append(0)
        rows[row].append(sample)
        used[row] += length
    return rows, len(rows) * max(used) * (6 * dim + max(used))
