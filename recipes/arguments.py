"""What must be known of the arguments of `bridges train` before they can be parsed."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

CONFIGS = Path(__file__).parent / "configs"
"""The shipped configs."""

_SOURCE = "--data.sources."


def chosen(key: str, arguments: Sequence[str], default: str) -> str:
    """The class path given for a key, by which the parser knows what keys there are.

    Args:
        key: ``module`` or ``data_class``.
        arguments: from `expand_configs`. ``--KEY`` comes before the key of the configs, the last
            one given before the others.
        default: where it is given nowhere.
    """
    given = [value for flag, value in _options(arguments) if flag == f"--{key}"]
    configured = [str(config[key]) for config in _configs(arguments) if config.get(key) is not None]
    return [default, *configured, *given][-1]


def expand_configs(arguments: Sequence[str]) -> list[str]:
    """A shipped config may go by its bare name."""
    expanded: list[str] = []
    previous = ""
    for argument in arguments:
        flag, equals, value = argument.partition("=")
        if previous in ("--config", "-c") or (flag == "--config" and equals):
            path = shipped_config(value if equals else argument)
            argument = f"--config={path}" if equals else path
        expanded.append(argument)
        previous = argument
    return expanded


def expand_data(arguments: Sequence[str], *, mixture: bool) -> list[str]:
    """`--data PATH` means `--data.shards=PATH`; of a mixture, PATH/NAME for each source.

    Args:
        arguments: from `expand_configs`.
        mixture: whether the data is one.

    Raises:
        ValueError: a mixture whose configs name no sources; a source left out that there is not.
    """
    keys = {"": "--data.shards"}
    if mixture:
        _check_left_out(arguments)
        keys = {f"/{name}": f"--data.sources.{name}.shards" for name in _sources(arguments)}
    expanded: list[str] = []
    options = iter(arguments)
    for argument in options:
        flag, equals, value = argument.partition("=")
        if flag != "--data":
            expanded.append(argument)
            continue
        value = value if equals else next(options, "")
        if not value:
            raise ValueError("found --data without a path; expected where the shards are")
        if not keys:
            raise ValueError(
                f"found --data {value} for a mixture without data.sources in its configs; expected "
                "sources there, whose shards are the folders of their names: or give each with "
                "--data.sources.NAME.shards"
            )
        expanded += [f"{key}={value}{folder}" for folder, key in keys.items()]
    return expanded


def shipped_config(name: str) -> str:
    """A config file by its path, or a shipped one by its name without `.yaml`."""
    if Path(name).is_file():
        return name
    shipped = CONFIGS / f"{name.removesuffix('.yaml')}.yaml"
    if not shipped.is_file():
        names = ", ".join(sorted(path.stem for path in CONFIGS.glob("*.yaml")))
        raise ValueError(
            f"found no config file {name!r}; expected a path or one of the shipped {names}"
        )
    return str(shipped)


def _check_left_out(arguments: Sequence[str]) -> None:
    """Refuses `--data.sources.NAME null` without such a source: a slip would leave none out."""
    options = list(_options(arguments))
    given = [flag.removeprefix(_SOURCE) for flag, _ in options if flag.startswith(_SOURCE)]
    known = {*_configured(arguments), *(name.split(".")[0] for name in given if "." in name)}
    for flag, value in options:
        name = flag.removeprefix(_SOURCE)
        if flag.startswith(_SOURCE) and value == "null" and "." not in name and name not in known:
            raise ValueError(
                f"found {flag} null; expected one of the sources {', '.join(sorted(known))}"
            )


def _sources(arguments: Sequence[str]) -> list[str]:
    """Names of the sources in the configs, those left out on the command line excepted."""
    left_out = {flag for flag, value in _options(arguments) if value == "null"}
    return [
        name
        for name, source in _configured(arguments).items()
        if source is not None and f"{_SOURCE}{name}" not in left_out
    ]


def _configured(arguments: Sequence[str]) -> dict[str, Any]:
    """The sources in the configs, by name; None for those that are left out there."""
    sources: dict[str, Any] = {}
    for config in _configs(arguments):
        data = config.get("data")
        mixed = data.get("sources") if isinstance(data, DictConfig) else None
        if isinstance(mixed, DictConfig):
            sources.update({str(name): source for name, source in mixed.items()})
    return sources


def _options(arguments: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Flags with their values, whether written with a space or with ``=``."""
    for argument, following in zip(arguments, [*arguments[1:], ""], strict=True):
        flag, equals, value = argument.partition("=")
        yield flag, value if equals else following


def _configs(arguments: Sequence[str]) -> Iterator[DictConfig]:
    """The config files, in their order; what cannot be read is for the parser to refuse."""
    for flag, value in _options(arguments):
        if flag not in ("--config", "-c"):
            continue
        try:
            loaded = OmegaConf.load(value)
        except (yaml.YAMLError, OmegaConfBaseException, OSError):
            continue
        if isinstance(loaded, DictConfig):
            yield loaded
