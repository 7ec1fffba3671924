"""`bridges attention`: what the words of a text, or a Q-Former's queries, look at in pictures."""

from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import torch
from jinja2 import Environment
from jsonargparse import ArgumentParser
from rich.progress import track

import bridges
from bridges import Instruction, VisionEncoder, VisionLanguageModel
from bridges.files import write_text
from bridges.images import open_image
from bridges.prompts import CAPTION_INSTRUCTION, encode_instruction
from qformer.maps import cross_attention_maps
from qformer.resampler import QFormer
from qformer.runs import is_stage1_run, load_stage1
from recipes.attention_maps import Layer
from recipes.attention_picture import as_seen, colour_map, overlay
from recipes.attention_words import At, choose, drawn, readings
from recipes.gallery import uri


def main(arguments: Sequence[str]) -> None:
    """Entry of the subcommand."""
    parser = ArgumentParser(
        prog="bridges attention",
        description="Draws what the words of a text, or the queries of a Q-Former, look at in "
        "pictures, as one page.",
    )
    parser.add_argument("images", type=Path, nargs="+", help="picture files")
    parser.add_argument(
        "--run", type=Path, required=True, help="run directory: a stage 1, or a bridge"
    )
    parser.add_argument("--out", type=Path, required=True, help="the page, an .html file")
    parser.add_argument(
        "--of",
        type=Literal["queries", "words"] | None,
        help="what looks; queries by default where there is a Q-Former and no text is asked for",
    )
    parser.add_argument(
        "--text",
        type=str | None,
        help="the caption of each picture, or with <image> in it a text of all of them; what the "
        "model writes by default",
    )
    parser.add_argument("--words", type=str | None, help="some of its words: cat,green")
    parser.add_argument(
        "--at",
        type=At,
        default="before",
        help="a word's attention is that of the tokens before its own, which predict them, or of "
        "its own",
    )
    parser.add_argument(
        "--layer",
        type=Layer | None,
        help="the last layer that reads the image or the mean: last for queries, mean for words",
    )
    parser.add_argument(
        "--question", type=str | None, help="for a prompt or a Q-Former that takes one"
    )
    options = parser.parse_args(list(arguments))
    missing = [str(path) for path in options.images if not path.is_file()]
    if missing:
        raise ValueError(f"found no file {', '.join(missing)}; expected pictures")
    colour_map()  # said before models are loaded, if it is not there
    model = None if is_stage1_run(options.run) else bridges.load(options.run)
    of = options.of or _looker(model, options.text is not None or options.words is not None)
    page = (_page_of_words if of == "words" else _page_of_queries)(model, options)
    write_text(options.out, page)
    print(f"open {options.out}")


def load_qformer(
    run: Path, question: str | None = None, model: VisionLanguageModel | None = None
) -> tuple[VisionEncoder, QFormer, Instruction | None]:
    """The Q-Former of a run, with its encoder and the instruction that it reads, if it reads one.

    Args:
        run: a stage-1 run, or a run whose bridge has a `QFormer` as resampler.
        question: the instruction; `CAPTION_INSTRUCTION` by default.
        model: of a run with a bridge, if it is loaded already.

    Raises:
        ValueError: a run without a Q-Former, or a question that nobody would read.
    """
    if is_stage1_run(run):
        vision, stage1 = load_stage1(run)
        qformer, tokenizer = stage1.qformer, None
    else:
        model = model or bridges.load(run)
        vision, qformer = model.vision, _resampler(model)
        if not isinstance(qformer, QFormer):
            raise ValueError(
                f"found a {type(model.bridge).__name__} on a {type(qformer).__name__} in {run}; "
                "expected a bridge with qformer.QFormer as its resampler: only a Q-Former has "
                "queries to draw, leave --of out for words"
            )
        tokenizer = qformer.tokenizer
    if tokenizer is None:
        if question is not None:
            raise ValueError(
                f"found question {question!r} for {run}, whose queries read no text; expected "
                "none: leave --question out"
            )
        return vision, qformer, None
    asked = encode_instruction(tokenizer, [question or CAPTION_INSTRUCTION])
    device = qformer.queries.device
    return vision, qformer, Instruction(asked.input_ids.to(device), asked.attention_mask.to(device))


@torch.no_grad()
def picture(
    path: Path, vision: VisionEncoder, qformer: QFormer, text: Instruction | None, layer: Layer
) -> dict[str, Any]:
    """One picture's part of the page."""
    image = open_image(path)
    features = vision.encode(vision.preprocess(image)[None, None])
    maps = cross_attention_maps(qformer, features, text)[0, 0].mean(dim=1).cpu()
    chosen = maps[-1] if layer == "last" else maps.mean(dim=0)
    rows, columns = features.grid
    on_patches = chosen[:, -rows * columns :].unflatten(1, (rows, columns))
    seen = as_seen(vision.preprocess, image)
    return {
        "name": path.name,
        "size": image.size,
        "seen_size": seen.size,
        "grid": (rows, columns),
        "seen": uri(seen),
        "mean": uri(overlay(seen, on_patches.mean(dim=0))),
        "queries": [
            {
                "uri": uri(overlay(seen, one)),
                "lowest": float(one.min()),
                "peak": float(one.max()),
                "prefix": 1 - float(one.sum()),
            }
            for one in on_patches
        ],
        "has_prefix": chosen.shape[1] > rows * columns,
    }


def render(template: str, **content: Any) -> str:
    """A page, self-contained."""
    source = files("recipes").joinpath(f"templates/{template}").read_text(encoding="utf-8")
    return Environment(autoescape=True).from_string(source).render(**content)


def _looker(model: VisionLanguageModel | None, text: bool) -> str:
    """What looks if nobody says so."""
    has_queries = model is None or isinstance(_resampler(model), QFormer)
    return "queries" if has_queries and not text else "words"


def _page_of_queries(model: VisionLanguageModel | None, options: Any) -> str:
    if options.text is not None or options.words is not None:
        raise ValueError(
            "found --text or --words with --of queries; expected neither: queries read no caption"
        )
    layer: Layer = options.layer or "last"
    vision, qformer, text = load_qformer(options.run, options.question, model)
    shown = [
        picture(path, vision, qformer, text, layer)
        for path in track(options.images, "looking", transient=True)
    ]
    asked = None if text is None else options.question or CAPTION_INSTRUCTION
    return render(
        "attention.html", pictures=shown, run=options.run.name, layer=layer, question=asked
    )


def _page_of_words(model: VisionLanguageModel | None, options: Any) -> str:
    if model is None:
        raise ValueError(
            f"found a stage-1 run in {options.run}, which has no language model and so no words; "
            "expected a run of a bridge: leave --of, --text and --words out for its queries"
        )
    layer: Layer = options.layer or "mean"
    found = readings(model, options.images, options.text, options.question)
    wanted = [word.strip() for word in (options.words or "").split(",") if word.strip()]
    shown = [
        drawn(model, reading, layer, options.at)
        for reading in track(choose(found, wanted), "looking", transient=True)
    ]
    return render(
        "attention_words.html",
        texts=shown,
        run=options.run.name,
        layer=layer,
        at=options.at,
        reader=type(model.bridge).__name__,
        resampler=type(_resampler(model)).__name__,
        shares=any(picture["has_shares"] for text in shown for picture in text["pictures"]),
        written=options.text is None,
    )


def _resampler(model: VisionLanguageModel) -> Any:
    return getattr(model.bridge, "resampler", None)
