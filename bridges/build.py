"""Builds a bridge from the ``class_path`` and ``init_args`` of a YAML or of a run."""

from typing import Any

from bridges.contract import BridgeFactory


def bridge_factory(spec: dict[str, Any]) -> BridgeFactory:
    """The factory that a YAML names; any importable `Bridge` class, no registry.

    Args:
        spec: ``{"class_path": "bridges.SoftPrefix", "init_args": {...}}``, where a resampler is
            given in the same form.

    Raises:
        ValueError: the class cannot be imported or is no `Bridge`, or an argument is unknown or
            of a wrong type.
    """
    from jsonargparse import ArgumentError, ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--bridge", type=BridgeFactory, required=True)
    try:
        parsed = parser.parse_object({"bridge": spec})
    except ArgumentError as error:
        raise ValueError(f"found a bridge that cannot be built: {error}") from error
    return parser.instantiate(parsed).bridge
