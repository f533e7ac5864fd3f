"""Checks of a run: that losses are finite, that no other process trains it, and that it can be resumed exactly."""

from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import EarlyStopping, StochasticWeightAveraging
from lightning.pytorch.callbacks.early_stopping import EarlyStoppingReason
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch.optim import lr_scheduler

from .console import JobError
from .data import DeviceDataModule
from .processes import all_gather_object
from .runs import CheckpointError, RunLock, run_directory

# What PyTorch's fused optimizers write to, without a look at its size.
KERNELS_WRITE = {"step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer", "sum"}


class NotFiniteError(JobError, FloatingPointError):
    """A loss or a weight is infinite or no number."""


class Checks(pl.Callback):
    """Takes the lock on a run's directory, ends a run that had ended early, and refuses what would not resume exactly.

    Args:
        lock: Gets the lock; whoever made it gives it back.
        ckpt_path: The checkpoint that this process has found, or "".

    Raises:
        JobError: Another process trains in the directory.
        MisconfigurationException: The processes found different checkpoints; or the checkpoint was trained with another
            optimizer, schedule of the learning rate, number of iterations in an epoch, or other data.
    """

    def __init__(self, lock: RunLock, ckpt_path: str = "") -> None:
        self.lock, self.ckpt_path = lock, ckpt_path
        self._checkpoint: dict[str, Any] = {}  # the one that is resumed
        self._settings: dict[str, str] = {}

    def on_save_checkpoint(self, trainer: pl.Trainer, _: Any, checkpoint: dict[str, Any]) -> None:
        checkpoint["settings"] = self._settings
        checkpoint["stopped_early"] = trainer.should_stop and early_stopping(trainer) is not None

    def on_load_checkpoint(self, trainer: pl.Trainer, _: Any, checkpoint: dict[str, Any]) -> None:
        self._checkpoint = checkpoint if trainer.state.fn == TrainerFn.FITTING else {}

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        paths = all_gather_object(trainer, self.ckpt_path)
        if len(set(paths)) > 1:
            raise MisconfigurationException(f"ckpt_path: the processes found different checkpoints: {paths}")

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if run := run_directory(trainer):
            self.lock.acquire(run)
        self._require_same({"the optimizer": _class_names(trainer.optimizers)}, "optimizer")
        self._require_same(_schedule_settings(trainer), "schedule, max_epochs and max_steps")
        self._require_same(_data_settings(trainer), "data")
        if self._checkpoint:
            _check_optimizers(trainer, self._checkpoint)
            # Else Lightning would train another epoch before it asks again.
            if self._checkpoint.get("stopped_early") and early_stopping(trainer):
                trainer.should_stop = True

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        iterations = {"the number of iterations in an epoch": str(trainer.num_training_batches)}
        self._require_same(iterations, "trainer.limit_train_batches")
        self._checkpoint = {}
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        if trainer.fit_loop.restarted_mid_epoch and any(isinstance(c, StochasticWeightAveraging) for c in callbacks):
            # It restores its schedule as an epoch starts, which this one did before the checkpoint.
            raise MisconfigurationException(
                "StochasticWeightAveraging cannot be resumed in mid-epoch; resume a checkpoint of an epoch's end"
            )

    def _require_same(self, settings: dict[str, str], give: str) -> None:
        """Keep settings for checkpoints, and refuse to resume one that was trained with others."""
        self._settings |= settings
        for name, now in settings.items():
            then = self._checkpoint.get("settings", {}).get(name, now)
            if then != now:
                raise MisconfigurationException(
                    f"{name} is {now}, but the checkpoint was trained with {then}; give the same {give} to resume it"
                )


class FiniteLosses(pl.Callback):
    """Ends a run where a loss that is logged is not finite.

    Raises:
        NotFiniteError: In `Trainer.fit`.
    """

    hooks_every_n_steps = 0

    def on_train_batch_end(self, trainer: Any, _: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if isinstance(loss, Tensor) and trainer.global_step % (trainer.log_every_n_steps or 50) == 0:
            loss = trainer.strategy.reduce(loss.detach())
            if not loss.isfinite().all():
                where = f"the loss is {loss.max().item()} at iteration {trainer.global_step}"
                raise NotFiniteError(f"{where}; {remedy(trainer)}")


def remedy(trainer: pl.Trainer) -> str:
    """What to do about a loss or a weight that is not finite."""
    if trainer.precision == "16-true":
        return "half precision is too coarse for Adam: give trainer.precision 16-mixed or bf16-mixed"
    return "try a smaller model.learning_rate"


def early_stopping(trainer: pl.Trainer) -> EarlyStopping | None:
    """The Trainer's `EarlyStopping` that has found a reason to stop, if one has."""
    callbacks = (callback for callback in trainer.callbacks if isinstance(callback, EarlyStopping))  # type: ignore[attr-defined]
    return next((c for c in callbacks if c.stopping_reason != EarlyStoppingReason.NOT_STOPPED), None)


def why_done(trainer: pl.Trainer, epochs: int, iteration: int) -> str:
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


def _data_settings(trainer: pl.Trainer) -> dict[str, str]:
    data = trainer.datamodule  # type: ignore[attr-defined]
    if not isinstance(data, DeviceDataModule):
        return {}  # only its author knows which of its settings decide what the data are
    settings = {f"data.{name}": str(value) for name, value in data.hparams.items()}
    if "data.fingerprint" in settings:  # it identifies them, whatever they are called
        del settings["data.dataset_name"]
    return settings


def _schedule_settings(trainer: pl.Trainer) -> dict[str, str]:
    """The schedules' states before the first iteration: without rates, which are the optimizer's, all are settings."""
    schedules = [config.scheduler for config in trainer.lr_scheduler_configs]
    settings = {"the schedule of the learning rate": _class_names(schedules)}
    for i, schedule in enumerate(schedules):
        # Of another class than PyTorch's nobody knows what its state holds.
        state = schedule.state_dict() if type(schedule).__module__ == lr_scheduler.__name__ else {}
        names = [name for name in state if name != "base_lrs" and not name.startswith("_")]
        settings |= {f"lr_schedulers[{i}].{name}": str(state[name]) for name in names}
    return settings


def _class_names(objects: list[Any]) -> str:
    return ", ".join(type(each).__name__ for each in objects) or "none"


def _check_optimizers(trainer: pl.Trainer, checkpoint: dict[str, Any]) -> None:
    """Raise where a tensor does not fit its parameter: PyTorch's fused kernels would write outside of it.

    Raises:
        CheckpointError: One does not.
    """
    try:
        for optimizer, saved in zip(trainer.optimizers, checkpoint["optimizer_states"], strict=True):
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            names = [name for group in saved["param_groups"] for name in group["params"]]
            for name, parameter in zip(names, parameters, strict=True):  # by position, as PyTorch loads them
                _check_state(saved["state"].get(name, {}), parameter)
    except Exception as error:  # whatever plain values may lead to that are in the wrong place
        raise CheckpointError(f"{trainer.ckpt_path} is not of this program: {type(error).__name__}: {error}") from error


def _check_state(state: dict[str, Any], parameter: Tensor) -> None:
    # Not a plain number, which some optimizers count steps with, and no kernel writes to.
    for key in [key for key in KERNELS_WRITE & state.keys() if isinstance(state[key], Tensor)]:
        value, shape = state[key], torch.Size() if key == "step" else parameter.shape
        is_dense = value.is_contiguous() or value.stride() == parameter.stride()  # channels last, say
        if value.shape != shape or not value.is_floating_point() or not is_dense:
            raise ValueError(f"expected the optimizer's {key} of shape {tuple(shape)}, found {tuple(value.shape)}")
