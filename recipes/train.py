"""`bridges train`: LightningCLI over a module, one stream and a run directory."""

import logging
import os
import signal
import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import lightning as L
import torch
from jsonargparse import Namespace
from jsonargparse.typing import PositiveInt
from lightning.pytorch.callbacks import Callback, RichModelSummary
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.strategies.launchers.subprocess_script import _SubprocessScriptLauncher
from lightning.pytorch.utilities import rank_zero_only

from bridges.files import remove_orphans
from bridges.precision import resolve_dtype
from bridges.run import RUN_FILE
from recipes.arguments import CONFIGS, chosen, expand_configs, expand_data
from recipes.checkpoints import LAST, AtomicCheckpointIO, LastCheckpoint, read_checkpoint
from recipes.data import split_shards
from recipes.finite import SkipNonFinite
from recipes.gates import GateRecorder
from recipes.locks import claim_run
from recipes.mixture import MixtureData, sources_of
from recipes.progress import StepProgressBar, Throughput
from recipes.recording import RunRecorder
from recipes.run_log import CSV_LOGS
from recipes.training import (
    DEFAULT_DATA,
    DEFAULT_MODULE,
    BridgeModule,
    load_data_class,
    load_module,
)

__all__ = ["CONFIGS", "TrainCLI", "main", "train", "train_module"]


class TrainCLI(LightningCLI):
    """Config files and overrides become a trainer, a module and data; a typo is an error."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """What a run needs beside trainer, model and data."""
        parser.add_argument(
            "--module",
            type=str,
            default=DEFAULT_MODULE,
            help="class path of what is trained, a recipes.training.BridgeModule",
        )
        parser.add_argument(
            "--data_class",
            type=str,
            default=DEFAULT_DATA,
            help="class path of the data, recipes.data.CaptionData or recipes.mixture.MixtureData",
        )
        parser.add_argument("--run", type=str, required=True, help="folder of the run")
        parser.add_argument(
            "--resume", type=bool, default=False, help="continue the run from its last checkpoint"
        )
        parser.add_argument(
            "--checkpoint_every", type=int, default=500, help="steps between checkpoints"
        )
        parser.add_argument(
            "--max_skipped_in_a_row",
            type=PositiveInt,
            default=10,
            help="stop after so many steps in a row whose loss or gradients are not finite",
        )

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parses the arguments given, without a look at (and a warning about) `sys.argv`."""
        self.config = parser.parse_args(args)

    def before_instantiate_classes(self) -> None:
        """What can be refused is refused before models are loaded."""
        config: Namespace = self.config
        mixed = config.data.get("sources")
        for source in [config.data] if mixed is None else filter(None, mixed.values()):
            split_shards(source["shards"], source["val_shards"])
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
        start = config.model.get("init_from")
        if start is not None and not config.resume and not Path(start).exists():
            raise ValueError(
                f"found nothing at model.init_from: {start}; expected weights to start from, a run "
                "of stage 1 (train it first, e.g. with --config blip2_stage1_small), a LAVIS .pth "
                "or a Hugging Face folder: give --model.init_from, or null for none"
            )
        if config.trainer.precision is None:
            bf16 = resolve_dtype("auto") == torch.bfloat16
            config.trainer.precision = "bf16-mixed" if bf16 else "32-true"

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        """A trainer that writes everything into the run directory."""
        config: Namespace = self.config
        folder = Path(config.run)
        dumped = self.parser.dump(config, skip_none=False)
        # One CSV for each start: Lightning's logger empties a folder that holds a log already.
        starts = len(list(folder.glob(CSV_LOGS)))
        kwargs["logger"] = [
            # Written at once: what is kept back is lost when the run is killed.
            CSVLogger(folder, name="", version=f"csv-{starts}", flush_logs_every_n_steps=1),
            TensorBoardLogger(folder, name="", version="tensorboard"),
        ]
        instantiated: Any = self.config_init
        options = instantiated.trainer
        if isinstance(self.datamodule, MixtureData):
            kwargs |= self.datamodule.trainer_options(
                options.accumulate_grad_batches, options.val_check_interval
            )
        skips = SkipNonFinite(config.max_skipped_in_a_row)
        kwargs["callbacks"] = [
            *(options.callbacks or []),
            *([StepProgressBar()] if options.enable_progress_bar is not False else []),
            RichModelSummary(max_depth=2),
            Throughput(),
            GateRecorder(folder),
            skips,
            EndAllRanks(),
            LastCheckpoint(folder / LAST, config.checkpoint_every),
            RunRecorder(folder, config.as_dict(), dumped, skips),
        ]
        kwargs["enable_checkpointing"] = False
        kwargs["plugins"] = [AtomicCheckpointIO()]
        # The stream's order belongs to an epoch, so that its loader is made anew for each.
        kwargs["reload_dataloaders_every_n_epochs"] = 1
        return super().instantiate_trainer(**kwargs)


class _Parsed(TrainCLI):
    """Parses, and makes nothing of it."""

    def _set_seed(self) -> None:
        """Nothing is drawn."""

    def before_instantiate_classes(self) -> None:
        """What a run needs is looked at when it begins."""

    def instantiate_classes(self) -> None:
        """Models are loaded when the run begins."""


def check_arguments(arguments: Sequence[str]) -> None:
    """Refuses arguments of `bridges train` that cannot be read, without loading any model.

    Raises:
        ValueError: a module or data class that there is not.
        ArgumentError: of jsonargparse: an unknown key, a value of another type, a class that
            cannot be imported.
    """
    os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _cli(_Parsed, expand_configs(arguments), exit_on_error=False)


class EndAllRanks(Callback):
    """Where the first rank fails, ends the processes that Lightning started for the others.

    They would wait for it, and hold their GPUs, until their collective's time is up: Lightning
    ends them on Ctrl-C alone.
    """

    def on_exception(self, trainer: L.Trainer, *_: Any) -> None:
        """Ends them, if there are any."""
        launcher = trainer.strategy.launcher
        if isinstance(launcher, _SubprocessScriptLauncher) and trainer.is_global_zero:
            launcher.kill(signal.SIGTERM)


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
    return train_module(arguments)[0]


def train_module(arguments: Sequence[str]) -> tuple[Path, BridgeModule]:
    """Runs `bridges train`; returns the run directory and what was trained, with its trainer."""
    torch.set_float32_matmul_precision("medium")
    for chatter in ("utilities.rank_zero", "trainer.connectors.checkpoint_connector"):
        logging.getLogger(f"lightning.pytorch.{chatter}").setLevel(logging.WARNING)
    # Lightning's CLI still calls what jsonargparse has renamed; a user can do nothing about it.
    os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    with warnings.catch_warnings():
        for message in UNHELPFUL_WARNINGS:
            warnings.filterwarnings("ignore", message)
        return _fit(expand_configs(arguments))


def _cli(kind: type[TrainCLI], arguments: list[str], *, exit_on_error: bool = True) -> TrainCLI:
    module_path = chosen("module", arguments, DEFAULT_MODULE)
    data_path = chosen("data_class", arguments, DEFAULT_DATA)
    data_class = load_data_class(data_path)
    arguments = expand_data(arguments, mixture=issubclass(data_class, MixtureData))
    return kind(
        load_module(module_path),
        data_class,
        # Last, so that what is dumped is the class that was trained.
        args=[*arguments, f"--module={module_path}", f"--data_class={data_path}"],
        run=False,
        save_config_callback=None,
        seed_everything_default=0,
        auto_configure_optimizers=False,
        parser_kwargs={
            "parser_mode": "omegaconf",
            "prog": "bridges train",
            "exit_on_error": exit_on_error,
        },
    )


def _fit(arguments: list[str]) -> tuple[Path, BridgeModule]:
    cli = _cli(TrainCLI, arguments)
    folder = Path(cli.config.run)
    trainer, data = cli.trainer, cli.datamodule
    module: Any = cli.model
    resume = folder / LAST if cli.config.resume else None
    # Before fit, which makes folders for its logs: what is refused here leaves nothing behind.
    module.check_mixture(data)
    for source in sources_of(data):
        module.check_data(source)
    if resume is None:
        module.initialise()
    else:
        for written in (folder, resume.parent):
            remove_orphans(written)
        belongs = read_checkpoint(resume)["fingerprints"]
        module.check_fingerprints(belongs, f"the run in {folder}")
    module.vision.to(trainer.strategy.root_device)
    collator = module.collator if isinstance(data, MixtureData) else module.collator(data)
    data.connect(module.vision, collator, trainer.world_size)
    with claim_run(folder) if trainer.is_global_zero else nullcontext():
        trainer.fit(module, data, ckpt_path=resume, weights_only=True)
    return folder, module


def main(arguments: Sequence[str]) -> None:
    """Entry of the subcommand."""
    folder, module = train_module(arguments)
    rank_zero_only(print)(module.done(folder))
