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

FULL = 0.95
"""Share of real positions from which rows are not made longer to get fuller.

Every position is scored against its whole row, so that longer rows cost more each.
"""


@dataclass(frozen=True)
class PackingCollator:
    """Packs the batches that another collator makes; see `of`.

    Attributes:
        collate: makes a padded batch.
        limit: longest row; None for no limit.
    """

    collate: CaptionCollator | DocumentCollator
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
        return cls(collate, model.lm.max_length)

    def decoder(self, preprocess: ImageDecoder, *, training: bool) -> Decode:
        return self.collate.decoder(preprocess, training=training)

    def __call__(self, samples: Sequence[dict[str, Any]]) -> CaptionBatch:
        return pack(self.collate(samples), self.collate.encode, self.limit)


def pack(batch: CaptionBatch, encode: PromptEncoder, limit: int | None = None) -> CaptionBatch:
    """A batch with its texts in packed rows, and its samples in the order of the rows.

    Args:
        batch: of padded texts.
        encode: pads the rows.
        limit: longest row, where no text is longer.
    """
    text, real = batch.text, batch.text.attention_mask
    lengths = real.sum(dim=1)
    rows = full_rows(lengths.tolist(), limit)

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


def full_rows(lengths: Sequence[int], limit: int | None = None) -> list[list[int]]:
    """Which samples share a row: rows as long as the longest sample, longer while not `FULL`.

    Args:
        lengths: of the samples, at least one, each at least 1.
        limit: longest row, where no sample is longer.

    Returns:
        Indexes of the samples in each row.
    """
    total, room = sum(lengths), max(lengths)
    most = max(room, total if limit is None else limit)
    best, fewest = _first_fit(lengths, room)
    while total < FULL * fewest and room < most:
        room = min(most, room + 1 + room // 50)
        rows, positions = _first_fit(lengths, room)
        if positions < fewest:
            best, fewest = rows, positions
    return sorted(sorted(row) for row in best)


def _first_fit(lengths: Sequence[int], room: int) -> tuple[list[list[int]], int]:
    """Each sample, the longest first, in the first row with room for it; and all positions.

    The positions are those of rows as long as the fullest one.
    """
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
    return rows, len(rows) * max(used)
