"""Figures of an `MLP`: its layers, its weights, attributions of misclassified digits; points for the projector."""

import copy
from typing import Any

import numpy as np
import torch
from matplotlib.collections import LineCollection
from matplotlib.colors import LinearSegmentedColormap
from torch import Tensor, nn

from mnist_lightning.classifier import MNISTClassifier
from mnist_lightning.digits import interpretation, plots
from mnist_lightning.digits.examples import FIRST, Examples
from mnist_lightning.digits.plots import Figure
from mnist_lightning.engine.console import say_if_it_fails
from mnist_lightning.model import CLASSES, MLP, PIXELS, SIDE


def draw(network: nn.Module, examples: Examples, mistakes: Tensor, name: str) -> dict[str, Figure]:
    """Draw layers, weights and attributions of `MNISTClassifier`'s `MLP`; say that another network's are left out.

    Args:
        network: The module that was tested.
        examples: Those that it was tested on.
        mistakes: (M,) numbers of up to nine examples to explain.
        name: Of the data.
    """
    figures = {}
    with say_if_it_fails("No figures of the network"):
        mlp = _mlp(network)
        figures["network"] = draw_layers(mlp, type(network).__name__)
        units = interpretation.important_units(mlp, examples.images[:FIRST].float())
        heading = "weights of the most important hidden units, and the digit that each speaks for most"
        figures["weights"] = draw_weights(*units, f"{name}\n{heading}")
        figures["attributions"] = draw_attributions(mlp, examples, mistakes, name)
    return figures


def _mlp(network: nn.Module) -> MLP:
    """A copy of the network, on the CPU and in float32; a ValueError where it is another one."""
    mlp = getattr(network, "mlp", None)
    if type(mlp) is not MLP or type(network).forward is not MNISTClassifier.forward:
        raise ValueError("they are of MNISTClassifier's MLP")
    return copy.deepcopy(mlp).cpu().float()


def draw_layers(mlp: MLP, name: str) -> Figure:
    """Draw the layers as columns of at most eleven places, and their weights as lines."""
    wide, high = 4.4, 4.0  # inches
    figure = Figure(figsize=(wide, high))
    parameters = sum(weight.numel() for weight in mlp.parameters())
    figure.suptitle(f"{name}\n{parameters:,} parameters", y=1 - 0.1 / high, va="top", fontsize=12)
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, wide), ylim=(0, high))
    axes.axis("off")
    before: list[tuple[float, float]] = []
    layers = {"pixels": PIXELS, "ReLU": mlp.hidden.out_features, "logits": CLASSES}
    for index, (kind, units) in enumerate(layers.items()):
        x, shown = wide * (index + 0.5) / len(layers), min(units, 11)
        here = [(x, 2.02 + 0.25 * ((shown - 1) / 2 - unit)) for unit in range(shown)]
        if units > shown:
            axes.text(*here.pop(shown // 2), "⋮", ha="center", va="center", fontsize=15)
        axes.add_collection(LineCollection([(a, b) for a in before for b in here], colors="#d0d0d0", lw=0.7, zorder=1))
        color = "#4878a8" if index else "#8c8c8c"
        axes.plot(*np.transpose(here), "o", ms=11, mfc="white", mec=color, mew=1.5, zorder=2)
        axes.text(x, 0.42, f"{units:,}", ha="center", weight="bold", fontsize=12)
        axes.text(x, 0.18, kind, ha="center", fontsize=10)
        before = here
    return figure


def draw_attributions(mlp: MLP, examples: Examples, mistakes: Tensor, name: str) -> Figure:
    """Draw what each pixel adds to the predicted digit's logit minus the true one's."""
    images = examples.pictures(mistakes).float()
    predicted, true = examples.predictions[mistakes], examples.labels[mistakes]
    one_hot = torch.eye(CLASSES)
    values, constants = interpretation.attributions(mlp, images, one_hot[predicted] - one_hot[true])
    titles = [
        f"True: {label}, Pred: {digit}\n{ink:+.1f} {constant:+.1f} = {ink + constant:+.1f}"
        for label, digit, ink, constant in zip(true, predicted, values.sum(1), constants, strict=True)
    ]
    pictures = interpretation.color_by_attribution(images, values).unflatten(1, (SIDE, SIDE))
    legend = "blue (dark) ink is for the prediction, orange (light) against it"
    heading = f"{name}: attributions\n{legend}\nink + constant = predicted minus true logit"
    return plots.digit_grid(pictures, titles, heading)


def draw_weights(weights: Tensor, digits: Tensor, heading: str) -> Figure:
    """Draw the weights of N units, (N, 784), eight in a row, and below each its digit, (N,)."""
    columns, scale = min(8, len(digits)), weights.abs().quantile(0.999).item()
    grid = plots.tiles(weights.unflatten(1, (SIDE, SIDE)), columns, (0, 3, 0, 10), np.nan)
    high, wide = (size / 37 for size in grid.shape)
    height = high + 1.3
    figure = Figure(figsize=(7, height))
    figure.suptitle(heading, y=1 - 0.1 / height, va="top", fontsize=11)
    axes = figure.add_axes(((7 - wide) / 14, 0.75 / height, wide / 7, high / height))
    axes.axis("off")
    colors = LinearSegmentedColormap.from_list("", np.divide(interpretation.ORANGE_TO_BLUE, 255))
    shown = axes.imshow(grid.numpy(), cmap=colors, vmin=-scale, vmax=scale)
    for index, digit in enumerate(digits):
        x, y = index % columns * 31 + 13.5, index // columns * 38 + 28
        axes.text(x, y, f"{digit}", ha="center", va="top", weight="bold")
    label = "weight: ink here lowers the unit's activation (below 0) or raises it (above)"
    bar = figure.add_axes((0.2, 0.5 / height, 0.6, 0.12 / height))
    figure.colorbar(shown, cax=bar, orientation="horizontal", extend="both", label=label)
    return figure


def add_to_projector(trainer: Any, network: nn.Module, examples: Examples) -> None:
    """Show the first thousand digits in TensorBoard's projector, by the activations of the hidden units."""
    images = examples.images[:FIRST].float()
    points = _mlp(network).hidden(images).relu().detach()
    labels = torch.stack([examples.labels, examples.predictions], 1)[: len(images)].tolist()
    pictures = 1 - images.unflatten(1, (1, SIDE, SIDE))  # ink on paper
    for logger in trainer.loggers:
        if add := getattr(logger.experiment, "add_embedding", None):
            add(points, labels, pictures, trainer.global_step, "hidden", ["true", "predicted"])
