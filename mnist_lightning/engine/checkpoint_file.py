"""Files of checkpoints: written so that a whole one is always on disk, and read without trusting them."""

import contextlib
import os
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .run import numbered_runs

PARTS = ("state_dict", "global_step", "loops", "callbacks", "pytorch-lightning_version")


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written or must not be loaded; the message names it and says why."""


def load_checkpoint(path: Path, network: Callable[..., nn.Module]) -> dict[str, Any]:
    """Load a checkpoint without running anything that it holds.

    Args:
        path: The file.
        network: The class, or a function, that makes from the hyperparameters what it has to be a checkpoint of. To
            compare weights, it is called on PyTorch's meta device.

    Returns:
        What Lightning saved: tensors, on the CPU, and plain values only.

    Raises:
        CheckpointError: It holds something else, is damaged, or is not of this program or this network.
    """
    checkpoint = _load_plain(path)
    found = sorted(map(str, checkpoint)) if isinstance(checkpoint, dict) else type(checkpoint).__name__
    if not isinstance(checkpoint, dict) or any(part not in checkpoint for part in PARTS):
        raise CheckpointError(f"{path} is not of this program: expected {', '.join(PARTS)}, found {found}")
    try:
        with torch.device("meta"):  # for the shapes, without the memory
            module = network(**checkpoint.setdefault("hyper_parameters", {}))
        # With the defaults of settings that are newer than the checkpoint.
        checkpoint["hyper_parameters"] |= getattr(module, "hparams", {})
        expected, saved = (
            {name: (tuple(tensor.shape), tensor.is_floating_point()) for name, tensor in state.items()}
            for state in (module.state_dict(), checkpoint["state_dict"])
        )
        if not all(isinstance(count, int) for count in progress(checkpoint)):
            raise TypeError("epochs and iterations must be whole numbers")
        if not isinstance(checkpoint.setdefault("datamodule_hyper_parameters", {}), dict):
            raise TypeError("the data's settings must be a dictionary")
        # Not the buffers: one may be a mask of -inf.
        weights = [checkpoint["state_dict"].get(name) for name, _ in module.named_parameters()]
        finite = all(weight is None or weight.isfinite().all() for weight in weights)
    except Exception as error:  # whatever plain values may lead to that are in the wrong place
        raise CheckpointError(f"{path} is not of this program: {type(error).__name__}: {error}") from error
    if saved != expected:
        raise CheckpointError(f"{path} is of another network: expected weights {_list(expected)}, found {_list(saved)}")
    if not finite:
        raise CheckpointError(f"{path} is refused: expected weights that are finite numbers, found some that are not")
    return checkpoint


def progress(checkpoint: dict[str, Any]) -> tuple[int, int]:
    """Epochs and iterations that the run of a checkpoint has behind it."""
    return checkpoint["loops"]["fit_loop"]["epoch_progress"]["current"]["processed"], checkpoint["global_step"]


def find(name: str, runs: Path) -> Path:
    """The file that `best` or `last` of the newest run that trained means, or a path.

    Raises:
        CheckpointError: There is none.
    """
    if name not in ("best", "last"):
        if not Path(name).is_file():
            raise CheckpointError(f"there is no checkpoint {name}")
        return Path(name)
    # Each run has the two, if it was validated; what only tests has a directory too, and no checkpoints.
    kinds = ("checkpoints/best.ckpt", "checkpoints/last.ckpt")
    newest = next((run for run in numbered_runs(runs) if any((run / kind).exists() for kind in kinds)), None)
    if newest is None:
        raise CheckpointError(f"there is no {name}.ckpt of any run in {runs} yet; train one with `fit`")
    path = newest / "checkpoints" / f"{name}.ckpt"
    if not path.is_file():
        ways = "give `last`, or a path for another run's" if name == "best" else "give a path"
        raise CheckpointError(f"there is no {path}: the newest run has not come to it; {ways}")
    return path


def _load_plain(path: Path) -> Any:
    try:
        # PyTorch writes the zip format's CRC-32 sums but does not look at them; `testzip` does.
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged is None:
            return torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    except Exception as error:  # whatever a damaged file may lead to
        if call := re.search(r"GLOBAL (\S+)", str(error)):
            raise CheckpointError(
                f"{path} is refused: expected tensors and plain values only, found {call[1]}, which loading would "
                "call; nothing of it was run"
            ) from error
        damaged = str(error)
    raise CheckpointError(
        f"{path} is damaged or no checkpoint: expected what `fit` saves, found {path.stat().st_size:,} bytes that "
        f"cannot be read ({damaged})"
    )


def _list(weights: dict[str, tuple[tuple[int, ...], bool]]) -> str:
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
