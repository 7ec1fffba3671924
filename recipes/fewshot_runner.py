"""Prompts with pictures, batch by batch through a model."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

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
        pictures: places among the runner's, in their order.
        question: for a resampler that reads one; it reads the same beside all pictures.
    """

    ids: list[int]
    pictures: list[int]
    question: str | None = None


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


def exchanged(prompts: Sequence[Prompt], last: int | None = None) -> list[Prompt]:
    """Every prompt with the last pictures of the next one in the place of its own.

    Args:
        prompts: at least two, each with a picture.
        last: how many of the pictures, from the end; all by default. A next prompt that has
            fewer gives them again.

    Raises:
        ValueError: one prompt only.
    """
    if len(prompts) < 2:
        raise ValueError(
            f"found {len(prompts)} queries; expected at least 2 to exchange pictures: take more"
        )
    changed = []
    for prompt, other in zip(prompts, [*prompts[1:], prompts[0]], strict=True):
        kept = 0 if last is None else len(prompt.pictures) - last
        given = itertools.islice(
            itertools.cycle(reversed(other.pictures)), len(prompt.pictures) - kept
        )
        changed.append(replace(prompt, pictures=prompt.pictures[:kept] + list(given)[::-1]))
    return changed
