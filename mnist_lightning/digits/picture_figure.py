"""A figure of classified pictures, drawn with Pillow: importing Matplotlib would take longer than classifying them."""

from collections.abc import Mapping
from importlib.metadata import distribution
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from mnist_lightning.digits import pictures
from mnist_lightning.digits.ink import Array
from mnist_lightning.digits.interpretation import attributions, color_by_attribution
from mnist_lightning.digits.picture_predictions import stack
from mnist_lightning.engine.console import printable
from mnist_lightning.model import CLASSES, MLP, SIDE

DRAWN = 24  # pictures; more would be no overview, and all are in the CSV file

# In pixels: a picture's part of the figure, the heading, and the side of each small image.
WIDTH, HEIGHT, HEADING, TILE = 430, 320, 84, 4 * SIDE
FONT = "matplotlib/mpl-data/fonts/ttf/DejaVuSans.ttf"  # what it lacks is drawn as an empty box


def draw(path: str, inputs: Mapping[Path, Array | None], probabilities: Tensor, mlp: MLP) -> None:
    """Draw the first pictures, three in a row: as given, as the network gets them, its probabilities, attributions.

    Args:
        path: PNG file to write.
        inputs: N pictures, each preprocessed: (784,) pixels in [0, 1], or None if it is blank.
        probabilities: (N, 10).
        mlp: The network that they come from.
    """
    drawn = list(inputs.items())[:DRAWN]
    columns = min(3, len(drawn))
    figure = Image.new("RGB", (columns * WIDTH, -(-len(drawn) // columns) * HEIGHT + HEADING), "white")
    more = f": the first {len(drawn)} of {len(inputs):,} pictures" if len(inputs) > len(drawn) else ""
    _write(figure, figure.width / 2, HEADING - 50, f"Predictions{more}", 20)
    caption = "Attribution: blue (dark) ink speaks for the prediction, orange (light) for the runner-up"
    _write(figure, figure.width / 2, HEADING - 18, caption)

    pixels = stack([digit for _, digit in drawn])
    best = probabilities[: len(drawn)].topk(2).indices
    class_weights = torch.eye(CLASSES)[best[:, 0]] - torch.eye(CLASSES)[best[:, 1]]
    values, constants = attributions(mlp, pixels, class_weights)
    greys = (255 * (1 - pixels)).byte().view(-1, SIDE, SIDE).numpy()
    colored = (255 * color_by_attribution(pixels, values)).byte().view(-1, SIDE, SIDE, 3).numpy()
    for index, (file, digit) in enumerate(drawn):
        left, top = index % columns * WIDTH + 14, index // columns * HEIGHT + HEADING + 24
        middle, right = left + TILE + 10, left + 2 * TILE + 22
        name = printable(file.name)
        _paste(figure, _thumbnail(file), left, top, name if len(name) <= 16 else f"{name[:7]}…{name[-8:]}")
        _paste(figure, _enlarged(greys[index]), middle, top, "network input")
        if digit is None:
            _write(figure, right + 8 * CLASSES, top - 14, "blank")
            continue
        first, second = best[index].tolist()
        _draw_bars(figure, probabilities[index].tolist(), first, right, top)
        _paste(figure, _enlarged(colored[index]), middle, top + TILE + 36, f"{first} against {second}")
        each, constant = values[index], constants[index]
        terms = {f"ink for {first}": each.clamp(min=0), f"ink for {second}": each.clamp(max=0), "constant": constant}
        lines = [f"{name} {part.sum():+.1f}" for name, part in terms.items()] + [f"= {each.sum() + constant:+.1f}"]
        _write(figure, right + 8 * CLASSES, top + 3 * TILE / 2 + 36, "\n".join(lines))
    figure.save(path, "PNG")


def _write(figure: Image.Image, x: float, y: float, text: str, size: int = 14) -> None:
    font = ImageFont.truetype(str(distribution("matplotlib").locate_file(FONT)), size)
    ImageDraw.Draw(figure).text((x, y), text, "black", font, anchor="mm", align="center", spacing=10)


def _paste(figure: Image.Image, picture: Image.Image, left: int, top: int, title: str) -> None:
    corner = left + (TILE - picture.width) // 2, top + (TILE - picture.height) // 2
    figure.paste(picture, corner)
    ImageDraw.Draw(figure).rectangle((left - 1, top - 1, left + TILE, top + TILE), outline="lightgray")
    _write(figure, left + TILE / 2, top - 14, title)


def _draw_bars(figure: Image.Image, probabilities: list[float], best: int, left: int, top: int) -> None:
    _write(figure, left + 8 * CLASSES, top - 14, f"{best}  ({probabilities[best]:.1%})")
    bottom, pen = top + TILE - 14, ImageDraw.Draw(figure)
    for digit, probability in enumerate(probabilities):
        x, color = left + 16 * digit, "#d1602a" if digit == best else "#4878a8"
        pen.rectangle((x + 2, round(bottom - probability * (TILE - 14)), x + 13, bottom), color)
        _write(figure, x + 8, bottom + 11, str(digit), 12)
    pen.line((left, bottom, left + 16 * CLASSES, bottom), "black")


def _thumbnail(file: Path) -> Image.Image:
    picture = pictures.load(file).convert("RGBA")
    picture.thumbnail((TILE, TILE))
    return Image.alpha_composite(Image.new("RGBA", picture.size, "silver"), picture)  # for white ink on nothing


def _enlarged(pixels: Array) -> Image.Image:
    return Image.fromarray(pixels).resize((TILE, TILE), Image.Resampling.NEAREST)
