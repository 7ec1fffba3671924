"""Files that are whole or not there."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def staged(target: Path) -> Iterator[Path]:
    """A path beside `target` to write to; synced and renamed to it when nothing went wrong.

    A kill or a full disk then leaves the target as it was.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(target: Path, text: str) -> None:
    """Writes UTF-8 text through `staged`."""
    with staged(target) as path:
        path.write_text(text, encoding="utf-8")


def write_json(target: Path, content: Any) -> None:
    """Writes indented JSON through `staged`."""
    write_text(target, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
