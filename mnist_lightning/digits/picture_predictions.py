"""Predictions for users' pictures: find the files, classify them, write a CSV file, print a table."""

import csv
import os
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from glob import glob
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table
from rich.text import Text
from torch import Tensor

from mnist_lightning.digits import pictures
from mnist_lightning.digits.ink import Array
from mnist_lightning.digits.pictures import PictureError
from mnist_lightning.engine.console import UsageError, printable
from mnist_lightning.model import MLP, PIXELS

# HEIC, which phones write, cannot be read: it is named as skipped, not left out in silence.
SUFFIXES = (".png", ".jpg", ".jpeg", ".jfif", ".webp", ".avif", ".gif", ".bmp", ".tif", ".tiff", ".heic")
HEADER = ("file", "digit", "probability", "runner_up", "runner_up_probability")
LISTED = 100  # rows of the table; all are in the CSV file


def find_pictures(paths: Sequence[str]) -> list[Path]:
    """Return the files that paths name, each once.

    Paths are files, folders (all pictures in them and in their folders, but no hidden ones), and globs.

    Raises:
        UsageError: A path names no picture.
    """
    found: list[Path] = []
    for path in paths:
        # `Path.exists` would raise for what is too long for a path, and `Path.glob` takes no absolute ones.
        matches = [path] if os.path.exists(path) else sorted(glob(path, recursive=True))  # noqa: PTH110, PTH207
        files = [file for match in matches for file in _files(Path(match))]
        if not files:
            raise UsageError(f"there is no picture {path if len(path) <= 80 else f'{path[:80]}…'}")
        found += files
    return list(dict.fromkeys(found))


def _files(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    # Without hidden ones: macOS writes a `._1.png` beside each 1.png.
    files = sorted(file for file in path.rglob("[!.]*") if file.suffix.lower() in SUFFIXES and file.is_file())
    return [file for file in files if not any(part[0] == "." for part in file.relative_to(path).parts)]


def preprocess_all(paths: Sequence[Path]) -> list[Array | PictureError | None]:
    """Return what `pictures.preprocess` returns or raises for each file; it takes as many threads as PyTorch has."""
    console = Console(stderr=True)
    # In threads, since Pillow and OpenCV work without Python's lock.
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        results = pool.map(_preprocess_or_return_error, paths)
        bar = track(results, "Classifying pictures", len(paths), console=console, disable=not console.is_terminal)
        return list(bar)


def _preprocess_or_return_error(path: Path) -> Array | PictureError | None:
    try:
        return pictures.preprocess(path)
    except PictureError as error:
        return error


def classify(mlp: MLP, inputs: Mapping[Path, Array | None]) -> tuple[Tensor, list[list[Any]]]:
    """Classify N preprocessed pictures, (784,) in [0, 1] each, or None for a blank one.

    Returns:
        Probabilities, (N, 10), and rows with the columns of `HEADER`; of a blank picture the file, `blank`, and "".
    """
    probabilities = mlp(stack(inputs.values())).softmax(1)
    best, digits = (pair.tolist() for pair in probabilities.topk(2))
    return probabilities, [
        [file, "blank", "", "", ""] if digit is None else [file, first, p, second, q]
        for (file, digit), (p, q), (first, second) in zip(inputs.items(), best, digits, strict=True)
    ]


def stack(inputs: Collection[Array | None]) -> Tensor:
    """Put (784,) pixels in [0, 1] each into one tensor, (N, 784); a blank picture is all 0."""
    rows = [np.zeros(PIXELS) if digit is None else digit for digit in inputs]
    return torch.from_numpy(np.reshape(rows, (-1, PIXELS))).float()


def write_csv(path: str, rows: Sequence[Sequence[Any]]) -> None:
    """Write rows, probabilities with four digits. Names of files need not be text."""
    with Path(path).open("w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        cells = ([f"{cell:.4f}" if isinstance(cell, float) else cell for cell in row] for row in rows)
        csv.writer(file).writerows([HEADER, *cells])


def table(rows: Sequence[Sequence[Any]]) -> str:
    """The first rows, as wide as the console."""
    console = Console()
    table = Table("Picture", box=box.SIMPLE_HEAD)
    for heading in ("Digit", "Probability", "Runner-up"):
        table.add_column(heading, justify="right", no_wrap=True)
    for file, digit, p, runner_up, q in rows[:LISTED]:
        numbers = ("blank", "", "") if digit == "blank" else (f"{digit}", f"{p:.1%}", f"{runner_up} ({q:.1%})")
        table.add_row(Text(printable(str(file), console.encoding), overflow="fold"), *numbers)
    with console.capture() as text:
        console.print(table)
    more = f"\nand {len(rows) - LISTED:,} more" if len(rows) > LISTED else ""
    return text.get().rstrip() + more
