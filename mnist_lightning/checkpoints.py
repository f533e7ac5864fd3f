"""Checkpoints: written so that a whole one is always on disk, read without trusting them, saved when a signal comes."""

import io
import os
import re
import signal
import threading
import zipfile
from pathlib import Path
from types import FrameType
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.trainer.states import TrainerFn

from mnist_lightning.callbacks import run_directory
from mnist_lightning.classifier import MNISTClassifier


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written or must not be loaded; the message names it and says why."""


class Stopped(Exception):  # noqa: N818 (no error, as StopIteration is none)
    """A signal ended training.

    Args:
        signum: Number of the signal.
        iteration: Optimizer steps done.
        checkpoint: Where all of them are saved.
    """

    def __init__(self, signum: int, iteration: int, checkpoint: Path) -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name} at iteration {iteration:,}")
        self.signum = signum
        self.iteration = iteration
        self.checkpoint = checkpoint


def read(path: Path) -> dict[str, Any]:
    """Load a checkpoint of this program, tensors and plain values only, without running anything that it holds.

    Raises:
        CheckpointError: It holds something else, is damaged, or is not of this program.
    """
    try:
        # PyTorch writes checksums but does not look at them.
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged is None:
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
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
    parts = ("state_dict", "hyper_parameters", "datamodule_hyper_parameters", "global_step", "loops")
    found = sorted(map(str, checkpoint)) if isinstance(checkpoint, dict) else type(checkpoint).__name__
    if not isinstance(checkpoint, dict) or any(part not in checkpoint for part in parts):
        raise CheckpointError(f"{path} is not of this program: expected {', '.join(parts)}, found {found}")
    try:
        with torch.device("meta"):
            network = MNISTClassifier(**checkpoint["hyper_parameters"])
        expected, shapes = (
            {name: tuple(tensor.shape) for name, tensor in state.items()}
            for state in (network.state_dict(), checkpoint["state_dict"])
        )
    except (TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{path} is not of this program: {error}") from error
    if shapes != expected:
        raise CheckpointError(f"{path} is of another network: expected weights {expected}, found {shapes}")
    return checkpoint


class CheckpointIO(TorchCheckpointIO):
    """Lets the Trainer replace checkpoints in one step and load them by `read`, whatever its caller asks for."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write the checkpoint aside, sync it to the disk, and rename it.

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
            aside.unlink(missing_ok=True)
            raise CheckpointError(
                f"{path} cannot be saved: {error.strerror}; make room, then resume with --ckpt_path: what was saved "
                "before is whole"
            ) from error

    def load_checkpoint(
        self, path: str | Path, map_location: Any = None, weights_only: bool | None = True
    ) -> dict[str, Any]:
        """Load tensors and plain values, to the CPU."""
        return read(Path(path))


class LastCheckpoint(Checkpoint):
    """Keeps `last.ckpt` at the newest state: after each epoch, every so many iterations, and when a signal comes.

    SIGTERM and Ctrl-C (SIGINT) end training once the running call of `training_step` is done and saved. The same
    signal a second time stops at once.

    Args:
        every_n_iterations: Save in mid-epoch too, at the end of the call of `training_step` in which a multiple of
            this number falls. 0 saves at the end of epochs only.

    Raises:
        Stopped: In `Trainer.fit`, when a signal has come and the checkpoint is saved.
    """

    def __init__(self, every_n_iterations: int = 0) -> None:
        self.every_n_iterations = every_n_iterations
        self._saved = 0
        self._signum: int | None = None
        self._handlers: dict[int, Any] = {}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._saved = trainer.global_step
        if threading.current_thread() is threading.main_thread():
            self._handlers = {s: signal.signal(s, self._note) for s in (signal.SIGINT, signal.SIGTERM)}

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        fetcher = trainer.fit_loop._data_fetcher
        assert fetcher
        # After resuming from here, Lightning would leave out the validation that follows, or the end of the epoch.
        if not trainer.is_last_batch and not trainer.fit_loop.epoch_loop._should_check_val_fx(fetcher):
            self._save_if_due(trainer)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking and not trainer.is_last_batch:
            self._save_if_due(trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._save(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._restore_handlers()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._restore_handlers()

    def _save_if_due(self, trainer: pl.Trainer) -> None:
        n = self.every_n_iterations
        if self._signum is not None or (n and trainer.global_step // n > self._saved // n):
            self._save(trainer)

    def _save(self, trainer: pl.Trainer) -> None:
        path = (run_directory(trainer) or Path(trainer.default_root_dir)) / "checkpoints" / "last.ckpt"
        trainer.save_checkpoint(path)
        self._saved = trainer.global_step
        if self._signum is not None:
            raise Stopped(self._signum, self._saved, path)

    def _note(self, signum: int, frame: FrameType | None) -> None:
        self._signum = signum
        self._restore_handlers()

    def _restore_handlers(self) -> None:
        for signum, handler in self._handlers.items():
            signal.signal(signum, handler)
        self._handlers = {}
