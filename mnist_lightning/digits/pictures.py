"""Users' own pictures, each of one digit, cleaned as MNIST was made."""

import contextlib
import math
import warnings
from operator import itemgetter
from pathlib import Path
from typing import Any, TypeAlias

import cv2
import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, ImageStat, UnidentifiedImageError

from mnist_lightning.model import SIDE

Array: TypeAlias = npt.NDArray[Any]

FORMATS = ("PNG", "JPEG", "WEBP", "AVIF", "GIF", "BMP", "TIFF")

# More may be a decompression bomb. Pillow checks before a large JPEG is decoded at a smaller size, so `load` does it.
MAX_PIXELS = 89_478_485
Image.MAX_IMAGE_PIXELS = None

# Pillow warns of broken metadata, which no user can mend. Set once, since filters hold for all threads.
warnings.filterwarnings("ignore", module=r"PIL\.")

# MNIST's digits were fitted into a box of 20 pixels and put into a field of 28 by their centre of mass.
BOX = 20

# A digit is looked for at so many pixels along the longer side at most, and then anew in what was found.
VIEW = 280

# The rest was tuned on 1,000 validation digits: pasted, shaded and blurred as tests/digits/paste.py does, cut at their
# boxes, framed, and on squared paper.
EDGE = 0.2  # least ink inside of the box
CONNECTED = 0.15  # least ink of pixels that belong together
CONTRAST = 13  # least difference between ink and paper that is no blank, of 255; and 6 times the noise
HALF = 0.5  # least ink of what reaches the picture's edge: lines on the paper and shadows are fainter
TOUCHING = 0.1  # weight of a part that still reaches the edge: mostly a shadow or a frame
THIN = 0.25  # greatest part of its box that a frame covers
FILLED = 0.9  # least part of a tight picture that the digit is wide, and high
FRAMED = 0.15  # least height of an inner part, as a share of the outer one's, that makes the outer one a frame


class PictureError(ValueError):
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
            # Much faster: a large JPEG is decoded at a half, a quarter or an eighth of its size. Not a progressive one:
            # the decoder keeps all of it.
            if not picture.info.get("progressive"):
                picture.draft(None, (2 * VIEW, 2 * VIEW))
            if math.prod(picture.size) > MAX_PIXELS:
                raise PictureError(f"has more than {MAX_PIXELS:,} pixels, which may be an attack")
            picture.load()
            with contextlib.suppress(Exception):  # metadata may be broken as they like
                ImageOps.exif_transpose(picture, in_place=True)
            return _to_8_bits(picture) if picture.mode.startswith(("I", "F")) else picture
    except PictureError:
        raise
    except UnidentifiedImageError:
        raise PictureError(f"is none of {', '.join(FORMATS)}; save it as one of them") from None
    except Exception as error:  # whatever a damaged file may lead to
        raise PictureError(f"cannot be read: {getattr(error, 'strerror', None) or error}") from error


def _to_8_bits(picture: Image.Image) -> Image.Image:
    # From the darkest to the brightest: of 16 bits a camera may use but some.
    values = np.nan_to_num(np.asarray(picture, dtype=np.float64))
    return Image.fromarray(np.interp(values, (values.min(), values.max()), (0, 255)).astype(np.uint8))


def find_ink(picture: Image.Image) -> Array:
    """Tell a digit from its background: dark on light or light on dark, in uneven light, among noise.

    Returns:
        (H, W) from 0 (background) to 1 (ink): the whole picture, or of one longer than `VIEW` the part around the
        digit, smaller. All 0 where the picture is blank.
    """
    grey = whole = _grey(picture)
    while True:
        step = math.ceil(max(grey.size) / VIEW)
        view = _without_noise(np.asarray(grey.reduce(step)))
        found = [_dark_ink(values, tight) for tight in {False, grey is whole} for values in (view, 255 - view)]
        ink, _ = max(found, key=itemgetter(1))
        if step == 1 or not ink.any():
            return ink
        left, top, width, height = cv2.boundingRect((ink > 0).astype(np.uint8))
        margin = max(width, height) // 4 + 2
        right, bottom = (left + width + margin) * step, (top + height + margin) * step
        left, top = max(0, left - margin) * step, max(0, top - margin) * step
        closer = grey.crop((left, top, min(grey.width, right), min(grey.height, bottom)))
        if math.ceil(max(closer.size) / VIEW) == step:
            return ink
        grey = closer


def _grey(picture: Image.Image) -> Image.Image:
    """A picture of at most 8 bits a channel in mode L: one value for each pixel, 0 to 255."""
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        # Where all that shows is bright, it is ink for a dark page.
        shows = picture.getchannel("A").point(lambda alpha: 255 * (alpha > 127))
        darkest = ImageStat.Stat(picture.convert("L"), shows).extrema[0][0]
        paper = Image.new("RGBA", picture.size, "black" if 127 < darkest <= 255 else "white")
        picture = Image.alpha_composite(paper, picture)
    if picture.mode in ("1", "L"):
        return picture.convert("L")
    picture = picture.convert("RGB")
    # Along the principal component of the differences of neighbours: red ink may be as bright as green paper.
    few = np.asarray(picture.reduce(math.ceil(max(picture.size) / 100)), dtype=np.float64)
    differences = (few - cv2.blur(few, (9, 9), borderType=cv2.BORDER_REPLICATE)).reshape(-1, 3)
    axis = np.linalg.eigh(differences.T @ differences)[1][:, -1]
    axis *= (-1 if axis.sum() < 0 else 1) / np.abs(axis).sum()
    return picture.convert("L", (*axis.tolist(), -255 * float(axis.clip(max=0).sum())))


def _without_noise(grey: Array) -> Array:
    # Where there is none, most neighbours are equal.
    if min(grey.shape) < 3 or np.median(np.abs(np.diff(grey[::4].astype(np.int16), 2))) < 1:
        return grey
    return cv2.GaussianBlur(grey, (0, 0), max(0.7, max(grey.shape) / 150))


def _dark_ink(values: Array, tight: bool) -> tuple[Array, float]:
    """The dark ink in a picture, (H, W) in [0, 1], and how much it looks like a digit: 0 where there is none.

    In a tight picture, one that was cut at the digit's box, only a digit as large as the picture counts.
    """
    # Morphological closing removes what is dark and narrower than the window; paper, its shades and edges of shadows
    # stay. Pictures that are not tight are padded, so that shadows at their edges stay, too. Windows are odd, as even
    # ones would move the picture by a pixel.
    window = max(9, max(values.shape) // (6 if tight else 8) * 2 + 1)
    border = 0 if tight else window
    padded = cv2.copyMakeBorder(values, border, border, border, border, cv2.BORDER_REPLICATE)
    closed = cv2.morphologyEx(padded, cv2.MORPH_CLOSE, np.ones((window, window), np.uint8))
    darkness = closed[border : border + len(values), border : border + values.shape[1]] - values

    # A tenth of a picture and more is paper, and how dark its lightest part is follows from noise alone. For a normal
    # distribution the tenth percentile lies 0.77 standard deviations above the second, and the mean 1.28 above that.
    few = darkness[:: window // 16 + 1, :: window // 16 + 1]
    second, tenth = np.quantile(few, (0.02, 0.1))
    noise = float(tenth - second) / 0.77
    signal = darkness - np.float32(tenth + 1.28 * noise)
    contrast = float(signal.max())
    if contrast < max(CONTRAST, 6 * noise):
        return np.zeros_like(signal), 0
    full = float(np.quantile(signal[signal > contrast / 2], 0.75))
    none = min(full / 2, 3 * noise)
    ink = np.clip((signal - none) / (full - none), 0, 1)

    level = values[ink > 0.5].mean() + darkness[ink > 0.5].mean() / 2  # between ink and paper
    labels, boxes, mass = _parts(ink, ink > CONNECTED)
    touching = np.isin(labels, _rim(labels)) & (labels > 0)
    labels, boxes, mass = _parts(ink, (ink > CONNECTED) & ~(touching & (ink < HALF)))
    mass[np.unique(_rim(labels))] *= TOUCHING
    mass[0] = 0  # the background's label
    for part in np.flatnonzero(mass > 0.05 * mass.max()):
        if _frames(part, labels, boxes):
            mass[part] = 0
    largest = int(mass.argmax())
    parts = mass >= max(0.05 * mass.max(), 1e-9)  # the others are specks
    ink *= cv2.dilate(parts[labels].astype(np.uint8), np.ones((5, 5), np.uint8))  # with the faint pixels at their edges
    # A 0's hole differs from the 0 as much as ink from paper, but is smaller; a shadow differs less; and most of the
    # picture's edge is paper. So the score is the size times the contrast cubed, less where the edge is dark.
    inset = min(values.shape) // 24
    rim = _rim(values[inset : len(values) - inset, inset : values.shape[1] - inset])
    edge = float((rim < level).mean())
    _, _, width, height = cv2.boundingRect(((labels == largest) & (ink > 0.5)).astype(np.uint8))
    fills = width >= FILLED * values.shape[1] and height >= FILLED * len(values) and touching[labels == largest].any()
    if tight and not fills:
        return ink, 0
    return ink, width * height * contrast**3 * (1.05 - edge)


def _parts(ink: Array, mask: Array) -> tuple[Array, Array, Array]:
    """What belongs together: labels, (H, W), 0 for the background; of each label its box and how much ink it has."""
    _, labels, boxes, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8))
    return labels, boxes[:, :4], np.bincount(labels.ravel(), ink.ravel())


def _rim(values: Array) -> Array:
    return np.concatenate([values[0], values[-1], values[:, 0], values[:, -1]])


def _frames(part: np.intp, labels: Array, boxes: Array) -> bool:
    """Whether a part is drawn around another one: the frame of a digit."""
    left, top, width, height = boxes[part]
    if (labels == part).sum() > THIN * width * height:
        return False
    x, y, w, h = boxes.T
    inside = (x > left) & (x + w < left + width) & (y > top) & (y + h < top + height) & (h >= FRAMED * height)
    return any(not (labels[b : b + d, a : a + c] == part).any() for a, b, c, d in boxes[inside])


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
