"""`best.ckpt` and `last.ckpt`: what a run saves, when, and how a signal ends it."""

import contextlib
import os
import signal
import threading
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.trainer.states import TrainerFn

from .checkpoint_file import write_whole
from .processes import agree
from .run import rank, run_directory


@dataclass(eq=False)
class Stopped(Exception):  # noqa: N818 (no error, as StopIteration is none)
    """A signal ended training at an iteration, and everything up to there is saved in a checkpoint."""

    signum: int
    iteration: int
    checkpoint: Path
    run: Path | None
    """Directory of the run, if it has one."""


class BestAndLast(Checkpoint):
    """Keeps `best.ckpt` and `last.ckpt` in the run's `checkpoints/`, so that a run that dies can go on exactly.

    Best is the highest value of `monitor`, the earliest of equals. Last is saved before the first iteration, after each
    epoch, where something ends training within one, and when SIGTERM or Ctrl-C (SIGINT) comes: those end training once
    the running iteration is done and all is saved. A second signal stops at once. As a `Checkpoint`, this callback is
    called after all others, and saves what they have done. It needs the engine's Trainer.

    Args:
        every_n_iterations: Save `last.ckpt` after each multiple of so many iterations too. 0 does not.
        monitor: The metric whose highest value is the best.

    Raises:
        Stopped: In `Trainer.fit`, when a signal has come and the checkpoint is saved.
        FloatingPointError: Weights are not finite; they are not saved.
    """

    def __init__(self, every_n_iterations: int = 0, monitor: str = "val/acc") -> None:
        self.observe_every = every_n_iterations
        self.monitor = monitor
        self._best = -float("inf")  # before the first validation
        self._improved = False
        self._saved = 0
        self._signum: int | None = None
        self._handlers: dict[int, Any] = {}

    def state_dict(self) -> dict[str, Any]:
        return {"best": self._best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._best = state_dict["best"]

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._saved = trainer.global_step
        best, last = self.path(trainer, "best"), self.path(trainer, "last")
        # The first process looks, for all: they save together.
        best_exists, last_exists = trainer.strategy.broadcast((best.exists(), last.exists()))
        if not best_exists:  # the checkpoint is from another directory
            self._best = -float("inf")
        self._improved = False
        self._signum = None
        # From here on `--ckpt_path last` means this run.
        if not last_exists:
            if not trainer.ckpt_path:
                self._save(trainer, "last")
            elif trainer.is_global_zero:
                write_whole(last, Path(trainer.ckpt_path).read_bytes())
        if threading.current_thread() is threading.main_thread():

            def note(signum: int, frame: FrameType | None) -> None:
                self._signum = signum
                trainer.visit = True  # type: ignore[attr-defined]
                self._restore_handlers()
                if rank() == 0:
                    # Not `print`, which a handler must not call while another one is running.
                    with contextlib.suppress(OSError):
                        os.write(2, b"Finishing the running iteration; a second signal stops at once.\n")

            self._handlers = {s: signal.signal(s, note) for s in (signal.SIGINT, signal.SIGTERM)}

    def on_iteration_end(self, trainer: pl.Trainer) -> None:
        """Save, if it is due. `on_train_batch_end` would be too early: Lightning logs after it."""
        n = self.observe_every
        ends = trainer.should_stop or 0 <= trainer.max_steps <= trainer.global_step
        if self._signal_to_any(trainer) or ends or (n and trainer.global_step // n > self._saved // n):
            self._save_last(trainer)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.state.fn != TrainerFn.FITTING or trainer.sanity_checking:
            return
        if self.monitor in trainer.callback_metrics:
            value = trainer.callback_metrics[self.monitor].item()
            if value > self._best:
                self._best, self._improved = value, True
        if not trainer.is_last_batch:
            self._save_best(trainer)
            self.on_iteration_end(trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._save_best(trainer)
        # Lightning takes an epoch that `max_steps` or a callback has ended for a whole one; what `on_iteration_end` has
        # saved can be resumed.
        if trainer.is_last_batch:
            self._save_last(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._restore_handlers()
        self._stop_if_asked(trainer)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._restore_handlers()

    def best(self, trainer: pl.Trainer) -> Path | None:
        """The best checkpoint of the run, if it has one yet; each process has to ask."""
        path = self.path(trainer, "best")
        return trainer.strategy.broadcast(path if self._best > -float("inf") and path.exists() else None)

    @staticmethod
    def path(trainer: pl.Trainer, name: str) -> Path:
        """Where `best` or `last` is saved, by the first process."""
        return (run_directory(trainer) or Path(trainer.default_root_dir)) / "checkpoints" / f"{name}.ckpt"

    def _save_best(self, trainer: pl.Trainer) -> None:
        if self._improved:
            self._save(trainer, "best")
            self._improved = False

    def _save_last(self, trainer: pl.Trainer) -> None:
        self._save(trainer, "last")
        self._saved = trainer.global_step
        self._stop_if_asked(trainer)

    def _save(self, trainer: pl.Trainer, name: str) -> None:
        if not all(parameter.isfinite().all() for parameter in trainer.lightning_module.parameters()):
            raise FloatingPointError(
                f"weights are not finite after iteration {trainer.global_step}; try a smaller model.learning_rate"
            )
        trainer.save_checkpoint(self.path(trainer, name), weights_only=False)  # all of it, not the weights alone

    def _stop_if_asked(self, trainer: pl.Trainer) -> None:
        if signum := self._signal_to_any(trainer):
            raise Stopped(signum, self._saved, self.path(trainer, "last"), run_directory(trainer))

    def _signal_to_any(self, trainer: pl.Trainer) -> int:
        """The signal that one of the processes was sent, or 0: they save and stop together."""
        return agree(trainer.strategy, self._signum or 0, "max")

    def _restore_handlers(self) -> None:
        for signum, handler in self._handlers.items():
            signal.signal(signum, handler)
        self._handlers = {}


class FiniteLosses(pl.Callback):
    """Ends a run within 100 iterations after the first loss that is not finite, and names it.

    Raises:
        FloatingPointError: In `Trainer.fit`.
    """

    observe_every = 100

    def on_train_batch_end(self, trainer: pl.Trainer, _: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._check(trainer, [outputs["loss"]] if outputs else [])

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._check(trainer, [])  # a quiet iteration may have ended training

    def _check(self, trainer: pl.Trainer, visited: list[torch.Tensor]) -> None:
        losses = [*getattr(trainer, "quiet_losses", []), *visited]
        if not losses:
            return
        of_all = trainer.strategy.reduce(torch.stack(losses))
        bad = of_all.isfinite().logical_not().nonzero()
        if len(bad):
            first = int(bad[0])
            raise FloatingPointError(
                f"the loss is {of_all[first].item()} at iteration {trainer.global_step - len(losses) + 1 + first}; "
                "try a smaller model.learning_rate"
            )
