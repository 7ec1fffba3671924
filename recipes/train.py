"""`bridges train`: LightningCLI over one module, one stream and a run directory."""

import logging
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from jsonargparse import Namespace
from lightning.pytorch.callbacks import RichModelSummary
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only

from bridges import LanguageSource, RunSpec, VisionSource
from bridges.precision import resolve_dtype
from bridges.run import RUN_FILE, check_fingerprints
from recipes.checkpoints import LAST, AtomicCheckpointIO, LastCheckpoint
from recipes.data import CaptionData, split_shards
from recipes.module import CaptionModule
from recipes.progress import StepProgressBar, Throughput
from recipes.recording import RunRecorder

CSV_LOGS = "csv-*"
"""Folders of the CSV logs in a run directory."""

CONFIGS = Path(__file__).parent / "configs"


class TrainCLI(LightningCLI):
    """Config files and overrides become a trainer, a module and data; a typo is an error."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """What a run needs beside trainer, model and data."""
        parser.add_argument("--run", type=str, required=True, help="folder of the run")
        parser.add_argument(
            "--resume", type=bool, default=False, help="continue the run from its last checkpoint"
        )
        parser.add_argument(
            "--checkpoint_every", type=int, default=500, help="steps between checkpoints"
        )

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parses the arguments given, without a look at (and a warning about) `sys.argv`."""
        self.config = parser.parse_args(args)

    def before_instantiate_classes(self) -> None:
        """What can be refused is refused before models are loaded."""
        config: Namespace = self.config
        split_shards(config.data.shards, config.data.val_shards)
        folder = Path(config.run)
        begun = (folder / RUN_FILE).exists() or (folder / LAST).exists()
        if begun and not config.resume:
            raise ValueError(
                f"found a run in {folder} already; expected a new folder: give another --run, "
                "continue it with --resume true, or delete it"
            )
        if config.resume and not (folder / LAST).is_file():
            raise ValueError(
                f"found no checkpoint at {folder / LAST}; expected one to continue from: leave "
                "--resume out"
            )
        if config.trainer.precision is None:
            bf16 = resolve_dtype("auto") == torch.bfloat16
            config.trainer.precision = "bf16-mixed" if bf16 else "32-true"

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        """A trainer that writes everything into the run directory."""
        config: Namespace = self.config
        folder = Path(config.run)
        spec = RunSpec(
            VisionSource(**config.model.vision.as_dict()),
            _language_source(config.model.lm),
            config.model.bridge.as_dict(),
            config.model.prompt,
        )
        dumped = self.parser.dump(config, skip_none=False)
        # One CSV for each start: Lightning's logger empties a folder that holds a log already.
        starts = len(list(folder.glob(CSV_LOGS)))
        kwargs["logger"] = [
            CSVLogger(folder, name="", version=f"csv-{starts}"),
            TensorBoardLogger(folder, name="", version="tensorboard"),
        ]
        instantiated: Any = self.config_init
        options = instantiated.trainer
        kwargs["callbacks"] = [
            *(options.callbacks or []),
            *([StepProgressBar()] if options.enable_progress_bar is not False else []),
            RichModelSummary(max_depth=2),
            Throughput(),
            LastCheckpoint(folder / LAST, config.checkpoint_every),
            RunRecorder(folder, spec, dumped, seed=config.seed_everything),
        ]
        kwargs["enable_checkpointing"] = False
        kwargs["plugins"] = [AtomicCheckpointIO()]
        # The stream's order belongs to an epoch, so that its loader is made anew for each.
        kwargs["reload_dataloaders_every_n_epochs"] = 1
        return super().instantiate_trainer(**kwargs)


UNHELPFUL_WARNINGS = (
    # Lightning's own use of what torch has renamed.
    r"`isinstance\(treespec, LeafSpec\)`",
    # Advice that does not fit: the loader's length is exact, and features need no workers.
    r"Your `IterableDataset` has `__len__` defined",
    r".*does not have many workers",
    r"Precision .* is not supported by the model summary",
    # The frozen ends are in eval mode, and meant to be.
    r"Found .* module\(s\) in eval mode at the start of training",
)


def train(arguments: Sequence[str]) -> Path:
    """Runs `bridges train` with these arguments; returns the run directory."""
    torch.set_float32_matmul_precision("medium")
    logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel(logging.WARNING)
    # Lightning's CLI still calls what jsonargparse has renamed; a user can do nothing about it.
    os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    with warnings.catch_warnings():
        for message in UNHELPFUL_WARNINGS:
            warnings.filterwarnings("ignore", message)
        return _train(expand_arguments(arguments))


def _train(arguments: list[str]) -> Path:
    cli = TrainCLI(
        CaptionModule,
        CaptionData,
        args=arguments,
        run=False,
        save_config_callback=None,
        seed_everything_default=0,
        auto_configure_optimizers=False,
        parser_kwargs={"parser_mode": "omegaconf", "prog": "bridges train"},
    )
    folder = Path(cli.config.run)
    trainer, module, data = cli.trainer, cli.model, cli.datamodule
    resume = folder / LAST if cli.config.resume else None
    if resume is not None:
        belongs = torch.load(resume, map_location="cpu", weights_only=True)["fingerprints"]
        check_fingerprints(belongs, module.vlm.vision, module.vlm.lm, f"the run in {folder}")
    # Before fit, which makes folders for its logs: what is refused here leaves nothing behind.
    module.vlm.vision.to(trainer.strategy.root_device)
    data.connect(module.vlm, trainer.world_size)
    trainer.fit(module, data, ckpt_path=resume, weights_only=True)
    return folder


def expand_arguments(arguments: Sequence[str]) -> list[str]:
    """`--data PATH` means `--data.shards=PATH`; a shipped config may go by its bare name."""
    expanded: list[str] = []
    previous = ""
    for argument in arguments:
        flag, equals, value = argument.partition("=")
        if previous in ("--config", "-c") or (flag == "--config" and equals):
            path = shipped_config(value if equals else argument)
            argument = f"--config={path}" if equals else path
        elif argument == "--data":
            argument = "--data.shards"
        elif flag == "--data" and equals:
            argument = f"--data.shards={value}"
        expanded.append(argument)
        previous = argument
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


def _language_source(config: Namespace) -> LanguageSource:
    from bridges import LoRA

    options = config.as_dict()
    lora = options.pop("lora")
    return LanguageSource(**options, lora=LoRA(**lora) if lora else None)


def main(arguments: Sequence[str]) -> None:
    """Entry of the subcommand."""
    folder = train(arguments)
    rank_zero_only(print)(
        f"the bridge is in {folder}; caption with: bridges caption IMAGE --run {folder}"
    )
