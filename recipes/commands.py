"""The small subcommands."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser

from bridges.files import write_json
from recipes.scene_shards import write_scenes
from recipes.shard_checks import index_shards, print_check, verify_shards
from recipes.shards import build_shards, print_report


def shards(arguments: Sequence[str]) -> int:
    """`bridges shards IMAGES CAPTIONS OUT`, `bridges shards index` and `bridges shards verify`."""
    if arguments and arguments[0] in ("index", "verify"):
        return {"index": _index, "verify": _verify}[arguments[0]](arguments[1:])
    parser = ArgumentParser(
        prog="bridges shards",
        description="Makes webdataset shards of a folder of pictures and a captions file. "
        "'bridges shards index' and 'bridges shards verify' take shards that are there (a folder "
        "of pictures of such a name is written ./index).",
    )
    parser.add_argument("images", type=Path, help="folder of pictures")
    parser.add_argument(
        "captions", type=Path, help="captions file; '-' for a .txt beside each picture"
    )
    parser.add_argument("out", type=Path, help="folder for the shards")
    skip: set[str | int] = {"images", "captions", "out", "progress"}
    parser.add_function_arguments(build_shards, skip=skip, fail_untyped=False)
    options = vars(parser.parse_args(list(arguments)))
    captions = options.pop("captions")
    source = None if str(captions) == "-" else captions
    print_report(build_shards(options.pop("images"), source, options.pop("out"), **options))
    return 0


def _index(arguments: Sequence[str]) -> int:
    parser = _over_shards(
        "bridges shards index",
        "Makes the indexes and the manifest of shards, whoever wrote them, and says what is wrong "
        "with them; exit code 1 if there is anything.",
    )
    parser.add_function_arguments(index_shards, skip={"shards", "progress"}, fail_untyped=False)
    options = vars(parser.parse_args(list(arguments)))
    check = index_shards(options.pop("shards"), **options)
    print_check(check)
    if check.findings:
        print("a run raises these faults, or with on_error: skip counts them")
    return 1 if check.findings else 0


def _verify(arguments: Sequence[str]) -> int:
    parser = _over_shards(
        "bridges shards verify",
        "Compares shards with their manifest and indexes, to the byte, and names every bad shard "
        "and sample; exit code 1 if there is one.",
    )
    skip: set[str | int] = {"shards", "progress"}
    parser.add_function_arguments(verify_shards, skip=skip, fail_untyped=False)
    parser.add_argument("--json", type=Path | None, help="file for the findings")
    options = vars(parser.parse_args(list(arguments)))
    target = options.pop("json")
    check = verify_shards(options.pop("shards"), **options)
    print_check(check)
    if target is not None:
        write_json(target, asdict(check) | {"by_kind": check.by_kind})
    return 1 if check.findings else 0


def _over_shards(prog: str, description: str) -> ArgumentParser:
    parser = ArgumentParser(prog=prog, description=description)
    parser.add_argument(
        "shards", type=str, nargs="+", help="a folder of shards, .tar files, or patterns of them"
    )
    return parser


def scenes(arguments: Sequence[str]) -> None:
    """`bridges scenes OUT`."""
    parser = ArgumentParser(
        prog="bridges scenes",
        description="Draws emoji scenes with captions, questions and answers, or documents of "
        "several scenes, as webdataset shards, so that any recipe can be tried without data of "
        "one's own.",
    )
    parser.add_argument("out", type=Path, help="folder for the shards")
    parser.add_function_arguments(write_scenes, skip={"out", "progress"}, fail_untyped=False)
    options = vars(parser.parse_args(list(arguments)))
    report = write_scenes(options.pop("out"), **options)
    if options["documents"]:
        documents = sum(report.samples.values())
        print(f"{report.captions:,} pictures with texts in {documents:,} documents: {report.out}")
    else:
        print_report(report)


def caption(arguments: Sequence[str]) -> None:
    """`bridges caption IMAGE… --run RUNDIR`."""
    parser = ArgumentParser(
        prog="bridges caption", description="Captions pictures, one line each: file, tab, caption."
    )
    parser.add_argument("images", type=Path, nargs="+", help="picture files")
    parser.add_argument("--run", type=Path, required=True, help="run directory of the bridge")
    parser.add_argument("--prompt", type=str | None, help="instead of the one trained with")
    parser.add_argument(
        "--question", type=str | None, help="for a bridge whose prompt or resampler reads one"
    )
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--max_new_tokens", type=int, default=40)
    parser.add_argument("--num_beams", type=int, default=1)
    parser.add_argument("--do_sample", type=bool, default=False, help="sample; else the likeliest")
    parser.add_argument("--temperature", type=float | None)
    parser.add_argument("--top_p", type=float | None)
    parser.add_argument("--seed", type=int, default=0, help="of sampling")
    options: dict[str, Any] = vars(parser.parse_args(list(arguments)))
    images = options.pop("images")
    missing = [str(path) for path in images if not path.is_file()]
    if missing:
        raise ValueError(f"found no file {', '.join(missing)}; expected pictures")

    import torch

    import bridges

    torch.manual_seed(options.pop("seed"))
    model = bridges.load(options.pop("run"))
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    given = {k: v for k, v in options.items() if v is not None}
    for path, text in zip(images, bridges.caption(model, images, **given), strict=True):
        print(f"{path}\t{' '.join(text.split())}")
