"""Samples of a shard while it is scanned, and the damage beside them."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

from recipes.shard_faults import Fault
from recipes.shard_members import Damage, checksum_holds


@dataclass(eq=False)
class Group:
    """Members side by side that have the same key."""

    key: str
    offset: int
    end: int = 0
    checksum: int = 0
    fault: Fault | None = None
    members: dict[str, tuple[int, int]] = field(default_factory=dict)
    row: int | None = None

    @cached_property
    def form(self) -> frozenset[str]:
        """Its extensions, once it is complete."""
        return frozenset(self.members)


@dataclass(eq=False)
class Break:
    """Damage, and the samples on both sides of it."""

    damage: Damage
    before: Group | None
    after: Group | None = None


def owns(group: Group, damage: Damage, mended: bool = False) -> bool:
    """Whether a damaged header was of this sample, by what is left of its name.

    Args:
        group: the sample.
        damage: the header.
        mended: ask whether the header's checksum would hold with the sample's name in it. It is a
            sum, and so may hold with a neighbour's name, too.
    """
    name = damage.name or b""
    for encoded in (f"{group.key}.".encode(), f"{group.key}.".encode("ascii", "replace")):
        extension = name[len(encoded) :].decode("utf-8", "replace").lower()
        if not name or extension in group.members:
            continue
        if mended:
            found = len(encoded) < 100 and checksum_holds(encoded + damage.block[len(encoded) :])
        else:
            found = name.startswith(encoded[: len(name)] if len(name) == 100 else encoded)
        if found:
            return True
    return False
