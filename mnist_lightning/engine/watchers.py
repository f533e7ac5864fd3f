"""Who observes an iteration: the callbacks, hooks and settings for which Lightning has to visit it."""

import math
from datetime import timedelta
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch import callbacks
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.profilers import PassThroughProfiler
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor

from .processes import DDP

HOOKS = (
    "on_train_batch_start",
    "on_train_batch_end",
    "on_before_zero_grad",
    "on_before_backward",
    "on_after_backward",
    "on_before_optimizer_step",
)
MODULE_HOOKS = (*HOOKS, "optimizer_step", "optimizer_zero_grad", "lr_scheduler_step")
STEP_HOOKS = ("backward", "configure_gradient_clipping")
TRANSFER_HOOKS = ("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer")

# Callbacks of Lightning's whose batch hooks act only where it logs, by the clock, or every so many iterations.
KNOWN = (
    callbacks.DeviceStatsMonitor,
    callbacks.LearningRateMonitor,
    callbacks.ModelCheckpoint,
    callbacks.RichProgressBar,
    callbacks.Timer,
    callbacks.TQDMProgressBar,
)


def is_overridden(name: str, instance: object, base: type) -> bool:
    """Whether a method is another one than the base's: in a class between them, or set on the instance."""
    return name in vars(instance) or getattr(type(instance), name, None) is not getattr(base, name)


def interval(callback: pl.Callback) -> tuple[int, bool]:
    """How many iterations apart a callback's batch hooks have to be called, and whether by the clock.

    0 where visits for other reasons are enough. The intervals of `ModelCheckpoint` are private; `loop.py` reads them.
    """
    every = getattr(callback, "observe_every", None)
    if every is not None:
        return (1, True) if isinstance(every, timedelta) else (every, False)
    known = next((known for known in KNOWN if isinstance(callback, known)), pl.Callback)
    if any(is_overridden(hook, callback, known) for hook in HOOKS):
        return 1, False
    if isinstance(callback, callbacks.TQDMProgressBar):
        return callback.refresh_rate, True
    return int(isinstance(callback, callbacks.ProgressBar | callbacks.Timer)), True


def who_watches(trainer: pl.Trainer) -> str | None:
    """What needs Lightning's hooks in every iteration, if anything does."""
    module = trainer.lightning_module
    for hook in MODULE_HOOKS:
        if is_overridden(hook, module, pl.LightningModule):
            return f"{type(module).__name__} has the hook {hook}"
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if interval(callback) == (1, False):
            return f"{type(callback).__name__} has hooks that are called for each batch"
    reasons = {
        "manual optimization": not module.automatic_optimization,
        "there are several optimizers": len(trainer.optimizers) != 1,
        "gradients are accumulated": trainer.accumulate_grad_batches > 1,
        "there is a profiler": not isinstance(trainer.profiler, PassThroughProfiler),  # type: ignore[attr-defined]
        "anomaly detection is on": torch.is_anomaly_enabled(),
        f"the strategy is {type(trainer.strategy).__name__}": type(trainer.strategy) not in (SingleDeviceStrategy, DDP),
        "the training data have no length": math.isinf(trainer.num_training_batches),
        "ReduceLROnPlateau steps in each iteration": any(
            config.reduce_on_plateau and config.interval == "step" for config in trainer.lr_scheduler_configs
        ),
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def is_lean(trainer: pl.Trainer) -> bool:
    """Whether a step can skip the strategy, and the hooks for the transfer, the backward pass and clipping."""
    module, data = trainer.lightning_module, trainer.datamodule  # type: ignore[attr-defined]
    return (
        type(trainer.precision_plugin) is Precision
        and trainer.world_size == 1
        and not trainer.gradient_clip_val
        and not any(is_overridden(hook, module, pl.LightningModule) for hook in (*TRANSFER_HOOKS, *STEP_HOOKS))
        and not (data and any(is_overridden(hook, data, pl.LightningDataModule) for hook in TRANSFER_HOOKS))
    )


def is_on(device: torch.device, batch: Any) -> bool:
    """Whether a batch is a pair, or the like, of tensors that are on the device."""
    return type(batch) in (tuple, list) and all(type(part) is Tensor and part.device == device for part in batch)
