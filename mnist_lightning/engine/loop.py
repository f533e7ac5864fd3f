"""Lightning's training loop, which visits only the iterations that somebody observes, and the `Trainer` that has it."""

import math
import time
from collections import OrderedDict
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loops.fetchers import _DataFetcher, _DataLoaderIterDataFetcher
from lightning.pytorch.loops.optimization.automatic import ClosureResult
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor
from torch.distributed.constants import default_pg_timeout

from . import fast, watchers
from .processes import DDP, agree
from .resume import FitLoop, LoadAsTrained

# Iterations between two visits at most, and seconds where somebody goes by the clock.
AT_MOST, LOOK_EVERY = 1000, 0.1


class Trainer(pl.Trainer):
    """Lightning's Trainer, sooner: the same weights, metrics, curves and checkpoints, to the bit on a CPU.

    Iterations that nobody observes run quietly, one after the other: forward, backward, the optimizer's and the
    schedulers' steps. Lightning visits all others, with its hooks and its logging. A callback says how often its batch
    hooks have to be called by an attribute `observe_every`: a number of iterations, a `timedelta`, or 0 where it only
    acts when Lightning logs, validates or ends an epoch. One that does not say is called in each iteration. Its
    `on_iteration_end(trainer)`, which Lightning does not have, is called after a visited iteration is logged, where
    neither a validation nor the epoch's end follows.

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

    def run(self, data_fetcher: _DataFetcher) -> None:
        """Run an epoch. Its first iteration is visited: what follows is decided by what it left."""
        self._visited = self._lean = self._may_be_fast = False
        self._fast: fast.FastStep | None = None
        self._agrees: bool | None = None  # the fast step's trial, once in an epoch
        self._pace = 1  # iterations that take about as long as `LOOK_EVERY`
        super().run(data_fetcher)

    def on_run_start(self, data_fetcher: _DataFetcher) -> None:
        """Begin an epoch, or go on within one, also with a loader that cannot say how far it was."""
        fit = self.trainer.fit_loop
        if fit.is_resuming:
            # Lightning's issue 20550: it drops them where `estimated_stepping_batches` asked for the loader before.
            fit._load_combined_loader_states()
            fit.random.restore_loader(data_fetcher, self.batch_progress.current.ready)
        elif self.trainer.current_epoch > 0 and not self.restarting:
            fit.random.before_epoch = torch.get_rng_state()  # Lightning makes the iterator next
        super().on_run_start(data_fetcher)

    def advance(self, data_fetcher: _DataFetcher) -> None:
        """Run the quiet iterations that are next, if any, and then visit one."""
        self.trainer.quiet_losses.clear()
        if self._visited and self._run_quietly(data_fetcher):
            return
        self._visited, self.trainer.visit = True, False
        if self.batch_progress.current.ready == 0:
            self.trainer.fit_loop.random.before_batch = torch.get_rng_state()
        super().advance(data_fetcher)

    def on_advance_end(self, data_fetcher: _DataFetcher) -> None:
        """Validate where it is due; elsewhere the iteration is over, its curves logged, and callbacks may save it."""
        validates = self._should_check_val_fx(data_fetcher)
        super().on_advance_end(data_fetcher)
        if not validates and not self.batch_progress.is_last_batch:
            for callback in self.trainer.callbacks:
                if over := getattr(callback, "on_iteration_end", None):
                    over(self.trainer)

    def _run_quietly(self, fetcher: _DataFetcher) -> bool:
        """Run iterations up to the next observed one; say whether one asked to stop, whose end is left to Lightning."""
        trainer, device, started = self.trainer, self.trainer.strategy.root_device, time.monotonic()
        count, clocked = self._unobserved(fetcher)
        if count == 0:
            return False
        # Made anew after each visit: a callback may have changed the network, the loss or the optimizer.
        self._fast, self._may_be_fast = None, fast.allowed(trainer) and not self._logs_by_the_epoch()
        self._lean = watchers.is_lean(trainer)
        self._takes_index = len(self._build_kwargs(OrderedDict(), None, 0)) > 1
        stops = False
        with _QuietLog(trainer.lightning_module, self._results):
            for _ in range(count):
                batch, _, _ = next(fetcher)
                if not (self._lean and watchers.is_on(device, batch)):
                    batch = trainer.precision_plugin.convert_input(batch)
                    batch = trainer.lightning_module._on_before_batch_transfer(batch, dataloader_idx=0)
                    batch = trainer.strategy.batch_to_device(batch, dataloader_idx=0)
                self.batch_progress.increment_ready()
                trainer._logger_connector.on_batch_start(batch)
                if batch is not None:  # as Lightning does
                    self.batch_progress.increment_started()
                    loss = self._step(batch)
                    trainer.quiet_losses += [] if loss is None else [loss]
                self.batch_progress.increment_processed()
                if trainer.lr_scheduler_configs:
                    self.update_lr_schedulers("step", update_plateau_schedulers=False)
                if stops := trainer.should_stop or trainer.received_sigterm:
                    break
                self.batch_progress.increment_completed()
                self._batches_that_stepped += 1
                # Several processes have agreed on a number, and all of them keep to it.
                if trainer.world_size == 1 and (
                    trainer.visit
                    or (clocked and time.monotonic() - started > LOOK_EVERY and (self.batch_idx + 2) % clocked == 0)
                ):
                    break
        if stops:
            trainer._logger_connector.on_batch_end()
            self.batch_progress.increment_completed()
            trainer._logger_connector.update_train_step_metrics()
        self._pace = max(1, min(AT_MOST, int(count * LOOK_EVERY / (time.monotonic() - started))))
        return stops

    def _unobserved(self, fetcher: _DataFetcher) -> tuple[int, int]:
        """Iterations before the next observed one; by the clock, a multiple of the second number is visited earlier."""
        trainer, done, step = self.trainer, self.batch_progress.current.ready, self.global_step
        if not trainer.fast or trainer.fast_dev_run:
            return 0, 0
        why = watchers.who_watches(trainer)
        if isinstance(fetcher, _DataLoaderIterDataFetcher):
            why = "training_step takes dataloader_iter"
        if why:
            self._warning_cache.info(f"Lightning visits every iteration: {why}")
        if why or self.automatic_optimization._skip_backward:
            return 0, 0
        intervals = [_interval(callback) for callback in trainer.callbacks]
        due = [AT_MOST, trainer.num_training_batches - done]
        due += [every - step % every for every, by_clock in intervals if every and not by_clock]
        if self.max_steps >= 0:
            due.append(self.max_steps - step)
        if trainer.log_every_n_steps:
            due.append(trainer.log_every_n_steps - self._batches_that_stepped % trainer.log_every_n_steps)
        if trainer.val_check_batch is not None and self._should_check_val_epoch():
            before = self.batch_progress.total.ready if trainer.check_val_every_n_epoch is None else done
            due.append(trainer.val_check_batch - before % trainer.val_check_batch)
        count = 0 if trainer.visit or trainer.should_stop else int(min(due)) - 1
        if trainer.world_size > 1:
            count = agree(trainer.strategy, min(count, self._pace))
        clocked = [every for every, by_clock in intervals if every and by_clock]
        clocked += [1] * (trainer._val_check_time_interval is not None)
        return count, math.lcm(*clocked) if clocked else 0

    def _step(self, batch: Any) -> Tensor | None:
        """Do one optimizer step; return its loss, (), or None where `training_step` has none."""
        step = self.automatic_optimization.optim_progress.optimizer.step
        step.increment_ready()
        loss = None
        if self._may_be_fast and self._fast is None and self._agrees is not False:
            self._fast = fast.make(self.trainer, batch)
            self._may_be_fast = self._fast is not None
        if self._fast and self._agrees is None:
            self._agrees, loss = fast.try_out(self._fast, self.trainer, batch, partial(self._ordinary_step, batch))
            self._fast = self._fast if self._agrees else None
        elif self._fast is None or (loss := self._fast(batch)) is None:
            loss = self._ordinary_step(batch)
        else:
            self._count_zero_grad()
        step.increment_completed()
        return loss

    def _ordinary_step(self, batch: Any) -> Tensor | None:
        """What Lightning does with a batch in `automatic_optimization.run`, without the hooks that nobody has."""
        trainer, (optimizer,), module = self.trainer, self.trainer.optimizers, self.trainer.lightning_module
        arguments = (batch, self.batch_idx) if self._takes_index else (batch,)
        loss: Tensor | None = None

        def closure() -> Tensor | None:
            nonlocal loss
            output = (module if self._lean else trainer.strategy).training_step(*arguments)
            loss = (
                output if isinstance(output, Tensor) else ClosureResult.from_training_step_output(output).closure_loss
            )
            optimizer.zero_grad()
            self._count_zero_grad()
            if loss is not None:
                loss.backward() if self._lean else trainer.strategy.backward(loss, optimizer)
                loss = loss.detach()
            elif trainer.world_size > 1:
                raise RuntimeError("with several processes, `training_step` must not return None")
            return loss

        if self._lean:
            optimizer.step(torch.enable_grad()(closure))
        else:
            trainer.strategy.optimizer_step(optimizer, torch.enable_grad()(closure), module)
        return loss

    def _count_zero_grad(self) -> None:
        counts = self.automatic_optimization.optim_progress.optimizer.zero_grad
        counts.increment_ready()
        counts.increment_started()
        counts.increment_completed()

    def _logs_by_the_epoch(self) -> bool:
        return any(result.meta.on_epoch and result.meta.fx == "training_step" for result in self._results.values())


class _QuietLog:
    """`self.log` in quiet iterations: it keeps the same values, and checks the arguments of like calls only once."""

    def __init__(self, module: pl.LightningModule, results: Any) -> None:
        self.module, self.results, self.log = module, results, module.log
        self.known: dict[Any, Any] = {}
        self.unreduced: dict[Any, tuple[Any, Tensor]] = {}
        self.is_swapped = False

    def __enter__(self) -> None:
        self.module._current_fx_name = "training_step"
        # A `training_step` on the instance is a compiled one, and would be compiled anew.
        if not {"training_step", "log"} & vars(self.module).keys() and not is_overridden("log", self.module):
            self.is_swapped = True
            self.module.log = self  # type: ignore[method-assign]

    def __exit__(self, error: object, *_: object) -> None:
        self.module._current_fx_name = None
        if self.is_swapped:
            del self.module.log
        for metric, value in () if error else self.unreduced.values():
            metric.forward(value, 1)

    def __call__(self, name: str, value: Any, *args: Any, **kwargs: Any) -> None:
        key = (name, *args, *kwargs.items())
        metric = self.known.get(key)
        is_scalar = type(value) is Tensor and value.dim() == 0 and value.dtype in (torch.float32, torch.float64)
        if metric is None or (metric.is_tensor and not is_scalar):
            self.log(name, value, *args, **kwargs)
            self.known[key] = self.results.get(f"training_step.{name}")  # none with `Trainer(barebones=True)`
        elif metric.is_tensor and not metric.meta.on_epoch:
            # Only the last one counts, so that several processes need to reduce no other.
            metric.value = metric._forward_cache = value.detach().clone()
            metric.has_reset = False
            if metric.meta.sync.should:
                self.unreduced[name] = metric, metric.value
        else:
            size = self.results._extract_batch_size(metric, kwargs.get("batch_size"), metric.meta)
            metric.forward(value.detach() if metric.is_tensor else value, size)
            metric.has_reset = False


def _interval(callback: pl.Callback) -> tuple[int, bool]:
    every, by_clock = watchers.interval(callback)
    if every or not isinstance(callback, ModelCheckpoint):
        return every, by_clock
    by_clock = callback._train_time_interval is not None
    return int(by_clock) or callback._every_n_train_steps, by_clock
