"""What is refused before a run goes wrong: two processes in one directory, and what could not be resumed exactly."""

import os
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import EarlyStopping, StochasticWeightAveraging
from lightning.pytorch.callbacks.early_stopping import EarlyStoppingReason
from lightning.pytorch.trainer.states import TrainerFn

from .checkpoint_file import CheckpointError
from .run import lock, run_directory

# What PyTorch's fused optimizers write to, without a look at its size.
KERNELS_WRITE = {"step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer", "sum"}


class ExactResumption(pl.Callback):
    """Holds the lock on a run's directory, ends a run that had ended early, and refuses what would not go on exactly.

    Raises:
        MisconfigurationException: Another process trains in the directory; or the checkpoint has another number of
            iterations in an epoch or in the schedule of the learning rate.
    """

    def __init__(self, lock: int | None = None) -> None:
        self._lock = lock  # of the run's directory, if it is held already
        self._checkpoint: dict[str, Any] = {}

    def on_save_checkpoint(self, trainer: pl.Trainer, _: Any, checkpoint: dict[str, Any]) -> None:
        checkpoint["iterations_per_epoch"] = trainer.num_training_batches
        checkpoint["stopped_early"] = trainer.should_stop and early_stopping(trainer) is not None

    def on_load_checkpoint(self, trainer: pl.Trainer, _: Any, checkpoint: dict[str, Any]) -> None:
        self._checkpoint = checkpoint if trainer.state.fn == TrainerFn.FITTING else {}

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._lock is None and (run := run_directory(trainer)):
            try:
                self._lock = lock(run)
            except BlockingIOError as error:
                raise MisconfigurationException(f"another process is training in {run}") from error
        # Lightning would refuse it too, but only after the training.
        limit, data = trainer.limit_test_batches, trainer.datamodule  # type: ignore[attr-defined]
        if data and isinstance(limit, float) and 0 < limit < 1 and int(limit * len(data.test_dataloader())) == 0:
            raise MisconfigurationException(f"limit_test_batches {limit} is less than one minibatch; give 0 for none")
        if self._checkpoint:
            _restore_schedules(trainer, self._checkpoint)
            _check_optimizers(trainer, self._checkpoint)
            # Else Lightning would train another epoch before it asks again.
            if self._checkpoint.get("stopped_early") and early_stopping(trainer):
                trainer.should_stop = True

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        then, now = self._checkpoint.get("iterations_per_epoch"), trainer.num_training_batches
        self._checkpoint = {}
        if then not in (None, now):
            raise MisconfigurationException(
                f"an epoch has {now} iterations, but the checkpoint was trained with {then}; give the same "
                "trainer.limit_train_batches to resume it"
            )
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, StochasticWeightAveraging) and trainer.fit_loop.restarted_mid_epoch:
                # It restores its schedule as an epoch starts, which this one did before the checkpoint.
                rates = [group["lr"] for group in trainer.optimizers[0].param_groups]
                callback.on_train_epoch_start(trainer, pl_module)
                for group, rate in zip(trainer.optimizers[0].param_groups, rates, strict=True):
                    group["lr"] = rate

    def teardown(self, *_: Any, **__: Any) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    on_exception = teardown


def early_stopping(trainer: pl.Trainer) -> EarlyStopping | None:
    """The Trainer's `EarlyStopping` that has found a reason to stop, if one has."""
    callbacks = (callback for callback in trainer.callbacks if isinstance(callback, EarlyStopping))  # type: ignore[attr-defined]
    return next((c for c in callbacks if c.stopping_reason != EarlyStoppingReason.NOT_STOPPED), None)


def _restore_schedules(trainer: pl.Trainer, checkpoint: dict[str, Any]) -> None:
    """Let each schedule of a given length go on by the iteration alone.

    The iteration determines it. The checkpoint's own state is not loaded: PyTorch sets whatever attributes it names.

    Raises:
        MisconfigurationException: The checkpoint's schedule has another length.
    """
    states = checkpoint["callbacks"]
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        averages = isinstance(callback, StochasticWeightAveraging)
        if averages and states.get(callback.state_key, {}).get("scheduler_state"):
            checkpoint["lr_schedulers"] = []  # it has put its own in the place of ours, and restores that itself
            return
    schedules = [config.scheduler.state_dict() for config in trainer.lr_scheduler_configs]
    saved = checkpoint.get("lr_schedulers", [])
    lengths, trained_with = ([state.get("total_steps") for state in states] for states in (schedules, saved))
    if lengths != trained_with:
        ours, theirs = (", ".join(f"{n} iterations" for n in total) or "none" for total in (lengths, trained_with))
        raise MisconfigurationException(
            f"the schedule of the learning rate is for {ours}, that of the checkpoint for {theirs}; give the same "
            "learning_rate_schedule, max_epochs and max_steps to resume it"
        )
    for index, (config, state) in enumerate(zip(trainer.lr_scheduler_configs, schedules, strict=True)):
        if "total_steps" in state:
            each = config.interval == "step" and config.frequency == 1
            done = checkpoint["global_step"] if each else int(saved[index]["last_epoch"])
            rates = [float(rate) for rate in saved[index]["_last_lr"]]
            saved[index] = state | {"last_epoch": done, "_step_count": done + 1, "_last_lr": rates}


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
                state = saved["state"].get(name, {})
                # Not a plain number, which some optimizers count steps with, and no kernel writes to.
                for key in [key for key in KERNELS_WRITE & state.keys() if isinstance(state[key], torch.Tensor)]:
                    value, shape = state[key], torch.Size() if key == "step" else parameter.shape
                    is_dense = value.is_contiguous() or value.stride() == parameter.stride()  # channels last, say
                    if value.shape != shape or not value.is_floating_point() or not is_dense:
                        raise ValueError(
                            f"expected the optimizer's {key} of shape {tuple(shape)}, found {tuple(value.shape)}"
                        )
    except Exception as error:  # whatever plain values may lead to that are in the wrong place
        raise CheckpointError(f"{trainer.ckpt_path} is not of this program: {type(error).__name__}: {error}") from error
