"""What is wrong with a shard, and what of it a member's name tells."""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass

from webdataset.tariterators import base_plus_ext

from recipes.shard_members import Member

# webdataset passes over metadata members of this form; a scan must count as it reads.
_METADATA = re.compile(r"__[^/]*__($|/)")
_MAX_NAME = 1024


@dataclass(frozen=True)
class Fault:
    """What is wrong with a part of a shard, so that a sample cannot be had, or not as it was.

    Attributes:
        kind: what such faults are counted by, e.g. ``duplicate key``.
        key: of the sample, where it is known.
        problem: what was found.
    """

    kind: str
    key: str | None
    problem: str


def read_name(member: Member) -> tuple[str | None, str, Fault | None]:
    """(key, extension, what is wrong) of a member, by webdataset's rule but for hidden files.

    There is no key where the member is no sample's: a folder, metadata, a name without extension, a
    hidden file (``src/._000.jpg``, of which webdataset makes a sample ``src/``).
    """
    name = member.name
    if member.passed_over or _no_samples(name):
        return None, "", None
    shown = name[:_MAX_NAME].encode("utf-8", "backslashreplace").decode()
    key, extension = base_plus_ext(shown)
    fault = None
    if problem := _unsafe(name):
        fault = Fault("unsafe name", key, f"the member {shown[:200]!r} {problem}")
    elif not member.plain:
        kind = "link or device" if member.what != "a sparse file" else "refused member"
        fault = Fault(kind, key, f"the member {shown[:200]!r} is {member.what}")
    return key, (extension or "").lower(), fault


def is_key(key: str) -> bool:
    """Whether a sample written under a key is read under the same."""
    # The longest extension that is written, or a long key would be refused for some members only.
    name = f"{key}.000000.jpeg"
    return (
        base_plus_ext(name) == (key, "000000.jpeg")
        and not (_no_samples(name) or _unsafe(name))
        and not any(unicodedata.category(character) == "Cc" for character in key)
    )


def _no_samples(name: str) -> bool:
    if name.rpartition("/")[2].startswith("."):
        return True
    return _METADATA.match(name) is not None and len(name) <= _MAX_NAME


def _unsafe(name: str) -> str:
    try:
        length = len(name.encode())
    except UnicodeEncodeError:
        return "has a name that is not UTF-8"
    if length > _MAX_NAME:
        return f"has a name of {length:,} bytes; expected at most {_MAX_NAME:,}"
    if name.startswith("/") or re.match(r"[A-Za-z]:", name):
        return "has an absolute path"
    if "\\" in name or "\0" in name:
        return "has a backslash or a zero byte in its name"
    return "leaves its folder" if ".." in name.split("/") else ""
