"""Figures: tensors in, `matplotlib.figure.Figure` out.

All margins are given: Matplotlib's layout engines would draw each figure twice.
"""

import io
import math
from collections.abc import Sequence

import matplotlib.figure
import numpy as np
import torch
from torch import Tensor, nn

from mnist_lightning.model import SIDE


class Figure(matplotlib.figure.Figure):
    """A figure that notebooks show without `pyplot`."""

    def _repr_png_(self) -> bytes:
        png = io.BytesIO()
        self.savefig(png, format="png")
        return png.getvalue()


def as_pictures(images: Tensor) -> Tensor:
    """Bring images into the form in which they are drawn.

    Args:
        images: Grey ones, (N, H, W), (N, 1, H, W) or, where they are square, (N, H * W); or in colour, (N, 3, H, W)
            or (N, H, W, 3). Bytes; or floats, whose range becomes [0, 1] where it is larger.

    Returns:
        (N, H, W) or (N, H, W, 3) floats in [0, 1].

    Raises:
        ValueError: They have another shape.
    """
    shape = images.shape[1:]
    side = math.isqrt(shape.numel())
    if shape == (side**2,):
        images = images.unflatten(1, (side, side))
    elif images.ndim == 4 and shape[0] in (1, 3):
        images = images.movedim(1, 3).squeeze(3)
    elif images.ndim != 3 and shape[2:] != (3,):
        raise ValueError(f"tensors of the shape {tuple(shape)} are no images")
    scale = 255 if images.dtype == torch.uint8 else 1
    images = images.to(torch.promote_types(images.dtype, torch.float)) / scale
    low, high = images.aminmax() if images.numel() else torch.tensor([0, 1])
    return images if low >= 0 and high <= 1 else (images - low) / (high - low)


def digit_grid(images: Tensor, titles: Sequence[str], heading: str) -> Figure:
    """Draw up to nine digits, or other images, in a 3x3 grid.

    Args:
        images: (N, 784) pixels in [0, 1], or anything that `as_pictures` takes; the first nine are drawn, and a grid of
            fewer stays partly empty. Grey images of 28 x 28 pixels are ink on paper, as MNIST's are; others are not.
        titles: A title for each image.
        heading: Title of the whole figure.
    """
    images, lines = as_pictures(images[:9]), 1 + max([0, *(title.count("\n") for title in titles)])
    high, wide = images.shape[1:3]
    scale = wide / SIDE
    margin, above = max(1, round(scale)), round(scale * (2 + 3 * lines))  # pixels beside an image, and of its title
    heading_height = 0.24 * (1 + heading.count("\n")) + 0.1  # inches
    height = heading_height + 5 * (high + above) / (wide + 2 * margin)
    figure = Figure(figsize=(5, height))
    figure.suptitle(heading, y=1 - 0.1 / height, va="top", fontsize=13 - lines)
    # One picture of all: nine axes took half of the time that a run's figures take.
    axes = figure.add_axes((0, 0, 1, 1 - heading_height / height))
    axes.axis("off")
    if len(images):
        is_ink = images.shape[1:] == (SIDE, SIDE)
        grid = tiles(images, 3, (margin, margin, above, 0), blank=0 if is_ink else 1)
        axes.imshow(grid.numpy(), cmap="gray_r" if is_ink else "gray", vmin=0, vmax=1)
        axes.set(xlim=(-0.5, grid.shape[1] - 0.5), ylim=(3 * (high + above) - 0.5, -0.5))
        for index, title in enumerate(titles[: len(images)]):
            x = index % 3 * (wide + 2 * margin) + margin + (wide - 1) / 2
            y = index // 3 * (high + above) + above - 1.5 * scale
            axes.text(x, y, title, ha="center", va="bottom", fontsize=10)
    else:
        axes.text(0.5, 0.6, "none", ha="center", va="center", color="gray", fontsize=16)
    return figure


def tiles(images: Tensor, columns: int, margins: tuple[int, int, int, int], blank: float = 0) -> Tensor:
    """Put images, (N, H, W) or (N, H, W, 3), side by side in rows of `columns`.

    Margins are pixels left of, right of, above and below each image, of the value `blank`.
    """
    left, right, above, below = margins
    images = images.reshape(*images.shape[:3], -1)
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
        grid = tiles(as_pictures(picture.flatten(0, 1)), picture.shape[1], (0, 0, 0, 0))
        axes.imshow(grid.numpy(), cmap="gray_r", vmin=0, vmax=1)
        axes.set_title(title, fontsize=10)
        axes.axis("off")
    return figure


def confusion_matrix(counts: Tensor, heading: str) -> Figure:
    """Draw a confusion matrix, with its numbers where there is room for them.

    Args:
        counts: (C, C) numbers of examples, a row for each true class, a column for each predicted one.
        heading: Title of the figure.
    """
    figure = Figure(figsize=(6.2, 6.4))
    figure.subplots_adjust(0.1, 0.08, 0.98, 0.91)
    axes = figure.subplots()
    # Coloured by mistakes alone: the diagonal's counts would drown everything else.
    mistakes = counts.float().fill_diagonal_(0)
    axes.imshow((mistakes / mistakes.max().clamp(min=1)).numpy(), cmap="Reds", vmin=0, vmax=1.8)
    axes.set(title=heading, xlabel="predicted (the redder, the more mistakes)", ylabel="true")
    axes.tick_params(length=0)
    if len(counts) > 20:
        return figure
    for (true, predicted), count in np.ndenumerate(counts.numpy()):
        color, weight = "black" if count else "lightgray", "bold" if true == predicted else "normal"
        size = min(9, 120 / len(counts))
        axes.text(
            predicted, true, f"{count or '·'}", ha="center", va="center", color=color, weight=weight, fontsize=size
        )
    axes.set(xticks=range(len(counts)), yticks=range(len(counts)))
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
