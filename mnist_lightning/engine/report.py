"""What a run tells: lines on the console, figures, and `results.json`."""

import contextlib
import json
import platform
import time
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import StochasticWeightAveraging
from lightning.pytorch.trainer.states import TrainerFn

from . import tensorboard
from .checkpoint_file import progress
from .checks import why_done
from .console import PROGRAM, printable, say
from .data import DeviceDataModule
from .hooks import name_of
from .runs import run_directory

# The tutorial's words for these metrics; others are printed by their names.
WORDS = {
    "val/loss": "validation loss: {:.2f}",
    "val/acc": "validation accuracy: {:.1%}",
    "test/loss": "test loss: {:.2f}",
    "test/acc": "test accuracy: {:.1%}",
}


class Report(pl.Callback):
    """Prints the tutorial's lines, logs what TensorBoard's HParams tab compares, and writes `results.json`.

    It prints whatever the module logs. Of `train/loss` and `train/acc`, `val/loss` and `val/acc` it keeps the curves'
    points as rows `[iteration, loss, accuracy]`, iterations counted from 1, also in checkpoints.
    """

    hooks_every_n_steps = 0

    def __init__(self) -> None:
        self.train: list[list[float]] = []
        self.val: list[list[float]] = []
        self._dataset = ""
        self._loaded: tuple[int, str] | None = None  # iteration and dataset of the checkpoint that is tested
        self._resumes_from = 0, 0  # epochs and iterations
        self.has_begun = False  # training has, in this process
        self._seconds_of_resumed_runs, self._started = 0.0, 0.0
        self._before: dict[str, Any] = {}  # metrics from before this epoch or validation
        self._validated: tuple[int, dict[str, float]] = 0, {}  # iteration and metrics of the last validation

    @property
    def train_seconds(self) -> float:
        """Seconds spent in the fit loop, with validation, also of the runs that were resumed."""
        return self._seconds_of_resumed_runs + (time.perf_counter() - self._started if self._started else 0)

    def iteration(self, trainer: pl.Trainer) -> int:
        """Optimizer steps behind the weights: of the checkpoint that was loaded to test it, or of this run."""
        return self._loaded[0] if self._loaded else trainer.global_step

    def state_dict(self) -> dict[str, Any]:
        state = {"train_seconds": self.train_seconds, "dataset": self._dataset, "validated": self._validated}
        return state | {"train": self.train, "val": self.val}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._validated = state_dict["validated"]
        # Testing the best checkpoint after a fit must not forget the epochs that came after it.
        if not self.has_begun:
            self.train, self.val = state_dict["train"], state_dict["val"]
            self._seconds_of_resumed_runs = state_dict["train_seconds"]

    def on_load_checkpoint(self, trainer: pl.Trainer, _: Any, checkpoint: dict[str, Any]) -> None:
        if trainer.state.fn == TrainerFn.FITTING:
            self._resumes_from = progress(checkpoint)
            return
        saved = checkpoint.get("callbacks", {}).get("Report", {}), checkpoint.get("datamodule_hyper_parameters", {})
        dataset = saved[0].get("dataset") or saved[1].get("dataset_name", "other data")
        self._loaded = checkpoint["global_step"], dataset
        if not self.has_begun:
            say(printable(f"Weights of iteration {self._loaded[0]:,}, trained on {dataset}: {trainer.ckpt_path}"))
            say(f"Reading {data_name(trainer)}")

    def on_save_checkpoint(self, trainer: pl.Trainer, *_: Any) -> None:
        # Whoever resumes this checkpoint logs what comes after it; what came before has to be on disk.
        for logger in trainer.loggers:
            logger.save()

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._loaded, self._dataset = None, data_name(trainer)
        epochs, iteration = self._resumes_from
        if why := why_done(trainer, epochs, iteration):
            say(f"This run is done, at iteration {iteration:,}; {why}")
            return
        say(f"Training on {self._dataset}{_sizes(trainer)}; {_how(trainer, pl_module)}")
        if trainer.ckpt_path:
            say(f"Resuming {trainer.ckpt_path} after iteration {iteration:,}")

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.has_begun, self._started, self._printed = True, time.perf_counter(), trainer.global_step
        if trainer.ckpt_path:
            # Not earlier: a run that cannot be resumed keeps its curves.
            tensorboard.purge_after(trainer)
        tensorboard.log_settings(trainer, {**pl_module.hparams, **data_settings(trainer)})

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._before = dict(trainer.callback_metrics)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        iteration, every = trainer.global_step, trainer.log_every_n_steps  # type: ignore[attr-defined]
        # Where gradients are accumulated, several batches have one iteration.
        if not every or iteration % every or iteration == self._printed:
            return
        metrics, self._printed = self._new_metrics(trainer), iteration
        if {"train/loss", "train/acc"} <= metrics.keys():
            self.train.append([iteration, metrics["train/loss"], metrics["train/acc"]])
            say("iter {}: Loss={:.2f}, Training Accuracy={:.1%}".format(*self.train[-1]))
        else:
            _say_metrics(metrics, f"iter {iteration}: ")

    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._before = dict(trainer.callback_metrics)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.sanity_checking:
            return
        iteration, metrics = self._validated = self.iteration(trainer), self._new_metrics(trainer)
        self._before = dict(trainer.callback_metrics)
        if {"val/loss", "val/acc"} <= metrics.keys():
            self.val.append([iteration, metrics["val/loss"], metrics["val/acc"]])
        _say_metrics(metrics, f"Epoch: {trainer.current_epoch + 1}, " * (trainer.state.fn == TrainerFn.FITTING))

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if any(isinstance(each, StochasticWeightAveraging) for each in trainer.callbacks):  # type: ignore[attr-defined]
            self._validated = 0, {}  # it has put an average in the place of the weights that were validated
        self._seconds_of_resumed_runs, self._started = self.train_seconds, 0
        self._write_results(trainer, {})

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.state.fn != TrainerFn.FITTING:
            self.on_test_epoch_end(trainer, pl_module)

    def on_test_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # Lightning takes a metric of this name for the place on the curves' axis, which begins at 0.
        pl_module.log("step", float(max(0, self.iteration(trainer) - 1)), sync_dist=True)

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        metrics = self._new_metrics(trainer)
        _say_metrics(metrics)
        self._write_results(trainer, metrics)

    def _new_metrics(self, trainer: pl.Trainer) -> dict[str, float]:
        """What the module has logged since the epoch or the validation began, to look at which waits for a GPU."""
        new = {name: x for name, x in trainer.callback_metrics.items() if x is not self._before.get(name)}
        left_out = {"step", *(f"{name}_{by}" for name in new for by in ("step", "epoch"))}  # which repeat `name`
        # Without LearningRateMonitor's. Six digits: more would show the rounding of the float32 mean.
        shown = [name for name in new if name not in left_out and not name.startswith("lr-")]
        return {name: round(new[name].item(), 6) for name in shown}

    def _write_results(self, trainer: pl.Trainer, tested: dict[str, float]) -> None:
        """Write what is known by now, after training and again after a test."""
        if (folder := run_directory(trainer)) is None:
            return
        iteration, dataset = self._loaded or (trainer.global_step, data_name(trainer))
        results: dict[str, Any] = {"dataset": data_name(trainer), "seed": data_settings(trainer).get("seed")}
        results |= {"iterations": trainer.global_step or iteration, "train_seconds": round(self.train_seconds, 3)}
        results |= {"device": trainer.strategy.root_device.type, "precision": str(trainer.precision)}
        results |= {"threads": torch.get_num_threads(), "processes": trainer.world_size}
        # The validation of the very weights that are tested, if it was on the same dataset.
        if dataset == data_name(trainer) and iteration == self._validated[0]:
            results |= self._validated[1]
        results |= tested
        results["versions"] = {"python": platform.python_version()}
        for name in ("torch", "torchvision", "lightning", PROGRAM.replace("_", "-")):  # what decides a run's results
            with contextlib.suppress(PackageNotFoundError):
                results["versions"][name] = version(name)
        (folder / "results.json").write_text(json.dumps(results, indent=4) + "\n")


def report(trainer: pl.Trainer) -> Report | None:
    """The Trainer's report, if it has one."""
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    return next((callback for callback in callbacks if isinstance(callback, Report)), None)


def data_settings(trainer: pl.Trainer) -> dict[str, Any]:
    """The data module's hyperparameters; a loader that was given to `fit` has none."""
    data = trainer.datamodule  # type: ignore[attr-defined]
    return dict(data.hparams) if data else {}


def _say_metrics(metrics: dict[str, float], start: str = "") -> None:
    parts = [WORDS[name].format(value) if name in WORDS else f"{name}: {value:.3g}" for name, value in metrics.items()]
    line = start + ", ".join(parts)
    if parts:
        say(line[0].upper() + line[1:] if WORDS.keys() & metrics else line)


def _how(trainer: pl.Trainer, module: pl.LightningModule) -> str:
    threads = torch.get_num_threads()
    device = f"cpu, {threads} thread{'s' * (threads > 1)}" if module.device.type == "cpu" else str(module.device)
    fused = getattr(module, "fused_step", None)
    step = f"; {name_of(fused)}, not training_step's" if fused else ""
    parameters = sum(weight.numel() for weight in module.parameters())
    return f"{parameters:,} parameters on {device}, seed {data_settings(trainer).get('seed')}{step}"


def data_name(trainer: pl.Trainer) -> str:
    """What to call the data: their `dataset_name`, or their class."""
    data = trainer.datamodule  # type: ignore[attr-defined]
    return str(getattr(data, "dataset_name", type(data).__name__)) if data else "the given loader"


def _sizes(trainer: pl.Trainer) -> str:
    data = trainer.datamodule  # type: ignore[attr-defined]
    # Not the loaders' lengths: to make one copies its split to the device.
    splits: list[Any] = [getattr(data, name, None) for name in ("train", "val")]
    if not isinstance(data, DeviceDataModule) or not all(splits):
        return ""
    train, val = (len(targets) for _, targets in splits)
    return f": {train:,} images, {val:,} for validation"
