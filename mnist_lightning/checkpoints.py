"""Checkpoints: written so that a whole one is always on disk, read without trusting them, saved when a signal comes."""

import contextlib
import io
import os
import re
import signal
import sys
import threading
import zipfile
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

from mnist_lightning.callbacks import progress, run_directory
from mnist_lightning.classifier import MNISTClassifier
from mnist_lightning.datamodule import MNISTDataModule
from mnist_lightning.digits.files import NAMES
from mnist_lightning.model import MLP
from mnist_lightning.processes import gather, rank


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
        # PyTorch writes the zip format's CRC-32 sums but does not look at them; `testzip` does.
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
    parts = (
        *("state_dict", "hyper_parameters", "datamodule_hyper_parameters", "global_step", "loops", "callbacks"),
        "pytorch-lightning_version",
    )
    found = sorted(map(str, checkpoint)) if isinstance(checkpoint, dict) else type(checkpoint).__name__
    if not isinstance(checkpoint, dict) or any(part not in checkpoint for part in parts):
        raise CheckpointError(f"{path} is not of this program: expected {', '.join(parts)}, found {found}")
    try:
        with torch.device("meta"):  # for the shapes, without the memory
            network = MNISTClassifier(**checkpoint["hyper_parameters"])
        # With the defaults of settings that are newer than the checkpoint.
        checkpoint["hyper_parameters"] = dict(network.hparams)
        expected, shapes = (
            {name: (tuple(tensor.shape), tensor.is_floating_point()) for name, tensor in state.items()}
            for state in (network.state_dict(), checkpoint["state_dict"])
        )
        if not all(isinstance(count, int) for count in progress(checkpoint)):
            raise TypeError("epochs and iterations must be whole numbers")
        if not all(isinstance(schedule["total_steps"], int) for schedule in checkpoint.get("lr_schedulers", [])):
            raise TypeError("the iterations of a schedule must be a whole number")
        NAMES[checkpoint["datamodule_hyper_parameters"]["dataset"]]
        finite = all(tensor.isfinite().all() for tensor in checkpoint["state_dict"].values())
        if shapes == expected:
            for optimizer in checkpoint.get("optimizer_states", []):
                _check_optimizer(optimizer, list(network.parameters()))
    except Exception as error:  # whatever plain values may lead to that are in the wrong place
        raise CheckpointError(f"{path} is not of this program: {type(error).__name__}: {error}") from error
    if shapes != expected:
        raise CheckpointError(
            f"{path} is of another network: expected weights {_shapes(expected)}, found {_shapes(shapes)}"
        )
    if not finite:
        raise CheckpointError(f"{path} is refused: expected weights that are finite numbers, found some that are not")
    return checkpoint


def find(name: str, runs: Path) -> Path:
    """The file that `best` or `last` of the newest run that has one means, or a path.

    Raises:
        CheckpointError: There is none.
    """
    if name not in ("best", "last"):
        if not Path(name).is_file():
            raise CheckpointError(f"there is no checkpoint {name}")
        return Path(name)
    numbered = {
        int(match[1]): path
        for path in runs.glob(f"version_*/checkpoints/{name}.ckpt")
        if (match := re.fullmatch(r"version_(\d+)", path.parts[-3]))
    }
    if not numbered:
        raise CheckpointError(f"there is no {name}.ckpt of any run in {runs} yet; train one with `fit`")
    return numbered[max(numbered)]


def read_network(path: Path) -> tuple[MLP, str]:
    """The network of a checkpoint, in float32 and for reading only, and in words what it was trained on.

    Raises:
        CheckpointError: As in `read`.
    """
    checkpoint = read(path)
    classifier = MNISTClassifier(**checkpoint["hyper_parameters"])
    classifier.load_state_dict(checkpoint["state_dict"])
    iteration = checkpoint["global_step"]
    dataset = NAMES[checkpoint["datamodule_hyper_parameters"]["dataset"]]
    return classifier.mlp.float().eval().requires_grad_(False), f"{dataset}, {iteration:,} iterations"


def _check_optimizer(optimizer: dict[str, Any], parameters: list[torch.nn.Parameter]) -> None:
    """Raise where a tensor does not fit its parameter: PyTorch's fused kernels would write outside of it."""
    if len(optimizer["param_groups"][0]["params"]) > len(parameters):
        raise ValueError("an optimizer of more parameters than the network has")
    for index, state in optimizer["state"].items():
        for name, value in state.items():
            shape = torch.Size() if name == "step" else parameters[index].shape
            if value.shape != shape or not value.is_floating_point() or not value.is_contiguous():
                raise ValueError(f"expected the optimizer's {name} of shape {tuple(shape)}, found {tuple(value.shape)}")


def _shapes(weights: dict[str, tuple[tuple[int, ...], bool]]) -> str:
    return ", ".join(f"{name} {shape}" for name, (shape, _) in weights.items())


def write_whole(path: Path, content: bytes) -> None:
    """Write a file beside `path`, sync it to the disk, and rename it to `path`, so that one of the two is there whole.

    Raises:
        OSError: It cannot be written; what was at `path` is left as it was.
    """
    aside = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with aside.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            aside.unlink()
        raise


class CheckpointIO(TorchCheckpointIO):
    """Lets the Trainer replace checkpoints in one step and load them by `read`, whatever its caller asks for."""

    def __init__(self) -> None:
        self._directories: set[Path] = set()

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Replace the checkpoint at `path`, if there is one, by `write_whole`.

        Raises:
            CheckpointError: It cannot be written; the checkpoint that was there before is left as it was.
        """
        path = Path(path)
        content = io.BytesIO()
        torch.save(checkpoint, content)
        try:
            write_whole(path, content.getvalue())
        except OSError as error:
            raise CheckpointError(
                f"{path} cannot be saved: {error.strerror}; what was saved before, if anything, is whole: mend that "
                "and resume with --ckpt_path"
            ) from error
        self._directories.add(path.resolve().parent)

    def remove_checkpoint(self, path: str | Path) -> None:
        """Remove a checkpoint beside those saved here, and nothing else that a stranger's checkpoint may name."""
        path = Path(path).resolve()
        if path.is_file() and path.suffix == ".ckpt" and path.parent in self._directories:
            path.unlink()

    def load_checkpoint(
        self, path: str | Path, map_location: Any = None, weights_only: bool | None = True
    ) -> dict[str, Any]:
        """Load a checkpoint by `read`, tensors and plain values only, to the CPU.

        Of several processes, the first one reads for all: the others may be on machines that do not have the file.

        Raises:
            CheckpointError: As in `read`, in all processes.
        """
        if not torch.distributed.is_initialized():
            return read(Path(path))
        found: list[Any] = [None]
        if rank() == 0:
            try:
                found = [read(Path(path))]
            except CheckpointError as error:
                found = [error]
        torch.distributed.broadcast_object_list(found)
        if isinstance(found[0], CheckpointError):
            raise found[0]
        checkpoint: dict[str, Any] = found[0]
        return checkpoint


class BestAndLast(Checkpoint):
    """Keeps `best.ckpt` and `last.ckpt` in the run's `checkpoints/`, so that a run that dies can go on exactly.

    Best is the highest `val/acc`, the earliest of equals. Last is saved before the first iteration, after each epoch,
    and when SIGTERM or Ctrl-C (SIGINT) comes: those end training once the running call of `training_step` is done and
    saved. A second signal stops at once.

    A checkpoint also carries the state of PyTorch's random numbers on the CPU, one of each process, so that a resumed
    run draws the same ones. As a `Checkpoint`, this callback is called after all others, and saves what they have done.

    Args:
        every_n_iterations: Save `last.ckpt` in mid-epoch too, at the end of the call of `training_step` in which a
            multiple of this number falls. 0 does not.

    Raises:
        Stopped: In `Trainer.fit`, when a signal has come and the checkpoint is saved.
        FloatingPointError: Weights are not finite; they are not saved.
        MisconfigurationException: Another process is training in the run's directory, or the run to resume was ended
            by `max_steps` within an epoch.
    """

    def __init__(self, every_n_iterations: int = 0) -> None:
        self.every_n_iterations = every_n_iterations
        self._best = -1.0  # before the first validation
        self._improved = False
        self._saved = 0
        self._rng_states: Tensor | None = None
        self._max_steps: int | None = None
        self._signum: int | None = None
        self._handlers: dict[int, Any] = {}
        self._lock: int | None = None

    def state_dict(self) -> dict[str, Any]:
        return {"best": self._best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._best = state_dict["best"]

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        state = torch.get_rng_state().to(trainer.strategy.root_device)
        checkpoint["rng_states"] = gather(trainer, state[None]).cpu()

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if trainer.state.fn != TrainerFn.FITTING:
            return
        self._rng_states = checkpoint.get("rng_states")
        data: MNISTDataModule = trainer.datamodule  # type: ignore[attr-defined]
        epochs, iteration = progress(checkpoint)
        ended_early = iteration < epochs * data.iterations_per_epoch
        if ended_early and not 0 <= trainer.max_steps <= iteration:
            # Lightning takes that epoch for finished and would leave out the rest of it.
            raise MisconfigurationException(
                f"the checkpoint is from iteration {iteration}, where max_steps ended an epoch early; only whole "
                "epochs can be resumed"
            )

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._take_lock(trainer)
        # Lightning calls this hook after it has restored the weights and before it restores its own progress. If
        # `max_steps` is set then, Lightning 2.6 takes each checkpoint for one from within an epoch, and counts a
        # finished one twice.
        epoch_loop = trainer.fit_loop.epoch_loop
        self._max_steps, epoch_loop.max_steps = epoch_loop.max_steps, -1

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._restore_max_steps(trainer)
        self._restore_random_state(trainer)
        self._saved = trainer.global_step
        best, last = self.path(trainer, "best"), self.path(trainer, "last")
        # The first process looks, for all: they save together.
        best_exists, last_exists = trainer.strategy.broadcast((best.exists(), last.exists()))
        if not best_exists:  # the checkpoint is from another directory
            self._best = -1.0
        self._improved = False
        self._signum = None
        # From here on `--ckpt_path last` means this run.
        if not last_exists:
            if not trainer.ckpt_path:
                self._save(trainer, "last")
            elif trainer.is_global_zero:
                write_whole(last, Path(trainer.ckpt_path).read_bytes())
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
        """The best checkpoint of the run, if it has one yet; each process has to ask."""
        path = self.path(trainer, "best")
        return trainer.strategy.broadcast(path if self._best >= 0 and path.exists() else None)

    @staticmethod
    def path(trainer: pl.Trainer, name: str) -> Path:
        """Where `best` or `last` is saved, by the first process."""
        return (run_directory(trainer) or Path(trainer.default_root_dir)) / "checkpoints" / f"{name}.ckpt"

    def _save_if_due(self, trainer: pl.Trainer) -> None:
        n = self.every_n_iterations
        if self._signal_to_any(trainer) or (n and trainer.global_step // n > self._saved // n):
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
        if signum := self._signal_to_any(trainer):
            raise Stopped(signum, self._saved, self.path(trainer, "last"), run_directory(trainer))

    def _signal_to_any(self, trainer: pl.Trainer) -> int:
        """The signal that one of the processes was sent, or 0: they save and stop together."""
        signum = torch.tensor(self._signum or 0, device=trainer.strategy.root_device)
        return int(trainer.strategy.reduce(signum, reduce_op="max"))

    def _note(self, signum: int, frame: FrameType | None) -> None:
        self._signum = signum
        self._restore_handlers()
        if rank():
            return
        # Not `print`, which a handler must not call while another one is running.
        with contextlib.suppress(OSError):
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
        except OSError:
            pass  # a file system without locks

    def _end(self, trainer: pl.Trainer) -> None:
        self._restore_handlers()
        self._restore_max_steps(trainer)
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _restore_random_state(self, trainer: pl.Trainer) -> None:
        states = self._rng_states if trainer.ckpt_path else None
        if states is not None and trainer.global_rank < len(states):
            # A copy, since PyTorch crashes on a tensor that does not begin where its storage does.
            torch.set_rng_state(states[trainer.global_rank].clone())
        self._rng_states = None

    def _restore_max_steps(self, trainer: pl.Trainer) -> None:
        if self._max_steps is not None:
            trainer.fit_loop.epoch_loop.max_steps, self._max_steps = self._max_steps, None

    def _restore_handlers(self) -> None:
        for signum, handler in self._handlers.items():
            signal.signal(signum, handler)
        self._handlers = {}
