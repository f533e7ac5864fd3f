"""The command line: Lightning's own CLI with defaults of ours, runs that go on, and errors as one clear line."""

import inspect
import sys
from typing import Any, Literal, Union, get_args

import lightning.pytorch as pl
from jsonargparse.typing import NonNegativeInt
from lightning.fabric.plugins import CheckpointIO as CheckpointIOPlugin
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint, ProgressBar, WeightAveraging
from lightning.pytorch.callbacks.progress.rich_progress import RichProgressBarTheme
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import TensorBoardLogger

from . import auto, processes
from .checkpoint_io import CheckpointIO
from .checkpoints import BestAndLast, FiniteLosses
from .ckpt_path import CheckpointCLI
from .config import SaveConfig
from .guard import ExactResumption
from .loop import Trainer
from .main import TRAINER_COMMANDS
from .parser import Parser, UsageError, shorter
from .progress import EpochBar
from .report import MoreCurves, Report
from .run import PROGRAM, RUNS, run_directory, say
from .tensorboard import RunLogger


class LightningParser(Parser, LightningArgumentParser):
    """Lightning's argument parser, with errors in one line."""


class CLI(CheckpointCLI):
    """`fit`, `validate`, `test` and `predict`. The Trainer also gets `callbacks`, without settings of their own."""

    def __init__(
        self,
        model_class: type[pl.LightningModule],
        datamodule_class: type[pl.LightningDataModule],
        *callbacks: pl.Callback,
    ) -> None:
        _keep_limits_whole()
        super().__init__(
            model_class,
            datamodule_class,
            trainer_class=Trainer,
            save_config_callback=SaveConfig,
            save_config_kwargs={"overwrite": True},
            trainer_defaults={
                "accelerator": "cpu",
                "devices": 1,
                "max_epochs": 10,
                "log_every_n_steps": 100,
                "num_sanity_val_steps": 0,
                "enable_model_summary": False,
                "callbacks": [*callbacks],
            },
            seed_everything_default=0,
            parser_kwargs={"prog": PROGRAM},
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
                self.runs.parent,
                name=RUNS,
                version=self.resumed_run.name if self.resumed_run else None,
                log_graph=not (self.resumed_run and self.checkpoint),
                default_hp_metric=False,
            )
        callbacks, plugins = (
            given if isinstance(given, list) else [given] if given else []
            for given in (config.callbacks, config.plugins)
        )
        if any(isinstance(plugin, CheckpointIOPlugin) for plugin in plugins):
            raise UsageError("trainer.plugins: checkpoints are saved and loaded in this project's own way")
        self._report = Report()
        ours = FiniteLosses(), self._report, MoreCurves()
        first = ExactResumption(self.lock), processes.Timeout(), processes.OwnRandomNumbers()
        callbacks = [*first, *callbacks, *ours]
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
            self.trainer.callbacks = [each for each in self.trainer.callbacks if not isinstance(each, WeightAveraging)]  # type: ignore[attr-defined]
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
