"""Lightning's training loop, which visits only the iterations that somebody observes, and the `Trainer` that has it."""

import contextlib
import os
import time
from collections.abc import Iterator
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loops.fetchers import _DataFetcher, _DataLoaderIterDataFetcher
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor
from torch.distributed.constants import default_pg_timeout

from . import watchers
from .processes import DDP, agree
from .resume import FitLoop, LoadAsTrained
from .step import QuietStep

# With the "1" that Lightning sets, every `optimizer.step()` on a machine without a GPU searches for NVIDIA's library
# again: 0.1 to 0.25 ms a step, a fifth of a small network's whole step.
os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "0"

# Iterations between two visits at most, and seconds where somebody goes by the clock.
AT_MOST, LOOK_EVERY = 1000, 0.1


class Trainer(pl.Trainer):
    """Lightning's Trainer, sooner: the same weights, metrics, curves and checkpoints, to the bit on a CPU.

    Iterations that nobody observes run quietly, one after the other; Lightning visits all others. A callback says how
    often its batch hooks have to be called by an attribute `observe_every`: a number of iterations, a `timedelta`, or 0
    where it acts only when Lightning logs, validates or ends an epoch. Where it does not say, in each iteration. Its
    `on_iteration_end(trainer)`, if any, is called after a visited iteration is logged, where neither a validation nor
    the end of the epoch follows.

    Args:
        fast: Run iterations quietly. With False, and wherever it is not sure that nobody watches, this is Lightning's
            Trainer.
        **kwargs: Lightning's own arguments.

    Attributes:
        visit: Set it to True, also from a signal handler, to have Lightning visit the next iteration.
        quiet_losses: Losses, each (), of the quiet iterations since the last visit.
    """

    def __init__(self, *, fast: bool = True, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.fast = fast
        self.visit = False
        self.quiet_losses: list[Tensor] = []
        fit, epoch = self.fit_loop, self.fit_loop.epoch_loop
        self.fit_loop = FitLoop(self, fit.min_epochs, fit.max_epochs)
        self.fit_loop.epoch_loop = QuietLoop(self, epoch.min_steps, epoch.max_steps)
        self.callbacks: list[pl.Callback] = [LoadAsTrained(), *self.callbacks]
        if type(self.strategy) is DDPStrategy and self.strategy._start_method == "popen":
            self.strategy.__class__ = DDP  # which only adds methods; the arguments are the user's
            assert isinstance(self.strategy, DDP)
            self.strategy.has_timeout = self.strategy._timeout != default_pg_timeout


class QuietLoop(_TrainingEpochLoop):
    """Lightning's loop over an epoch's iterations: it visits those that are observed, and runs the others quietly."""

    _step: QuietStep | None = None
    _validates_to_stop = False

    def on_run_start(self, data_fetcher: _DataFetcher) -> None:
        """Begin an epoch, or go on within one, also with a loader that cannot say how far it was."""
        self._visited = False  # the first iteration is visited: quiet ones need what it logged
        self._pace = 1  # iterations of several processes that take about as long as `LOOK_EVERY`
        self.trainer.quiet_losses.clear()
        self.trainer.fit_loop.prepare_loader()
        super().on_run_start(data_fetcher)

    def advance(self, data_fetcher: _DataFetcher) -> None:
        """Run the quiet iterations that are next, if any, and then visit one."""
        if self._visited and self._run_quietly(data_fetcher):
            return
        self.trainer.visit, before = False, self.batch_progress.current.ready
        if before == 0:
            self.trainer.fit_loop.before_batch = torch.get_rng_state()
        super().advance(data_fetcher)
        self._visited = self.batch_progress.current.ready > before  # not where a resumed run goes back to a validation
        self.trainer.quiet_losses.clear()

    def on_advance_end(self, data_fetcher: _DataFetcher) -> None:
        """Validate if it is due. Otherwise call the callbacks' `on_iteration_end`."""
        validates, stops = self._should_check_val_fx(data_fetcher), self.trainer.should_stop
        self.trainer.should_stop = False
        self._validates_to_stop = validates and not self._should_check_val_fx(data_fetcher)
        self.trainer.should_stop = stops
        super().on_advance_end(data_fetcher)
        self._validates_to_stop = False
        if not validates and not self.batch_progress.is_last_batch:
            for callback in self.trainer.callbacks:
                if over := getattr(callback, "on_iteration_end", None):
                    over(self.trainer)

    def on_save_checkpoint(self) -> dict[str, Any]:
        """Lightning's state; a validation that only the end of training caused is not repeated by a resumed run."""
        state: dict[str, Any] = super().on_save_checkpoint()
        # So its iteration is counted already, which Lightning does after the validation.
        state["_batches_that_stepped"] += self._validates_to_stop
        return state

    def _run_quietly(self, fetcher: _DataFetcher) -> bool:
        """Run iterations up to the next observed one; return True if one of them asked to stop."""
        trainer, device = self.trainer, self.trainer.strategy.root_device
        turns = self._turns(*self._unobserved(fetcher))
        if not next(turns, False):
            return False
        if not (self._step and self._step.is_for(trainer)):
            self._step = QuietStep(trainer)  # one for each fit: a trial holds for the same network and optimizer
        by_epoch = any(result.meta.on_epoch and result.meta.fx == "training_step" for result in self._results.values())
        step, progress, connector = self._step, self.batch_progress, trainer._logger_connector
        step.prepare(may_be_fast=not by_epoch)
        schedules = trainer.lr_scheduler_configs
        stops, goes_on = False, True
        with _quiet_log(trainer.lightning_module, self._results):
            while goes_on:
                batch, _, _ = next(fetcher)
                if not (step.lean and watchers.is_on(device, batch)):
                    batch = trainer.precision_plugin.convert_input(batch)
                    batch = trainer.lightning_module._on_before_batch_transfer(batch, dataloader_idx=0)
                    batch = trainer.strategy.batch_to_device(batch, dataloader_idx=0)
                progress.increment_ready()
                connector.on_batch_start(batch)
                if batch is not None:  # as Lightning does
                    progress.increment_started()
                    loss = step(batch, self.batch_idx)
                    trainer.quiet_losses += [] if loss is None else [loss]
                progress.increment_processed()
                if schedules:
                    self.update_lr_schedulers("step", update_plateau_schedulers=False)
                if stops := trainer.should_stop or trainer.received_sigterm:
                    break
                progress.increment_completed()
                self._batches_that_stepped += 1
                goes_on = next(turns, False)
        if stops:
            connector.on_batch_end()
            progress.increment_completed()
            connector.update_train_step_metrics()
        return stops

    def _turns(self, count: int, clocked: list[int]) -> Iterator[bool]:
        """Yield True before each quiet iteration. Several processes agree on as many as take about `LOOK_EVERY`."""
        trainer, started = self.trainer, time.monotonic()
        if not isinstance(trainer.strategy, DDP):
            for _ in range(count):
                yield True
                late = clocked and time.monotonic() - started > LOOK_EVERY
                if trainer.visit or (late and any((self.batch_idx + 2) % every == 0 for every in clocked)):
                    return
            return
        while True:  # also where nothing is left to this process: another one may not know
            now = time.monotonic()
            asked = trainer.visit or trainer.should_stop or (clocked and now - started > LOOK_EVERY)
            agreed = agree(trainer.strategy, 0 if asked else min(count, self._pace))
            if agreed == 0:
                return
            for _ in range(agreed):
                yield True
            count -= agreed
            self._pace = max(1, min(AT_MOST, int(agreed * LOOK_EVERY / max(time.monotonic() - now, 1e-9))))

    def _unobserved(self, fetcher: _DataFetcher) -> tuple[int, list[int]]:
        """Iterations before the next observed one; and of which multiples one is observed earlier, by the clock."""
        trainer, done, step = self.trainer, self.batch_progress.current.ready, self.global_step
        if not trainer.fast or trainer.fast_dev_run:
            return 0, []
        why = watchers.who_watches(trainer)
        if isinstance(fetcher, _DataLoaderIterDataFetcher):
            why = "training_step takes dataloader_iter"
        if why:
            self._warning_cache.info(f"Lightning visits every iteration: {why}")
        due = [AT_MOST, trainer.num_training_batches - done]
        clocked = [1] * (trainer._val_check_time_interval is not None)
        for callback in trainer.callbacks:
            every, by_clock = watchers.interval(callback)
            if not every and isinstance(callback, ModelCheckpoint):
                by_clock = callback._train_time_interval is not None
                every = 1 if by_clock else callback._every_n_train_steps
            if every:
                clocked += [every] * by_clock
                due += [every - step % every] * (not by_clock)
        if self.max_steps >= 0:
            due.append(self.max_steps - step)
        if trainer.log_every_n_steps:
            due.append(trainer.log_every_n_steps - self._batches_that_stepped % trainer.log_every_n_steps)
        if trainer.val_check_batch is not None and self._should_check_val_epoch():
            before = self.batch_progress.total.ready if trainer.check_val_every_n_epoch is None else done
            due.append(trainer.val_check_batch - before % trainer.val_check_batch)
        watched = why or self.automatic_optimization._skip_backward or trainer.visit or trainer.should_stop
        return 0 if watched else int(min(due)) - 1, clocked


@contextlib.contextmanager
def _quiet_log(module: pl.LightningModule, results: Any) -> Iterator[None]:
    """Let `self.log` keep the same values in quiet iterations, but check the arguments of repeated calls only once."""
    log = module.log
    known: dict[Any, Any] = {}
    unreduced: dict[str, tuple[Any, Tensor]] = {}

    def quietly(name: str, value: Any, *args: Any, **kwargs: Any) -> None:
        key = (name, *args, *kwargs.items())
        metric = known.get(key)
        is_scalar = type(value) is Tensor and value.dim() == 0 and value.dtype in (torch.float32, torch.float64)
        if metric is None or (metric.is_tensor and not is_scalar):
            log(name, value, *args, **kwargs)
            known[key] = results.get(f"training_step.{name}")  # none with `Trainer(barebones=True)`
        elif metric.is_tensor and not metric.meta.on_epoch:
            # Only the last one counts, so that several processes need to reduce no other.
            metric.value = metric._forward_cache = value.detach().clone()
            metric.has_reset = False
            if metric.meta.sync.should:
                part_weight = getattr(module.trainer.strategy, "part_weight", 1.0)
                unreduced[name] = metric, metric.value * part_weight
        else:
            size = results._extract_batch_size(metric, kwargs.get("batch_size"), metric.meta)
            metric.forward(value.detach() if metric.is_tensor else value, size)
            metric.has_reset = False

    # A `training_step` on the instance is a compiled one, and would be compiled anew.
    swaps = "training_step" not in vars(module) and not watchers.is_overridden("log", module, pl.LightningModule)
    module._current_fx_name = "training_step"
    if swaps:
        module.log = quietly  # type: ignore[method-assign]
    try:
        yield
    finally:
        module._current_fx_name = None
        if swaps:
            del module.log
    for metric, value in unreduced.values():
        metric.forward(value, 1)
