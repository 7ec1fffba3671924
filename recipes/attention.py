"""`bridges attention`: what each query of a trained Q-Former looks at, drawn over pictures."""

from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jinja2 import Environment
from jsonargparse import ArgumentParser
from PIL import Image
from rich.progress import track
from torch import Tensor

import bridges
from bridges import Instruction, VisionEncoder
from bridges.files import write_text
from bridges.images import open_image
from bridges.prompts import CAPTION_INSTRUCTION, encode_instruction
from bridges.vision import Preprocess
from qformer.maps import cross_attention_maps
from qformer.resampler import QFormer
from qformer.runs import is_stage1_run, load_stage1
from recipes.gallery import uri

Layer = Literal["last", "mean"]


def main(arguments: Sequence[str]) -> None:
    """Entry of the subcommand."""
    parser = ArgumentParser(
        prog="bridges attention",
        description="Draws what each query of a Q-Former looks at over pictures, as one page.",
    )
    parser.add_argument("images", type=Path, nargs="+", help="picture files")
    parser.add_argument(
        "--run", type=Path, required=True, help="run directory: a stage 1, or a bridge on it"
    )
    parser.add_argument("--out", type=Path, required=True, help="the page, an .html file")
    parser.add_argument(
        "--layer", type=Layer, default="last", help="layer that reads the image, or their mean"
    )
    parser.add_argument(
        "--question", type=str | None, help="for a Q-Former that reads an instruction"
    )
    options = parser.parse_args(list(arguments))
    missing = [str(path) for path in options.images if not path.is_file()]
    if missing:
        raise ValueError(f"found no file {', '.join(missing)}; expected pictures")
    _colours()
    vision, qformer, text = load_qformer(options.run, options.question)
    shown = [
        picture(path, vision, qformer, text, options.layer)
        for path in track(options.images, "looking", transient=True)
    ]
    asked = None if text is None else options.question or CAPTION_INSTRUCTION
    write_text(options.out, render(shown, options.run, options.layer, asked))
    print(f"open {options.out}")


def load_qformer(
    run: Path, question: str | None = None
) -> tuple[VisionEncoder, QFormer, Instruction | None]:
    """The Q-Former of a run, with its encoder and the instruction that it reads, if it reads one.

    Args:
        run: a stage-1 run, or a run whose bridge has a `QFormer` as resampler.
        question: the instruction; `CAPTION_INSTRUCTION` by default.

    Raises:
        ValueError: a run without a Q-Former, or a question that nobody would read.
    """
    if is_stage1_run(run):
        vision, stage1 = load_stage1(run)
        qformer, tokenizer = stage1.qformer, None
    else:
        model = bridges.load(run)
        vision, qformer = model.vision, getattr(model.bridge, "resampler", None)
        if not isinstance(qformer, QFormer):
            raise ValueError(
                f"found a {type(model.bridge).__name__} on a {type(qformer).__name__} in {run}; "
                "expected a bridge with qformer.QFormer as its resampler: only its maps are drawn"
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


def as_seen(preprocess: Preprocess, image: Image.Image) -> Image.Image:
    """The picture as the encoder sees it: resized and cropped, its normalisation undone.

    What black and white of the same size become tells scale and shift of each channel, so that
    no preprocessing needs to be known by name.

    Raises:
        ValueError: the preprocessing makes the same of black and of white.
    """
    seen = preprocess(image).float()
    black, white = (
        preprocess(Image.new("RGB", image.size, colour)).float().flatten(1)
        for colour in ("black", "white")
    )
    span, place = (white - black).abs().max(dim=1)
    if not span.all():
        raise ValueError(
            "found a preprocessing that tells no black from white; expected one of pictures"
        )
    # Padding is the same in both: the place where they differ most is none.
    low, high = (x.gather(1, place[:, None])[:, :, None] for x in (black, white))
    pixels = ((seen - low) / (high - low)).clamp(0, 1).mul(255).round().byte()
    return Image.fromarray(pixels.permute(1, 2, 0).numpy())


def overlay(seen: Image.Image, attention: Tensor) -> Image.Image:
    """A map over a grey picture: nothing over its lowest patch, brightest over its highest.

    Args:
        seen: what the encoder sees.
        attention: (rows, columns), which cover all of it.
    """
    low, high = attention.min(), attention.max()
    small = Image.fromarray(((attention - low) / (high - low).clamp(min=1e-12)).numpy())
    heat = np.asarray(small.resize(seen.size, Image.Resampling.BILINEAR))
    colours = _colours()(heat)[..., :3]
    grey = np.asarray(seen.convert("L"), dtype=np.float32)[..., None] / 255
    opacity = 0.75 * heat[..., None]
    mixed = grey * (1 - opacity) + colours * opacity
    return Image.fromarray((mixed * 255).round().astype(np.uint8))


def render(shown: Sequence[dict[str, Any]], run: Path, layer: Layer, question: str | None) -> str:
    """The page, self-contained."""
    template = Environment(autoescape=True).from_string(
        files("recipes").joinpath("templates/attention.html").read_text(encoding="utf-8")
    )
    return template.render(pictures=shown, run=run.name, layer=layer, question=question)


def _colours() -> Any:
    try:
        from matplotlib import colormaps
    except ImportError as error:
        raise ImportError(
            "drawing attention needs matplotlib: pip install 'bridges[demo]'"
        ) from error
    return colormaps["inferno"]
