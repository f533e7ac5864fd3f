"""`--ckpt_path`: the weights that a command takes, and the settings of the run that `fit` goes on with."""

import contextlib
import sys
from pathlib import Path

import lightning.pytorch as pl
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI

from . import auto
from .checkpoint_file import CheckpointError, find, load_checkpoint
from .config import defaults_of, runs_directory
from .parser import UsageError, check_values


class CheckpointCLI(LightningCLI):
    """Lightning's CLI, where `ckpt_path` may also be `best`, `last` or, for `fit`, `auto`.

    Attributes:
        runs: Directory of the runs.
        resumed_run: Directory of the run that `fit` goes on with, if it is one of them.
        lock: That run's lock, if it is held already.
        checkpoint: The path of the checkpoint, if one is taken.
    """

    model_class: type[pl.LightningModule]

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Resolve `best` and `last`, add the settings of the run that is resumed, and check what Lightning does not."""
        super().parse_arguments(parser, args)
        config = self.config[self.config.subcommand]
        self.runs = runs_directory(config.trainer)
        self.resumed_run: Path | None = None
        self.lock: int | None = None
        self.checkpoint: str | None = None
        if config.ckpt_path == "auto" and self.config.subcommand == "fit":
            config.ckpt_path, self.resumed_run, self.lock = auto.find(self.runs, config)
        if config.ckpt_path:
            self._take_checkpoint(parser)
        elif self.config.subcommand != "fit":
            raise UsageError("ckpt_path: which weights? Give `best` or `last` of the newest run, or a path")
        check_values(self.config[self.config.subcommand])

    def _take_checkpoint(self, parser: LightningArgumentParser) -> None:
        """Take the settings of a checkpoint's run and of its network; other ones are refused, not overruled."""
        command = self.config.subcommand
        fits = command == "fit"
        try:
            path = find(self.config[command].ckpt_path, self.runs)
            checkpoint = load_checkpoint(path, self.model_class)
            # Older versions had this setting, and took several steps in one `training_step`.
            is_old = "steps_per_execution" in checkpoint["datamodule_hyper_parameters"]
            if fits and is_old and "random_states" not in checkpoint["loops"]["fit_loop"].get("state_dict", {}):
                raise CheckpointError(
                    "the checkpoint is of an older version of this program, whose runs cannot be resumed; its weights "
                    "still load for all other commands"
                )
        except CheckpointError as error:
            raise UsageError(f"ckpt_path: {error}") from error
        run = path.resolve().parent.parent
        if fits and run.parent == self.runs.resolve():
            # Goes on in its own directory, with its own settings where the command gives no others.
            self.resumed_run = run
            if (run / "config.yaml").is_file():
                self.config = parser.parse_args(["fit", "--config", str(run / "config.yaml"), *sys.argv[2:]])
        # A default was asked for by nobody, unless it stands in the run's own config.
        defaults = {} if self.resumed_run else defaults_of(self.model_class)
        for name, value in checkpoint["hyper_parameters"].items():
            given = self.config[command].model[name]
            if given not in (value, defaults.get(name, value)):
                ways = "; leave that out, or give it to a new run, without --ckpt_path" if fits else ""
                raise UsageError(f"model.{name} is {given}, but the checkpoint was trained with {value}{ways}")
        self.config = parser.parse_object({command: {"model": checkpoint["hyper_parameters"]}}, self.config)
        if fits and self.config[command].data.get("dataset") == "auto":
            found = {"dataset": checkpoint["datamodule_hyper_parameters"].get("dataset")}
            with contextlib.suppress(UsageError):  # a data module of the user's may have but one
                self.config = parser.parse_object({command: {"data": found}}, self.config)
        # Kept from LightningCLI, which would load it once more, to take over the settings.
        self.checkpoint, self.config[command].ckpt_path = str(path), None

    def before_instantiate_classes(self) -> None:
        """Give the checkpoint back, for the Trainer."""
        self.config[self.subcommand].ckpt_path = self.checkpoint
