"""Text with images in it, as token ids."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bridges.loss import IGNORE


@dataclass(frozen=True)
class TextBatch:
    """Padded text with image placeholders.

    Attributes:
        input_ids: long (b, t).
        attention_mask: bool (b, t); False marks padding.
        labels: long (b, t), `IGNORE` everywhere but at the completion.
        truncated: number of completions that were cut to fit.
    """

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor
    truncated: int = 0

    def to(self, device: torch.device | str) -> "TextBatch":
        """The same batch on another device."""
        move = {"device": device, "non_blocking": True}
        return TextBatch(
            self.input_ids.to(**move),
            self.attention_mask.to(**move),
            self.labels.to(**move),
            self.truncated,
        )

    def pin_memory(self) -> "TextBatch":
        """The same batch in page-locked memory."""
        return TextBatch(
            self.input_ids.pin_memory(),
            self.attention_mask.pin_memory(),
            self.labels.pin_memory(),
            self.truncated,
        )


@dataclass(frozen=True)
class PromptEncoder:
    """Turns prompts and completions into a `TextBatch`.

    Every ``image_token`` in a prompt becomes `num_tokens` placeholders. The tokenizer's BOS
    comes first if it usually adds one, its EOS ends every completion.

    Attributes:
        tokenizer: of the LM, with `image_token` in its vocabulary.
        image_token: the placeholder's text.
        num_tokens: placeholders per image, the bridge's `num_tokens`.
        max_completion: longest completion in tokens, EOS included.
    """

    tokenizer: Any
    image_token: str
    num_tokens: int
    max_completion: int = 64

    def __call__(
        self,
        prompts: Sequence[str],
        completions: Sequence[str] | None = None,
        *,
        padding_side: str = "right",
    ) -> TextBatch:
        """Encodes a batch; without completions every label is `IGNORE` (generation)."""
        heads = [self._prompt(prompt) for prompt in prompts]
        tails: list[list[int]] = [[] for _ in prompts]
        truncated = 0
        if completions is not None:
            # A caption is data: "<image>" in it is text, not a placeholder without an image.
            ends = self.tokenizer(
                list(completions), add_special_tokens=False, split_special_tokens=True
            )["input_ids"]
            truncated = sum(len(end) + 1 > self.max_completion for end in ends)
            eos = self.tokenizer.eos_token_id
            tails = [[*end[: self.max_completion - 1], eos] for end in ends]
        length = max(len(h) + len(t) for h, t in zip(heads, tails, strict=True))
        ids = torch.full((len(heads), length), self._pad_id(), dtype=torch.long)
        mask = torch.zeros(len(heads), length, dtype=torch.bool)
        labels = torch.full_like(ids, IGNORE)
        for row, (head, tail) in enumerate(zip(heads, tails, strict=True)):
            size = len(head) + len(tail)
            start = length - size if padding_side == "left" else 0
            ids[row, start : start + size] = torch.tensor(head + tail)
            mask[row, start : start + size] = True
            labels[row, start + len(head) : start + size] = torch.tensor(tail, dtype=torch.long)
        return TextBatch(ids, mask, labels, truncated)

    def caption(self, prompt: str, caption: str) -> str:
        """A caption as the completion of a prompt: after text, it begins with a space.

        Prompt and completion are tokenised apart, so that "A photo of" and "a cat" would else
        run into one word.
        """
        apart = not prompt or prompt.endswith((self.image_token, " ", "\n"))
        return caption if apart else f" {caption}"

    def _prompt(self, prompt: str) -> list[int]:
        image_id = self.tokenizer.convert_tokens_to_ids(self.image_token)
        pieces = prompt.split(self.image_token)
        ids = _with_bos(self.tokenizer)
        for index, piece in enumerate(pieces):
            if index:
                ids += [image_id] * self.num_tokens
            if piece:
                ids += self.tokenizer(piece, add_special_tokens=False)["input_ids"]
        return ids

    def _pad_id(self) -> int:
        pad = self.tokenizer.pad_token_id
        return self.tokenizer.eos_token_id if pad is None else pad


def _with_bos(tokenizer: Any) -> list[int]:
    """The tokenizer's BOS, if it puts one before ordinary text by itself."""
    bos = tokenizer.bos_token_id
    ids = tokenizer("a")["input_ids"]
    return [bos] if bos is not None and ids and ids[0] == bos else []
