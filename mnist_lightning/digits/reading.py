"""What a network reads in pictures: rows of a CSV file, a table on the console, and a figure."""

import csv
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from glob import glob
from importlib.metadata import distribution
from itertools import pairwise
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor

from mnist_lightning.digits import pictures
from mnist_lightning.digits.interpretation import attributions, color_by_attribution
from mnist_lightning.digits.pictures import Array, PictureError
from mnist_lightning.engine.run import printable
from mnist_lightning.model import CLASSES, MLP, PIXELS, SIDE

SUFFIXES = (".png", ".jpg", ".jpeg", ".jfif", ".webp", ".avif", ".gif", ".bmp", ".tif", ".tiff")

HEADER = ("file", "digit", "probability", "runner_up", "runner_up_probability", "note")

SEVERAL = "more than one digit? read as one"

# More would be no overview; all are in the CSV file.
LISTED, DRAWN = 100, 24

# Of the figure, in pixels: a picture's part of it, what the heading takes, and the side of a picture.
WIDTH, HEIGHT, HEADING, TILE = 430, 320, 84, 4 * SIDE
FONT = "matplotlib/mpl-data/fonts/ttf/DejaVuSans.ttf"  # what it lacks is drawn as an empty box


def find(paths: Sequence[str]) -> tuple[list[Path], str]:
    """The files that paths mean, each once; and a line on what was left out of folders, or "".

    Args:
        paths: Files; folders, for all pictures in them and in their folders, hidden ones excepted; globs.

    Raises:
        ValueError: A path means no file.
    """
    found: list[Path] = []
    others: Counter[str] = Counter()
    for path in paths:
        matches = [path] if Path(path).exists() else sorted(glob(path, recursive=True))  # noqa: PTH207 (takes absolute ones)
        given = dict.fromkeys(map(Path, matches))
        files = [file for match in given for file in _files(match)]
        taken = [file for file in files if file in given or file.suffix.lower() in SUFFIXES]
        left_out = Counter(file.suffix.lower() or file.name for file in set(files) - set(taken))
        if not taken:
            raise ValueError(f"there is no picture {path}" + f" ({_kinds(left_out)})" * bool(left_out))
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


def preprocess_all(paths: Sequence[Path]) -> Iterator[Array | PictureError | None]:
    """What `pictures.preprocess` returns or raises for each file, by as many threads as PyTorch has."""
    # In threads, since Pillow and OpenCV work without Python's lock.
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        yield from pool.map(_preprocess_or_say, paths)


def _preprocess_or_say(path: Path) -> Array | PictureError | None:
    try:
        return pictures.preprocess(path)
    except PictureError as error:
        return error


def classify(mlp: MLP, seen: Mapping[Path, Array | None]) -> tuple[Tensor, list[list[Any]]]:
    """Classify N digits, (784,) in [0, 1] each, or None for a blank picture.

    Returns:
        Probabilities, (N, 10), and rows with the columns of `HEADER`; a blank picture's are the file, `blank`, and "".
    """
    probabilities = mlp(_stack(seen.values())).softmax(1)
    best, digits = (pair.tolist() for pair in probabilities.topk(2))
    return probabilities, [
        [file, "blank", "", "", "", ""]
        if digit is None
        else [file, first, p, second, q, SEVERAL if _several(digit) else ""]
        for (file, digit), (p, q), (first, second) in zip(seen.items(), best, digits, strict=True)
    ]


def _stack(digits: Collection[Array | None]) -> Tensor:
    """Digits as one tensor, (N, 784) in [0, 1]; a blank one is all 0."""
    rows = [np.zeros(PIXELS) if digit is None else digit for digit in digits]
    return torch.from_numpy(np.reshape(rows, (-1, PIXELS))).float()


def _several(digit: Array) -> bool:
    """Whether what the network sees, (784,), may be more than one digit: high parts side by side, or very wide."""
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


def draw(path: str, seen: Mapping[Path, Array | None], probabilities: Tensor, mlp: MLP) -> None:
    """Draw the first pictures as given, as the network saw them, what it read, and below why, three to a row.

    With Pillow, since importing Matplotlib and drawing with it take longer than reading the pictures.
    """
    drawn = list(seen.items())[:DRAWN]
    columns = min(3, len(drawn))
    figure = Image.new("RGB", (columns * WIDTH, -(-len(drawn) // columns) * HEIGHT + HEADING), "white")
    pen = ImageDraw.Draw(figure)
    font_file = str(distribution("matplotlib").locate_file(FONT))
    fonts = {size: ImageFont.truetype(font_file, size) for size in (12, 14, 20)}

    def write(x: float, y: float, text: str, size: int = 14) -> None:
        pen.text((x, y), text, "black", fonts[size], anchor="mm", align="center", spacing=10)

    def enlarged(digit: Array) -> Image.Image:
        return Image.fromarray(digit).resize((TILE, TILE), Image.Resampling.NEAREST)

    def show(picture: Image.Image, left: int, top: int, title: str) -> None:
        corner = left + (TILE - picture.width) // 2, top + (TILE - picture.height) // 2
        figure.paste(picture, corner, picture if picture.mode == "RGBA" else None)
        pen.rectangle((left - 1, top - 1, left + TILE, top + TILE), outline="lightgray")
        write(left + TILE / 2, top - 14, title)

    more = f": the first {len(drawn)} of {len(seen):,} pictures" if len(seen) > len(drawn) else ""
    write(figure.width / 2, HEADING - 50, f"What the network read{more}", 20)
    write(figure.width / 2, HEADING - 18, "Blue (dark) ink speaks for it, orange (light) for the runner-up")
    pixels = _stack([digit for _, digit in drawn])
    best = probabilities[: len(drawn)].topk(2).indices
    shares = torch.eye(CLASSES)[best]
    says, constants, _ = attributions(mlp, pixels, shares[:, 0] - shares[:, 1])
    inks = (255 * color_by_attribution(pixels, says)).byte().view(-1, SIDE, SIDE, 4).numpy()
    greys = (255 * (1 - pixels)).byte().view(-1, SIDE, SIDE).numpy()
    for index, ((file, digit), row) in enumerate(zip(drawn, probabilities.tolist(), strict=False)):
        left, top = index % columns * WIDTH + 14, index // columns * HEIGHT + HEADING + 24
        given = pictures.load(file).convert("RGBA")
        given.thumbnail((TILE, TILE))
        given = Image.alpha_composite(Image.new("RGBA", given.size, "silver"), given)  # for white ink on nothing
        name = printable(file.name)
        show(given, left, top, name if len(name) <= 16 else f"{name[:7]}…{name[-8:]}")
        middle, right = left + TILE + 10, left + 2 * TILE + 22
        show(enlarged(greys[index]), middle, top, "as seen")
        first, second = best[index].tolist()
        write(right + 8 * CLASSES, top - 14, "blank" if digit is None else f"{first}  ({row[first]:.1%})")
        if digit is None:
            continue
        for number, probability in enumerate(row):
            x, bottom = right + 16 * number, top + TILE - 14
            color = "#d1602a" if number == first else "#4878a8"
            pen.rectangle((x + 2, round(bottom - probability * (TILE - 14)), x + 13, bottom), color)
            write(x + 8, bottom + 11, str(number), 12)
        pen.line((right, bottom, right + 16 * CLASSES, bottom), "black")
        show(enlarged(inks[index]), middle, top + TILE + 36, f"why {first}, not {second}")
        each, constant = says[index], constants[index]
        terms = {f"ink for {first}": each.clamp(min=0), f"ink for {second}": each.clamp(max=0), "constant": constant}
        lines = [f"{name} {part.sum():+.1f}" for name, part in terms.items()] + [f"= {each.sum() + constant:+.1f}"]
        write(right + 8 * CLASSES, top + 3 * TILE / 2 + 36, "\n".join(lines))
    figure.save(path, "PNG")
