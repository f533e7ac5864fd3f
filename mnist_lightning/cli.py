"""The command line: Lightning's own CLI with this project's defaults, and errors as one clear line."""

import contextlib
import logging
import os
import shlex
import signal
import sys
import threading
import time
import warnings
from pathlib import Path
from typing import Any, Literal

from jsonargparse.typing import NonNegativeInt
from lightning.fabric.plugins import CheckpointIO as CheckpointIOPlugin
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint, ProgressBar
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.core import LightningModule
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.trainer import Trainer

from mnist_lightning import processes
from mnist_lightning.callbacks import (
    Figures,
    IterationProgressBar,
    PredictionWriter,
    Report,
    RunLogger,
    printable,
    run_directory,
    say,
)
from mnist_lightning.checkpoints import BestAndLast, CheckpointError, CheckpointIO, Stopped, find, read, write_whole
from mnist_lightning.classifier import MNISTClassifier
from mnist_lightning.commands import COMMANDS, RUNS
from mnist_lightning.datamodule import MNISTDataModule
from mnist_lightning.parser import Parser, UsageError, did_you_mean, shorter

# What Lightning does not check: the least value, and the one that means no limit.
TRAINER_MINIMA = {
    "max_epochs": (1, -1),
    "max_steps": (1, -1),
    "check_val_every_n_epoch": (1, None),
    "num_sanity_val_steps": (0, -1),
    "log_every_n_steps": (0, None),
}


class SaveConfig(SaveConfigCallback):
    """Saves `config.yaml` when training begins: a run that cannot be resumed keeps its own."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Save at once where nothing is trained."""
        if stage == "fit":
            self.already_saved = True  # also for the test that comes after
        super().setup(trainer, pl_module, stage)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save, in one step: a resumed run needs its config."""
        if run := run_directory(trainer):
            write_whole(run / "config.yaml", self.parser.dump(self.config, skip_none=False).encode())


class CLI(LightningCLI):
    """`fit`, `validate`, `test` and `predict`."""

    def __init__(self) -> None:
        super().__init__(
            MNISTClassifier,
            MNISTDataModule,
            save_config_callback=SaveConfig,
            save_config_kwargs={"overwrite": True},
            trainer_defaults={
                "accelerator": "cpu",
                "devices": 1,
                "max_epochs": 10,
                "log_every_n_steps": 100,
                "num_sanity_val_steps": 0,
                "enable_model_summary": False,
            },
            seed_everything_default=0,
            parser_kwargs={
                "prog": "mnist_lightning",
                "description": "Train a two-layer network to read handwritten digits.",
                "epilog": "Besides: `data` gets and verifies the data, `read` reads pictures, `demo` writes a page to "
                "draw on, and `export` hands a network on to ONNX, TorchScript or safetensors; see `data --help` etc.",
            },
            parser_class=Parser,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Trainer methods, and those of their arguments that are not for the command line."""
        ours = {"weights_only", "verbose", "return_predictions"}
        return {name: skipped | ours for name, skipped in LightningCLI.subcommands().items()}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add this project's own settings."""
        parser.link_arguments("seed_everything", "data.seed")
        parser.add_lightning_class_args(Figures, "figures")
        parser.add_argument(
            "--checkpoint_every",
            type=NonNegativeInt,
            default=0,
            help="Save last.ckpt also every so many iterations, rounded up to data.steps_per_execution; 0 does not",
        )
        parser.add_argument(
            "--test_after_fit", type=bool, default=True, help="Whether `fit` tests at its end and draws the figures"
        )
        parser.add_argument(
            "--test_weights",
            type=Literal["best", "last"],
            default="best",
            help="Weights that `fit` tests: those of the best validation accuracy, or the last",
        )

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Resolve `best` and `last`, add the settings of the run that is resumed, and check what Lightning does not."""
        arguments = list(map(str, sys.argv[1:] if args is None else args))
        super().parse_arguments(parser, arguments)
        config = self.config[self.config.subcommand]
        self._runs = Path(config.trainer.default_root_dir or ".", RUNS)
        self._run: Path | None = None
        if config.ckpt_path:
            try:
                checkpoint = find(config.ckpt_path, self._runs)
            except CheckpointError as error:
                raise UsageError(f"ckpt_path: {error}") from error
            run = checkpoint.resolve().parent.parent
            if self.config.subcommand == "fit" and run.parent == self._runs.resolve():
                # Goes on in its own directory, with its own settings where the command gives no others.
                self._run = run
                if (run / "config.yaml").is_file():
                    if arguments[0] != "fit":
                        raise UsageError("to resume a run, give `fit` before its settings")
                    settings = ["--config", str(run / "config.yaml")]
                    super().parse_arguments(parser, ["fit", *settings, *arguments[1:]])
                    config = self.config.fit
            config.ckpt_path = str(checkpoint)
        if not config.ckpt_path and self.config.subcommand != "fit":
            raise UsageError("ckpt_path: which weights? Give `best` or `last` of the newest run, or a path")
        seed = config.seed_everything
        if isinstance(seed, bool) or not 0 <= seed < 2**32:
            raise UsageError(f"seed_everything must be a whole number from 0 to {2**32 - 1}, not {seed}")
        for name, (least, unlimited) in TRAINER_MINIMA.items():
            value = config.trainer[name]
            if value is not None and value < least and value != unlimited:
                choice = "" if unlimited is None else f", or {unlimited} for no limit"
                raise UsageError(f"trainer.{name} must be at least {least}{choice}, not {value}")

    def _parse_ckpt_path(self) -> None:
        # LightningCLI calls this after parsing, to take the model's settings from the checkpoint; they would win over
        # all others without a word.
        command = self.config.subcommand
        config = self.config[command]
        if not config.ckpt_path:
            return
        try:
            checkpoint = read(Path(config.ckpt_path))
        except CheckpointError as error:
            raise UsageError(f"ckpt_path: {error}") from error
        super()._parse_ckpt_path()
        if command == "fit" and config.data.dataset == "auto":
            self.config.fit.data.dataset = checkpoint["datamodule_hyper_parameters"]["dataset"]
        for name, value in checkpoint["hyper_parameters"].items():
            # A default was asked for by nobody, unless it stands in the run's own config.
            default = value if self._run else self._parser(command).get_default(f"model.{name}")
            if config.model[name] not in (value, default):
                raise UsageError(f"model.{name} is {config.model[name]}, but the checkpoint was trained with {value}")

    def instantiate_classes(self) -> None:
        """Settings out of range are the user's errors."""
        try:
            super().instantiate_classes()
        except (ValueError, TypeError, MisconfigurationException) as error:
            raise UsageError(shorter(str(error))) from error

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Add the logger, the callbacks and the progress bar, where the user has not chosen otherwise."""
        config = self.config_init[self.subcommand].trainer
        for name, off, instead in (
            ("gradient_clip_val", None, "a smaller model.learning_rate"),
            ("accumulate_grad_batches", 1, "a larger data.batch_size"),
        ):
            if config[name] not in (off, 0):
                raise UsageError(f"trainer.{name} does not work with several optimizer steps a call; use {instead}")
        if config.logger in (None, True):
            kwargs["logger"] = RunLogger(
                self._runs.parent,
                name=RUNS,
                version=self._run.name if self._run else None,
                log_graph=self._run is None,
                default_hp_metric=False,
            )
        callbacks, plugins = (
            given if isinstance(given, list) else [given] if given else []
            for given in (config.callbacks, config.plugins)
        )
        if any(isinstance(plugin, CheckpointIOPlugin) for plugin in plugins):
            raise UsageError("trainer.plugins: checkpoints are saved and loaded in this project's own way")
        callbacks = [*callbacks, processes.Timeout(), Report(), PredictionWriter()]
        if not any(isinstance(callback, ProgressBar) for callback in callbacks):
            if config.enable_progress_bar is not False and sys.stdout.isatty():
                callbacks.append(IterationProgressBar())
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
        plugins = [*plugins, *processes.slurm(plugins), CheckpointIO()]
        trainer = super().instantiate_trainer(**kwargs, callbacks=callbacks, plugins=plugins)
        processes.check(trainer)
        if self.subcommand == "fit" and not self.config.fit.ckpt_path:
            processes.check_share(self.datamodule.batch_size, trainer.world_size)
        return trainer

    def fit(self, **kwargs: Any) -> None:
        """Train, then test."""
        # config.yaml repeats the whole run, also where this process resumed it.
        self.config.fit.ckpt_path = None
        self.trainer.fit(**kwargs)
        if self.config.fit.test_after_fit:
            best = None
            if self._best_and_last and self.config.fit.test_weights == "best":
                best = self._best_and_last.best(self.trainer)
            # The hyperparameters and the graph are logged already.
            self.trainer.enable_autolog_hparams = False
            self.trainer.test(self.model, datamodule=self.datamodule, ckpt_path=best, verbose=False)
        self._say_where()

    def validate(self, **kwargs: Any) -> None:
        """Measure the validation split."""
        self.trainer.validate(**kwargs, verbose=False)
        self._say_where()

    def test(self, **kwargs: Any) -> None:
        """Measure the test split and draw the figures."""
        self.trainer.test(**kwargs, verbose=False)
        self._say_where()

    def predict(self, **kwargs: Any) -> None:
        """Read the test split's digits."""
        self.trainer.predict(**kwargs, return_predictions=False)
        self._say_where()

    def _say_where(self) -> None:
        directory = run_directory(self.trainer)
        if directory is None:
            return
        if directory.is_relative_to(Path.cwd()):
            directory = directory.relative_to(Path.cwd())
        say(f"Run: {directory}")
        if any(isinstance(logger, TensorBoardLogger) for logger in self.trainer.loggers):
            say(f"Look at it: tensorboard --logdir {directory.parent}")


def main() -> int:
    """Run the command line.

    Returns:
        0 when done, 1 when the job failed, 2 when the command or config was wrong, 128 + the number of a signal. Of
        several processes, none returns: each exits with it.
    """
    code = _run()
    processes.leave(code)
    return code


def _run() -> int:
    _silence_what_no_user_can_act_on()
    processes.end_with_launcher()
    if os.environ.get("MNIST_LIGHTNING_DEBUG") != "1":
        # TensorBoard's: on a full disk its writer fails in a thread, and then again where it is called.
        threading.excepthook = lambda arguments: None
    signal.signal(signal.SIGTERM, lambda signum, frame: sys.exit(128 + signum))
    try:
        name = sys.argv[1] if len(sys.argv) > 1 else ""
        if command := COMMANDS.get(name):
            command(sys.argv[2:])
        else:
            _check_command(name)
            CLI()
        return 0
    except Stopped as stopped:
        run = stopped.run
        config = ["--config", str(run / "config.yaml")] if run and (run / "config.yaml").exists() else []
        resume = ["python", "-m", "mnist_lightning", "fit", *config, "--ckpt_path", str(stopped.checkpoint)]
        say(f"Stopped and saved at iteration {stopped.iteration:,}; to go on:\n{shlex.join(resume)}")
        # The first process answers for all; Lightning would kill it, should it see that another one has failed.
        return 128 + stopped.signum if processes.rank() == 0 else 0
    except KeyboardInterrupt:
        return _fail("interrupted", 128 + signal.SIGINT)
    except SystemExit as exit_:
        if isinstance(exit_.__context__, KeyboardInterrupt):  # Lightning's way to end
            return _fail("interrupted", 128 + signal.SIGINT)
        raise
    except (UsageError, MisconfigurationException) as error:
        return _fail(error, 2)
    except Exception as error:
        if isinstance(error, OSError) and error.filename is None:  # of a file written to, not opened
            error = OSError(f"a file of the run cannot be written: {error.strerror or error}")
        elif processes.is_lost(error):
            error = RuntimeError("another process of the run has ended or does not answer; to go on: --ckpt_path last")
        return _fail(error, 1)


def _check_command(name: str) -> None:
    # Lightning's error would name its own commands only.
    names = [*CLI.subcommands(), *COMMANDS]
    if name in names or name.startswith("-"):  # settings may come before the command
        return
    problem = f"there is no command {name}" if name else "a command is missing"
    raise UsageError(problem + did_you_mean(name, names, f"; give {', '.join(names[:-1])} or {names[-1]}"))


def _silence_what_no_user_can_act_on() -> None:
    # Lightning announces itself and its products on INFO; its warnings stay.
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    # The one that says why it kills a run: one of its processes has died.
    logging.getLogger("lightning.fabric.strategies.launchers.subprocess_script").setLevel(logging.INFO)
    for message in (
        r".*`torch.jit.trace",  # TensorBoard's graph, inside PyTorch
        r".*`isinstance\(treespec, LeafSpec\)` is deprecated",  # inside Lightning
        r"The number of training batches .* is smaller than the logging interval",  # counts lists of minibatches
        r"Checkpoint directory .* exists and is not empty",  # of the run that is being resumed
        r"Using ModelCheckpoint with manual optimization",  # saving the weights after an iteration is what is wanted
        r"LightningCLI's args parameter is intended to run from within Python",  # to add a run's own config
        r"Be aware that when using `ckpt_path`, callbacks",  # only `fit` writes checkpoints
    ):
        warnings.filterwarnings("ignore", message)


def _fail(error: Exception | str, code: int) -> int:
    if os.environ.get("MNIST_LIGHTNING_DEBUG") == "1" and isinstance(error, Exception):
        raise error
    message = " ".join(str(error).split()) or type(error).__name__
    # A damaged file's content must not reach the terminal's control codes, nor a closed console hide the exit code.
    message = printable(message)
    if rank := processes.rank():
        # Where all fail, the first one speaks for all: torchrun, and `end_with_launcher`, mostly end this one before.
        time.sleep(3)
        message = f"process {rank}: {message}"
    with contextlib.suppress(OSError):
        print(f"mnist_lightning: {message}", file=sys.stderr, flush=True)
    return code
