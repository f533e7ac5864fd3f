"""Users' own pictures, each of one digit, cleaned as MNIST was made."""

import contextlib
import math
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from mnist_lightning.digits.ink import VIEW, Array, find_ink
from mnist_lightning.engine.console import JobError
from mnist_lightning.model import SIDE

FORMATS = ("PNG", "JPEG", "WEBP", "AVIF", "GIF", "BMP", "TIFF")

# MNIST's digits were fitted into a box of 20 pixels and put into a field of 28 by their centre of mass.
BOX = 20
EDGE = 0.2  # least ink inside of the box


class PictureError(JobError):
    """A file that is no picture, or one of too many pixels; the message says which, without the file's name."""


def preprocess(path: Path) -> Array | None:
    """Read a picture and make it what the network was trained on.

    Returns:
        (784,) pixels in [0, 1], or None where the picture is blank.

    Raises:
        PictureError: The file is no picture, is damaged, or has too many pixels.
    """
    return normalise(find_ink(load(path)))


def load(path: Path) -> Image.Image:
    """Open a picture of one of `FORMATS`, upright; of a moving one its first frame.

    Raises:
        PictureError: The file is no picture, is damaged, or has too many pixels.
    """
    try:
        with Image.open(path, formats=FORMATS) as picture:
            picture.draft(None, (2 * VIEW, 2 * VIEW))  # much faster: a large JPEG is decoded at an eighth of its size
            picture.load()
            with contextlib.suppress(Exception):  # metadata may be broken as they like
                ImageOps.exif_transpose(picture, in_place=True)
            return _to_8_bits(picture) if picture.mode.startswith(("I", "F")) else picture
    except UnidentifiedImageError:
        raise PictureError(f"is none of {', '.join(FORMATS)}; save it as one of them") from None
    except Exception as error:  # whatever a damaged file may lead to
        raise PictureError(f"cannot be read: {getattr(error, 'strerror', None) or error}") from error


def _to_8_bits(picture: Image.Image) -> Image.Image:
    # From the darkest to the brightest: of 16 bits a camera may use but some.
    values = np.nan_to_num(np.asarray(picture, dtype=np.float64))
    return Image.fromarray(cv2.normalize(values, np.empty(0), 0, 255, cv2.NORM_MINMAX, cv2.CV_8U))


def normalise(ink: Array) -> Array | None:
    """Bring a digit to the size and place of MNIST's, as its home page describes it (LeCun, Cortes and Burges).

    `demo.html` does the same in JavaScript.

    Args:
        ink: (H, W) from 0 (background) to 1 (ink).

    Returns:
        (784,) pixels in [0, 1]: the digit in a box of 20 by 20 with its aspect ratio kept, its centre of mass at pixel
        14 along both axes; or None where there is no ink.
    """
    left, top, width, height = cv2.boundingRect((ink > EDGE).astype(np.uint8))
    if not height:
        return None
    crop = Image.fromarray(ink[top : top + height, left : left + width].astype(np.float32))
    width, height = (max(1, _round(length * BOX / max(crop.size))) for length in crop.size)
    digit = np.asarray(crop.resize((width, height), Image.Resampling.BILINEAR), dtype=np.float64)
    digit = digit / digit.max()
    mass = cv2.moments(digit)
    y, x = _corner(mass["m01"] / mass["m00"], height), _corner(mass["m10"] / mass["m00"], width)
    field = np.zeros((SIDE, SIDE))
    field[y : y + height, x : x + width] = digit
    return field.reshape(-1)


def _corner(centre: float, length: int) -> int:
    """Where along an axis a digit of this length begins, whose centre of mass lies so far behind its beginning."""
    return min(SIDE - length, max(0, _round(SIDE / 2 - centre)))


def _round(number: float) -> int:
    return math.floor(number + 0.5)
