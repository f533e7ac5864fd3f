"""Figures of a network: its weights, and attributions of misclassified digits; points for TensorBoard's projector."""

from typing import Any

import numpy as np
import torch
from matplotlib.colors import LinearSegmentedColormap
from torch import Tensor, nn

from mnist_lightning.digits import interpretation, plots
from mnist_lightning.digits.interpretation import ORANGE_TO_BLUE
from mnist_lightning.digits.plots import Figure
from mnist_lightning.engine.console import say
from mnist_lightning.model import CLASSES, SIDE

DIGITS = 1000  # whose activations are taken


def draw(network: nn.Module, data: Any, predictions: Tensor, mistakes: Tensor) -> dict[str, Figure]:
    """Draw weights and attributions; say which of them are left out.

    Args:
        network: Maps (B, 784) pixels in [0, 1] to (B, 10) logits.
        data: A set up `MNISTDataModule`.
        predictions: (N,) predicted classes of the test split.
        mistakes: (M,) indices of those that are wrong.
    """
    figures = {}
    try:
        if units := interpretation.important_units(network, data.val[0][:DIGITS].float() / 255):
            heading = "weights of the most important hidden units, and the digit that each speaks for most"
            figures["weights"] = draw_weights(*units, f"{data.dataset_name}\n{heading}")
        else:
            say("No figure weights.png: the first layer is not a Linear layer of 784 pixels")
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
    pixels, constants, is_linear = interpretation.attributions(network, images, class_weights)
    sums = [f"{a:+.1f} {b:+.1f} = {a + b:+.1f}" for a, b in zip(pixels.sum(1), constants, strict=True)]
    rows = zip(true, predicted, sums if is_linear else ["no exact sum"] * len(sums), strict=True)
    titles = [f"True: {digit}, Pred: {other}\n{text}" for digit, other, text in rows]
    caption = "ink + constant = predicted minus true logit" if is_linear else "gradient times input"
    legend = "blue (dark) ink is for the prediction, orange (light) against it"
    heading = f"{data.dataset_name}: attributions\n{legend}\n{caption}"
    return plots.digit_grid(interpretation.color_by_attribution(images, pixels), titles, heading)


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
    """Show test digits in TensorBoard's projector, by the inputs of the last layer: the last hidden activations."""
    predicted = predictions[:DIGITS]
    images, true = data.test[0][: len(predicted)].float() / 255, data.test[1][: len(predicted)]
    hidden: list[Tensor] = []
    layers = [module for module in network.modules() if [*module.parameters(recurse=False)]]
    hooks = [layer.register_forward_pre_hook(lambda _, inputs: hidden.append(inputs[0])) for layer in layers]
    try:
        interpretation.logits_in_double(network, images)
        labels, pictures = torch.stack([true, predicted], 1).tolist(), 1 - images.view(-1, 1, SIDE, SIDE)
        for logger in trainer.loggers:
            if add := getattr(logger.experiment, "add_embedding", None):
                points = hidden[-1].detach().flatten(1)
                add(points, labels, pictures, trainer.global_step, "hidden", ["digit", "predicted"])
    except Exception as error:  # as above
        say(f"Nothing in the projector: {error}".partition("\n")[0])
    finally:
        for hook in hooks:
            hook.remove()
