"""Doors by which shards come in, by their contents and by their names."""

from __future__ import annotations

import json
import multiprocessing
from typing import Any

from torch import nn

from bridges import VisionEncoder
from recipes.cache import cache_features
from recipes.cache_form import PICTURES
from recipes.cli import main
from recipes.data import CaptionData
from recipes.documents import DOCUMENTS
from recipes.loader import SizedLoader
from recipes.reliability_payloads_made import member_payloads, name_payloads, payload_shard, pickles
from recipes.reliability_payloads_place import Decode, Door, Place, attempt, preprocess, stream_of
from recipes.shard_files import expand_shards
from recipes.shard_store import index_path
from recipes.shards import build_shards
from recipes.video import Clips, clip_form


def in_this_process(place: Place) -> int:
    """`ShardStream`, read in this process."""
    shard, _ = place.shard()
    # Of each sample something is read, so that none is passed over before it is looked at.
    return len(list(stream_of([shard]).iterate()))


def by_workers(method: str) -> Door:
    """`ShardStream`, read by two workers that are started by this method."""

    def door(place: Place) -> int:
        shard, _ = place.shard()
        before = multiprocessing.get_start_method(allow_none=True)
        multiprocessing.set_start_method(method, force=True)
        try:
            together: Any = list
            stream = stream_of([shard])
            loader: Any = SizedLoader(stream, 4, together, num_workers=2, drop_last=False)
            return sum(len(batch) for batch in loader)
        finally:
            multiprocessing.set_start_method(before, force=True)

    return door


def caption_data(place: Place) -> int:
    """`CaptionData`, as each task reads it."""
    # Features are refused by the folder that they are in, before any sample is met.
    count = place.shard("train-000000.tar", leave=("npy", "safetensors"))[1]
    place.shard("val-000000.tar", leave=("npy", "safetensors"))
    for task in ("caption", "instruction", "interleaved", "video"):
        options: dict[str, Any] = {"task": task, "on_error": "skip", "max_bad_fraction": 1.0}
        data = CaptionData(str(place.folder), batch_size=4, **options)
        attempt(lambda data=data: data.connect(encoder_of(), _Collate()))
        attempt(lambda data=data: list(data.val_dataloader()))
    return count


class _Collate:
    def decoder(self, preprocess: Any, *, training: bool) -> Any:
        return Decode()

    def __call__(self, samples: Any) -> Any:
        return samples


def indexed_and_verified(place: Place) -> int:
    """`bridges shards index` and `bridges shards verify`."""
    shard, count = place.shard()
    for where in (str(shard), str(shard.parent)):
        attempt(lambda where=where: main(["shards", "index", where]))
        attempt(lambda where=where: main(["shards", "verify", where]))
        attempt(lambda where=where: main(["shards", "verify", where, "--decode=true"]))
    return count


def cache(place: Place) -> int:
    """`bridges cache`."""
    shard, count = place.shard(leave=("npy", "safetensors"))
    encoder, folder = encoder_of(), place.folder / "cache"
    for form in (PICTURES, DOCUMENTS, clip_form(Clips())):
        attempt(
            lambda form=form: cache_features(shard, encoder, folder, on_error="skip", form=form)
        )
    return count


def pictures(place: Place) -> int:
    """`bridges shards` of a folder of pictures."""
    made = member_payloads(place.url)
    images = place.folder / "images"
    images.mkdir()
    for number, (name, make) in enumerate(made.items()):
        data = make(place.markers / name.replace("/", "-"))
        extension = name.split("/")[0]
        (images / f"{number}.{extension}").write_bytes(data)
        (images / f"{number}-as.jpg").write_bytes(data)
        (images / f"{number}-as.txt").write_text("a cat")
    attempt(lambda: build_shards(images, None, place.folder / "out"))
    return len(made)


def beside(place: Place) -> int:
    """Files beside a shard: its index, the manifest, a cache's description."""
    tried = 0
    for name in ("index", "shards.json", "features.json"):
        for kind, data in pickles(place.markers / name):
            folder = place.folder / f"{name}-{kind}"
            folder.mkdir()
            shard = folder / "train-000000.tar"
            payload_shard(shard, place.markers, place.url)
            target = index_path(shard) if name == "index" else folder / name
            target.write_bytes(data)
            tried += attempt(lambda shard=shard: next(stream_of([shard]).iterate()))
            tried += attempt(lambda folder=folder: main(["shards", "verify", str(folder)]))
    return tried


def encoder_of() -> VisionEncoder:
    """An encoder of next to no size: 2 × 2 patches."""
    return VisionEncoder(nn.Conv2d(3, 4, 8, 8), preprocess, image_size=(16, 16))


def names(place: Place) -> int:
    """Names of shards, given to whatever takes some, and within manifests."""
    tried = 0
    for number, name in enumerate(name_payloads(place.url, place.markers / "name")):
        local = place.folder / f"{number}"
        local.mkdir()
        described = {"name": name, "split": "train", "bytes": 1, "sha256": "0" * 64, "samples": 1}
        (local / "shards.json").write_text(json.dumps({"shards": [described]}))
        (local / "train-000000.tar").write_bytes(bytes(1024))
        for action in (
            lambda name=name: expand_shards(name),
            lambda name=name: stream_of(name),
            lambda name=name: stream_of([name]),
            lambda name=name: stream_of(f"{{{name},{name}}}"),
            lambda name=name: CaptionData(name),
            lambda name=name: CaptionData("x.tar", name),
            lambda local=local: stream_of(local),
            lambda local=local: main(["shards", "verify", str(local)]),
        ):
            tried += attempt(action)
    return tried


def names_in_commands(place: Place) -> int:
    """Names of shards on command lines and in configs."""
    tried = 0
    for number, name in enumerate(name_payloads(place.url, place.markers / "name")):
        run = str(place.folder / f"run-{number}")
        config = place.folder / f"{number}.yaml"
        config.write_text(json.dumps({"data": {"shards": name}}))
        for command in (
            ["shards", "index", name],
            ["shards", "verify", name],
            ["train", "--config=perceiver_small", f"--config={config}", f"--run={run}"],
            ["train", "--config=perceiver_small", f"--data={name}", f"--run={run}"],
            ["cache", f"--data={name}", "--model.vision.name=none", f"--out={run}"],
        ):
            tried += attempt(lambda command=command: main(command))
    return tried
