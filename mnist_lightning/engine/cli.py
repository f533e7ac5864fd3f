"""The command line: Lightning's own CLI with defaults of ours, runs that go on, and errors as one clear line."""

import contextlib
import inspect
import sys
from pathlib import Path
from typing import Any, Literal, Union, get_args

import lightning.pytorch as pl
from jsonargparse.typing import NonNegativeInt
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint, ProgressBar, WeightAveraging
from lightning.pytorch.callbacks.progress.rich_progress import RichProgressBarTheme
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import TensorBoardLogger

from . import auto, processes
from .checkpoint_file import CheckpointError, find, load_checkpoint
from .checkpoint_io import CheckpointIO
from .checkpoints import BestAndLast, FiniteLosses
from .config import SaveConfig, defaults_of, runs_directory
from .guard import ExactResumption
from .loop import Trainer
from .main import TRAINER_COMMANDS
from .parser import Parser, UsageError, check_values, shorter
from .progress import EpochBar
from .report import Report
from .run import PROGRAM, RUNS, run_directory, say
from .tensorboard import RunLogger

TRAINER_DEFAULTS = {
    "accelerator": "cpu",
    "devices": 1,
    "max_epochs": 10,
    "log_every_n_steps": 100,
    "num_sanity_val_steps": 0,
    "enable_model_summary": False,
}


class LightningParser(Parser, LightningArgumentParser):
    """Lightning's argument parser, with errors in one line."""


class CLI(LightningCLI):
    """`fit`, `validate`, `test` and `predict`.

    Args:
        model_class: The `LightningModule`.
        datamodule_class: The `LightningDataModule`.
        callbacks: Callbacks that every Trainer gets, without settings of their own.
    """

    def __init__(
        self,
        model_class: type[pl.LightningModule],
        datamodule_class: type[pl.LightningDataModule],
        callbacks: tuple[type[pl.Callback], ...] = (),
    ) -> None:
        self.callbacks, self.network_class = callbacks, model_class
        _keep_limits_whole()
        super().__init__(
            model_class,
            datamodule_class,
            trainer_class=Trainer,
            save_config_callback=SaveConfig,
            save_config_kwargs={"overwrite": True},
            trainer_defaults=TRAINER_DEFAULTS,
            seed_everything_default=0,
            # A setting that does not exist must not be taken for one that begins in the same way.
            parser_kwargs={"prog": PROGRAM, "allow_abbrev": False},
            parser_class=LightningParser,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Trainer methods, and those of their arguments that are not for the command line."""
        ours = {"weights_only", "verbose", "return_predictions"}
        # Only the one that is asked for, where it comes first: a parser of all settings takes 0.1 s to make.
        asked = {*sys.argv[1:2]} & TRAINER_COMMANDS.keys() or TRAINER_COMMANDS
        return {name: skipped | ours for name, skipped in LightningCLI.subcommands().items() if name in asked}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add this project's own settings."""
        every = "Save last.ckpt also after every so many iterations; 0 does not"
        parser.add_argument("--checkpoint_every", type=NonNegativeInt, default=0, help=every)
        test = "Whether `fit` tests at its end and draws the figures"
        parser.add_argument("--test_after_fit", type=bool, default=True, help=test)
        weights = "Weights that `fit` tests: those of the best validation accuracy, or the last"
        parser.add_argument("--test_weights", type=Literal["best", "last"], default="best", help=weights)

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Resolve `best` and `last`, add the settings of the run that is resumed, and check what Lightning does not."""
        super().parse_arguments(parser, args)
        config = self.config[self.config.subcommand]
        self._runs = runs_directory(config.trainer)
        self._run: Path | None = None
        self._lock: int | None = None
        if config.ckpt_path == "auto" and self.config.subcommand == "fit":
            config.ckpt_path, self._run, self._lock = auto.find(self._runs, config)
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
            path = find(self.config[command].ckpt_path, self._runs)
            checkpoint = load_checkpoint(path, self.network_class)
            # A setting of older versions only, which took several steps in one `training_step`.
            if fits and "steps_per_execution" in checkpoint.get("datamodule_hyper_parameters", {}):
                raise CheckpointError(
                    "the checkpoint is of an older version of this program, whose runs cannot be resumed; its weights "
                    "still load for all other commands"
                )
        except CheckpointError as error:
            raise UsageError(f"ckpt_path: {error}") from error
        run = path.resolve().parent.parent
        if fits and run.parent == self._runs.resolve():
            # Goes on in its own directory, with its own settings where the command gives no others.
            self._run = run
            if (run / "config.yaml").is_file():
                self.config = parser.parse_args(["fit", "--config", str(run / "config.yaml"), *sys.argv[2:]])
        # A default was asked for by nobody, unless it stands in the run's own config.
        defaults = {} if self._run else defaults_of(self.network_class)
        for name, value in checkpoint["hyper_parameters"].items():
            given = self.config[command].model[name]
            if given not in (value, defaults.get(name, value)):
                ways = "; leave that out, or give it to a new run, without --ckpt_path" if fits else ""
                raise UsageError(f"model.{name} is {given}, but the checkpoint was trained with {value}{ways}")
        if fits and self.config[command].data.get("dataset") == "auto":
            found = {"dataset": checkpoint.get("datamodule_hyper_parameters", {}).get("dataset")}
            with contextlib.suppress(UsageError):  # a data module of the user's may have but one
                self.config = parser.parse_object({command: {"data": found}}, self.config)
        self.config[command].ckpt_path = str(path)  # whose settings LightningCLI takes over next

    def instantiate_classes(self) -> None:
        """Report a setting that is out of range as a usage error."""
        try:
            super().instantiate_classes()
        except (ValueError, TypeError, MisconfigurationException) as error:
            raise UsageError(shorter(str(error))) from error

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        """Add the logger, the callbacks and the progress bar, where the user has not chosen otherwise."""
        config = self.config_init[self.subcommand].trainer
        if config.logger in (None, True):
            kwargs["logger"] = RunLogger(
                self._runs.parent,
                name=RUNS,
                version=self._run.name if self._run else None,
                log_graph=not (self._run and self.config[self.subcommand].ckpt_path),
                default_hp_metric=False,
            )
        callbacks, plugins = (
            given if isinstance(given, list) else [given] if given else []
            for given in (config.callbacks, config.plugins)
        )
        self._report = Report()
        ours = (FiniteLosses(), self._report, *(kind() for kind in self.callbacks))
        callbacks = [ExactResumption(self._lock), processes.SeveralProcesses(), *callbacks, *ours]
        if not any(isinstance(callback, ProgressBar) for callback in callbacks):
            if config.enable_progress_bar is not False and sys.stdout.isatty():
                callbacks.append(EpochBar(theme=RichProgressBarTheme(metrics_format=".2f")))
            else:
                kwargs["enable_progress_bar"] = False
        self._best_and_last = None
        if self.subcommand != "fit" and not any(isinstance(callback, ModelCheckpoint) for callback in callbacks):
            kwargs["enable_checkpointing"] = False
        elif config.enable_checkpointing is not False and not config.fast_dev_run:
            self._best_and_last = BestAndLast(self.config[self.subcommand].checkpoint_every)
            callbacks.append(self._best_and_last)
        if config.logger is False:
            self.save_config_callback = None
        plugins = [*plugins, *processes.slurm(plugins), CheckpointIO(type(self.model))]
        trainer = super().instantiate_trainer(**kwargs, callbacks=callbacks, plugins=plugins)
        processes.check(trainer)
        if self.subcommand == "fit" and not self.config.fit.ckpt_path:
            processes.check_share(self.datamodule.batch_size, trainer.world_size)
        return trainer

    def fit(self, **kwargs: Any) -> None:
        """Train, then test."""
        # config.yaml repeats the whole run, also where this process resumed it.
        self.config.fit.ckpt_path = None
        auto.begin(self.trainer, self.config.fit)
        try:
            self.trainer.fit(**kwargs)
        except Exception as error:
            if not self._report.has_begun:
                if isinstance(self.trainer.logger, RunLogger):
                    self.trainer.logger.discard()
                if isinstance(error, ValueError | TypeError):
                    raise UsageError(str(error)) from error
            raise
        if self.config.fit.test_after_fit:
            best = None
            if self._best_and_last and self.config.fit.test_weights == "best":
                best = self._best_and_last.best(self.trainer)
            # It would load the weights that it averages, not their average, which was validated and saved.
            trainer: Any = self.trainer
            trainer.callbacks = [each for each in trainer.callbacks if not isinstance(each, WeightAveraging)]
            # The hyperparameters and the graph are logged already.
            self.trainer.enable_autolog_hparams = False
            self.trainer.test(self.model, datamodule=self.datamodule, ckpt_path=best, verbose=False)
        auto.finish(self.trainer)

    def validate(self, **kwargs: Any) -> None:
        """Measure the validation split."""
        self.trainer.validate(**kwargs, verbose=False)

    def test(self, **kwargs: Any) -> None:
        """Measure the test split and draw the figures."""
        self.trainer.test(**kwargs, verbose=False)

    def after_fit(self) -> None:
        """Say where the run is, and how to look at it."""
        if run := run_directory(self.trainer):
            say(f"Run: {run}")
            if any(isinstance(logger, TensorBoardLogger) for logger in self.trainer.loggers):
                say(f"Look at it: tensorboard --logdir {run.parent}")

    after_validate = after_test = after_predict = after_fit


def _keep_limits_whole() -> None:
    # Of equal types `typing` may take another module's, and `limit_val_batches: 1` would be 1.0, all minibatches.
    annotations = inspect.unwrap(pl.Trainer.__init__).__annotations__
    for name, hint in annotations.items():
        if {int, float} <= set(get_args(hint)):
            annotations[name] = Union[(int, *get_args(hint))]
