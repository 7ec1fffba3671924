"""`bridges fewshot`: what demonstrations in the prompt do for a trained bridge."""

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from jsonargparse import ArgumentParser, Namespace
from jsonargparse.typing import NonNegativeInt, PositiveInt
from rich.console import Console

import bridges
from bridges.files import write_json, write_text
from recipes import fewshot_page
from recipes.fewshot_curve import Evaluation, of_documents, of_pictures

FEW_SHOTS = {"documents": "0,1,2,4"}
"""Where they are not 0,4,8: web pages have few pictures."""

PAIRS_ONLY = ("template", "bos", "selection", "seeds", "support", "zero_shot_texts")
"""Options that mean nothing for documents, which bring their own demonstrations and form."""


def main(arguments: Sequence[str]) -> None:
    """Entry of the subcommand."""
    options = _parse(arguments)
    out = options.out or options.run
    page = (
        out.with_suffix(".html") if out.suffix == ".json" else out / f"fewshot_{options.task}.html"
    )
    model = bridges.load(options.run, device=options.device)
    measure = of_documents if options.task == "documents" else of_pictures
    found = measure(model, options)
    result = _result(options, arguments, found)
    write_json(page.with_suffix(".json"), result)
    write_text(page, fewshot_page.render(result, found))
    console = Console()
    for table in fewshot_page.tables(result):
        console.print(table)
    console.print(f"open {page}", soft_wrap=True)


def _parse(arguments: Sequence[str]) -> Namespace:
    parser = ArgumentParser(
        prog="bridges fewshot",
        description="Asks a trained bridge about held-out pictures after 0, 4, 8, … demonstrations "
        "in the prompt, and writes fewshot_TASK.json and fewshot_TASK.html.",
    )
    parser.add_argument("--run", type=Path, required=True, help="run directory of the bridge")
    parser.add_argument(
        "--data",
        required=True,
        help="folder of shards: train-*.tar demonstrate, val-*.tar or dev-*.tar are asked about",
    )
    parser.add_argument(
        "--held_out", type=str | None, help="shards to ask about, if not those of the folder"
    )
    parser.add_argument(
        "--task",
        type=Literal["caption", "vqa", "classify", "nll", "documents"],
        default="nll",
        help="caption, vqa: written answers; classify: the likeliest of some names; nll: loss of "
        "the true caption; documents: loss of a document's last text after ever more of it, and of "
        "its last two with one picture exchanged",
    )
    parser.add_argument(
        "--shots",
        type=str | None,
        help="such as 0,4,8,16,32; 0,4,8 by default (documents: 0,1,2,4)",
    )
    parser.add_argument(
        "--selection",
        type=Literal["random", "rices", "both"],
        default="random",
        help="demonstrations at random, or the most similar pictures, the most similar last",
    )
    parser.add_argument("--seeds", type=str, default="0", help="of demonstrations, such as 0,1,2")
    parser.add_argument("--queries", type=PositiveInt, default=100, help="the first so many")
    parser.add_argument(
        "--support", type=PositiveInt, default=1000, help="samples that may demonstrate, the first"
    )
    parser.add_argument(
        "--template",
        type=str | None,
        help="'openflamingo', or such as '<image>Output:{answer}' and '<image>Question:{question} "
        "Short answer:{answer}'; the prompt of the run's own training by default",
    )
    parser.add_argument(
        "--bos",
        type=bool,
        default=True,
        help="begin prompts with BOS, as documents in training do; a run of pairs alone has seen "
        "it only if its tokenizer puts it there by itself: try false",
    )
    parser.add_argument(
        "--zero_shot_texts",
        type=NonNegativeInt,
        default=2,
        help="text-only demonstrations at 0 shots, as in Flamingo",
    )
    parser.add_argument(
        "--labels", type=str, default="colour", help="classify: key of the truth in the JSON"
    )
    parser.add_argument(
        "--classes",
        type=Path | None,
        help="classify: file of names, one a line; else all there are",
    )
    parser.add_argument(
        "--score_end",
        type=bool,
        default=True,
        help="classify: score the end after a name too (OpenFlamingo does not)",
    )
    parser.add_argument("--max_new_tokens", type=PositiveInt, default=32)
    parser.add_argument("--num_beams", type=PositiveInt, default=1)
    parser.add_argument("--length_penalty", type=float, default=1.0, help="of beam search")
    parser.add_argument("--batch_size", type=PositiveInt, default=8, help="queries at a time")
    parser.add_argument(
        "--max_rows", type=PositiveInt, default=64, help="classify: queries × names at a time"
    )
    parser.add_argument(
        "--feature_cache",
        type=Path | None,
        help="folder in which features of all pictures are kept",
    )
    parser.add_argument("--device", type=str | None, help="the GPU if there is one, by default")
    parser.add_argument(
        "--out", type=Path | None, help="folder, or the .json file; that of the run by default"
    )
    options = parser.parse_args(list(arguments))
    given = [name for name in PAIRS_ONLY if options[name] != parser.get_default(name)]
    if options.task == "documents" and given:
        raise ValueError(
            f"found {', '.join('--' + name for name in given)} with --task documents; expected "
            "none of them: a document's own beginning demonstrates, in the form of training"
        )
    options.shots = _numbers("shots", options.shots or FEW_SHOTS.get(options.task, "0,4,8"))
    options.seeds = _numbers("seeds", options.seeds)
    return options


def _numbers(name: str, text: str) -> list[int]:
    """ "0,4,8" as numbers, in order and each once."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdigit() for part in parts):
        raise ValueError(f"found --{name} {text!r}; expected numbers with commas between, as 0,4,8")
    return sorted({int(part) for part in parts})


def _result(options: Namespace, arguments: Sequence[str], found: Evaluation) -> dict[str, Any]:
    return {
        "task": options.task,
        "run": str(options.run),
        "data": options.data,
        "selection": "document" if options.task == "documents" else options.selection,
        "seeds": options.seeds,
        **found.described,
        "shots": found.summary(),
        "command": shlex.join(["bridges", "fewshot", *map(str, arguments)]),
    }
