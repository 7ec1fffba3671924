"""Emoji scenes, or documents of them, as shards."""

from pathlib import Path

from rich.console import Console
from rich.progress import track

from bridges.embedded import ASSETS, fetch
from recipes.scene_documents import document_samples
from recipes.scenes import scene_samples
from recipes.shard_writer import ShardSet
from recipes.shards import ShardReport


def write_scenes(
    out: Path,
    *,
    train: int = 10000,
    val: int = 400,
    documents: bool = False,
    seed: int = 0,
    overwrite: bool = False,
    progress: bool = True,
) -> ShardReport:
    """Draws scenes into the shards of a folder, all or none; ``shards.json`` names them.

    Args:
        out: The folder for the shards; made when it does not exist.
        train: Scenes to train on.
        val: Scenes to validate on, of compositions that the others never show.
        documents: Make ``train`` and ``val`` documents of two to five scenes each, see
            `recipes.scene_documents`.
        seed: Another seed gives other scenes.
        overwrite: Replace the shards in ``out`` if there are any.
        progress: Show a progress bar.

    Raises:
        ValueError: Shards in ``out`` already, or no scenes or a negative number asked for.
        EmbeddedAssetError: The artwork is not in the cache and cannot be fetched.
    """
    with ShardSet(out, samples_per_shard=1000, overwrite=overwrite) as shards:
        if min(train, val) < 0 or train + val == 0:
            raise ValueError(
                f"found {train} and {val} scenes to draw; expected 0 or more, and some in all: "
                "give another --train or --val"
            )
        emoji = fetch("emoji")
        counts = {"train": train, "val": val}
        samples = document_samples if documents else scene_samples
        drawn = (
            (split, sample)
            for split, n in counts.items()
            for sample in samples(n, seed, split, emoji)
        )
        texts = 0
        console = Console(stderr=True)
        for split, sample in track(
            drawn, "scenes", train + val, console=console, disable=not progress
        ):
            shards.add(split, sample)
            texts += len(sample["json"]["scenes"]) if documents else 1
        kind = "documents" if documents else "scenes"
        source = {"seed": seed, kind: counts, "licence": ASSETS["emoji"].licence}
        written = shards.commit(manifest=source)
    return ShardReport(out, written, captions=texts)
