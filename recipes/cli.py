"""The `bridges` command."""

import os
import sys
from collections.abc import Sequence
from importlib import import_module

COMMANDS = {
    "shards": ("recipes.commands", "shards", "make, index or verify webdataset shards"),
    "scenes": ("recipes.commands", "scenes", "draw emoji scenes as shards, to try a recipe on"),
    "cache": ("recipes.cache_command", "main", "compute a frozen encoder's features once"),
    "train": ("recipes.train", "main", "train a bridge from a YAML"),
    "caption": ("recipes.commands", "caption", "caption pictures with a trained bridge"),
    "evaluate": (
        "recipes.evaluate_command",
        "main",
        "captions, VQA, retrieval, few-shot, classes, likelihood of a run, with intervals",
    ),
    "retrieve": (
        "recipes.retrieve",
        "main",
        "rank pictures for texts and texts for pictures with a stage-1 run",
    ),
    "fewshot": (
        "recipes.fewshot",
        "main",
        "ask a trained bridge after demonstrations in the prompt",
    ),
    "ablate": ("recipes.ablation_command", "main", "train and compare the cells of a grid, fairly"),
    "attention": ("recipes.attention", "main", "draw what words, or a Q-Former's queries, look at"),
    "export": ("recipes.export", "main", "write a trained bridge as a Hugging Face folder"),
    "bench": ("recipes.bench", "main", "measure ours beside a reference, in one process"),
    "reliability": (
        "recipes.reliability",
        "main",
        "kill, damage and attack the data plane, and count what is lost",
    ),
    "demo": ("recipes.demo", "main", "train two bridges on emoji scenes and write a report"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a subcommand; a user's error is one message and exit code 2, not a traceback."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    name = arguments[0] if arguments else "--help"
    if name not in COMMANDS:
        listed = "\n".join(f"  {command:<13}{text}" for command, (_, _, text) in COMMANDS.items())
        print(f"usage: bridges COMMAND [--help] …\n\n{listed}")
        if name in ("-h", "--help"):
            return 0
        print(f"error: found command {name!r}; expected one of these", file=sys.stderr)
        return 2
    module, function, _ = COMMANDS[name]
    try:
        # Imported late: torch, transformers and lightning take seconds, --help should not.
        code = getattr(import_module(module), function)(arguments[1:])
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        if os.environ.get("BRIDGES_TRACEBACK"):
            raise
        print(f"error: {error}\n(BRIDGES_TRACEBACK=1 shows where)", file=sys.stderr)
        return 2
    return code if isinstance(code, int) else 0


def console() -> None:
    """Console script."""
    sys.exit(main())
