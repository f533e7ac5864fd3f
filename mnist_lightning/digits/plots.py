"""Figures: tensors in, `matplotlib.figure.Figure` out.

All margins are given: Matplotlib's layout engines would draw each figure twice.
"""

import io
from collections.abc import Sequence

import matplotlib.figure
import numpy as np
from torch import Tensor, nn

from mnist_lightning.model import CLASSES, SIDE


class Figure(matplotlib.figure.Figure):
    """A figure that notebooks show without `pyplot`."""

    def _repr_png_(self) -> bytes:
        png = io.BytesIO()
        self.savefig(png, format="png")
        return png.getvalue()


def digit_grid(images: Tensor, titles: Sequence[str], heading: str) -> Figure:
    """Draw up to nine digits in a 3x3 grid.

    Args:
        images: (N, 784) pixels in [0, 1], or (N, 784, 4) of red, green, blue and opacity; the first nine are drawn, and
            a grid of fewer stays partly empty.
        titles: A title for each image.
        heading: Title of the whole figure.
    """
    images, lines = images[:9], 1 + max([0, *(title.count("\n") for title in titles)])
    above = 2 + 3 * lines  # pixels of an image's title
    heading_height = 0.24 * (1 + heading.count("\n")) + 0.1  # inches
    height = heading_height + 5 * (SIDE + above) / (SIDE + 2)
    figure = Figure(figsize=(5, height))
    figure.suptitle(heading, y=1 - 0.1 / height, va="top", fontsize=13 - lines)
    # One picture of all: nine axes took half of the time that a run's figures take.
    axes = figure.add_axes((0, 0, 1, 1 - heading_height / height))
    axes.axis("off")
    if len(images):
        grid = tiles(images, 3, (1, 1, above, 0))
        axes.imshow(grid.numpy(), cmap="gray_r", vmin=0, vmax=1)
        axes.set(xlim=(-0.5, 3 * (SIDE + 2) - 0.5), ylim=(3 * (SIDE + above) - 0.5, -0.5))
        for index, title in enumerate(titles[: len(images)]):
            x, y = index % 3 * (SIDE + 2) + SIDE / 2 + 0.5, index // 3 * (SIDE + above) + above - 1.5
            axes.text(x, y, title, ha="center", va="bottom", fontsize=10)
    else:
        axes.text(0.5, 0.6, "none", ha="center", va="center", color="gray", fontsize=16)
    return figure


def tiles(images: Tensor, columns: int, margins: tuple[int, int, int, int], blank: float = 0) -> Tensor:
    """Put images, (N, 784), (N, 28, 28) or (N, 784, C), side by side in rows of `columns`: (H, W) or (H, W, C).

    Margins are pixels left of, right of, above and below each image, of the value `blank`.
    """
    left, right, above, below = margins
    images = images.reshape(len(images), SIDE, SIDE, -1)
    images = nn.functional.pad(images, (0, 0, left, right, above, below, 0, -len(images) % columns), value=blank)
    grid: Tensor = images.unflatten(0, (-1, columns)).transpose(1, 2).flatten(2, 3).flatten(0, 1).squeeze(-1)
    return grid


def distorted_digits(images: Tensor, copies: Tensor, heading: str) -> Figure:
    """Draw digits beside their distorted copies, a row for each.

    Args:
        images: (N, 784) pixels in [0, 1].
        copies: (N, C, 784) pixels in [0, 1].
        heading: Title of the whole figure.
    """
    columns = copies.shape[1]
    height = 0.62 * len(copies) + 0.8
    figure = Figure(figsize=(0.62 * (columns + 1.4), height))
    figure.suptitle(heading, y=1 - 0.08 / height, va="top")
    figure.subplots_adjust(0.02, 0.1 / height, 0.98, 1 - 0.7 / height, wspace=0.08)
    pictures = {"original": images[:, None], "each epoch another distortion": copies}
    for axes, (title, picture) in zip(figure.subplots(1, 2, width_ratios=(1, columns)), pictures.items(), strict=True):
        grid = tiles(picture.flatten(0, 1), picture.shape[1], (0, 0, 0, 0))
        axes.imshow(grid.numpy(), cmap="gray_r", vmin=0, vmax=1)
        axes.set_title(title, fontsize=10)
        axes.axis("off")
    return figure


def confusion_matrix(counts: Tensor, heading: str) -> Figure:
    """Draw a confusion matrix.

    Args:
        counts: (10, 10) numbers of digits, a row for each true digit, a column for each predicted one.
        heading: Title of the figure.
    """
    figure = Figure(figsize=(6.2, 6.4))
    figure.subplots_adjust(0.1, 0.08, 0.98, 0.91)
    axes = figure.subplots()
    # Coloured by mistakes alone: the diagonal's counts would drown everything else.
    mistakes = counts.float().fill_diagonal_(0)
    axes.imshow((mistakes / mistakes.max().clamp(min=1)).numpy(), cmap="Reds", vmin=0, vmax=1.8)
    for (true, predicted), count in np.ndenumerate(counts.numpy()):
        color, weight = "black" if count else "lightgray", "bold" if true == predicted else "normal"
        axes.text(predicted, true, f"{count or '·'}", ha="center", va="center", color=color, weight=weight, fontsize=9)
    axes.set(title=heading, xlabel="predicted (the redder, the more mistakes)", ylabel="true")
    axes.set(xticks=range(CLASSES), yticks=range(CLASSES))
    axes.tick_params(length=0)
    return figure


def training_curves(train: Tensor, val: Tensor, heading: str) -> Figure:
    """Draw loss and accuracy over iterations.

    Args:
        train: (T, 3) rows of iteration, loss and accuracy (0 to 1) of single minibatches.
        val: (V, 3) rows of the same over the validation split.
        heading: Title of the whole figure.
    """
    figure = Figure(figsize=(9, 3.7))
    figure.suptitle(heading)
    figure.subplots_adjust(0.07, 0.14, 0.985, 0.89, wspace=0.18)
    panels = (("loss (nats)", 1, "upper right"), ("accuracy (%)", 100, "lower right"))
    for column, (axes, (name, scale, corner)) in enumerate(zip(figure.subplots(1, 2), panels, strict=True), 1):
        (x, y), (val_x, val_y) = (rows[:, [0, column]].T.numpy() for rows in (train, val))
        marker = "o" if len(x) == 1 else ""
        axes.plot(x, y * scale, color="#4878a8", marker=marker, ms=4, alpha=0.7, lw=1, label="training minibatch")
        axes.plot(val_x, val_y * scale, color="#d1602a", marker="o", ms=4, label="validation")
        axes.set(xlabel="iteration", ylabel=name)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, loc=corner)
    return figure
