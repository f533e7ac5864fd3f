"""Tell a digit's ink from paper: dark on light or light on dark, in uneven light, among noise, lines and specks."""

import math
from operator import itemgetter
from typing import Any, TypeAlias

import cv2
import numpy as np
import numpy.typing as npt
from PIL import Image, ImageStat

Array: TypeAlias = npt.NDArray[Any]

# A digit is looked for at so many pixels along the longer side at most, and then anew in what was found.
VIEW = 280

# Tuned on 1,000 validation digits: pasted, shaded and blurred by tests/digits/paste.py, cut at their boxes, framed, and
# on squared paper.
CONNECTED = 0.15  # least ink of pixels that belong together
CONTRAST = 13  # least difference between ink and paper that is no blank, of 255; and 6 times the noise
HALF = 0.5  # least ink of what reaches the picture's edge: lines on the paper and shadows are fainter
TOUCHING = 0.1  # weight of a part that still reaches the edge: mostly a shadow or a frame
THIN = 0.25  # greatest part of its box that a frame covers
FILLED = 0.9  # least part of a tight picture that the digit is wide, and high
SPECK = 0.05  # least ink of a part of a digit, as a share of its largest part's; and least height of a framed one


def find_ink(picture: Image.Image) -> Array:
    """Return how much ink there is, (H, W) from 0 to 1: all 0 where the picture is blank.

    Of a picture longer than `VIEW` it is the part around the digit, smaller.
    """
    grey = whole = _grey(picture)
    while True:
        step = math.ceil(max(grey.size) / VIEW)
        view = _without_noise(np.asarray(grey.reduce(step)))
        candidates = [_dark_ink(values, tight) for tight in {False, grey is whole} for values in (view, 255 - view)]
        ink, _ = max(candidates, key=itemgetter(1))
        if step == 1 or not ink.any():
            return ink
        left, top, width, height = cv2.boundingRect((ink > 0).astype(np.uint8))
        margin = max(width, height) // 4 + 2
        box = step * np.array((left - margin, top - margin, left + width + margin, top + height + margin))
        closer = grey.crop(tuple(box.clip(0, 2 * grey.size).tolist()))
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
    axis = cv2.PCACompute(differences, mean=np.zeros((1, 3)), maxComponents=1)[1][0]
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
    darkness = _darkness(values, tight)
    ink, contrast = _scale(darkness)
    if not contrast:
        return ink, 0
    labels, mass, reaches_edge = _parts_of_digit(ink)
    largest = labels == mass.argmax()
    level = values[ink > 0.5].mean() + darkness[ink > 0.5].mean() / 2  # between ink and paper
    parts = mass >= max(SPECK * mass.max(), 1e-9)
    ink *= cv2.dilate(parts[labels].astype(np.uint8), np.ones((5, 5), np.uint8))  # with the faint pixels at their edges

    # A 0's hole differs from the 0 as much as ink from paper, but is smaller; a shadow differs less; and most of the
    # picture's edge is paper. So the score is the size times the contrast cubed, less where the edge is dark.
    inset = min(values.shape) // 24
    inner = values[inset : len(values) - inset, inset : values.shape[1] - inset]
    edge = float((np.concatenate([inner[0], inner[-1], inner[:, 0], inner[:, -1]]) < level).mean())
    _, _, width, height = cv2.boundingRect((largest & (ink > 0.5)).astype(np.uint8))
    fills = width >= FILLED * values.shape[1] and height >= FILLED * len(values) and reaches_edge[largest].any()
    return ink, 0 if tight and not fills else width * height * contrast**3 * (1.05 - edge)


def _darkness(values: Array, tight: bool) -> Array:
    """How much darker each pixel is than the paper around it, (H, W) bytes."""
    # The black hat: morphological closing removes what is dark and narrower than the window; paper, its shades and
    # edges of shadows stay. Pictures that are not tight are padded, so that shadows at their edges stay, too. Windows
    # are odd, as even ones would move the picture by a pixel.
    window = max(9, max(values.shape) // (6 if tight else 8) * 2 + 1)
    border = 0 if tight else window
    padded = cv2.copyMakeBorder(values, border, border, border, border, cv2.BORDER_REPLICATE)
    darkness = cv2.morphologyEx(padded, cv2.MORPH_BLACKHAT, np.ones((window, window), np.uint8))
    return darkness[border : border + len(values), border : border + values.shape[1]]


def _scale(darkness: Array) -> tuple[Array, float]:
    """Ink from 0, as dark as paper, to 1; and its contrast, 0 where the picture is blank."""
    # Most of a picture is paper; the triangle method (Zack, Rogers and Latt 1977) finds where its peak ends.
    _, dark = cv2.threshold(darkness, 0, 255, cv2.THRESH_TRIANGLE)
    mean, deviation = cv2.meanStdDev(darkness, mask=255 - dark)
    noise = float(deviation[0, 0])
    signal = darkness - np.float32(mean[0, 0])
    contrast = float(signal.max())
    if contrast < max(CONTRAST, 6 * noise):
        return np.zeros_like(signal), 0
    full = float(np.quantile(signal[signal > contrast / 2], 0.75))
    none = min(full / 2, 3 * noise)
    return np.clip((signal - none) / (full - none), 0, 1), contrast


def _parts_of_digit(ink: Array) -> tuple[Array, Array, Array]:
    """What belongs together: labels, (H, W); the ink of each label, 0 for what is no digit; what reaches the edge."""
    labels, boxes, touching = _parts(ink > CONNECTED)
    reaches_edge = touching[labels]
    labels, boxes, touching = _parts((ink > CONNECTED) & ~(reaches_edge & (ink < HALF)))
    mass = np.bincount(labels.ravel(), ink.ravel()) * np.where(touching, TOUCHING, 1)
    mass[[0, *_frames(labels, boxes)]] = 0  # 0 is the background's label
    return labels, mass, reaches_edge


def _parts(mask: Array) -> tuple[Array, Array, Array]:
    """Connected parts: labels, (H, W), 0 for the background; of each label its box and whether it reaches the edge."""
    _, labels, boxes, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8))
    left, top, width, height, _ = boxes.T
    touching = (left == 0) | (top == 0) | (left + width == mask.shape[1]) | (top + height == len(mask))
    touching[0] = False
    return labels, boxes, touching


def _frames(labels: Array, boxes: Array) -> list[int]:
    """Labels of thin parts that are drawn around another one: the frame of a digit."""
    contours, tree = cv2.findContours((labels > 0).astype(np.uint8), cv2.RETR_TREE, cv2.CHAIN_APPROX_SIMPLE)
    frames = []
    for index, contour in enumerate(contours):
        hole = tree[0, index, 3]
        around = tree[0, hole, 3] if hole >= 0 else -1
        if around >= 0:  # the hole is in what is drawn around this part
            part, frame = (labels[y, x] for x, y in (contour[0, 0], contours[around][0, 0]))
            _, _, width, height, area = boxes[frame]
            if area <= THIN * width * height and boxes[part][3] >= SPECK * height:
                frames.append(int(frame))
    return frames
