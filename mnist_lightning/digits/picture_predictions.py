"""Predictions for users' pictures: find the files, classify them, write a CSV file, print a table."""

import csv
import os
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from glob import glob
from itertools import pairwise
from pathlib import Path
from typing import Any

import cv2
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
from mnist_lightning.engine.console import printable
from mnist_lightning.model import MLP, PIXELS, SIDE

SUFFIXES = (".png", ".jpg", ".jpeg", ".jfif", ".webp", ".avif", ".gif", ".bmp", ".tif", ".tiff")
HEADER = ("file", "digit", "probability", "runner_up", "runner_up_probability", "note")
SEVERAL = "more than one digit? classified as one"
LISTED = 100  # rows of the table; all are in the CSV file


def find_pictures(paths: Sequence[str]) -> tuple[list[Path], str]:
    """Return the files that paths name, each once; and a line that says what was left out of folders, or "".

    Paths are files, folders (all pictures in them and in their folders, but no hidden ones), and globs.

    Raises:
        ValueError: A path names no picture.
    """
    found: list[Path] = []
    others: Counter[str] = Counter()
    for path in paths:
        # `Path.exists` would raise for what is too long for a path, and `Path.glob` takes no absolute ones.
        matches = [path] if os.path.exists(path) else sorted(glob(path, recursive=True))  # noqa: PTH110, PTH207
        given = dict.fromkeys(map(Path, matches))
        files = [file for match in given for file in _files(match)]
        taken = [file for file in files if file in given or file.suffix.lower() in SUFFIXES]
        left_out = Counter(file.suffix.lower() or file.name for file in set(files) - set(taken))
        if not taken:
            name = path if len(path) <= 80 else f"{path[:80]}…"
            raise ValueError(f"there is no picture {name}" + f" ({_kinds(left_out)})" * bool(left_out))
        others += left_out
        found += taken
    return list(dict.fromkeys(found)), _kinds(others) if others else ""


def _kinds(others: Counter[str]) -> str:
    kinds = ", ".join(f"{count:,} {kind}" for kind, count in sorted(others.items()))
    return f"not supported: {kinds}; save pictures as JPEG or PNG"


def _files(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    # Without hidden ones: macOS writes a `._1.png` beside each 1.png.
    files = (file for file in path.rglob("[!.]*") if file.is_file())
    return sorted(file for file in files if not any(part[0] == "." for part in file.relative_to(path).parts))


def preprocess_all(paths: Sequence[Path]) -> list[Array | PictureError | None]:
    """Return what `pictures.preprocess` returns or raises for each file; it takes as many threads as PyTorch has."""
    console = Console(stderr=True)
    hidden = len(paths) < 100 or not console.is_terminal  # more take half a second: worth a progress bar
    # In threads, since Pillow and OpenCV work without Python's lock.
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        results = pool.map(_preprocess_or_return_error, paths)
        return list(track(results, "Classifying pictures", len(paths), console=console, disable=hidden))


def _preprocess_or_return_error(path: Path) -> Array | PictureError | None:
    try:
        return pictures.preprocess(path)
    except PictureError as error:
        return error


def classify(mlp: MLP, inputs: Mapping[Path, Array | None]) -> tuple[Tensor, list[list[Any]]]:
    """Classify N preprocessed pictures, (784,) in [0, 1] each, or None for a blank one.

    Returns:
        Probabilities, (N, 10), and rows with the columns of `HEADER`; a blank picture's are the file, `blank`, and "".
    """
    probabilities = mlp(stack(inputs.values())).softmax(1)
    best, digits = (pair.tolist() for pair in probabilities.topk(2))
    return probabilities, [
        [file, "blank", "", "", "", ""]
        if digit is None
        else [file, first, p, second, q, SEVERAL if _may_be_several(digit) else ""]
        for (file, digit), (p, q), (first, second) in zip(inputs.items(), best, digits, strict=True)
    ]


def stack(inputs: Collection[Array | None]) -> Tensor:
    """Put (784,) pixels in [0, 1] each into one tensor, (N, 784); a blank picture is all 0."""
    rows = [np.zeros(PIXELS) if digit is None else digit for digit in inputs]
    return torch.from_numpy(np.reshape(rows, (-1, PIXELS))).float()


def _may_be_several(digit: Array) -> bool:
    """Whether (784,) pixels may show more than one digit: high parts side by side, or very wide."""
    mask = (digit.reshape(SIDE, SIDE) > pictures.EDGE).astype(np.uint8)
    _, _, width, height = cv2.boundingRect(mask)
    boxes = cv2.connectedComponentsWithStats(mask)[2][1:]
    high = sorted((x, x + w) for x, _, w, h, _ in boxes.tolist() if h > 0.7 * height)
    return width > 1.7 * height or any(one[1] <= other[0] for one, other in pairwise(high))


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
    listed = rows[:LISTED]
    for file, digit, p, runner_up, q, note in listed:
        mark = "*" if note else ""
        numbers = ("blank", "", "") if digit == "blank" else (f"{digit}{mark}", f"{p:.1%}", f"{runner_up} ({q:.1%})")
        table.add_row(Text(printable(str(file), console.encoding), overflow="fold"), *numbers)
    with console.capture() as text:
        console.print(table)
    return text.get().rstrip() + f"\n* {SEVERAL}" * any(note for *_, note in listed)
