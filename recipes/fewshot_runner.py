"""Prompts with pictures, batch by batch through a model."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from bridges import Instruction, TextBatch, VisionFeatures, VisionLanguageModel
from bridges.loss import IGNORE
from bridges.prompts import CAPTION_INSTRUCTION, encode_instruction, instruction_tokenizer
from bridges.scoring import Choices, score_choices
from recipes.batch import moved
from recipes.evaluate import autocast


@dataclass(frozen=True)
class Prompt:
    """A prompt in numbers.

    Attributes:
        ids: tokens, with the placeholders of the pictures.
        pictures: places among the runner's, in their order; equal pictures have the same place.
        question: for a resampler that reads one; it reads the same beside all pictures.
        text_only: tokens without the placeholders of the demonstrations; None where
            demonstrations have no pictures.
        own: how many of the pictures are the query's, from the end.
    """

    ids: list[int]
    pictures: list[int]
    question: str | None = None
    text_only: list[int] | None = None
    own: int = 1

    def without_demonstrated(self) -> "Prompt":
        """The same texts with the query's pictures alone."""
        if self.text_only is None:
            return self
        return replace(self, ids=self.text_only, pictures=self.pictures[-self.own :])


@dataclass(frozen=True)
class Runner:
    """Generates and scores, some prompts at a time.

    Attributes:
        model: the model.
        patches: of every picture, (p, d) each.
        batch_size: prompts that go through the LM together.
        advance: told of so many prompts that are done.
    """

    model: VisionLanguageModel
    patches: Sequence[Tensor]
    batch_size: int = 8
    advance: Callable[[int], object] = lambda done: None

    def generate(self, prompts: Sequence[Prompt], **options: Any) -> list[str]:
        """What the model writes after each prompt; options are those of HF's ``generate``."""
        written: list[str] = []
        for _, text, vision, instruction in self._batches(prompts):
            with autocast(self.model):
                ids = self.model.generate(
                    text.input_ids, text.attention_mask, vision, instruction, **options
                )
            decoded = self.model.lm.tokenizer.batch_decode(ids, skip_special_tokens=True)
            written += [one.strip() for one in decoded]
            self.advance(len(decoded))
        return written

    def score(
        self, prompts: Sequence[Prompt], choices: Sequence[Choices], max_rows: int = 64
    ) -> list[tuple[Tensor, Tensor]]:
        """Log-likelihoods and lengths of the choices of each prompt, see `score_choices`."""
        found: list[tuple[Tensor, Tensor]] = []
        for at, text, vision, instruction in self._batches(prompts):
            with autocast(self.model):
                scores = score_choices(
                    self.model, text, choices[at], vision, instruction, max_rows=max_rows
                )
            rows = zip(choices[at], scores.log_likelihoods.cpu(), scores.lengths.cpu(), strict=True)
            found += [(each[: len(row)], lengths[: len(row)]) for row, each, lengths in rows]
            self.advance(len(text.input_ids))
        return found

    @torch.no_grad()
    def losses(self, rows: Sequence[Prompt], labels: Sequence[Sequence[int]]) -> list[Tensor]:
        """Loss of each label of whole sequences, teacher-forced: fp32, on the CPU.

        Args:
            rows: of which some tokens are labels.
            labels: as many as a row has tokens, `IGNORE` where there is no loss.
        """
        found: list[Tensor] = []
        for _, text, vision, instruction in self._batches(rows, labels):
            with autocast(self.model):
                output = self.model(
                    text.input_ids, text.attention_mask, text.labels, vision, instruction
                )
            found += output.token_losses.cpu().split(output.label_counts.tolist())
            self.advance(len(text.input_ids))
        return found

    def _batches(
        self, prompts: Sequence[Prompt], labels: Sequence[Sequence[int]] | None = None
    ) -> Iterator[tuple[slice, TextBatch, VisionFeatures, Instruction | None]]:
        """Prompts to continue, padded on the left; with labels, as in training, on the right."""
        device, encode = self.model.lm.device, self.model.prompt_encoder()
        reads = instruction_tokenizer(self.model.bridge)
        for start in range(0, len(prompts), self.batch_size):
            at = slice(start, start + self.batch_size)
            batch = prompts[at]
            if labels is None:
                rows = [(prompt.ids, [IGNORE] * len(prompt.ids)) for prompt in batch]
                text = encode.pad(rows, padding_side="left").to(device)
            else:
                rows = [(p.ids, row) for p, row in zip(batch, labels[at], strict=True)]
                text = encode.pad(rows).to(device)
            asked = [CAPTION_INSTRUCTION if p.question is None else p.question for p in batch]
            instruction = None if reads is None else encode_instruction(reads, asked)
            yield at, text, self._features(batch), moved(instruction, device)

    def _features(self, prompts: Sequence[Prompt]) -> VisionFeatures:
        most = max(1, *(len(prompt.pictures) for prompt in prompts))
        rows = [p.pictures + [0] * (most - len(p.pictures)) for p in prompts]
        patches = torch.stack([torch.stack([self.patches[r] for r in row]) for row in rows])
        mask = torch.arange(most) < torch.tensor([[len(p.pictures)] for p in prompts])
        return VisionFeatures(patches, mask, self.model.vision.shape.grid)


def exchanged(
    prompts: Sequence[Prompt], which: Literal["all", "query", "demonstrations"] = "all"
) -> list[Prompt]:
    """Every prompt with other pictures than its own, see `other_pictures`.

    Args:
        prompts: at least two, each with a picture.
        which: pictures that are exchanged; the others stay.

    Raises:
        ValueError: no other picture.
    """

    def of(prompt: Prompt) -> slice:
        query = len(prompt.pictures) - prompt.own
        return {"all": slice(None), "query": slice(query, None)}.get(which, slice(query))

    given = other_pictures([prompt.pictures[of(prompt)] for prompt in prompts])
    changed = []
    for prompt, others in zip(prompts, given, strict=True):
        pictures = prompt.pictures.copy()
        pictures[of(prompt)] = others
        changed.append(replace(prompt, pictures=pictures))
    return changed


def other_pictures(rows: Sequence[Sequence[int]]) -> list[list[int]]:
    """For each picture of each row the one at its place, from the end, in the next row.

    That is the next one, round and round, where another picture stands: several captions of one
    picture, or documents that share one, are passed over. A row that has fewer gives them again.

    Args:
        rows: of pictures, of which equal ones have equal numbers.

    Raises:
        ValueError: one row only, or everywhere the same picture.
    """
    if len(rows) < 2:
        raise ValueError(
            f"found {len(rows)} queries; expected at least 2 to exchange pictures: take more"
        )
    return [
        [_other(rows, number, place) for place in range(len(row))]
        for number, row in enumerate(rows)
    ]


def _other(rows: Sequence[Sequence[int]], number: int, place: int) -> int:
    own, from_end = rows[number][place], len(rows[number]) - place
    for step in range(1, len(rows)):
        there = rows[(number + step) % len(rows)]
        if there and (other := there[-1 - (from_end - 1) % len(there)]) != own:
            return other
    raise ValueError(
        f"found the same picture in the place of number {place + 1} in all of {len(rows)} queries; "
        "expected another one to exchange it for: take more queries, or data of other pictures"
    )
