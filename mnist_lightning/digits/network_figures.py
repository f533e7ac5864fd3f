"""Figures of a network: its layers, its weights, attributions of misclassified images; points for the projector."""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from matplotlib.collections import LineCollection
from matplotlib.colors import LinearSegmentedColormap
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from mnist_lightning.digits import interpretation, plots
from mnist_lightning.digits.examples import FIRST, Examples
from mnist_lightning.digits.interpretation import ORANGE_TO_BLUE
from mnist_lightning.digits.plots import Figure
from mnist_lightning.engine.console import say


@contextlib.contextmanager
def or_say(without: str) -> Iterator[None]:
    """Say in a line what there is `without`, and why, where drawing fails: a run that is done must not fail of it."""
    try:
        yield
    except Exception as error:
        text = " ".join(str(error).partition("\n")[0].split())
        say(f"{without}: {text if isinstance(error, ValueError) and text else f'{type(error).__name__}: {text}'}")


def draw(network: nn.Module, examples: Examples, mistakes: Tensor, name: str) -> dict[str, Figure]:
    """Draw layers, weights and attributions; say which of them are left out.

    Args:
        network: Maps images, (B, ...), to logits, (B, C).
        examples: Those that were tested.
        mistakes: (M,) numbers of up to nine examples to explain.
        name: Of the data.
    """
    figures = {}
    with or_say("No figures of the network"):
        if layers := chain(network, examples.images[:1]):
            parameters = sum(weight.numel() for weight in network.parameters())
            figures["network"] = draw_layers(layers, f"{type(network).__name__}\n{parameters:,} parameters")
        else:
            say("No figure network.png: the network is not a chain of Linear layers and activations")
        if units := interpretation.important_units(network, examples.images[:FIRST]):
            heading = "weights of the most important hidden units, and the digit that each speaks for most"
            figures["weights"] = draw_weights(*units, f"{name}\n{heading}")
        else:
            say("No figure weights.png: the first layer is not a Linear layer of 784 pixels")
        if len(mistakes):
            figures["attributions"] = draw_attributions(network, examples, mistakes, name)
        else:
            say("No figure attributions.png: nothing was misclassified")
    return figures


class _Calls(TorchFunctionMode):
    """Keeps the calls of PyTorch's functions that return a tensor: name, tensors that go in, tensor that comes out."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, list[Tensor], Tensor]] = []

    def __torch_function__(self, function: Any, _: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        result, given = function(*args, **(kwargs or {})), [*args, *(kwargs or {}).values()]
        if isinstance(result, Tensor):
            self.calls.append((function.__name__, [each for each in given if isinstance(each, Tensor)], result))
        return result


def chain(network: nn.Module, image: Tensor) -> list[tuple[int, str]] | None:
    """The layers of a network that is nothing but `Linear` layers one after the other, with activations.

    Args:
        network: Maps images to logits.
        image: One of them, (1, ...).

    Returns:
        The number of pixels and "", then for each layer the number of its units and the name of its activation, or "";
        None where there is anything else in the network.
    """
    activations = {each.lower(): each for each in nn.modules.activation.__all__}
    at = image.double()
    layers, known = [(image.numel(), "")], [at]
    with torch.no_grad(), _Calls() as recorded:
        logits = interpretation.logits_in_double(network, at)
    for name, inputs, result in recorded.calls:
        known_inputs = [each for each in inputs if any(each is other for other in known)]
        if not known_inputs:  # it is done to the weights
            continue
        if name == "linear" and inputs[0] is at:
            layers.append((result.shape[-1], ""))
        elif len(inputs) > 1 or inputs[0] is not at or result.numel() != at.numel():
            return None
        elif activation := activations.get(name.replace("_", "")):
            layers[-1] = layers[-1][0], activation
        at = result
        known.append(result)
    return layers if at is logits and logits.numel() == layers[-1][0] else None


def draw_layers(layers: list[tuple[int, str]], heading: str) -> Figure:
    """Draw layers as columns of at most eleven places, and their weights as lines.

    Args:
        layers: For each its number of units, and the name of its activation or ""; the first are the pixels.
        heading: Title of the figure.
    """
    wide, high = 4.4, 4.0  # inches
    figure = Figure(figsize=(wide, high))
    figure.suptitle(heading, y=1 - 0.1 / high, va="top", fontsize=12)
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, wide), ylim=(0, high))
    axes.axis("off")
    before: list[tuple[float, float]] = []
    for index, (units, activation) in enumerate(layers):
        x, shown = wide * (index + 0.5) / len(layers), min(units, 11)
        here = [(x, 2.02 + 0.25 * ((shown - 1) / 2 - unit)) for unit in range(shown)]
        if units > shown:
            axes.text(*here.pop(shown // 2), "⋮", ha="center", va="center", fontsize=15)
        axes.add_collection(LineCollection([(a, b) for a in before for b in here], colors="#d0d0d0", lw=0.7, zorder=1))
        color = "#4878a8" if index else "#8c8c8c"
        axes.plot(*np.transpose(here), "o", ms=11, mfc="white", mec=color, mew=1.5, zorder=2)
        kind = activation or ("logits" if index == len(layers) - 1 else "units") if index else "pixels"
        axes.text(x, 0.42, f"{units:,}", ha="center", weight="bold", fontsize=12)
        axes.text(x, 0.18, kind, ha="center", fontsize=10)
        before = here
    return figure


def draw_attributions(network: nn.Module, examples: Examples, mistakes: Tensor, name: str) -> Figure:
    """Draw what each pixel adds to the predicted class's logit minus the true one's."""
    images, predicted, true = examples.pictures(mistakes), examples.predictions[mistakes], examples.labels[mistakes]
    one_hot = torch.eye(examples.classes)
    values, constants, is_linear = interpretation.attributions(network, images, one_hot[predicted] - one_hot[true])
    sums = [f"{a:+.1f} {b:+.1f} = {a + b:+.1f}" for a, b in zip(values.flatten(1).sum(1), constants, strict=True)]
    rows = zip(true, predicted, sums if is_linear else ["no exact sum"] * len(sums), strict=True)
    titles = [f"True: {label}, Pred: {other}\n{text}" for label, other, text in rows]
    pictures, ink, term = plots.as_pictures(images), " ink", "ink"
    opacities, shape = pictures.flatten(1), pictures.shape[1:3]
    if pictures.ndim == 4:  # in colour
        values, ink, term = values.sum(1 if images.shape[1] == 3 else 3), "", "pixels"
        opacities = (values.abs() / values.abs().amax((1, 2), keepdim=True).clamp(min=1e-9)).flatten(1)
    rgba = interpretation.color_by_attribution(opacities, values.flatten(1)).unflatten(1, shape)
    caption = f"{term} + constant = predicted minus true logit" if is_linear else "gradient times input"
    legend = f"blue (dark){ink} is for the prediction, orange (light) against it"
    return plots.digit_grid(rgba, titles, f"{name}: attributions\n{legend}\n{caption}")


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


def add_to_projector(trainer: Any, network: nn.Module, examples: Examples) -> None:
    """Show examples in TensorBoard's projector, by the inputs of the last layer: the last hidden activations."""
    images = examples.images[:FIRST]
    hidden: list[Tensor] = []
    layers = [module for module in network.modules() if [*module.parameters(recurse=False)]]
    hooks = [layer.register_forward_pre_hook(lambda _, inputs: hidden.append(inputs[0])) for layer in layers]
    try:
        interpretation.logits_in_double(network, images)
    finally:
        for hook in hooks:
            hook.remove()
    labels = torch.stack([examples.labels, examples.predictions], 1)[: len(images)].tolist()
    pictures = plots.as_pictures(images)
    pictures = 1 - pictures[:, None] if pictures.ndim == 3 else pictures.movedim(3, 1)
    for logger in trainer.loggers:
        if add := getattr(logger.experiment, "add_embedding", None):
            points = hidden[-1].detach().flatten(1)
            add(points, labels, pictures, trainer.global_step, "hidden", ["true", "predicted"])
