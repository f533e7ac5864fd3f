"""Checkpoints: written so that a whole one is always on disk, read without trusting them, saved when a signal comes."""

import contextlib
import io
import itertools
import os
import re
import signal
import sys
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from mnist_lightning.callbacks import run_directory
from mnist_lightning.classifier import MNISTClassifier


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written or must not be loaded; the message names it and says why."""


class Stopped(Exception):  # noqa: N818 (no error, as StopIteration is none)
    """A signal ended training, and everything up to there is saved.

    Args:
        signum: Number of the signal.
        iteration: Optimizer steps done.
        checkpoint: Where they are saved.
        run: Directory of the run, if it has one.
    """

    def __init__(self, signum: int, iteration: int, checkpoint: Path, run: Path | None) -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name} at iteration {iteration:,}")
        self.signum = signum
        self.iteration = iteration
        self.checkpoint = checkpoint
        self.run = run


def read(path: Path) -> dict[str, Any]:
    """Load a checkpoint of this program without running anything that it holds.

    Returns:
        What Lightning saved: tensors, on the CPU, and plain values only.

    Raises:
        CheckpointError: It holds something else, is damaged, or is not of this program.
    """
    try:
        # PyTorch writes checksums but does not look at them.
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged is None:
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    except Exception as error:  # whatever a damaged file may lead to
        if call := re.search(r"GLOBAL (\S+)", str(error)):
            raise CheckpointError(
                f"{path} is refused: expected tensors and plain values only, found {call[1]}, which loading would "
                "call; nothing of it was run"
            ) from error
        damaged = str(error)
    if damaged is not None:
        raise CheckpointError(
            f"{path} is damaged or no checkpoint: expected what `fit` saves, found {path.stat().st_size:,} bytes that "
            f"cannot be read ({damaged})"
        )
    parts = ("state_dict", "hyper_parameters", "datamodule_hyper_parameters", "global_step", "loops", "callbacks")
    found = sorted(map(str, checkpoint)) if isinstance(checkpoint, dict) else type(checkpoint).__name__
    if not isinstance(checkpoint, dict) or any(part not in checkpoint for part in parts):
        raise CheckpointError(f"{path} is not of this program: expected {', '.join(parts)}, found {found}")
    try:
        with torch.device("meta"):  # for the shapes, without the memory
            network = MNISTClassifier(**checkpoint["hyper_parameters"])
        expected, shapes = (
            {name: (tuple(tensor.shape), tensor.is_floating_point()) for name, tensor in state.items()}
            for state in (network.state_dict(), checkpoint["state_dict"])
        )
        epochs_done(checkpoint)
        str(checkpoint["datamodule_hyper_parameters"]["dataset"])
        for optimizer in checkpoint.get("optimizer_states", []):
            optimizer["state"], optimizer["param_groups"]
    except Exception as error:  # whatever plain values may lead to that are in the wrong place
        raise CheckpointError(f"{path} is not of this program: {type(error).__name__}: {error}") from error
    if shapes != expected:
        raise CheckpointError(
            f"{path} is of another network: expected weights {_shapes(expected)}, found {_shapes(shapes)}"
        )
    if not all(tensor.isfinite().all() for tensor in checkpoint["state_dict"].values()):
        raise CheckpointError(f"{path} is refused: expected weights that are finite numbers, found some that are not")
    for text in _texts(checkpoint["callbacks"]):
        # Lightning's ModelCheckpoint would delete it as the best checkpoint so far, wherever it leads.
        if ".." in itertools.dropwhile(lambda part: part == "..", Path(text).parts):
            raise CheckpointError(f"{path} is refused: expected paths inside its run, found {text}")
    return checkpoint


def epochs_done(checkpoint: dict[str, Any]) -> tuple[int, int]:
    """Say how many epochs and how many iterations a checkpoint's run has behind it."""
    epochs: int = checkpoint["loops"]["fit_loop"]["epoch_progress"]["current"]["processed"]
    iterations: int = checkpoint["global_step"]
    if not isinstance(epochs, int) or not isinstance(iterations, int):
        raise TypeError("epochs and iterations must be whole numbers")
    return epochs, iterations


def _shapes(weights: dict[str, tuple[tuple[int, ...], bool]]) -> str:
    return ", ".join(f"{name} {shape}" for name, (shape, _) in weights.items())


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from _texts([*value.keys(), *value.values()])
    elif isinstance(value, (list, tuple, set)):
        for item in value:
            yield from _texts(item)


class CheckpointIO(TorchCheckpointIO):
    """Lets the Trainer replace checkpoints in one step and load them by `read`, whatever its caller asks for."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write the checkpoint to a file beside `path`, sync it to the disk, and rename it to `path`.

        Raises:
            CheckpointError: It cannot be written; the checkpoint that was there before is left as it was.
        """
        path = Path(path)
        aside = path.with_name(f".{path.name}.part")
        content = io.BytesIO()
        torch.save(checkpoint, content)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with aside.open("wb") as file:
                file.write(content.getbuffer())
                file.flush()
                os.fsync(file.fileno())
            aside.replace(path)
        except OSError as error:
            with contextlib.suppress(OSError):
                aside.unlink()
            raise CheckpointError(
                f"{path} cannot be saved: {error.strerror}; what was saved before, if anything, is whole: mend that "
                "and resume with --ckpt_path"
            ) from error

    def load_checkpoint(
        self, path: str | Path, map_location: Any = None, weights_only: bool | None = True
    ) -> dict[str, Any]:
        """Load a checkpoint by `read`, tensors and plain values only, to the CPU.

        Raises:
            CheckpointError: As in `read`.
        """
        return read(Path(path))


class BestAndLast(Checkpoint):
    """Keeps `best.ckpt` and `last.ckpt` in the run's `checkpoints/`, so that a run that dies can go on exactly.

    Best is the highest `val/acc`, the earliest of equals. Last is saved before the first iteration, after each epoch,
    and when SIGTERM or Ctrl-C (SIGINT) comes: those end training once the running call of `training_step` is done and
    saved. A second signal stops at once.

    A checkpoint also carries the state of PyTorch's random numbers on the CPU, so that a resumed run draws the same
    ones. As a `Checkpoint`, this callback is called after all others, and saves what they have done.

    Args:
        every_n_iterations: Save `last.ckpt` in mid-epoch too, at the end of the call of `training_step` in which a
            multiple of this number falls. 0 does not.

    Raises:
        Stopped: In `Trainer.fit`, when a signal has come and the checkpoint is saved.
        FloatingPointError: Weights are not finite; they are not saved.
        MisconfigurationException: Another process is training in the run's directory.
    """

    def __init__(self, every_n_iterations: int = 0) -> None:
        self.every_n_iterations = every_n_iterations
        self._best = -1.0
        self._improved = False
        self._saved = 0
        self._rng_state: Tensor | None = None
        self._max_steps: int | None = None
        self._signum: int | None = None
        self._handlers: dict[int, Any] = {}
        self._lock: int | None = None

    def state_dict(self) -> dict[str, Any]:
        return {"best": self._best, "rng_state": torch.get_rng_state()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._best = state_dict["best"]
        self._rng_state = state_dict["rng_state"]

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # Comes between the restoring of the weights and that of the Trainer's progress. If `max_steps` is set then,
        # Lightning 2.6 takes each checkpoint for one from within an epoch, and counts a finished one twice.
        epoch_loop = trainer.fit_loop.epoch_loop
        self._max_steps, epoch_loop.max_steps = epoch_loop.max_steps, -1

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._show_max_steps(trainer)
        if self._rng_state is not None and trainer.ckpt_path:
            torch.set_rng_state(self._rng_state)
        self._rng_state = None
        self._take_lock(trainer)
        self._saved = trainer.global_step
        if not self.path(trainer, "best").exists():  # the checkpoint is from another directory
            self._best = -1.0
        self._improved = False
        self._signum = None
        if not self._saved:
            # From here on `--ckpt_path last` means this run.
            self._save(trainer, "last")
        if threading.current_thread() is threading.main_thread():
            self._handlers = {s: signal.signal(s, self._note) for s in (signal.SIGINT, signal.SIGTERM)}

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        fetcher = trainer.fit_loop._data_fetcher
        assert fetcher
        # A run resumed from a checkpoint of this moment would leave out what comes next: a validation, or the hooks of
        # the epoch's end. So it is saved after those.
        if not trainer.is_last_batch and not trainer.fit_loop.epoch_loop._should_check_val_fx(fetcher):
            self._save_if_due(trainer)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.state.fn != TrainerFn.FITTING or trainer.sanity_checking:
            return
        accuracy = trainer.callback_metrics["val/acc"].item()
        if accuracy > self._best:
            self._best, self._improved = accuracy, True
        if not trainer.is_last_batch:
            self._save_best(trainer)
            self._save_if_due(trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._save_best(trainer)
        self._save_last(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._end(trainer)
        self._stop_if_asked(trainer)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._end(trainer)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._end(trainer)

    def best(self, trainer: pl.Trainer) -> Path | None:
        """The best checkpoint of the run, if it has one yet."""
        path = self.path(trainer, "best")
        return path if self._best >= 0 and path.exists() else None

    @staticmethod
    def path(trainer: pl.Trainer, name: str) -> Path:
        """Where `best` or `last` is saved."""
        return (run_directory(trainer) or Path(trainer.default_root_dir)) / "checkpoints" / f"{name}.ckpt"

    def _save_if_due(self, trainer: pl.Trainer) -> None:
        n = self.every_n_iterations
        if self._signum is not None or (n and trainer.global_step // n > self._saved // n):
            self._save_last(trainer)

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
        trainer.save_checkpoint(self.path(trainer, name))

    def _stop_if_asked(self, trainer: pl.Trainer) -> None:
        if self._signum is not None:
            raise Stopped(self._signum, self._saved, self.path(trainer, "last"), run_directory(trainer))

    def _note(self, signum: int, frame: FrameType | None) -> None:
        self._signum = signum
        self._restore_handlers()
        # Not `print`, which a handler must not call while another one is running.
        os.write(2, b"Finishing the running iterations; a second signal stops at once.\n")

    def _take_lock(self, trainer: pl.Trainer) -> None:
        run = run_directory(trainer)
        if run is None or sys.platform == "win32":
            return
        import fcntl  # Windows has none

        self._lock = os.open(run, os.O_RDONLY)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise MisconfigurationException(f"another process is training in {run}") from error

    def _end(self, trainer: pl.Trainer) -> None:
        self._restore_handlers()
        self._show_max_steps(trainer)
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _show_max_steps(self, trainer: pl.Trainer) -> None:
        if self._max_steps is not None:
            trainer.fit_loop.epoch_loop.max_steps, self._max_steps = self._max_steps, None

    def _restore_handlers(self) -> None:
        for signum, handler in self._handlers.items():
            signal.signal(signum, handler)
        self._handlers = {}
