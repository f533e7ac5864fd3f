"""What a run tells: lines on the console, two curves more, and figures."""

import time
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
from lightning.pytorch.trainer.states import TrainerFn

from . import tensorboard
from .checkpoint_file import progress
from .checkpoints import Stopped
from .data import DeviceDataModule
from .guard import early_stopping
from .results import data_settings, metrics, write_results
from .run import printable, run_directory, say

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Report(pl.Callback):
    """Prints the tutorial's lines, logs what TensorBoard's HParams tab compares, and writes `results.json`.

    Where the module logs `train/loss` and `train/acc`, it prints them. It keeps the curves' points as rows
    `[iteration, loss, accuracy]`, iterations counted from 1; checkpoints carry them along.
    """

    observe_every = 0

    def __init__(self) -> None:
        self.train: list[list[float]] = []
        self.val: list[list[float]] = []
        self._dataset = ""
        self._loaded: tuple[int, str] | None = None  # iteration and dataset of the checkpoint that is tested
        self._resumes_from = 0, 0  # epochs and iterations
        self.has_begun = False  # training has, in this process
        self._seconds_of_resumed_runs = 0.0
        self._started: float | None = None
        self._validated: list[float] = []  # sums of the weights that were validated last
        self._is_validated = True  # the weights that training left

    @property
    def train_seconds(self) -> float:
        """Seconds spent in the fit loop, with validation, also of the runs that were resumed."""
        running = 0 if self._started is None else time.perf_counter() - self._started
        return self._seconds_of_resumed_runs + running

    def iteration(self, trainer: pl.Trainer) -> int:
        """Optimizer steps behind the weights: of the checkpoint that was loaded to test it, or of this run."""
        return self._loaded[0] if self._loaded else trainer.global_step

    def state_dict(self) -> dict[str, Any]:
        return {"train": self.train, "val": self.val, "train_seconds": self.train_seconds, "dataset": self._dataset}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        # Testing the best checkpoint after a fit must not forget the epochs that came after it.
        if not self.train:
            self.train, self.val = state_dict["train"], state_dict["val"]
            self._seconds_of_resumed_runs = state_dict["train_seconds"]

    def on_load_checkpoint(self, trainer: pl.Trainer, _: Any, checkpoint: dict[str, Any]) -> None:
        if trainer.state.fn == TrainerFn.FITTING:
            self._resumes_from = progress(checkpoint)
            return
        dataset = checkpoint.get("datamodule_hyper_parameters", {}).get("dataset", "")
        self._loaded = checkpoint["global_step"], dataset
        if not self.has_begun:
            trained_on = checkpoint["callbacks"].get("Report", {}).get("dataset") or dataset
            say(printable(f"Weights of iteration {self._loaded[0]:,}, trained on {trained_on}: {trainer.ckpt_path}"))
            say(f"Reading {_name(trainer)}")

    def on_save_checkpoint(self, trainer: pl.Trainer, *_: Any) -> None:
        # Whoever resumes this checkpoint logs what comes after it; what came before has to be on disk.
        for logger in trainer.loggers:
            logger.save()

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._loaded, self._dataset = None, _name(trainer)
        epochs, iteration = self._resumes_from
        if why := _why_done(trainer, epochs, iteration):
            say(f"This run is done, at iteration {iteration:,}; {why}")
            return
        parameters = f"{sum(weight.numel() for weight in pl_module.parameters()):,} parameters on {pl_module.device}"
        seed = data_settings(trainer).get("seed")
        say(f"Training on {self._dataset}{_sizes(trainer)}; {parameters}, seed {seed}")
        if trainer.ckpt_path:
            say(f"Resuming {trainer.ckpt_path} after iteration {iteration:,}")

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.has_begun, self._started = True, time.perf_counter()
        if trainer.global_step:
            # Not earlier: a run that cannot be resumed keeps its curves.
            tensorboard.rewind(trainer)
        tensorboard.log_settings(trainer, {**pl_module.hparams, **data_settings(trainer)})

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        iteration, every = trainer.global_step, trainer.log_every_n_steps  # type: ignore[attr-defined]
        # Where gradients are accumulated, several batches have one iteration.
        is_due = every and iteration % every == 0 and iteration > (self.train[-1][0] if self.train else 0)
        if is_due and (measured := metrics(trainer, "train")):
            self._say_train(iteration, *measured)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.sanity_checking or (measured := metrics(trainer, "val")) is None:
            return
        loss, acc = measured
        self.val.append([self.iteration(trainer), loss, acc])
        fitting = trainer.state.fn == TrainerFn.FITTING
        line = f"validation loss: {loss:.2f}, validation accuracy: {acc:.1%}"
        say(f"Epoch: {trainer.current_epoch + 1}, {line}" if fitting else line.capitalize())

    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._validated = _sums(pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # A callback may have put an average in their place.
        self._is_validated = self._validated == _sums(pl_module)
        self._log_short_run(trainer)
        self._seconds_of_resumed_runs, self._started = self.train_seconds, None
        self._write_results(trainer)

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.state.fn != TrainerFn.FITTING:
            self.on_test_epoch_end(trainer, pl_module)

    def on_test_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # Lightning takes a metric of this name for the place on the curves' axis, which begins at 0.
        pl_module.log("step", float(max(0, self.iteration(trainer) - 1)), sync_dist=True)

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if measured := metrics(trainer, "test"):
            say(f"Test loss: {measured[0]:.2f}, test accuracy: {measured[1]:.1%}")
        self._write_results(trainer)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        if isinstance(exception, Stopped):
            self._log_short_run(trainer)

    def _log_short_run(self, trainer: pl.Trainer) -> None:
        # Where no iteration was a multiple: the last one, a step after Lightning's. A run that goes on takes it back.
        logs = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if logs and not self.train and (measured := metrics(trainer, "train")):
            self._say_train(trainer.global_step, *measured)
            for logger in trainer.loggers:
                logger.log_metrics({"train/loss": measured[0], "train/acc": measured[1]}, trainer.global_step)

    def _say_train(self, iteration: int, loss: float, acc: float) -> None:
        self.train.append([iteration, loss, acc])
        say(f"iter {iteration}: Loss={loss:.2f}, Training Accuracy={acc:.1%}")

    def _write_results(self, trainer: pl.Trainer) -> None:
        # Validation of the very weights that are tested, if it was on the same dataset.
        tested = data_settings(trainer).get("dataset")
        iteration, dataset = self._loaded or (trainer.global_step, tested)
        counts = dataset == tested and (self._loaded or self._is_validated)
        measured = [(loss, acc) for at, loss, acc in self.val if counts and at == iteration]
        validated = measured[-1] if measured else None
        write_results(trainer, trainer.global_step or iteration, self.train_seconds, validated)


class MoreCurves(pl.Callback):
    """Logs two curves more: the learning rate, and examples a second since the point before, without validation."""

    observe_every = 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._since = time.perf_counter(), trainer.global_step

    on_train_epoch_start = on_validation_end = on_train_start

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        (then, before), now = self._since, time.perf_counter()
        iteration, every = trainer.global_step, trainer.log_every_n_steps  # type: ignore[attr-defined]
        if every and iteration % every == 0 and iteration > before:
            self._since = now, iteration
            batch_size = getattr(trainer.train_dataloader, "batch_size", None) or 1
            pl_module.log_dict(
                {
                    "train/learning_rate": trainer.optimizers[0].param_groups[0]["lr"],
                    "train/examples_per_second": (iteration - before) * batch_size / (now - then),
                }
            )


def report(trainer: pl.Trainer) -> Report | None:
    """The Trainer's report, if it has one."""
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    return next((callback for callback in callbacks if isinstance(callback, Report)), None)


def save_figures(figures: dict[str, "Figure"], trainer: pl.Trainer) -> None:
    """Save figures in the run's `figures/` and to TensorBoard, in the first process."""
    folder = run_directory(trainer)
    if folder is None:
        return
    (folder / "figures").mkdir(exist_ok=True)
    found = report(trainer)
    iteration = found.iteration(trainer) if found else trainer.global_step
    for name, figure in figures.items():
        path = folder / "figures" / f"{name}.png"
        figure.savefig(path, dpi=120)
        tensorboard.log_picture(trainer, f"figures/{name}", path, max(0, iteration - 1))


def _why_done(trainer: pl.Trainer, epochs: int, iteration: int) -> str:
    """Why a run that is resumed after so many epochs and iterations has nothing left to train, or ""."""
    for name, done in {"max_epochs": epochs, "max_steps": iteration}.items():
        if done >= (getattr(trainer, name) or 0) > 0:
            if any(hasattr(config.scheduler, "total_steps") for config in trainer.lr_scheduler_configs):
                return "so is the schedule of its learning rate, and it cannot be trained longer"
            return f"to train longer, give a larger --trainer.{name}"
    if trainer.should_stop and (stopped := early_stopping(trainer)):
        why = str(stopped.stopping_reason_message).removesuffix(" Signaling Trainer to stop.")
        return f"{why} To train longer, leave EarlyStopping out"
    return ""


def _name(trainer: pl.Trainer) -> str:
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


def _sums(module: pl.LightningModule) -> list[float]:
    return [parameter.sum().item() for parameter in module.parameters()]
