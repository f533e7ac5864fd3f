"""`best.ckpt` and `last.ckpt`: what a run saves, when and how, and how a signal ends it."""

import contextlib
import math
import os
import signal
import threading
from pathlib import Path
from types import FrameType
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.trainer.states import TrainerFn

from .checkpoint_file import load_checkpoint, save_checkpoint, write_whole
from .checks import NotFiniteError, remedy
from .console import Stopped, command_line, rank, say
from .processes import all_reduce_max
from .runs import CheckpointError, run_directory


class CheckpointIO(TorchCheckpointIO):
    """Lets the Trainer replace checkpoints in one step and load them safely, whatever its caller asks for."""

    def __init__(self) -> None:
        self._directories: set[Path] = set()

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Replace the checkpoint at `path`, if there is one, by `checkpoint_file.save_checkpoint`."""
        save_checkpoint(checkpoint, Path(path))
        self._directories.add(Path(path).resolve().parent)

    def remove_checkpoint(self, path: str | Path) -> None:
        """Remove a checkpoint beside those saved here, and nothing else that an untrusted one may name."""
        path = Path(path)
        # A link itself, and never what it leads to.
        if path.suffix == ".ckpt" and path.parent.resolve() in self._directories and not path.is_dir():
            path.unlink(missing_ok=True)

    def load_checkpoint(
        self, path: str | Path, map_location: Any = None, weights_only: bool | None = True
    ) -> dict[str, Any]:
        """Load a checkpoint by `checkpoint_file.load_checkpoint`: tensors and plain values only, to the CPU."""
        if not torch.distributed.is_initialized():
            return load_checkpoint(Path(path))
        # The first process reads for all: the others may be on machines that do not have the file.
        found: list[Any] = [None]
        if rank() == 0:
            try:
                found = [load_checkpoint(Path(path))]
            except CheckpointError as error:
                found = [error]
        torch.distributed.broadcast_object_list(found)
        if isinstance(found[0], CheckpointError):
            raise found[0]
        return dict(found[0])


class BestAndLast(Checkpoint):
    """Keeps `best.ckpt` and `last.ckpt` in the run's `checkpoints/`, so that a run that dies can go on exactly.

    Best is the best value of `monitor`, the earliest of equals. Last is saved before the first iteration, after each
    epoch, and where something ends training within one: also Ctrl-C (SIGINT), SIGTERM, SIGUSR1 and SIGHUP, after which
    the running iteration is done first. (Several processes look for signals in iterations that are logged.) A second
    Ctrl-C stops at once. As a `Checkpoint`, this callback is called after all others, and saves what they have done. It
    needs the engine's Trainer.

    Args:
        every_n_steps: Save `last.ckpt` after each multiple of so many iterations too. 0 does not.
        monitor: The metric whose best value is the best.
        mode: Whether the best value is the largest (`max`) or the smallest (`min`).

    Raises:
        Stopped: In `Trainer.fit`, when a signal has come and the checkpoint is saved.
        NotFiniteError: Weights are not finite; they are not saved.
    """

    def __init__(self, every_n_steps: int = 0, monitor: str = "val/acc", mode: str = "max") -> None:
        self.hooks_every_n_steps = every_n_steps
        self.monitor = monitor
        self._sign = 1 if mode == "max" else -1
        self._best: float | None = None  # before the first validation
        self._improved = self._is_validated = False
        self._saved = 0
        self._signum = 0
        self._handlers: dict[int, Any] = {}

    def state_dict(self) -> dict[str, Any]:
        return {"best": self._best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._best = state_dict["best"]

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._saved, self._signum = trainer.global_step, 0
        self._improved = self._is_validated = False
        best, last = self.path(trainer, "best"), self.path(trainer, "last")
        # The first process looks, for all: they save together.
        best_exists, last_exists = trainer.strategy.broadcast((best.exists(), last.exists()))
        if not best_exists:  # the checkpoint is from another directory
            self._best = None
        # From here on `--ckpt_path last` means this run.
        if not trainer.ckpt_path:
            if not last_exists:
                self._save(trainer, "last")
        elif trainer.is_global_zero and Path(trainer.ckpt_path).resolve() != last.resolve():
            write_whole(last, Path(trainer.ckpt_path).read_bytes())
        if threading.current_thread() is threading.main_thread():
            self._take_signals(trainer)

    def on_step_logged(self, trainer: pl.Trainer) -> None:
        """Save, if it is due. `on_train_batch_end` would be too early: Lightning logs after it."""
        if (trainer.fit_loop.batch_idx + 1) % trainer.accumulate_grad_batches and not trainer.is_last_batch:
            return  # no checkpoint keeps gradients
        step, n = trainer.global_step, self.hooks_every_n_steps
        is_due = n and step // n > self._saved // n
        ends = trainer.should_stop or 0 <= trainer.max_steps <= step
        looks = trainer.world_size == 1 or step % (trainer.log_every_n_steps or 50) == 0  # type: ignore[attr-defined]
        if is_due or ends or (looks and self._signal_to_any(trainer)):
            self._save_last(trainer)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.state.fn != TrainerFn.FITTING or trainer.sanity_checking:
            return
        metrics, self._is_validated = trainer.callback_metrics, True
        if self.monitor in metrics:
            # The first process decides, for all: they save together, and may not have the same value.
            value = self._sign * trainer.strategy.broadcast(metrics[self.monitor].item())
            value = -math.inf if math.isnan(value) else value
            if self._best is None or value > self._best:
                self._best, self._improved = value, True
        if not trainer.is_last_batch:
            self._save_best(trainer)
            self.on_step_logged(trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._save_best(trainer)
        # Lightning takes an epoch that `max_steps` or a callback has ended for a whole one; what `on_step_logged` has
        # saved can be resumed.
        if trainer.is_last_batch:
            self._save_last(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._give_signals_back()
        self._stop_if_asked(trainer)
        if self._best is None and self._is_validated:
            logged = ", ".join(sorted(map(str, trainer.callback_metrics))) or "none"
            say(f"There is no best.ckpt: {self.monitor} was not logged; give --monitor one of: {logged}")

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._give_signals_back()

    def best(self, trainer: pl.Trainer) -> Path | None:
        """The best checkpoint of the run, if it has one yet; each process has to ask."""
        path = self.path(trainer, "best")
        return trainer.strategy.broadcast(path if self._best is not None and path.exists() else None)

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
            raise NotFiniteError(f"weights are not finite after iteration {trainer.global_step}; {remedy(trainer)}")
        trainer.save_checkpoint(self.path(trainer, name), weights_only=False)  # all of it, not the weights alone

    def _take_signals(self, trainer: pl.Trainer) -> None:
        def handle(signum: int, frame: FrameType | None) -> None:
            self._signum = signum
            trainer.run_hooks = True  # type: ignore[attr-defined]
            self._give_signals_back()
            if rank() == 0:
                # Not `print`, which a handler must not call while another one is running.
                with contextlib.suppress(OSError):
                    os.write(2, b"Finishing the running iteration; a second Ctrl-C stops at once.\n")

        signals = [signal.SIGINT, signal.SIGTERM]
        # SLURM's and a terminal's, where nobody else has taken them; nohup has SIGHUP ignored.
        others = [getattr(signal, name, None) for name in ("SIGUSR1", "SIGHUP")]
        signals += [each for each in others if each and signal.getsignal(each) == signal.SIG_DFL]
        self._handlers = {each: signal.signal(each, handle) for each in signals}

    def _give_signals_back(self) -> None:
        for signum, handler in self._handlers.items():
            signal.signal(signum, handler)
        self._handlers = {}

    def _signal_to_any(self, trainer: pl.Trainer) -> int:
        """The signal that one of the processes was sent, or 0: they save and stop together."""
        return all_reduce_max(trainer, self._signum)

    def _stop_if_asked(self, trainer: pl.Trainer) -> None:
        if signum := self._signal_to_any(trainer):
            run = run_directory(trainer)
            config = ["--config", str(run / "config.yaml")] if run else []
            resume = command_line("fit", *config, "--ckpt_path", str(self.path(trainer, "last")))
            raise Stopped(signum, f"Stopped and saved at iteration {self._saved:,}; to resume:\n{resume}")
