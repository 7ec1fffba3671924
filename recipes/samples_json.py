"""The JSON of a sample, read so that no content of it can stall or swamp a loader's worker."""

from __future__ import annotations

import json
from typing import Any

MAX_DEPTH = 100
"""Levels of a sample's JSON. What is deeper can still be read, but not sent by a loader's worker,
whose loss the run would wait out for ever."""

MAX_VALUES = 1_000_000
"""Values in a sample's JSON. Each takes up to 70 bytes once read, and may have taken 3 in the file:
without a bound, 64 MiB of empty lists become 1.6 GiB. A long document has some hundreds."""

MAX_DIGITS = 308
"""Digits of a whole number: of more, no float is made, and reading them takes time squared."""


def parse_json(data: bytes) -> Any:
    """What some JSON holds. NaN and Infinity, which Python writes, are taken.

    Raises:
        ValueError: it is no JSON, is nested deeper than `MAX_DEPTH`, has more values than
            `MAX_VALUES`, a number of more digits than `MAX_DIGITS`, or half a surrogate pair
            (``"\\ud800"``) in it, which no tokenizer and no file takes.
    """
    # Counted before anything is built. Text has commas, too, but not so many.
    count = sum(data.count(mark) for mark in (b",", b"[", b"{"))
    if count > MAX_VALUES:
        raise ValueError(f"it has {count:,} commas and brackets; expected at most {MAX_VALUES:,}")
    try:
        value = json.loads(data, parse_int=_whole_number)
    except RecursionError as error:
        raise ValueError(f"it is nested deeper than {MAX_DEPTH} levels") from error
    _check_content(value)
    return value


def _whole_number(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise ValueError(
            f"it has a number of {len(digits):,} digits; expected at most {MAX_DIGITS}"
        )
    return int(digits)


def _check_content(value: Any, depth: int = 0) -> None:
    if depth > MAX_DEPTH:
        raise ValueError(f"it is nested deeper than {MAX_DEPTH} levels")
    if isinstance(value, str):
        value.encode()
    elif isinstance(value, dict):
        for key, content in value.items():
            key.encode()
            _check_content(content, depth + 1)
    elif isinstance(value, list):
        for content in value:
            _check_content(content, depth + 1)
