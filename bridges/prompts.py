"""Text with images in it, as token ids."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from bridges.contract import Bridge, Instruction
from bridges.loss import IGNORE

QUESTION = "{question}"
"""Where a prompt takes the question that belongs to its row."""

CAPTION_INSTRUCTION = "A short image description."
"""The question in the place of none: one of InstructBLIP's templates for captions."""


class _Mark(Enum):
    END_OF_CHUNK = "end of chunk"


END_OF_CHUNK = _Mark.END_OF_CHUNK
"""A part of a document: the token that ends a text, see `PromptEncoder.document`."""

DocumentPart = str | None | _Mark
"""Text, an image (None), or `END_OF_CHUNK`."""


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

    Every ``image_token`` in a prompt becomes `num_tokens` placeholders, every ``{question}`` the
    question of the row, which is data: "<image>" in it is text. The tokenizer's BOS comes first
    if it usually adds one and the prompt does not hold it; `end_id` ends every completion.

    Attributes:
        tokenizer: of the LM, with `image_token` in its vocabulary.
        image_token: the placeholder's text.
        num_tokens: placeholders per image, the bridge's `num_tokens`.
        max_completion: longest completion in tokens, its end included.
        end_id: what ends a completion and a chunk of a document; None for the tokenizer's EOS.
    """

    tokenizer: Any
    image_token: str
    num_tokens: int
    max_completion: int = 64
    end_id: int | None = None

    def __call__(
        self,
        prompts: Sequence[str],
        completions: Sequence[str] | None = None,
        *,
        questions: Sequence[str] | None = None,
        padding_side: str = "right",
    ) -> TextBatch:
        """Encodes a batch; without completions every label is `IGNORE` (generation).

        Raises:
            ValueError: ``{question}`` in a prompt, and no questions.
        """
        asked = questions if questions is not None else [None] * len(prompts)
        heads = [self._prompt(p, question) for p, question in zip(prompts, asked, strict=True)]
        tails: list[list[int]] = [[] for _ in prompts]
        truncated = 0
        if completions is not None:
            # A caption is data: "<image>" in it is text, not a placeholder without an image.
            ends = self.tokenizer(
                list(completions), add_special_tokens=False, split_special_tokens=True
            )["input_ids"]
            truncated = sum(len(end) + 1 > self.max_completion for end in ends)
            tails = [[*end[: self.max_completion - 1], self._end_id()] for end in ends]
        rows = [
            (head + tail, [IGNORE] * len(head) + tail)
            for head, tail in zip(heads, tails, strict=True)
        ]
        return self.pad(rows, padding_side=padding_side, truncated=truncated)

    def document(self, parts: Sequence[DocumentPart]) -> tuple[list[int], list[bool]]:
        """Tokens of text with images in it, BOS left out, and which of them may carry a loss.

        Text is data: special tokens in it are spelt out. Placeholders carry no loss.

        Args:
            parts: text, None for an image, `END_OF_CHUNK` where a text ends.
        """
        ids: list[int] = []
        lossy: list[bool] = []
        for part in parts:
            if part is None:
                image_id = self.tokenizer.convert_tokens_to_ids(self.image_token)
                tokens = [image_id] * self.num_tokens
            elif isinstance(part, str):
                tokens = self._text(part, data=True) if part else []
            else:
                tokens = [self._end_id()]
            ids += tokens
            lossy += [part is not None] * len(tokens)
        return ids, lossy

    def bos(self) -> list[int]:
        """What a document begins with: BOS, or EOS where the tokenizer has none.

        Also where the tokenizer puts none before ordinary text by itself: Flamingo's documents
        begin with it, and a decoder LM uses its first position as an attention sink, where a
        frozen embedding serves it better than a picture's soft token.
        """
        bos = self.tokenizer.bos_token_id
        return [self.tokenizer.eos_token_id if bos is None else bos]

    @property
    def end_of_chunk(self) -> str:
        """Text of the token that ends a completion and a chunk."""
        return self.tokenizer.convert_ids_to_tokens(self._end_id())

    def pad(
        self,
        rows: Sequence[tuple[Sequence[int], Sequence[int]]],
        *,
        padding_side: str = "right",
        truncated: int = 0,
    ) -> TextBatch:
        """Rows of token ids, and their labels, as a batch.

        Args:
            rows: ids, and as many labels, `IGNORE` where there is no loss.
            padding_side: left to generate, right to train.
            truncated: goes into the batch.
        """
        length = max(len(ids) for ids, _ in rows)
        ids = torch.full((len(rows), length), self._pad_id(), dtype=torch.long)
        mask = torch.zeros(len(rows), length, dtype=torch.bool)
        labels = torch.full_like(ids, IGNORE)
        for row, (tokens, wanted) in enumerate(rows):
            start = length - len(tokens) if padding_side == "left" else 0
            place = slice(start, start + len(tokens))
            ids[row, place] = torch.tensor(tokens, dtype=torch.long)
            mask[row, place] = True
            labels[row, place] = torch.tensor(wanted, dtype=torch.long)
        return TextBatch(ids, mask, labels, truncated)

    def caption(self, prompt: str, caption: str) -> str:
        """A caption as the completion of a prompt: after text, it begins with a space.

        Prompt and completion are tokenised apart, so that "A photo of" and "a cat" would else
        run into one word.
        """
        ends = (self.image_token, " ", "\n", self.tokenizer.bos_token or "\n")
        apart = not prompt or prompt.endswith(ends)
        return caption if apart else f" {caption}"

    def shortened(self, question: str) -> str:
        """A question of at most `max_completion` tokens; the rest is cut off."""
        ids = self._text(question, data=True)
        if len(ids) <= self.max_completion:
            return question
        return self.tokenizer.decode(ids[: self.max_completion])

    def _prompt(self, prompt: str, question: str | None) -> list[int]:
        if question is None and QUESTION in prompt:
            raise ValueError(
                f"found {QUESTION!r} in prompt {prompt!r} and no question; expected one for each "
                "row: give questions, or take it out of the prompt"
            )
        image_id = self.tokenizer.convert_tokens_to_ids(self.image_token)
        pieces = prompt.split(self.image_token)
        bos = self.tokenizer.bos_token
        # A prompt may set BOS where it wants it: BLIP-2 has it after the image.
        ids = [] if bos and bos in prompt else _with_bos(self.tokenizer)
        for index, piece in enumerate(pieces):
            if index:
                ids += [image_id] * self.num_tokens
            if piece:
                ids += self._piece(piece, question or "")
        return ids

    def _piece(self, piece: str, question: str) -> list[int]:
        """Text of a prompt without images, its question filled in."""
        filled = piece.replace(QUESTION, question)
        if all(filled.count(token) == piece.count(token) for token in self._special_tokens):
            return self._text(filled)
        # The question spells a special token: tokenised by itself, it is only text.
        ids: list[int] = []
        for index, part in enumerate(piece.split(QUESTION)):
            ids += self._text(question, data=True) if index else []
            ids += self._text(part)
        return ids

    def _text(self, text: str, *, data: bool = False) -> list[int]:
        """Tokens of a text; special tokens in data are spelt out."""
        options = {"split_special_tokens": True} if data else {}
        return self.tokenizer(text, add_special_tokens=False, **options)["input_ids"]

    @cached_property
    def _special_tokens(self) -> list[str]:
        added = self.tokenizer.added_tokens_decoder.values()
        return [token.content for token in added if token.special]

    def _end_id(self) -> int:
        return self.tokenizer.eos_token_id if self.end_id is None else self.end_id

    def _pad_id(self) -> int:
        pad = self.tokenizer.pad_token_id
        return self.tokenizer.eos_token_id if pad is None else pad


def _with_bos(tokenizer: Any) -> list[int]:
    """The tokenizer's BOS, if it puts one before ordinary text by itself."""
    bos = tokenizer.bos_token_id
    ids = tokenizer("a")["input_ids"]
    return [bos] if bos is not None and ids and ids[0] == bos else []


def instruction_tokenizer(bridge: Bridge) -> Any:
    """The tokenizer of a resampler that reads text beside the image, or None.

    Such a resampler has it as its attribute ``tokenizer``, and its bridge the resampler as
    ``resampler``.
    """
    return getattr(getattr(bridge, "resampler", None), "tokenizer", None)


def encode_instruction(tokenizer: Any, texts: Sequence[str]) -> Instruction:
    """Instructions for such a resampler; of a longer one, the last 128 tokens (as LAVIS has it)."""
    return encode_text(tokenizer, texts, 128, "left")


def encode_text(
    tokenizer: Any,
    texts: Sequence[str],
    max_length: int,
    truncation_side: Literal["left", "right"] = "right",
) -> Instruction:
    """Text for a BERT-shaped text branch, padded on the right to the longest of the batch.

    A text is data: special tokens in it are spelt out.

    Args:
        tokenizer: a BERT's.
        texts: b of them, at least one.
        max_length: tokens kept, [CLS] and [SEP] included; at least 3.
        truncation_side: which end of a longer text goes.

    Returns:
        Token ids and mask, (b, t) both.

    Raises:
        ValueError: no texts, or no room for any.
    """
    if max_length < 3 or not texts:
        raise ValueError(
            f"found {len(texts)} texts and max_length={max_length}; expected at least one text and "
            "room for one token between [CLS] and [SEP]"
        )
    inner = tokenizer(list(texts), add_special_tokens=False, split_special_tokens=True)["input_ids"]
    room = max_length - 2
    kept = [ids[-room:] if truncation_side == "left" else ids[:room] for ids in inner]
    rows = [[tokenizer.cls_token_id, *ids, tokenizer.sep_token_id] for ids in kept]
    ids = torch.full((len(rows), max(map(len, rows))), tokenizer.pad_token_id)
    mask = torch.zeros(ids.shape, dtype=torch.bool)
    for row, tokens in enumerate(rows):
        ids[row, : len(tokens)] = torch.tensor(tokens)
        mask[row, : len(tokens)] = True
    return Instruction(ids, mask)
