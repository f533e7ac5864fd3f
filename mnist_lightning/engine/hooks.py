"""Which iterations need hooks, and the optimizer step of those that do not."""

import contextlib
import inspect
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch import callbacks
from lightning.pytorch.loops.optimization.automatic import ClosureResult
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.profilers import PassThroughProfiler
from lightning.pytorch.strategies import SingleDeviceStrategy
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor

BATCH_HOOKS = (
    "on_train_batch_start",
    "on_train_batch_end",
    "on_before_zero_grad",
    "on_before_backward",
    "on_after_backward",
    "on_before_optimizer_step",
)
MODULE_HOOKS = (*BATCH_HOOKS, "optimizer_step", "optimizer_zero_grad", "lr_scheduler_step")
STEP_HOOKS = ("backward", "configure_gradient_clipping")
TRANSFER_HOOKS = ("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer")

# Lightning's callbacks whose batch hooks do something only in iterations that are logged or, for progress bars, drawn.
KNOWN = (
    callbacks.DeviceStatsMonitor,
    callbacks.LearningRateMonitor,
    callbacks.ModelCheckpoint,
    callbacks.RichProgressBar,
    callbacks.TQDMProgressBar,
)


def is_overridden(name: str, instance: object, base: type) -> bool:
    """Whether a subclass or the instance has another method of this name than the base class."""
    return name in vars(instance) or getattr(type(instance), name, None) is not getattr(base, name)


def hooks_every_n_steps(callback: pl.Callback) -> int:
    """Every how many optimizer steps a callback's batch hooks have to run; 0 where other reasons are enough."""
    every = getattr(callback, "hooks_every_n_steps", None)
    if every is not None:
        return int(every)
    known = next((known for known in KNOWN if isinstance(callback, known)), pl.Callback)
    if any(is_overridden(hook, callback, known) for hook in BATCH_HOOKS):
        return 1
    if isinstance(callback, callbacks.ModelCheckpoint):
        return 1 if callback._train_time_interval is not None else callback._every_n_train_steps
    return 0


def refresh_rates(trainer: Any) -> list[int]:
    """Every how many iterations the progress bars are to be drawn."""
    rates = [bar.refresh_rate for bar in trainer.callbacks if isinstance(bar, callbacks.TQDMProgressBar)]
    rates += [1 for bar in trainer.callbacks if isinstance(bar, callbacks.RichProgressBar)]  # its rate is by the second
    return [rate for rate in rates if rate > 0]


def why_always(trainer: Any) -> str | None:
    """What needs the hooks of every iteration, if anything does."""
    module = trainer.lightning_module
    for hook in MODULE_HOOKS:
        if is_overridden(hook, module, pl.LightningModule):
            return f"{type(module).__name__} has the hook {hook}"
    for callback in trainer.callbacks:
        if hooks_every_n_steps(callback) == 1:
            return f"{type(callback).__name__} has hooks that are called for each batch"
    reasons = {
        f"the strategy is {type(trainer.strategy).__name__}": type(trainer.strategy) is not SingleDeviceStrategy,
        "manual optimization": not module.automatic_optimization,
        "there are several optimizers": len(trainer.optimizers) != 1,
        "gradients are accumulated": trainer.accumulate_grad_batches > 1,
        "there is a profiler": not isinstance(trainer.profiler, PassThroughProfiler),
        "anomaly detection is on": torch.is_anomaly_enabled(),
        "the training data have no length": math.isinf(trainer.num_training_batches),
        "validation goes by the clock": trainer._val_check_time_interval is not None,
        "ReduceLROnPlateau steps in each iteration": any(
            config.reduce_on_plateau and config.interval == "step" for config in trainer.lr_scheduler_configs
        ),
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def is_plain(trainer: Any) -> bool:
    """Whether a step needs neither the strategy nor hooks for the transfer, the backward pass and clipping."""
    module, data = trainer.lightning_module, trainer.datamodule
    return (
        type(trainer.precision_plugin) is Precision
        and not trainer.gradient_clip_val
        and not any(is_overridden(hook, module, pl.LightningModule) for hook in (*TRANSFER_HOOKS, *STEP_HOOKS))
        and not (data and any(is_overridden(hook, data, pl.LightningDataModule) for hook in TRANSFER_HOOKS))
    )


class StepWithoutHooks:
    """Moves a batch to the device and takes one optimizer step with it.

    A module may have another way to the same step as its attribute `fused_step`, a function of the optimizer and the
    batch. It is tried once in each fit, beside `training_step`, and taken where it leaves the same bits.

    Args:
        trainer: With one device and one optimizer.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self.module, (self.optimizer,) = trainer.lightning_module, trainer.optimizers
        self.counts = trainer.fit_loop.epoch_loop.automatic_optimization.optim_progress.optimizer
        self.fused: Any = getattr(self.module, "fused_step", None)
        self.is_tried = False

    def is_for(self, trainer: Any) -> bool:
        """Whether it is this Trainer's module and optimizer."""
        return self.module is trainer.lightning_module and [self.optimizer] == trainer.optimizers

    def prepare(self) -> None:
        """Look at the module again: a callback's hook may have changed it."""
        self.is_plain = is_plain(self.trainer)
        # `fused_step` knows nothing of frozen weights.
        self.is_fused = self.fused and all(weight.requires_grad for weight in self.module.parameters())
        self.takes_index = is_param_in_hook_signature(self.module.training_step, "batch_idx", min_args=2)

    def to_device(self, batch: Any) -> Any:
        """Move a batch to the device, with the hooks for that; tensors that are there are returned as they are."""
        trainer, device = self.trainer, self.trainer.strategy.root_device
        is_there = type(batch) in (tuple, list) and all(type(x) is Tensor and x.device == device for x in batch)
        if self.is_plain and is_there:
            return batch
        batch = trainer.precision_plugin.convert_input(batch)
        batch = self.module._on_before_batch_transfer(batch, dataloader_idx=0)
        return trainer.strategy.batch_to_device(batch, dataloader_idx=0)

    def __call__(self, batch: Any, batch_idx: int) -> None:
        """Take one optimizer step."""
        self.counts.step.increment_ready()
        if self.is_fused and self.is_tried:
            self.counts.zero_grad.increment_by(1)
            self.fused(self.optimizer, batch)
        elif self.is_fused:
            self._try_fused(batch, batch_idx)
        else:
            self._step(batch, batch_idx)
        self.counts.step.increment_completed()

    def _step(self, batch: Any, batch_idx: int) -> None:
        """What Lightning does in `automatic_optimization.run`."""
        trainer, optimizer, module = self.trainer, self.optimizer, self.module
        arguments = (batch, batch_idx) if self.takes_index else (batch,)

        def closure() -> Any:
            with torch.enable_grad():
                loss: Any = (module if self.is_plain else trainer.strategy).training_step(*arguments)
                if not isinstance(loss, Tensor):
                    loss = ClosureResult.from_training_step_output(loss).closure_loss
                optimizer.zero_grad()
                self.counts.zero_grad.increment_by(1)
                if loss is not None:
                    loss.backward() if self.is_plain else trainer.strategy.backward(loss, optimizer)
            return loss

        if self.is_plain:
            optimizer.step(closure)
        else:
            trainer.strategy.optimizer_step(optimizer, closure, module)

    def _try_fused(self, batch: Any, batch_idx: int) -> None:
        """Take `fused_step`, undo it, take Lightning's step, and drop `fused_step` where the two differ."""
        tensors = [*self.module.parameters(), *self.module.buffers()]
        tensors += [x for state in self.optimizer.state.values() for x in state.values() if isinstance(x, Tensor)]
        before, random = [tensor.detach().clone() for tensor in tensors], torch.get_rng_state()
        self.fused(self.optimizer, batch)
        trial = [tensor.detach().clone() for tensor in tensors]
        with torch.no_grad():
            for tensor, value in zip(tensors, before, strict=True):
                tensor.copy_(value)
        torch.set_rng_state(random)
        self._step(batch, batch_idx)
        self.is_tried = True
        if not all(map(torch.equal, tensors, trial)):
            rank_zero_info(f"{name_of(self.fused)} leaves other weights: training_step is taken")
            self.fused = self.is_fused = None


@contextlib.contextmanager
def without_search_for_gpus() -> Iterator[None]:
    """Have PyTorch look for a GPU only once.

    With the "1" that Lightning sets, every `optimizer.step()` on a machine without a GPU searches for NVIDIA's library
    again: 0.1 to 0.25 ms a step, a fifth of a small network's whole step.
    """
    name = "PYTORCH_NVML_BASED_CUDA_CHECK"
    before = os.environ.get(name)
    if torch.cuda.is_available() or before is None:
        yield
        return
    os.environ[name] = "0"
    try:
        yield
    finally:
        os.environ[name] = before


def name_of(step: Any) -> str:
    """What a module's own step is called on the console: `fused.py's step`."""
    kind = step if inspect.isroutine(step) else type(step)
    return f"{Path(inspect.getfile(kind)).name}'s step"
