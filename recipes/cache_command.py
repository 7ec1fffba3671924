"""`bridges cache`: a frozen encoder's features, computed once by any number of processes."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import torch
import yaml
from jsonargparse import ArgumentParser, Namespace
from jsonargparse.typing import PositiveInt
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from bridges import VisionEncoder
from bridges.run import VisionSource
from recipes.arguments import expand_data, shipped_config
from recipes.cache import FEATURES_FILE, is_cached
from recipes.cache_set import FeatureSet, left_out, read_description
from recipes.cache_writer import Encoding, Written, write_features
from recipes.data import CaptionData, split_shards
from recipes.features import Storage
from recipes.loader import distributed_ranks
from recipes.shard_files import expand_shards

_DATA = (
    "shards",
    "val_shards",
    "on_error",
    "max_bad_fraction",
    "task",
    "num_frames",
    "fps",
    "decode",
)
"""Of `CaptionData`, what features depend on."""


def main(arguments: Sequence[str]) -> None:
    """Entry of the subcommand."""
    parser = _parser()
    # Before the rest can be parsed: a recipe gives what else is required.
    recipe = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    recipe.add_argument("--config")
    recipe.add_argument("--source")
    given, _ = recipe.parse_known_args(arguments)
    if given.config is not None:
        parser.set_defaults(_configured(shipped_config(given.config), given.source))
    options = parser.parse_args(expand_data(list(arguments), mixture=False))
    rank, world_size = distributed_ranks()
    features, encoding = _prepare(options)
    written = Written()
    if not features.begin():
        written = write_features(features, encoding, rank, world_size)
        features.finish()
    _report(features, written, rank, world_size)


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="bridges cache",
        description="Computes a frozen encoder's features of all pictures once, and writes them as "
        "shards to train on. Takes the encoder and the data as 'bridges train' does. Under "
        "torchrun, each process encodes its share of the shards; started again after a kill, it "
        "goes on after the last whole shard.",
    )
    parser.add_argument("--config", type=str | None, help="a recipe: its model.vision and data")
    parser.add_argument("--source", type=str | None, help="of a recipe with several, one of them")
    parser.add_class_arguments(VisionSource, "model.vision")
    known = CaptionData.__init__.__annotations__.keys() - {"return"}
    skip: set[str | int] = {*known.difference(_DATA)}
    parser.add_class_arguments(CaptionData, "data", skip=skip)
    parser.add_argument("--out", type=Path, required=True, help="folder of the feature shards")
    parser.add_argument(
        "--dtype", type=Storage, default="fp16", help=f"of the features: {get_args(Storage)}"
    )
    parser.add_argument("--batch_size", type=PositiveInt, default=32, help="pictures together")
    parser.add_argument("--device", type=str | None, help="this process's GPU, by default")
    return parser


def _configured(config: str, source: str | None) -> dict[str, Any]:
    """What a recipe says of the encoder and the data."""
    try:
        loaded: Any = OmegaConf.to_container(OmegaConf.load(config), resolve=True)
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise ValueError(
            f"found {config}, which is no recipe: {error}; expected plain YAML: mend the file"
        ) from error
    if not isinstance(loaded, dict):
        found = type(loaded).__name__
        raise ValueError(f"found a {found} in {config}; expected the keys of a recipe: mend it")
    data = loaded.get("data") or {}
    sources = data.get("sources")
    if sources is not None:
        if source not in sources:
            raise ValueError(
                f"found --source {source} for the sources {', '.join(sources)} in {config}; "
                "expected one of them: each is cached in a folder of its own"
            )
        data = sources[source]
    values = {f"data.{name}": data[name] for name in _DATA if name in data}
    vision = (loaded.get("model") or {}).get("vision") or {}
    return values | {f"model.vision.{name}": value for name, value in vision.items()}


def _prepare(options: Namespace) -> tuple[FeatureSet, Encoding]:
    data = CaptionData(**vars(options.data))
    if options.data.val_shards is None:
        shards, held_out = expand_shards(options.data.shards), []
    else:
        shards, held_out = split_shards(options.data.shards, options.data.val_shards)
    if cached := [path for path in (*shards, *held_out) if is_cached(path)]:
        raise ValueError(
            f"found features in {cached[0]}; expected pictures: give the shards they were made of"
        )
    encoder = VisionEncoder.load(**vars(options.model.vision))
    device = options.device
    if device is None and torch.cuda.is_available():
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    encoder.to(device or "cpu")
    form = data.cache_form()
    decode = options.data.decode
    features = FeatureSet.of(shards, options.out, encoder, form, options.dtype, decode, held_out)
    encoding = Encoding(
        encoder,
        form,
        options.dtype,
        decode,
        options.batch_size,
        options.data.on_error,
        options.data.max_bad_fraction,
    )
    return features, encoding


def _report(features: FeatureSet, written: Written, rank: int, world_size: int) -> None:
    who = f"rank {rank}: " if world_size > 1 else ""
    rate = written.pictures / written.seconds if written.seconds else 0.0
    print(
        f"{who}encoded {written.pictures:,} pictures in {written.shards} shards, "
        f"{written.seconds:,.1f} s, {rate:,.0f} pictures/s"
    )
    described = read_description(features.folder / FEATURES_FILE)
    if described is None:
        missing = sum(not path.is_file() for path in features.paths)
        print(f"{who}{missing} of {len(features.paths)} shards are still to come from other ranks")
        return
    if left := left_out(described):
        print(f"{who}{len(left)} bad samples were left out, first {left[0]}: see {FEATURES_FILE}")
    print(f"{who}the features are in {features.folder}; train with: --data {features.folder}")
