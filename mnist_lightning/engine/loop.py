"""Lightning's training loop, which runs the hooks of an iteration only where somebody needs them; and its `Trainer`."""

import contextlib
import inspect
import time
import warnings
from collections.abc import Iterator
from typing import Any, Union, get_args

import lightning.pytorch as pl
import torch
from lightning.pytorch.loops.fetchers import _DataFetcher, _DataLoaderIterDataFetcher
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor

from . import hooks
from .hooks import StepWithoutHooks
from .processes import DDP
from .resumption import CheckpointConnector, FitLoop

REFRESH_AFTER = 0.1  # seconds, where there is a progress bar


class Trainer(pl.Trainer):
    """Lightning's Trainer, faster and resumed exactly: the same weights, metrics and curves, bit for bit on a CPU.

    Iterations run without hooks where nobody needs them. A callback says how often it needs its batch hooks by an
    attribute `hooks_every_n_steps`: a number of optimizer steps, or 0 where it acts only when Lightning logs, validates
    or ends an epoch. A callback without that attribute has its batch hooks called in each iteration. Its
    `on_step_logged(trainer)`, if it has one, is called after an iteration with hooks is logged, where neither a
    validation nor the end of the epoch follows.

    Args:
        *args, **kwargs: Lightning's own arguments.
        fast: Run iterations without hooks. With False it is Lightning's loop.

    Attributes:
        run_hooks: Set it to True, also from a signal handler, to have hooks run in the next iteration.
    """

    def __init__(self, *args: Any, fast: bool = True, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.fast = fast
        self.run_hooks = False
        fit, epoch = self.fit_loop, self.fit_loop.epoch_loop
        self.fit_loop = FitLoop(self, fit.min_epochs, fit.max_epochs)
        self.fit_loop.epoch_loop = EpochLoop(self, epoch.min_steps, epoch.max_steps)
        self._checkpoint_connector = CheckpointConnector(self)
        if type(self.strategy) is DDPStrategy and self.strategy._start_method == "popen":
            self.strategy.__class__ = DDP  # which only adds a method; the arguments are the user's


def _signature() -> inspect.Signature:
    """Lightning's own, and `fast`; where a number may be whole or a fraction, a whole one is tried first."""
    lightnings = inspect.signature(pl.Trainer.__init__).parameters.values()
    parameters = []
    for each in lightnings:
        kinds = get_args(each.annotation)
        # Else `typing` may remember them in the other order, and `limit_val_batches: 1` would be all of them.
        hint = Union[(int, *kinds)] if {int, float} <= set(kinds) else each.annotation
        parameters.append(each.replace(annotation=hint))
    fast = inspect.Parameter("fast", inspect.Parameter.KEYWORD_ONLY, default=True, annotation=bool)
    return inspect.Signature([*parameters, fast])


Trainer.__init__.__signature__ = _signature()  # type: ignore[attr-defined]
Trainer.__init__.__doc__ = pl.Trainer.__init__.__doc__  # for the help of the command line


class EpochLoop(_TrainingEpochLoop):
    """Lightning's loop over an epoch's iterations, of which some run without hooks."""

    _step: StepWithoutHooks | None = None
    _validates_to_stop = False

    def run(self, data_fetcher: _DataFetcher) -> None:
        """Run an epoch."""
        with hooks.without_search_for_gpus():
            super().run(data_fetcher)

    def reset(self) -> None:
        """Lightning's, without its warning that a loader without a state cannot be resumed: `FitLoop` does that."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*dataloader is not resumable")
            super().reset()

    def on_run_start(self, data_fetcher: _DataFetcher) -> None:
        """Begin an epoch, or go on within one."""
        self._ran_hooks = False  # the first iteration has hooks: those without need what it logged
        self.trainer.fit_loop.restore_loader()
        super().on_run_start(data_fetcher)

    def advance(self, data_fetcher: _DataFetcher) -> None:
        """Run the iterations without hooks that are next, if any, and then one with hooks."""
        if self._ran_hooks and self._run_without_hooks(data_fetcher):
            return
        self.trainer.run_hooks, before = False, self.batch_progress.current.ready
        self.trainer.fit_loop.before_next_batch(before)
        super().advance(data_fetcher)
        self._ran_hooks = self.batch_progress.current.ready > before  # not where a validation is resumed

    def on_advance_end(self, data_fetcher: _DataFetcher) -> None:
        """Validate if it is due. Otherwise call the callbacks' `on_step_logged`."""
        if self.trainer.should_stop:
            self.trainer.should_stop = False
            self._validates_to_stop = not self._should_check_val_fx(data_fetcher)
            self.trainer.should_stop = True
        super().on_advance_end(data_fetcher)
        self._validates_to_stop = False
        if not self._validates and not self.batch_progress.is_last_batch:
            for callback in self.trainer.callbacks:
                if on_step_logged := getattr(callback, "on_step_logged", None):
                    on_step_logged(self.trainer)

    def _should_check_val_fx(self, data_fetcher: _DataFetcher) -> bool:
        self._validates: bool = super()._should_check_val_fx(data_fetcher)
        return self._validates

    def on_save_checkpoint(self) -> dict[str, Any]:
        """Lightning's state; a validation that only the end of training caused is not repeated by a resumed run."""
        state: dict[str, Any] = super().on_save_checkpoint()
        # To a resumed run the iteration is complete; Lightning counts it only after the validation.
        state["_batches_that_stepped"] += self._validates_to_stop
        return state

    def _run_without_hooks(self, fetcher: _DataFetcher) -> bool:
        """Run iterations up to the next one that needs hooks; return True if one of them asked to stop."""
        trainer, count = self.trainer, self._until_hooks(fetcher)
        if count == 0:
            return False
        started = time.monotonic()
        if not (self._step and self._step.is_for(trainer)):
            self._step = StepWithoutHooks(trainer)
        self._step.prepare()
        rates = hooks.refresh_rates(trainer)
        with _log_without_checks(trainer.lightning_module, self._results):
            for _ in range(count):
                self._advance_without_hooks(fetcher, self._step)
                if trainer.should_stop or trainer.received_sigterm:
                    break
                self.batch_progress.increment_completed()
                self._batches_that_stepped += 1
                is_late = rates and time.monotonic() - started > REFRESH_AFTER
                if trainer.run_hooks or (is_late and any((self.batch_idx + 2) % rate == 0 for rate in rates)):
                    return False
            else:
                return False
        trainer._logger_connector.on_batch_end()
        self.batch_progress.increment_completed()
        trainer._logger_connector.update_train_step_metrics()
        return True

    def _advance_without_hooks(self, fetcher: _DataFetcher, step: StepWithoutHooks) -> None:
        batch, _, _ = next(fetcher)
        batch = step.to_device(batch)
        self.batch_progress.increment_ready()
        self.trainer._logger_connector.on_batch_start(batch)
        if batch is not None:  # as Lightning does
            self.batch_progress.increment_started()
            step(batch, self.batch_idx)
        self.batch_progress.increment_processed()
        if self.trainer.lr_scheduler_configs:
            self.update_lr_schedulers("step", update_plateau_schedulers=False)

    def _until_hooks(self, fetcher: _DataFetcher) -> int:
        """How many iterations come before the next one that needs hooks."""
        trainer, done, step = self.trainer, self.batch_progress.current.ready, self.global_step
        if not trainer.fast or trainer.fast_dev_run or trainer.run_hooks or trainer.should_stop:
            return 0
        why = hooks.why_always(trainer)
        if isinstance(fetcher, _DataLoaderIterDataFetcher):
            why = "training_step takes dataloader_iter"
        if why:
            self._warning_cache.info(f"Hooks run in every iteration: {why}")
        if why or self.automatic_optimization._skip_backward:
            return 0
        due = [trainer.num_training_batches - done]
        due += [every - step % every for every in map(hooks.hooks_every_n_steps, trainer.callbacks) if every]
        if self.max_steps >= 0:
            due.append(self.max_steps - step)
        if trainer.log_every_n_steps:
            due.append(trainer.log_every_n_steps - self._batches_that_stepped % trainer.log_every_n_steps)
        if trainer.val_check_batch is not None and self._should_check_val_epoch():
            before = self.batch_progress.total.ready if trainer.check_val_every_n_epoch is None else done
            due.append(trainer.val_check_batch - before % trainer.val_check_batch)
        return int(min(due)) - 1


@contextlib.contextmanager
def _log_without_checks(module: pl.LightningModule, results: Any) -> Iterator[None]:
    """Let `self.log` keep the same values as Lightning's, but check the arguments of repeated calls only once."""
    log = module.log
    known: dict[Any, Any] = {}

    def log_again(name: str, value: Any, *args: Any, **kwargs: Any) -> None:
        key = (name, *args, *kwargs.items())
        metric = known.get(key)
        is_scalar = type(value) is Tensor and value.dim() == 0 and value.dtype in (torch.float32, torch.float64)
        if metric is None or (metric.is_tensor and not is_scalar):
            log(name, value, *args, **kwargs)
            known[key] = results.get(f"training_step.{name}")  # none with `Trainer(barebones=True)`
            return
        if metric.is_tensor and not metric.meta.on_epoch:
            metric.value = metric._forward_cache = value.detach().clone()
        else:
            size = results._extract_batch_size(metric, kwargs.get("batch_size"), metric.meta)
            metric.forward(value.detach() if metric.is_tensor else value, size)

    # A `training_step` on the instance is a compiled one, and would be compiled anew.
    swaps = "training_step" not in vars(module) and not hooks.is_overridden("log", module, pl.LightningModule)
    module._current_fx_name = "training_step"
    if swaps:
        module.log = log_again  # type: ignore[method-assign]
    try:
        yield
    finally:
        module._current_fx_name = None
        if swaps:
            del module.log
