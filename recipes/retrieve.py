"""`bridges retrieve`: pictures found for texts and texts for pictures, by a stage-1 run."""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jsonargparse import ArgumentParser
from jsonargparse.typing import PositiveInt
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from bridges import Instruction, VisionEncoder
from bridges.files import write_json, write_text
from bridges.prompts import encode_text
from qformer.retrieval import KS, chance_recall, count_duplicates, itc_similarity, recall_at, rerank
from qformer.runs import load_stage1, read_stage1
from qformer.stage1 import Stage1
from recipes import retrieval_page
from recipes.cache import cache_features, check_cached
from recipes.data import split_shards
from recipes.gallery import Gallery, Scores, picture_stream


def retrieve(
    stage1: Stage1,
    vision: VisionEncoder,
    samples: Iterable[Mapping[str, Any]],
    *,
    top_k: int = 128,
    batch_size: int = 32,
    max_text_tokens: int = 32,
) -> dict[str, Any]:
    """Recall at 1, 5 and 10 in both directions, by ITC and after re-ranking by ITM.

    Args:
        stage1: the model; its tokenizer reads the texts.
        vision: the encoder it was trained with.
        samples: each with "captions", and "image" (preprocessed) or "features" (p, d).
        top_k: candidates of each picture and each text that ITM re-ranks.
        batch_size: pictures, or texts, or pairs at a time.
        max_text_tokens: to which texts are cut.

    Returns:
        See `summary`.
    """
    gallery = Gallery.collect(samples, vision, batch_size)
    scores = score(stage1, gallery, top_k, batch_size, max_text_tokens)
    return summary(gallery, scores, top_k)


@torch.no_grad()
def score(
    stage1: Stage1, gallery: Gallery, top_k: int, batch_size: int, max_text_tokens: int
) -> Scores:
    """Compares all pictures with all texts, then re-ranks the first of each; see `retrieve`."""
    device = stage1.temperature.device
    encoded = encode_text(stage1.qformer.tokenizer, gallery.texts, max_text_tokens)

    def texts(rows: slice | Tensor) -> Instruction:
        ids, mask = encoded.input_ids[rows], encoded.attention_mask[rows]
        longest = int(mask.sum(dim=1).max())
        return Instruction(ids[:, :longest].to(device), mask[:, :longest].to(device))

    def match(pictures: Tensor, of: Tensor) -> Tensor:
        """Pairs come picture by picture: each is projected once for a batch of texts."""
        logits, done = torch.empty(len(pictures)), 0
        found, counts = pictures.unique_consecutive(return_counts=True)
        todo = list(zip(found.tolist(), counts.tolist(), strict=True))
        for picture, count in track(todo, "re-ranking by ITM", transient=True):
            features = gallery.features(slice(picture, picture + 1), device)
            for chunk in of[done : done + count].split(batch_size):
                judged = stage1.match(features, texts(chunk))[:, 1].float().cpu()
                logits[done : done + len(chunk)] = judged
                done += len(chunk)
        return logits

    pictures = [
        stage1.image_embeddings(gallery.features(rows, device)).cpu()
        for rows in _slices(len(gallery.names), batch_size, "comparing pictures")
    ]
    words = [
        stage1.text_embeddings(texts(rows)).cpu()
        for rows in _slices(len(gallery.texts), batch_size, "comparing texts")
    ]
    itc = itc_similarity(torch.cat(pictures), torch.cat(words))
    return Scores(itc, *rerank(itc, match, top_k))


def summary(gallery: Gallery, scores: Scores, top_k: int) -> dict[str, Any]:
    """Recall by ITC ("itc"), after re-ranking ("itm") and of a ranking at random ("random")."""
    owners, pictures = gallery.owners, torch.arange(len(gallery.names))
    one, several = torch.ones_like(owners), owners.bincount(minlength=len(pictures))

    def both(to_images: Tensor, to_texts: Tensor) -> dict[str, dict[str, float]]:
        return {
            "text_to_image": recall_at(to_images, owners, pictures),
            "image_to_text": recall_at(to_texts, pictures, owners),
        }

    return {
        "images": len(pictures),
        "texts": len(owners),
        "top_k": top_k,
        "itc": both(scores.itc.T, scores.itc),
        "itm": both(scores.itm_images, scores.itm_texts),
        "random": {
            "text_to_image": chance_recall(one, len(pictures)),
            "image_to_text": chance_recall(several, len(owners)),
        },
        "duplicate_captions": count_duplicates(gallery.texts, owners),
    }


def main(arguments: Sequence[str]) -> None:
    """Entry of the subcommand."""
    parser = ArgumentParser(
        prog="bridges retrieve",
        description="Ranks held-out pictures for every caption and captions for every picture by "
        "ITC, re-ranks the first by ITM, and writes retrieval.json and retrieval.html.",
    )
    parser.add_argument("--run", type=Path, required=True, help="run directory of a stage 1")
    parser.add_argument(
        "--data", required=True, help="folder with val-*.tar or dev-*.tar, or the shards themselves"
    )
    parser.add_argument("--out", type=Path | None, help="folder; that of the run by default")
    parser.add_argument(
        "--top_k", type=PositiveInt, default=128, help="candidates that ITM re-ranks"
    )
    parser.add_argument("--limit", type=PositiveInt, help="pictures taken, the first ones")
    parser.add_argument("--batch_size", type=PositiveInt, default=32)
    parser.add_argument(
        "--feature_cache", type=Path | None, help="folder in which features are kept"
    )
    parser.add_argument("--device", type=str | None, help="the GPU if there is one, by default")
    options = parser.parse_args(list(arguments))

    sources = shards = held_out_shards(options.data)
    vision, stage1 = load_stage1(options.run, device=options.device)
    if options.feature_cache is not None:
        shards = cache_features(shards, vision, options.feature_cache, on_error="skip")
    check_cached(shards, vision)
    stream = picture_stream(shards, vision)
    total = min(options.limit or stream.total_samples, stream.total_samples)
    samples = track(
        itertools.islice(stream.iterate(), total), "encoding pictures", total, transient=True
    )
    gallery = Gallery.collect(samples, vision, options.batch_size)
    cut = read_stage1(options.run).max_text_tokens
    scores = score(stage1, gallery, options.top_k, options.batch_size, cut)
    skipped = dict(stream.skipped)
    if lost := picture_stream(sources, vision).total_samples - stream.total_samples:
        skipped["left out of the feature cache"] = lost
    result = summary(gallery, scores, options.top_k) | {"skipped": skipped}
    out = options.out or options.run
    write_json(out / "retrieval.json", result)
    write_text(out / "retrieval.html", retrieval_page.render(result, gallery, scores, sources))
    console = Console()
    print_summary(result, console)
    console.print(f"open {out / 'retrieval.html'}", soft_wrap=True)


def held_out_shards(data: str) -> list[Path]:
    """The ``val-*`` or ``dev-*`` shards of a folder; shards that are named are taken as they are.

    Raises:
        ValueError: a folder without them.
    """
    named, held_out = split_shards(data, None)
    if not Path(data).is_dir():
        return named
    if not held_out:
        raise ValueError(
            f"found no val-*.tar and no dev-*.tar in {data}; expected held-out shards: name the "
            f"shards to rank, e.g. --data '{data}/*.tar'"
        )
    return held_out


def print_summary(result: Mapping[str, Any], console: Console) -> None:
    """The summary as a table on the terminal."""
    table = Table(title=f"{result['images']:,} pictures, {result['texts']:,} texts")
    table.add_column("")
    for k in KS:
        table.add_column(f"recall@{k}", justify="right")
    for direction in ("text_to_image", "image_to_text"):
        for kind, title in retrieval_page.KINDS.items():
            shares = [f"{result[kind][direction][f'recall@{k}']:.1%}" for k in KS]
            table.add_row(f"{direction.replace('_to_', ' → ')}, {title}", *shares)
        table.add_section()
    console.print(table)
    if result["skipped"]:
        console.print(f"skipped: {result['skipped']}")


def _slices(total: int, size: int, title: str) -> Iterable[slice]:
    starts = range(0, total, size)
    return (slice(start, start + size) for start in track(starts, title, transient=True))
