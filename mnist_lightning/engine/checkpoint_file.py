"""Files of checkpoints: written so that a whole one is always on disk, and read without trusting them."""

import contextlib
import errno
import io
import os
import re
import time
import zipfile
from collections.abc import Mapping
from enum import Enum
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .runs import CheckpointError

PARTS = ("state_dict", "global_step", "loops", "pytorch-lightning_version")

RENAME_TIMEOUT = 5.0  # seconds


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Load a checkpoint without running anything that it holds.

    Returns:
        What Lightning saved: tensors, on the CPU, and plain values only. There is a dictionary of settings of the
        module, `hyper_parameters`, and one of the data, `datamodule_hyper_parameters`.

    Raises:
        CheckpointError: It holds something else, is damaged, or is not Lightning's.
    """
    checkpoint = _load_plain(path)
    found = sorted(map(str, checkpoint)) if isinstance(checkpoint, dict) else type(checkpoint).__name__
    if not isinstance(checkpoint, dict) or any(part not in checkpoint for part in PARTS):
        raise CheckpointError(f"{path} is not of this program: expected {', '.join(PARTS)}, found {found}")
    try:
        if not all(isinstance(count, int) for count in progress(checkpoint)):
            raise TypeError("epochs and iterations must be whole numbers")
        for name in ("hyper_parameters", "datamodule_hyper_parameters", "settings"):
            if not isinstance(checkpoint.setdefault(name, {}), dict):
                raise TypeError(f"{name} must be a dictionary")
    except Exception as error:  # whatever plain values may lead to that are in the wrong place
        raise CheckpointError(f"{path} is not of this program: {type(error).__name__}: {error}") from error
    return checkpoint


def progress(checkpoint: dict[str, Any]) -> tuple[int, int]:
    """Epochs and iterations that the run of a checkpoint has behind it."""
    return checkpoint["loops"]["fit_loop"]["epoch_progress"]["current"]["processed"], checkpoint["global_step"]


def save_checkpoint(checkpoint: dict[str, Any], path: Path) -> None:
    """Replace the checkpoint at `path`, if there is one, by `write_whole`, with plain values only.

    Raises:
        CheckpointError: It cannot be written or would not load; the checkpoint that was there before is left as it was.
    """
    content = io.BytesIO()
    plain = {name: part if name == "state_dict" else plain_values(part, name) for name, part in checkpoint.items()}
    torch.save(plain, content)
    try:
        write_whole(path, content.getvalue())
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be saved: {error.strerror}; what was saved before, if anything, is whole: mend that "
            "and resume with --ckpt_path"
        ) from error


def plain_values(value: Any, name: str) -> Any:
    """A value as a checkpoint can keep it: NumPy's numbers, paths and enumerations become plain values.

    Args:
        value: The value, or containers of values.
        name: What to call it in an error.

    Raises:
        CheckpointError: There is no equal plain value.
    """
    # The exact types first: random states are thousands of numbers.
    if type(value) in (bool, int, float, str) or isinstance(value, Tensor | bytes | torch.device | torch.dtype | None):
        return value
    if isinstance(value, Enum):
        return plain_values(value.value, name)
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, PurePath):
        return str(value)
    for kind in (bool, int, float, str):
        if isinstance(value, kind):
            return kind(value)
    if isinstance(value, Mapping):
        return {plain_values(key, name): plain_values(part, f"{name}.{key}") for key, part in value.items()}
    if isinstance(value, list | tuple | set):
        parts = [plain_values(part, name) for part in value]
        return parts if isinstance(value, list) else set(parts) if isinstance(value, set) else tuple(parts)
    raise CheckpointError(
        f"{name.replace('hyper_parameters', 'setting')} is {value!r}, which a checkpoint cannot keep: loading it would "
        f"run code; give a number, a text, or a list or dictionary of these"
    )


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
            _sync(file.fileno())
        replace(aside, path)
    except OSError:
        with contextlib.suppress(OSError):
            aside.unlink()
        raise


def replace(source: Path, target: Path) -> None:
    """Rename a file over another one; on Windows a virus scanner may hold it for a moment."""
    deadline = time.monotonic() + RENAME_TIMEOUT
    while True:
        try:
            source.replace(target)
            return
        except PermissionError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)


def _sync(descriptor: int) -> None:
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):  # some file systems cannot
            raise


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
