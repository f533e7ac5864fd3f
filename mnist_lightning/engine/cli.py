"""The command line of a Trainer: LightningCLI with defaults of ours, checkpoints by name, and runs that are resumed."""

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import (
    LearningRateMonitor,
    ModelCheckpoint,
    ProgressBar,
    RichProgressBar,
    WeightAveraging,
)
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.model_helpers import is_overridden

from . import ckpt_path, processes
from .checkpoints import BestAndLast, CheckpointIO
from .checks import Checks, FiniteLosses
from .console import PROGRAM, TRAINER_COMMANDS, say
from .errors import in_one_line, without_noise
from .loop import Trainer
from .parser import Parser, add_settings, check_values
from .report import Report
from .runs import RUNS, RunLock, run_directory, runs_directory
from .tensorboard import RunLogger, SaveConfig


class LightningParser(Parser, LightningArgumentParser):
    """Lightning's argument parser, with errors in one line."""


class CLI(LightningCLI):
    """`fit`, `validate`, `test` and `predict`. Making one runs the command.

    `ckpt_path` may also be `best` or `last` of the newest run; for `fit` also `auto`, as `ckpt_path.find` has it.

    Args:
        model_class: The module to train.
        datamodule_class: Its data. Where these have a setting `seed`, it is `seed_everything`.
        callbacks: Callbacks without settings of their own.
        configurable: Callbacks with settings, by the names under which these stand.
        threads: PyTorch's threads where neither `--threads` nor `OMP_NUM_THREADS` is given; 0 is PyTorch's own number.
    """

    def __init__(
        self,
        model_class: type[pl.LightningModule],
        datamodule_class: type[pl.LightningDataModule],
        callbacks: Sequence[pl.Callback] = (),
        configurable: Mapping[str, type[pl.Callback]] = MappingProxyType({}),
        threads: int = 0,
    ) -> None:
        self.configurable, self.threads = configurable, threads
        self.lock = RunLock()
        super().__init__(
            model_class,
            datamodule_class,
            trainer_class=Trainer,
            save_config_callback=SaveConfig,
            trainer_defaults={
                "accelerator": "cpu",
                "devices": 1,
                "max_epochs": 10,
                "log_every_n_steps": 100,
                "num_sanity_val_steps": 0,
                "enable_model_summary": False,
                "callbacks": list(callbacks),
            },
            seed_everything_default=0,
            parser_kwargs={"prog": PROGRAM},
            parser_class=LightningParser,
            auto_configure_optimizers=not is_overridden("configure_optimizers", model_class, pl.LightningModule),
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
        """Add settings of the engine's and of the configurable callbacks."""
        for name, callback in self.configurable.items():
            parser.add_lightning_class_args(callback, name)
        if any(action.dest == "data.seed" for action in parser._actions):
            parser.link_arguments("seed_everything", "data.seed")
        add_settings(parser, self.threads)

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse; find the checkpoint that is asked for, take its settings, and check what Lightning does not."""
        super().parse_arguments(parser, args)
        command = self.config.subcommand
        config = self.config[command]
        self.runs = runs_directory(config.trainer)
        self.resumed_run: Path | None = None
        self.checkpoint = ckpt_path.find(command, config, self.runs)
        if self.checkpoint:
            run = self.checkpoint.resolve().parent.parent
            if command == "fit" and run.parent == self.runs.resolve():
                self.resumed_run = run  # it goes on in its own directory
            self.config = ckpt_path.take_settings(self.checkpoint, command, parser, self.config, self.resumed_run)
        check_values(self.config[command])
        # LightningCLI would load the checkpoint once more, to take over the settings.
        self.config[command].ckpt_path = None

    def before_instantiate_classes(self) -> None:
        """Set the number of threads, and give the checkpoint to the Trainer."""
        config = self.config[self.subcommand]
        for name in ("callbacks", "plugins"):
            if (one := config.trainer[name]) and not isinstance(one, list):
                config.trainer[name] = [one]  # else jsonargparse would not say where a bug in making it is
        given = config.trainer.logger
        for logger in given if isinstance(given, list) else [given]:
            if getattr(logger, "class_path", "").endswith(".TensorBoardLogger"):
                logger.init_args.default_hp_metric = False  # of -1, in the HParams tab
        if config.threads is None:
            config.threads = 0 if "OMP_NUM_THREADS" in os.environ else self.threads
        if config.threads:
            torch.set_num_threads(config.threads)
            os.environ["OMP_NUM_THREADS"] = str(config.threads)  # for the processes that Lightning starts
        config.threads = torch.get_num_threads()
        config.ckpt_path = self.checkpoint and str(self.checkpoint)

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        """Add the logger, the callbacks and the progress bar, where the user has not chosen otherwise."""
        config = self.config_init[self.subcommand].trainer
        if config.logger in (None, True):
            kwargs["logger"] = RunLogger(
                self.runs.parent,
                name=RUNS,
                version=self.resumed_run.name if self.resumed_run else None,
                log_graph=not self.resumed_run,
                default_hp_metric=False,
            )
        given, plugins = config.callbacks or [], config.plugins or []
        callbacks = self._callbacks(given, config.enable_checkpointing is not False and not config.fast_dev_run)
        if isinstance(config.strategy, str):  # another one may have a timeout of its own
            callbacks.append(processes.Timeout())
        if config.logger is not False and not any(isinstance(each, LearningRateMonitor) for each in given):
            callbacks.append(LearningRateMonitor("step"))
        if not any(isinstance(each, ProgressBar) for each in given):
            kwargs["enable_progress_bar"] = config.enable_progress_bar is not False and sys.stdout.isatty()
            callbacks += [RichProgressBar(2)] * kwargs["enable_progress_bar"]
        if self.subcommand != "fit" and not any(isinstance(each, ModelCheckpoint) for each in given):
            kwargs["enable_checkpointing"] = False
        plugins = [*plugins, *processes.slurm_without_requeue(plugins), CheckpointIO()]
        trainer = super().instantiate_trainer(**kwargs, callbacks=callbacks, plugins=plugins)
        processes.check_launcher(trainer)
        return trainer

    def _callbacks(self, given: list[pl.Callback], saves: bool) -> list[pl.Callback]:
        """The user's callbacks among ours."""
        self.report, self.best_and_last = Report(), None
        if self.subcommand == "fit" and saves:
            fit = self.config.fit
            self.best_and_last = BestAndLast(fit.checkpoint_every, fit.monitor, fit.mode)
        ours = [FiniteLosses(), self.report, *([self.best_and_last] if self.best_and_last else [])]
        return [Checks(self.lock, str(self.checkpoint or "")), *given, *ours]

    def fit(self, **kwargs: Any) -> None:
        """Train, then test."""
        # config.yaml repeats the whole run, also where this process resumed it.
        self.config.fit.ckpt_path = None
        is_done = False
        try:
            self.trainer.fit(**kwargs)
            if self.config.fit.test_after_fit:
                self._test_after_fit()
            is_done = True
        finally:
            self.lock.release(is_done or (self.lock.is_new and not self.report.has_begun))
            if not self.report.has_begun and isinstance(self.trainer.logger, RunLogger):
                self.trainer.logger.discard()

    def _test_after_fit(self) -> None:
        best = None
        if self.best_and_last and self.config.fit.test_weights == "best":
            best = self.best_and_last.best(self.trainer)
        # It would load the weights that it averages, not their average, which was validated and saved.
        self.trainer.callbacks = [each for each in self.trainer.callbacks if not isinstance(each, WeightAveraging)]  # type: ignore[attr-defined]
        # The hyperparameters and the graph are logged already.
        self.trainer.enable_autolog_hparams = False
        self.trainer.test(self.model, datamodule=self.datamodule, ckpt_path=best, verbose=False)

    def validate(self, **kwargs: Any) -> None:
        self.trainer.validate(**kwargs, verbose=False)

    def test(self, **kwargs: Any) -> None:
        self.trainer.test(**kwargs, verbose=False)

    def after_fit(self) -> None:
        """Say where the run is, and how to look at it."""
        if run := run_directory(self.trainer):
            say(f"Run: {run}")
            if any(isinstance(logger, TensorBoardLogger) for logger in self.trainer.loggers):
                say(f"Look at it: tensorboard --logdir {run.parent}")

    after_validate = after_test = after_predict = after_fit


def train(*classes: Any, **settings: Any) -> None:
    """Run one of Lightning's commands by `CLI`, whose arguments these are.

    Raises:
        UsageError: The command or the config is wrong.
        JobError: The job failed.
    """
    with in_one_line(), without_noise(), processes.process_settings():
        CLI(*classes, **settings)
