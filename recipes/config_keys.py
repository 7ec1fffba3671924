"""Keys of a training config, with dots, in the mapping that its YAML is."""

import copy
from collections.abc import Mapping
from typing import Any

Config = dict[str, Any]


def get_key(config: Mapping[str, Any], key: str) -> Any:
    """The value at a key with dots; None where there is none."""
    found: Any = config
    for part in key.split("."):
        found = found.get(part) if isinstance(found, Mapping) else None
    return found


def set_key(config: Config, key: str, value: Any) -> None:
    """Puts a value in the place of all that is below a key with dots.

    Raises:
        ValueError: something on the way is no mapping.
    """
    *path, last = key.split(".")
    inner = config
    for part in path:
        if inner.get(part) is None:
            inner[part] = {}
        elif isinstance(inner[part], str):
            # A class by its path alone: what follows are its arguments.
            inner[part] = {"class_path": inner[part]}
        inner = inner[part]
        if not isinstance(inner, dict):
            raise ValueError(
                f"found {inner!r} at {part!r} of the key {key!r}; expected a mapping there"
            )
    inner[last] = copy.deepcopy(value)
