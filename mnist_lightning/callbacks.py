"""What a run leaves behind: lines on the console, a progress bar, figures, `results.json`, `predictions.csv`."""

import csv
import json
import os
import platform
import sys
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.callbacks import Callback, RichProgressBar
from lightning.pytorch.callbacks.progress.rich_progress import RichProgressBarTheme
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_only
from matplotlib.figure import Figure
from PIL import Image
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams
from torchmetrics.functional.classification import multiclass_confusion_matrix

from mnist_lightning.classifier import MNISTClassifier
from mnist_lightning.datamodule import MNISTDataModule
from mnist_lightning.digits import plots
from mnist_lightning.digits.files import NAMES
from mnist_lightning.loader import Minibatch, Minibatches, uniform_noise
from mnist_lightning.model import CLASSES
from mnist_lightning.processes import gather


class IterationProgressBar(RichProgressBar):
    """Lightning's progress bar, counting iterations where Lightning counts its batches."""

    def __init__(self) -> None:
        # Lightning's 100 refreshes a second are more than a person can see.
        super().__init__(refresh_rate=5, theme=RichProgressBarTheme(metrics_format=".2f"))

    @property
    def total_train_batches(self) -> int:
        """Iterations in an epoch."""
        return _data(self.trainer).iterations_per_epoch

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Advance to the number of iterations done in this epoch."""
        done = trainer.global_step - trainer.current_epoch * self.total_train_batches
        super().on_train_batch_end(trainer, pl_module, outputs, batch, done - 1)

    def get_metrics(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, Any]:
        """Loss and accuracy of the last training point, short enough for a narrow terminal."""
        metrics = super().get_metrics(trainer, pl_module)
        return {name: metrics[f"train/{name}"] for name in ("loss", "acc") if f"train/{name}" in metrics}

    def configure_columns(self, trainer: pl.Trainer) -> list[Any]:
        """All columns but the speed, which has no room beside the metrics."""
        return super().configure_columns(trainer)[:-1]

    def _get_train_description(self, current_epoch: int) -> str:
        # Lightning counts epochs from 0, the tutorial's lines above the bar from 1.
        return f"Epoch {current_epoch + 1}/{self.trainer.max_epochs}"


class Report(Callback):
    """Prints the tutorial's lines, logs what TensorBoard's HParams tab compares, and writes `results.json`.

    The curve `train/examples_per_second` is of whole calls of `training_step`, without validation and figures; all
    points of one call have its value.

    Keeps the history of the curves as rows `[iteration, loss, accuracy]`; checkpoints carry it along.
    """

    def __init__(self) -> None:
        self.train: list[list[float]] = []
        self.val: list[list[float]] = []
        self._loaded: tuple[int, str] | None = None
        self._resumes_from = 0, 0  # epochs and iterations
        self._fits = False
        self._seconds_of_resumed_runs = 0.0
        self._started: float | None = None
        self._call_started = 0.0, 0  # when, and after how many iterations

    @property
    def train_seconds(self) -> float:
        """Seconds spent in the fit loop, with validation and the figure of distortions, also of the runs resumed."""
        running = 0 if self._started is None else time.perf_counter() - self._started
        return self._seconds_of_resumed_runs + running

    def state_dict(self) -> dict[str, Any]:
        return {"train": self.train, "val": self.val, "train_seconds": self.train_seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        # Testing the best checkpoint after a fit must not forget the epochs that came after it.
        if not self.train:
            self.train, self.val = state_dict["train"], state_dict["val"]
            self._seconds_of_resumed_runs = state_dict["train_seconds"]

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if trainer.state.fn == TrainerFn.FITTING:
            self._resumes_from = progress(checkpoint)
            return
        self._loaded = checkpoint["global_step"], checkpoint["datamodule_hyper_parameters"]["dataset"]
        if not self._fits:
            say(f"Weights of iteration {self._loaded[0]:,}, trained on {NAMES[self._loaded[1]]}")
            say(f"Reading {_data(trainer).dataset_name}")

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        # Whoever resumes this checkpoint logs what comes after it; what came before has to be on disk.
        for logger in trainer.loggers:
            logger.save()

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._fits = True
        data = _data(trainer)
        epochs, iteration = self._resumes_from
        for name, done in {"max_epochs": epochs, "max_steps": iteration}.items():
            if done >= (getattr(trainer, name) or 0) > 0:
                longer = f"to train longer, give a larger --trainer.{name}"
                if iteration % data.iterations_per_epoch:
                    longer = "it ended within an epoch and cannot be trained longer"
                say(f"This run is done, at iteration {iteration:,}; {longer}")
                return
        parameters = sum(parameter.numel() for parameter in pl_module.parameters())
        say(
            f"Training on {data.dataset_name}: {len(data.train[1]):,} images, {len(data.val[1]):,} for validation; "
            f"{parameters:,} parameters on {pl_module.device}, seed {data.seed}"
        )
        if trainer.ckpt_path:
            say(f"Resuming {trainer.ckpt_path} after iteration {iteration:,}")

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._started = time.perf_counter()
        if trainer.global_step:
            # Takes back what was logged after the checkpoint. Not earlier: a run that cannot be resumed keeps it.
            restart = SessionLog(status=SessionLog.START)
            for writer in _tensorboards(trainer):
                writer.file_writer.add_event(Event(step=trainer.global_step + 1, session_log=restart))
        settings = {
            name: str(value) if isinstance(value, dict) else value
            for name, value in {**pl_module.hparams, **_data(trainer).hparams}.items()
        }
        metrics = dict.fromkeys(("test/acc", "test/loss", "val/acc", "val/loss"))
        for writer in _tensorboards(trainer):
            for summary in hparams(settings, metrics):
                writer.file_writer.add_summary(summary)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Minibatches, batch_idx: int
    ) -> None:
        self._call_started = time.perf_counter(), trainer.global_step

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Minibatches, batch_idx: int
    ) -> None:
        then, iterations = self._call_started
        examples = sum(batch.sizes[: trainer.global_step - iterations]) * trainer.world_size
        speed = {"train/examples_per_second": examples / (time.perf_counter() - then)}
        for iteration, loss, acc in outputs["points"]:
            self.train.append([iteration, loss, acc])
            say(f"iter {iteration}: Loss={loss:.2f}, Training Accuracy={acc:.1%}")
            for logger in trainer.loggers:
                logger.log_metrics(speed, step=iteration)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.sanity_checking:
            return
        loss, acc = _metrics(trainer, "val")
        self.val.append([_iteration(pl_module), loss, acc])
        fitting = trainer.state.fn == TrainerFn.FITTING
        metrics = f"validation loss: {loss:.2f}, validation accuracy: {acc:.1%}"
        say(f"Epoch: {trainer.current_epoch + 1}, {metrics}" if fitting else metrics.capitalize())

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._seconds_of_resumed_runs, self._started = self.train_seconds, None
        self._write_results(trainer, pl_module)

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        loss, acc = _metrics(trainer, "test")
        say(f"Test loss: {loss:.2f}, test accuracy: {acc:.1%}")
        self._write_results(trainer, pl_module)

    def _write_results(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        folder = run_directory(trainer)
        if folder is None:
            return
        data = _data(trainer)
        results: dict[str, Any] = {
            "dataset": data.hparams["dataset"],
            "seed": data.seed,
            "iterations": _iteration(pl_module),
            "train_seconds": round(self.train_seconds, 3),
        }
        # Validation of the very weights that are tested, if it was on the same dataset.
        iteration, dataset = self._loaded or (_iteration(pl_module), data.hparams["dataset"])
        for row in self.val:
            if row[0] == iteration and dataset == data.hparams["dataset"]:
                results |= {"val/loss": row[1], "val/acc": row[2]}
        if "test/loss" in trainer.callback_metrics:
            results |= dict(zip(("test/loss", "test/acc"), _metrics(trainer, "test"), strict=True))
        results["versions"] = {name: version(name) for name in ("torch", "torchvision", "lightning", "mnist-lightning")}
        results["versions"]["python"] = platform.python_version()
        (folder / "results.json").write_text(json.dumps(results, indent=4) + "\n")


class Figures(Callback):
    """Draws figures to TensorBoard and to `figures/*.png`: distortions when training begins, digits after the test.

    Args:
        misclassified: Which nine of the misclassified digits to show: the first of the test file (`file_order`), or
            those that the network was surest of (`confidence`).
    """

    def __init__(self, misclassified: Literal["file_order", "confidence"] = "file_order") -> None:
        self.misclassified = misclassified
        self._logits: list[Tensor] = []

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        data = _data(trainer)
        if data.distortions is None or trainer.global_step or run_directory(trainer) is None:
            return
        images = data.train[0][:5]
        copies = images.repeat_interleave(9, dim=0)
        noise = uniform_noise(len(copies), data.distortions.draws, data.seed)
        distorted = data.distortions(copies, noise).reshape(len(images), 9, -1)
        figure = plots.distorted_digits(images, distorted, f"{data.dataset_name}: training digits")
        _save({"distortions": figure}, trainer, pl_module)

    def on_test_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Minibatch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._logits.append(gather(trainer, outputs))

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        logits = torch.cat(self._logits).cpu().float()
        self._logits = []
        folder = run_directory(trainer)
        if folder is None:
            return
        images, labels = (tensor[: len(logits)] for tensor in _data(trainer).test)
        confidences, predictions = logits.softmax(dim=1).max(dim=1)
        correct = (predictions == labels).nonzero().squeeze(1)
        mistakes = (predictions != labels).nonzero().squeeze(1)
        if self.misclassified == "confidence":
            mistakes = mistakes[confidences[mistakes].argsort(descending=True, stable=True)]

        def digits(which: Tensor, heading: str) -> Figure:
            which = which[:9]
            titles = [f"True: {labels[i]}, Pred: {predictions[i]}" for i in which]
            return plots.digit_grid(images[which], titles, heading)

        data = _data(trainer).dataset_name
        counts = multiclass_confusion_matrix(predictions, labels, num_classes=CLASSES)
        order = {"file_order": "first in the file", "confidence": "surest"}[self.misclassified]
        figures = {
            "correct": digits(correct, f"{data}\n{len(correct):,} correct test digits, first in the file"),
            "misclassified": digits(mistakes, f"{data}\n{len(mistakes):,} misclassified test digits, {order}"),
            "confusion_matrix": plots.confusion_matrix(
                counts, f"{data}\nconfusion matrix of {len(labels):,} test digits"
            ),
        }
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        report = next((callback for callback in callbacks if isinstance(callback, Report)), None)
        if report and report.train:
            train, val = (torch.tensor(rows).reshape(-1, 3) for rows in (report.train, report.val))
            figures["training_curves"] = plots.training_curves(train, val, f"{data}: training curves")
        _save(figures, trainer, pl_module)


class PredictionWriter(Callback):
    """Writes `predictions.csv`: for each image its number, the digit read, and that digit's probability."""

    def __init__(self) -> None:
        self._probabilities: list[Tensor] = []

    def on_predict_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Minibatch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._probabilities.append(gather(trainer, outputs))

    def on_predict_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        probabilities = torch.cat(self._probabilities).cpu().float()
        self._probabilities = []
        best, digits = (column.tolist() for column in probabilities.max(dim=1))
        if folder := run_directory(trainer):
            with (folder / "predictions.csv").open("w", newline="") as file:
                writer = csv.writer(file)
                writer.writerow(["image", "digit", "probability"])
                writer.writerows([i, digit, f"{p:.4f}"] for i, (digit, p) in enumerate(zip(digits, best, strict=True)))
        say(f"Predicted {len(digits):,} digits")


class RunLogger(TensorBoardLogger):
    """A TensorBoard logger whose `version_N` directories are numbered without a race."""

    @property
    @rank_zero_experiment
    def experiment(self) -> SummaryWriter:
        """The writer; the first use makes the run's directory."""
        # Lightning takes the next free number long before: of runs that start at once, several would take the same.
        while self._experiment is None and isinstance(version := self.version, int):
            try:
                Path(self.log_dir).mkdir(parents=True)
                break
            except FileExistsError:
                self._version = version + 1
        writer: SummaryWriter = super().experiment
        return writer


@rank_zero_only
def say(line: str) -> None:
    """Print a line, in the first process. Where nobody reads any more, as after `| head`, training goes on without."""
    try:
        print(line, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def run_directory(trainer: pl.Trainer) -> Path | None:
    """The directory of the run, that of `checkpoints/`.

    None where nothing is logged, as in `fast_dev_run`, and in all processes but the first, which write no files.
    """
    if not trainer.loggers or trainer.fast_dev_run or not trainer.is_global_zero:  # type: ignore[attr-defined]
        return None
    logger = trainer.loggers[0]
    if logger.log_dir is not None:
        return Path(logger.log_dir)
    version = logger.version if isinstance(logger.version, str) else f"version_{logger.version}"
    directory = Path(logger.save_dir or trainer.default_root_dir, str(logger.name), version)
    directory.mkdir(parents=True, exist_ok=True)
    return directory


def progress(checkpoint: dict[str, Any]) -> tuple[int, int]:
    """Epochs and iterations that the run of a checkpoint has behind it."""
    return checkpoint["loops"]["fit_loop"]["epoch_progress"]["current"]["processed"], checkpoint["global_step"]


def _save(figures: dict[str, Figure], trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
    """Save figures in the run's directory and to TensorBoard, in the first process."""
    folder = run_directory(trainer)
    if folder is None:
        return
    (folder / "figures").mkdir(exist_ok=True)
    for name, figure in figures.items():
        path = folder / "figures" / f"{name}.png"
        figure.savefig(path, dpi=120)
        for writer in _tensorboards(trainer):
            # `add_figure` would lay it out and draw it once more.
            pixels = np.asarray(Image.open(path))
            writer.add_image(f"figures/{name}", pixels, _iteration(pl_module), dataformats="HWC")


def printable(text: str) -> str:
    """Text of strangers, without control codes that a terminal would obey."""
    return "".join(character if character.isprintable() else "?" for character in text)


def _data(trainer: pl.Trainer) -> MNISTDataModule:
    data: MNISTDataModule = trainer.datamodule  # type: ignore[attr-defined]
    return data


def _iteration(pl_module: pl.LightningModule) -> int:
    assert isinstance(pl_module, MNISTClassifier)
    return pl_module.iteration


def _tensorboards(trainer: pl.Trainer) -> Iterator[Any]:
    loggers = trainer.loggers if trainer.is_global_zero else []
    return (logger.experiment for logger in loggers if isinstance(logger, TensorBoardLogger))


def _metrics(trainer: pl.Trainer, split: str) -> tuple[float, float]:
    # Six digits: more would show the rounding of the float32 mean.
    loss, acc = (round(trainer.callback_metrics[f"{split}/{name}"].item(), 6) for name in ("loss", "acc"))
    return loss, acc
