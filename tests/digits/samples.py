"""Ten digits, and pictures of them, for the tests."""

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mnist_lightning.digits import synthetic
from mnist_lightning.digits.ink import Array

DIGITS: Array = synthetic.draw_digits(10, 0)[0].numpy() / 255  # (10, 28, 28), each from 0 to 9 once


def enlarge(digit: Array, side: int) -> Array:
    """Ink, (side, side) in [0, 1]."""
    picture = Image.fromarray((digit * 255).astype(np.uint8)).resize((side, side), Image.Resampling.BICUBIC)
    return np.asarray(picture) / 255


def as_picture(ink: Array) -> Image.Image:
    return Image.fromarray((ink * 255).round().astype(np.uint8))


def on_paper(ink: Array, paper: Any = 255, pen: Any = 0) -> Array:
    """A picture, (H, W) or (H, W, 3) bytes, of a digit somewhere on a larger canvas."""
    canvas = np.pad(ink, ((30, 110), (90, 40)))
    paper, pen = np.asarray(paper, dtype=float), np.asarray(pen, dtype=float)
    picture: Array = paper + (pen - paper) * (canvas[..., None] if paper.ndim else canvas)
    return picture.round().astype(np.uint8)


def likeness(one: Array | None, other: Array | None) -> float:
    """Correlation of what the network sees of two pictures; their centres may be rounded to neighbouring pixels."""
    assert one is not None
    assert other is not None
    field = one.reshape(28, 28)
    moved = [np.roll(field, (y, x), (0, 1)).reshape(-1) for y in (-1, 0, 1) for x in (-1, 0, 1)]
    return max(float(np.corrcoef(field, other)[0, 1]) for field in moved)


def save(path: Path, picture: Image.Image, **kwargs: Any) -> Path:
    picture.save(path, **kwargs)
    return path
