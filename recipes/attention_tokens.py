"""The words of a row of tokens, and which tokens each is made of."""

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

WORD = re.compile(r"\w+(?:['’\-]\w+)*")


@dataclass(frozen=True)
class Word:
    """A word of a text.

    Attributes:
        text: the word.
        positions: of its tokens.
    """

    text: str
    positions: list[int]


def words_of(tokenizer: Any, ids: Sequence[int], silent: Collection[int], begin: int) -> list[Word]:
    """The words of a row of tokens, each with the positions of all tokens it has letters of.

    Args:
        tokenizer: of the LM.
        ids: of the row.
        silent: tokens that are no text (images, special tokens): a word ends there.
        begin: the first position to look at.
    """
    words: list[Word] = []
    start = begin
    for stop in range(begin, len(ids) + 1):
        if stop == len(ids) or ids[stop] in silent:
            words += _words_of_run(tokenizer, ids, start, stop)
            start = stop + 1
    return words


def _words_of_run(tokenizer: Any, ids: Sequence[int], start: int, stop: int) -> list[Word]:
    def text_until(end: int) -> str:
        # Half a letter of several bytes is no letter yet.
        text = tokenizer.decode(ids[start:end], clean_up_tokenization_spaces=False)
        return text.rstrip("\N{REPLACEMENT CHARACTER}") if end < stop else text

    ends = [len(text_until(end)) for end in range(start, stop + 1)]
    # A token that completes no letter belongs to the one that it begins.
    spans = [(left, max(right, left + 1)) for left, right in pairwise(ends)]
    words = []
    for match in WORD.finditer(text_until(stop)):
        positions = [
            start + token
            for token, (left, right) in enumerate(spans)
            if left < match.end() and right > match.start()
        ]
        words.append(Word(match.group(), positions))
    return words
