"""Test digits as strangers may hand them in; nobody tuned on them.

`python tests/digits/paste.py data mine` writes nine into `mine/`, of MNIST's files below `data/`.
"""

import sys
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFilter

from mnist_lightning.datamodule import MNISTDataModule


def paste(digit: npt.NDArray[np.float32], random: np.random.Generator) -> Image.Image:
    """A digit, 24 to 800 pixels high, on a larger canvas: tinted, maybe inverted, blurred, shaded, and noisy."""
    height = round(float(np.exp(random.uniform(np.log(24), np.log(800)))))
    side = round(28 * height / 20)
    ink = Image.fromarray((digit * 255).astype(np.uint8)).resize((side, side), Image.Resampling.BICUBIC)
    width, depth = (side + int(random.uniform(0, 2 * side)) for _ in range(2))
    canvas = Image.new("L", (width, depth))
    canvas.paste(ink, (int(random.integers(width - side + 1)), int(random.integers(depth - side + 1))))
    if random.random() < 0.5:
        canvas = canvas.filter(ImageFilter.GaussianBlur(random.uniform(0, 0.03) * height))

    dark, light = random.uniform(0, 0.3, 3), random.uniform(0.65, 1, 3)
    paper, pen = (dark, light) if random.random() < 0.5 else (light, dark)
    picture = paper + (pen - paper) * (np.asarray(canvas) / 255)[..., None]
    if random.random() < 0.6:  # light from one side
        turn = random.uniform(0, 2 * np.pi)
        y, x = np.mgrid[0 : 1 : depth * 1j, 0 : 1 : width * 1j]
        ramp = np.cos(turn) * x + np.sin(turn) * y
        picture *= (1 - random.uniform(0, 0.5) * (ramp - ramp.min()) / np.ptp(ramp))[..., None]
    if random.random() < 0.4:  # the shadow of something with a straight edge
        turn, through = random.uniform(0, 2 * np.pi), random.uniform((0, 0), (width, depth))
        along = 2 * (width + depth) * np.array([np.cos(turn), np.sin(turn)])
        across = np.array([-along[1], along[0]])
        shadow = Image.new("L", (width, depth))
        corners = (through - along, through + along, through + along + across, through - along + across)
        ImageDraw.Draw(shadow).polygon([(float(x), float(y)) for x, y in corners], fill=255)
        shadow = shadow.filter(ImageFilter.GaussianBlur(random.uniform(0.01, 0.1) * max(width, depth)))
        picture *= (1 - random.uniform(0.1, 0.5) * np.asarray(shadow) / 255)[..., None]
    picture = picture * 255 + random.normal(0, random.uniform(0, 10), picture.shape)
    return Image.fromarray(picture.clip(0, 255).astype(np.uint8))


if __name__ == "__main__":
    root, directory = sys.argv[1:]
    data = MNISTDataModule("mnist", root)
    data.setup("test")
    Path(directory).mkdir(exist_ok=True)
    random = np.random.default_rng(0)
    for index in range(9):
        paste((data.test[0][index].reshape(28, 28).numpy() / 255).astype(np.float32), random).save(
            Path(directory, f"{index + 1}.jpg")
        )
