"""Figures of a network: its layers, its weights, and attributions of misclassified digits; points for the projector."""

from typing import Any

import numpy as np
import torch
from matplotlib.collections import LineCollection
from matplotlib.colors import LinearSegmentedColormap
from torch import Tensor, nn

from mnist_lightning.digits import plots
from mnist_lightning.digits.interpretation import (
    ORANGE_TO_BLUE,
    Trace,
    attributions,
    color_by_attribution,
    important_units,
)
from mnist_lightning.digits.plots import Figure
from mnist_lightning.engine.run import say
from mnist_lightning.model import CLASSES, SIDE

DIGITS = 1000  # whose activations are taken


def draw(network: nn.Module, data: Any, predictions: Tensor, mistakes: Tensor) -> dict[str, Figure]:
    """Draw a network's layers, the weights of its first one, and attributions; say which of them are left out.

    Args:
        network: Maps (B, 784) pixels in [0, 1] to (B, 10) logits.
        data: A set up `MNISTDataModule`.
        predictions: (N,) predicted classes of the test split.
        mistakes: (M,) indices of those that are wrong.
    """
    figures, name = {}, data.dataset_name
    try:
        # With fewer than ten images, each counts several times.
        trace = Trace(network, data.val[0][:DIGITS].repeat(CLASSES, 1)[:DIGITS].float() / 255)
        figures["network"] = draw_layers(trace, f"{name}\n{type(network).__name__}")
        if units := important_units(trace):
            heading = "weights of the most important hidden units, and the digit that each speaks for most"
            figures["weights"] = draw_weights(*units, f"{name}\n{heading}")
        else:
            say("No figure weights.png: the units of the first layer do not have one weight for each pixel")
        if len(mistakes):
            figures["attributions"] = draw_attributions(network, data, predictions, mistakes[:9])
        else:
            say("No figure attributions.png: no digit was misclassified")
    except Exception as error:  # a network that does not run here must not fail a run that is done
        say(f"No figures of the network: {error}".partition("\n")[0])
    return figures


def draw_attributions(network: nn.Module, data: Any, predictions: Tensor, mistakes: Tensor) -> Figure:
    """Draw what each pixel adds to the predicted digit's logit minus the true one's, for up to nine mistakes."""
    images, predicted, true = data.test[0][mistakes] / 255, predictions[mistakes], data.test[1][mistakes].long()
    class_weights = torch.eye(CLASSES)[predicted] - torch.eye(CLASSES)[true]
    pixels, constants, is_linear = attributions(network, images, class_weights)
    sums = [f"{a:+.1f} {b:+.1f} = {a + b:+.1f}" for a, b in zip(pixels.sum(1), constants, strict=True)]
    rows = zip(true, predicted, sums if is_linear else ["no exact sum"] * len(sums), strict=True)
    titles = [f"True: {digit}, Pred: {other}\n{text}" for digit, other, text in rows]
    caption = "ink + constant = predicted minus true logit" if is_linear else "gradient times input"
    heading = (
        f"{data.dataset_name}: attributions\nblue (dark) ink is for the predicted digit, orange (light) for the true"
    )
    return plots.digit_grid(color_by_attribution(images, pixels), titles, f"{heading}\n{caption}")


def draw_layers(trace: Trace, heading: str) -> Figure:
    """Draw layers: dense ones as columns of some of their units, others as blocks."""
    columns = min(len(trace.layers), 5)
    height = 3.4 * -(-len(trace.layers) // columns) + 0.5
    parameters = sum(weight.numel() for layer in trace.layers for weight in layer.weights)
    heading += f": {parameters:,} parameters{', in the order of their calls; it branches' * trace.branches}"
    figure = Figure(figsize=(7, height))
    figure.suptitle(heading, y=1 - 0.1 / height, va="top", fontsize=11)
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, 7), ylim=(height, 0))
    axes.axis("off")
    before: list[tuple[float, float]] = []
    for index, layer in enumerate(trace.layers):
        x, y = 7 * (index % columns + 0.5) / columns, 3.4 * (index // columns) + 1.95
        (kind, *facts), shape, here = layer.kind.split("\n"), layer.outputs.shape[1:], [(x, y)]
        if len(shape) == 1 and kind in ("pixels", "Linear"):
            shown = min(*shape, 11)
            here = [(x, y + 0.19 * (unit - (shown - 1) / 2)) for unit in range(shown)]
            if shape[0] > shown:
                axes.text(*here.pop(5), "⋮", ha="center", va="center")
            axes.plot(*np.transpose(here), "o", ms=11, mfc="white", mec="black", zorder=2)
        else:
            wide, high = (max(0.3, side / SIDE) for side in shape[:0:-1]) if len(shape) == 3 else (0.25, 2)
            axes.bar(x, high, wide, y - high / 2, color="#e4e4e4", ec="black", zorder=2)
        if index % columns and not trace.branches:
            lines = [(one, other) for one in before for other in here]
            axes.add_collection(LineCollection(lines, colors="gray", linewidths=0.4, zorder=1))
        before = here
        sizes = ", ".join("B" if size == len(trace.pixels) else str(size) for size in layer.outputs.shape)
        facts = [f"({sizes})"] + [f"{sum(map(Tensor.numel, layer.weights)):,} parameters"] * bool(layer.weights) + facts
        axes.text(x, y - 1.13, layer.name, ha="center", fontsize=9, family="monospace")
        axes.text(x, y + 1.28, kind, ha="center", fontsize=min(10, 150 / len(kind)), weight="bold")
        axes.text(x, y + 1.35, "\n".join(facts), ha="center", va="top", fontsize=9)
    return figure


def draw_weights(pictures: Tensor, digits: Tensor, heading: str) -> Figure:
    """Draw the weights of N units, (N, 28, 28), eight in a row, and below each its digit, (N,)."""
    columns, scale = min(8, len(digits)), pictures.abs().quantile(0.999).item()
    grid = plots.tiles(pictures, columns, (0, 3, 0, 10), np.nan)
    high, wide = (size / 37 for size in grid.shape)
    height = high + 1.3
    figure = Figure(figsize=(7, height))
    figure.suptitle(heading, y=1 - 0.1 / height, va="top", fontsize=11)
    axes = figure.add_axes(((7 - wide) / 14, 0.75 / height, wide / 7, high / height))
    axes.axis("off")
    colors = LinearSegmentedColormap.from_list("", np.divide(ORANGE_TO_BLUE, 255))
    shown = axes.imshow(grid.numpy(), cmap=colors, vmin=-scale, vmax=scale)
    for index, digit in enumerate(digits):
        x, y = index % columns * 31 + 13.5, index // columns * 38 + 28
        axes.text(x, y, f"{digit}", ha="center", va="top", weight="bold")
    label = "weight: ink here lowers the unit's activation (below 0) or raises it (above)"
    bar = figure.add_axes((0.2, 0.5 / height, 0.6, 0.12 / height))
    figure.colorbar(shown, cax=bar, orientation="horizontal", extend="both", label=label)
    return figure


def add_to_projector(trainer: Any, network: nn.Module, data: Any, predictions: Tensor) -> None:
    """Show test digits in TensorBoard's projector, by the activations of the last hidden layer."""
    predicted = predictions[:DIGITS]
    images, true = data.test[0][: len(predicted)].float() / 255, data.test[1][: len(predicted)]
    try:
        layers = Trace(network, images).layers
        last = max(index for index, layer in enumerate(layers) if layer.weights)
        points = layers[last - 1].outputs.detach().flatten(1)
        labels, pictures = torch.stack([true, predicted], 1).tolist(), 1 - images.view(-1, 1, SIDE, SIDE)
        for logger in trainer.loggers:
            if add := getattr(logger.experiment, "add_embedding", None):
                add(points, labels, pictures, trainer.global_step, "hidden", ["digit", "predicted"])
    except Exception as error:  # as above
        say(f"Nothing in the projector: {error}".partition("\n")[0])
