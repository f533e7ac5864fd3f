"""What a network reads in pictures: rows of a CSV file, a table on the console, and a figure."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor

from mnist_lightning.digits import pictures, plots
from mnist_lightning.digits.pictures import Array
from mnist_lightning.engine.run import printable
from mnist_lightning.model import MLP, PIXELS

HEADER = ("file", "digit", "probability", "runner_up", "runner_up_probability")

# More would be no overview; all are in the CSV file.
LISTED, DRAWN = 100, 24


def read(mlp: MLP, seen: Mapping[Path, Array | None]) -> tuple[Tensor, list[list[Any]]]:
    """Read N digits, (784,) in [0, 1] each, or None for a blank picture.

    Returns:
        Probabilities, (N, 10), and rows with the columns of `HEADER`; a blank picture's are the file, `blank`, and "".
    """
    pixels = torch.zeros(len(seen), PIXELS)
    for row, digit in zip(pixels, seen.values(), strict=True):
        if digit is not None:
            row.copy_(torch.from_numpy(digit))
    probabilities = mlp(pixels).softmax(1)
    best, digits = (pair.tolist() for pair in probabilities.topk(2))
    return probabilities, [
        [file, "blank", "", "", ""] if digit is None else [file, first, p, second, q]
        for (file, digit), (p, q), (first, second) in zip(seen.items(), best, digits, strict=True)
    ]


def write_csv(path: str, rows: Sequence[Sequence[Any]]) -> None:
    """Write rows, probabilities with four digits. Names of files need not be text."""
    with Path(path).open("w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        cells = ([f"{cell:.4f}" if isinstance(cell, float) else cell for cell in row] for row in rows)
        csv.writer(file).writerows([HEADER, *cells])


def table(rows: Sequence[Sequence[Any]]) -> str:
    """The first rows, as wide as the console."""
    table = Table("Picture", box=box.SIMPLE_HEAD)
    for heading in ("Digit", "Probability", "Runner-up"):
        table.add_column(heading, justify="right", no_wrap=True)
    for file, digit, p, runner_up, q in rows[:LISTED]:
        numbers = ("blank", "", "") if digit == "blank" else (str(digit), f"{p:.1%}", f"{runner_up} ({q:.1%})")
        table.add_row(Text(printable(str(file)), overflow="fold"), *numbers)
    console = Console()
    with console.capture() as text:
        console.print(table)
    return text.get().rstrip()


def draw(path: str, seen: Mapping[Path, Array | None], probabilities: Tensor) -> None:
    """Draw the first pictures as given, as the network saw them, and what it read."""
    drawn = []
    for (file, digit), row in zip(list(seen.items())[:DRAWN], probabilities, strict=False):
        picture = pictures.load(file)
        picture.thumbnail((120, 120))
        drawn.append((picture, digit, row.numpy(), printable(file.name)))
    more = f": the first {len(drawn)} of {len(seen):,} pictures" if len(seen) > len(drawn) else ""
    plots.pictures_read(drawn, f"What the network read{more}").savefig(path, dpi=120)
