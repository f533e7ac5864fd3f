"""Users' own pictures, each of one digit, cleaned as MNIST was made."""

import math
import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from glob import glob
from operator import itemgetter
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageFilter, ImageOps, UnidentifiedImageError
from scipy import ndimage
from torch.utils.data import DataLoader

from mnist_lightning.model import SIDE

Array: TypeAlias = npt.NDArray[Any]

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF")
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")

# MNIST's digits were fitted into a box of 20 pixels and put into a field of 28 by their centre of mass.
BOX = 20

# A digit is looked for at so many pixels along the longer side at most, and then anew in what was found.
VIEW = 280

# So many pictures take half a second and more: worth a progress bar, and processes for all CPU cores.
MANY = 100

# The rest was chosen on 1,500 validation digits, pasted, shaded, blurred and saved as the tests do with others.
EDGE = 0.2  # least ink inside of the box
CONNECTED = 0.15  # least ink of pixels that belong together
CONTRAST = 13  # least difference between ink and paper that is no blank, of 255; and 6 times the noise
TOUCHING = 0.1  # weight of what reaches the picture's edge: shadows mostly do, digits seldom


class PictureError(ValueError):
    """A file that is no picture, or one of too many pixels; the message says which, without the file's name."""


# What the network sees of a picture, (784,) in [0, 1]; None where the picture is blank.
Reading: TypeAlias = Array | PictureError | None


def find(paths: Sequence[str]) -> list[Path]:
    """The files that paths mean, each once.

    Args:
        paths: Files; folders, for all pictures in them and in their folders; globs.

    Raises:
        ValueError: A path means no file.
    """
    found: list[Path] = []
    for path in paths:
        matches = [path] if Path(path).exists() else sorted(glob(path, recursive=True))  # noqa: PTH207 (takes absolute ones)
        files = [file for match in matches for file in _files(Path(match))]
        if not files:
            raise ValueError(f"there is no picture {path}")
        found += files
    return list(dict.fromkeys(found))


def _files(path: Path) -> Iterable[Path]:
    if not path.is_dir():
        return [path]
    return sorted(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file())


def read_all(paths: Sequence[Path]) -> Iterator[Reading]:
    """What `read` returns or raises for each file; many are read on all CPU cores."""
    # SLURM and containers may allow but some of the machine's.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    workers = cores if len(paths) >= MANY else 0
    # Any sequence will do as a dataset, and what collates a batch runs in a worker.
    for readings in DataLoader(paths, batch_size=20, num_workers=workers, collate_fn=_read_each):  # type: ignore[arg-type]
        yield from readings


def _read_each(paths: Sequence[Path]) -> list[Reading]:
    readings: list[Reading] = []
    for path in paths:
        try:
            readings.append(read(path))
        except PictureError as error:
            readings.append(error)
    return readings


def read(path: Path) -> Array | None:
    """Read a picture and make it what the network was trained on.

    Returns:
        (784,) pixels in [0, 1], or None where the picture is blank.

    Raises:
        PictureError: The file is no picture, is damaged, or has too many pixels.
    """
    return normalise(find_ink(load(path)))


def load(path: Path) -> Image.Image:
    """Open a PNG, JPEG, WebP, BMP or TIFF, upright.

    Raises:
        PictureError: The file is no picture, is damaged, or has too many pixels.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            picture = Image.open(path, formats=FORMATS)
        with picture:
            # Much faster: a large JPEG is decoded at a half, a quarter or an eighth of its size.
            picture.draft(None, (2 * VIEW, 2 * VIEW))
            picture.load()
            ImageOps.exif_transpose(picture, in_place=True)
            return _to_8_bits(picture) if picture.mode.startswith(("I", "F")) else picture
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise PictureError(f"has more than {Image.MAX_IMAGE_PIXELS:,} pixels, which may be an attack") from None
    except UnidentifiedImageError:
        raise PictureError(f"is none of {', '.join(FORMATS)}") from None
    except OSError as error:
        raise PictureError(f"cannot be read: {error.strerror or error}") from error
    except Exception as error:  # whatever a damaged file may lead to
        raise PictureError(f"is damaged: {error}") from error


def _to_8_bits(picture: Image.Image) -> Image.Image:
    # From the darkest to the brightest: of 16 bits a camera may use but some.
    values = np.nan_to_num(np.asarray(picture, dtype=np.float64))
    low, high = values.min(), values.max()
    return Image.fromarray(((values - low) * (255 / max(high - low, 1e-9))).astype(np.uint8))


def find_ink(picture: Image.Image) -> Array:
    """Tell a digit from its background: dark on light or light on dark, in uneven light, among noise.

    Returns:
        (H, W) from 0 (background) to 1 (ink): the whole picture, or of one longer than `VIEW` the part around the
        digit, smaller. All 0 where the picture is blank.
    """
    grey = _grey(picture)
    while True:
        step = math.ceil(max(grey.size) / VIEW)
        view = _without_noise(grey.reduce(step))
        ink, _ = max(_dark_ink(view), _dark_ink(ImageOps.invert(view)), key=itemgetter(1))
        if step == 1 or not ink.any():
            return ink
        top, bottom, left, right = _bounds(ink > 0)
        margin = max(bottom - top, right - left) // 4 + 2
        left, top = max(0, left - margin) * step, max(0, top - margin) * step
        right, bottom = min(grey.width, (right + margin) * step), min(grey.height, (bottom + margin) * step)
        closer = grey.crop((left, top, right, bottom))
        if math.ceil(max(closer.size) / VIEW) == step:
            return ink
        grey = closer


def _grey(picture: Image.Image) -> Image.Image:
    """A picture of at most 8 bits a channel in mode L: one value for each pixel, 0 to 255."""
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    if picture.mode in ("1", "L"):
        return picture.convert("L")
    picture = picture.convert("RGB")
    # Along the principal component of the differences of neighbours: red ink may be as bright as green paper.
    few = np.asarray(picture.reduce(math.ceil(max(picture.size) / 100)), dtype=np.float64)
    differences = (few - ndimage.uniform_filter(few, (9, 9, 1), mode="nearest")).reshape(-1, 3)
    axis = np.linalg.eigh(differences.T @ differences)[1][:, -1]
    axis *= (-1 if axis.sum() < 0 else 1) / np.abs(axis).sum()
    return picture.convert("L", (*axis.tolist(), -255 * float(axis.clip(max=0).sum())))


def _without_noise(grey: Image.Image) -> Image.Image:
    # Where there is none, most neighbours are equal.
    if grey.width < 3 or np.median(np.abs(np.diff(np.asarray(grey)[::4].astype(np.int16), 2))) < 1:
        return grey
    return grey.filter(ImageFilter.GaussianBlur(max(0.7, max(grey.size) / 150)))


def _dark_ink(grey: Image.Image) -> tuple[Array, float]:
    """The dark ink in a picture, (H, W) in [0, 1], and how much it looks like a digit: 0 where there is none."""
    values = np.asarray(grey)
    # Closing fills what is dark and narrower than the window. It leaves the paper, its shades and the edges of shadows.
    window = max(grey.size) // 4 + 1
    padded = np.pad(values, window - 1, mode="edge")
    darkness = _extreme(np.minimum, _extreme(np.maximum, padded, window), window) - values

    # Most of a picture is paper, and how dark its lighter half is follows from noise alone. For a normal distribution
    # the mean lies 0.67 standard deviations above the lower quartile, which lies 0.97 above the twentieth.
    lowest, quartile = np.quantile(darkness[::4, ::4], (0.05, 0.25))
    noise = float(quartile - lowest)
    signal = darkness - np.float32(quartile + 0.67 * noise)
    contrast = float(signal.max())
    if contrast < max(CONTRAST, 6 * noise):
        return np.zeros_like(signal), 0
    full = float(np.quantile(signal[signal > contrast / 2], 0.75))
    none = min(full / 2, 3 * noise)
    ink = np.clip((signal - none) / (full - none), 0, 1)

    labels, _ = ndimage.label(ink > CONNECTED, np.ones((3, 3)))
    mass = np.bincount(labels.ravel(), ink.ravel())
    mass[np.unique(np.concatenate([labels[0], labels[-1], labels[:, 0], labels[:, -1]]))] *= TOUCHING
    mass[0] = 0  # the background's label
    parts = mass >= max(0.05 * mass.max(), 1e-9)  # the others are specks
    mask = parts[labels]
    top, bottom, left, right = _bounds(mask & (ink > 0.5))
    ink *= _extreme(np.maximum, np.pad(mask, 2), 5)  # with the faint pixels at their edges
    # The hole of a 0 differs from the 0 as much as that does from the paper, but is smaller; a shadow differs less.
    score = (bottom - top) * (right - left) * contrast**3
    return ink, score * (TOUCHING if mass.sum() <= TOUCHING * ink.sum() else 1)


def _extreme(pick: np.ufunc, values: Array, window: int) -> Array:
    """The smallest or largest value in each square window: (H, W) to (H - window + 1, W - window + 1).

    By doubling, in a twentieth of the time that SciPy's filters take.
    """
    for _ in range(2):
        reach = 1
        while reach < window:
            shift = min(reach, window - reach)
            values = pick(values[shift:], values[:-shift])
            reach += shift
        values = values.T
    return values


def _bounds(mask: npt.NDArray[np.bool_]) -> tuple[int, int, int, int]:
    """Top, bottom, left and right of what is true; bottom and right are the first without. All 0 where nothing is."""
    rows, columns = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
    return (int(rows[0]), int(rows[-1]) + 1, int(columns[0]), int(columns[-1]) + 1) if len(rows) else (0, 0, 0, 0)


def normalise(ink: Array) -> Array | None:
    """Bring a digit to the size and place of MNIST's, as its home page describes it (LeCun, Cortes and Burges).

    `demo.html` does the same in JavaScript.

    Args:
        ink: (H, W) from 0 (background) to 1 (ink).

    Returns:
        (784,) pixels in [0, 1]: the digit in a box of 20 by 20 with its aspect ratio kept, its centre of mass at pixel
        14 along both axes; or None where there is no ink.
    """
    top, bottom, left, right = _bounds(ink > EDGE)
    if bottom == 0:
        return None
    crop = Image.fromarray(ink[top:bottom, left:right].astype(np.float32))
    width, height = (max(1, _round(length * BOX / max(crop.size))) for length in crop.size)
    digit = np.asarray(crop.resize((width, height), Image.Resampling.BILINEAR), dtype=np.float64)
    digit = digit / digit.max()
    y, x = (_place(digit.sum(axis)) for axis in (1, 0))
    field = np.zeros((SIDE, SIDE))
    field[y : y + height, x : x + width] = digit
    return field.reshape(-1)


def _place(mass: Array) -> int:
    """Where along an axis a digit of these (L,) masses begins."""
    centre = float(mass @ np.arange(len(mass)) / mass.sum())
    return min(SIDE - len(mass), max(0, _round(SIDE / 2 - centre)))


def _round(number: float) -> int:
    return math.floor(number + 0.5)
