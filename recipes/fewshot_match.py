"""Whether a written answer is one of the right ones."""

import re
from collections.abc import Sequence

_MARKS = re.compile(
    r"(?<=\d),(?=\d{3}(?!\d))"  # between thousands
    r"|(?!(?<=\d)[^\w\s]\d|(?<!\w)-?\.?\d)[^\w\s]"  # neither within a number nor its sign
)
_ARTICLES = ("a", "an", "the")


def same_text(text: str, truths: Sequence[str]) -> bool:
    """Whether a text equals one of some truths, but for case, articles, punctuation and spaces.

    What belongs to a number stays: "1.5" is not "15", "-1" not "1", "10:30" not "1030"; commas
    between thousands go. A text of articles alone keeps them ("A", of several choices, is not
    "the"), one of punctuation alone keeps that, and an empty text equals nothing.
    """
    return bool(text.strip()) and _plain(text) in map(_plain, truths)


def _plain(text: str) -> str:
    lower = text.lower().replace("\N{MINUS SIGN}", "-").strip()
    words = _MARKS.sub("", lower).split()
    return " ".join([word for word in words if word not in _ARTICLES] or words) or lower
