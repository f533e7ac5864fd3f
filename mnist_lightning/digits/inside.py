"""What a network has become: its layers, what the first one looks for, and why it read a digit.

Whatever the network is, it is run and not written down again: a forward pass notes its calls, then comes autograd, in
double precision on the CPU. The network has to be in evaluation mode.
"""

from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from matplotlib import collections, colors, patches
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from mnist_lightning.digits import plots
from mnist_lightning.engine.run import say
from mnist_lightning.model import CLASSES, PIXELS, SIDE

# Orange, grey, blue: told apart by the colour blind, and in black and white, as light, grey and dark.
COLORS = colors.LinearSegmentedColormap.from_list("", ["#ffd07a", "#e8982e", "#828282", "#3a67b5", "#0b1f5c"])
KINDS = {name.lower(): name for name in dir(nn)}  # the function `max_pool2d` is named as its module
DIGITS = 1000  # whose activations are looked at


class Trace(TorchFunctionMode):
    """A forward pass from `pixels`, (B, 784) in [0, 1], to `logits`, (B, 10), in double precision.

    Its `layers`, the pixels first, have parameters or change the shape. Each has a `kind`, with the activations behind
    it; the `name` of its module; `weights`; and `outputs`, (B, ...), of those activations. `branches` is true where one
    gets more than the one before gives.
    """

    def __init__(self, network: nn.Module, images: Tensor) -> None:
        super().__init__()
        with torch.inference_mode(False), torch.enable_grad():  # Lightning tests in inference mode
            tensors: dict[str, Tensor] = dict(network.named_buffers())
            for name, tensor in tensors.items():
                tensors[name] = tensor.to("cpu", torch.double if tensor.is_floating_point() else tensor.dtype)
            for name, weight in network.named_parameters():
                tensors[name] = nn.Parameter(weight.to("cpu", torch.double), requires_grad=False)
            self._names = {id(tensor): name for name, tensor in tensors.items()}
            self.pixels = images.to("cpu", torch.double, copy=True).requires_grad_()
            self.layers = [SimpleNamespace(kind="pixels", name="", weights=[], outputs=self.pixels)]
            self.branches = False
            with self:
                self.logits: Tensor = torch.func.functional_call(network, tensors, self.pixels)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Note a call of a function, also by a module."""
        given = [value for value in (*args, *(kwargs or {}).values()) if isinstance(value, Tensor)]
        weights = [tensor for tensor in given if isinstance(tensor, nn.Parameter)]
        inputs = [(tensor, tensor._version) for tensor in given if id(tensor) not in self._names]
        result = func(*args, **kwargs or {})
        output = next(iter(result), None) if isinstance(result, tuple) else result
        if inputs and isinstance(output, Tensor) and output.is_floating_point():
            before, (first, version) = self.layers[-1], inputs[0]
            self.branches |= len(inputs) > 1 or first is not before.outputs
            kind = KINDS.get(func.__name__.replace("_", ""), func.__name__)
            if weights or first.shape != output.shape:
                name = self._names[id(weights[0])].rpartition(".")[0] if weights else ""
                self.layers.append(SimpleNamespace(kind=kind, name=name, weights=weights, outputs=output))
            else:
                # A dropout does nothing here. What is written in place is in the input, too.
                before.kind += f"\nthen {kind}" if first._version > version or not torch.equal(first, output) else ""
                before.outputs = output
        return result


def detectors(trace: Trace) -> tuple[Tensor, Tensor] | None:
    """Find the forty units of the first layer that matter most: mean activation times the norm of ten effects.

    An effect is a logit's mean slope by the activation: the outgoing weight, in front of the last layer. Incoming
    weights, (N, 28, 28), and the digits that the units speak for most, (N,); None without a weight for each pixel.
    """
    layer = next(layer for layer in trace.layers if layer.weights)
    weights, rows = layer.weights[0], torch.arange(len(trace.logits))
    if weights.shape != (layer.outputs.shape[1], PIXELS):
        return None
    # In one backward pass, each logit on every tenth digit.
    (slopes,) = torch.autograd.grad(trace.logits[rows, rows % CLASSES].sum(), layer.outputs)
    effects = torch.stack([slopes[digit::CLASSES].mean(0) for digit in range(CLASSES)])
    order = (layer.outputs.detach().mean(0) * effects.norm(dim=0)).argsort(descending=True)[:40]
    return weights[order].unflatten(1, (SIDE, SIDE)), effects[:, order].argmax(0)


def reasons(network: nn.Module, images: Tensor, digits: Tensor, others: Tensor) -> tuple[Tensor, Tensor, bool]:
    """Say why a network reads one digit, (N,), and not another, (N,), in images, (N, 784): what each pixel adds to the
    lead of one logit over the other, (N, 784), and a constant, (N,).

    A network of ReLUs is piecewise linear: with the active units held, this sum is exact. Where the third value is
    false, the network is no such one, and this is gradient times input.
    """
    pixels = images.to("cpu", torch.double, copy=True)
    # Within a linear piece, and only there, the slope is the same further on. So little further, no unit switches.
    trace, rows = Trace(network, torch.cat([pixels, pixels * (1 + 1e-7)])), torch.arange(2 * len(images))
    leads = trace.logits[rows, digits.repeat(2)] - trace.logits[rows, others.repeat(2)]
    slopes, further = torch.autograd.grad(leads.sum(), trace.pixels)[0].chunk(2)
    pixels *= slopes
    is_exact = torch.allclose(slopes, further, rtol=0, atol=1e-11 * slopes.abs().max().item())
    return pixels, leads.detach()[: len(images)] - pixels.sum(1), is_exact


def colored(images: Tensor, pixels: Tensor) -> Tensor:
    """Colour ink, (N, 784) in [0, 1], by what it says, (N, 784), each digit by its own scale: (N, 784, 4) in [0, 1]."""
    scale = 1.4 * pixels.abs().amax(1, keepdim=True).clamp(min=1e-9)
    rgba = torch.from_numpy(COLORS((pixels / scale + 0.5).numpy()))
    rgba[..., 3] = images
    return rgba


def draw(network: nn.Module, data: Any, predictions: Tensor, mistakes: Tensor) -> dict[str, Figure]:
    """Draw a network's layers, weights of the first one, and why it misread digits; say what is left out.

    `predictions`, (N,), are the digits read in the test split, and `mistakes`, (M,), the numbers of the wrong ones.
    """
    figures, name = {}, data.dataset_name
    try:
        # With fewer than ten digits, each counts several times.
        trace = Trace(network, data.val[0][:DIGITS].repeat(CLASSES, 1)[:DIGITS].float() / 255)
        figures["network"] = layers(trace, f"{name}\n{type(network).__name__}")
        if found := detectors(trace):
            figures["weights"] = weights(*found, f"{name}\nunits that matter most, and the digit that each speaks for")
        else:
            say("No figure weights.png: the first layer's units have not one weight for each pixel")
        if len(which := mistakes[:9]):
            images, read, true = data.test[0][which].float() / 255, predictions[which], data.test[1][which]
            pixels, constants, is_exact = reasons(network, images, read, true)
            told = zip(read, true, pixels.sum(1), constants, strict=True)
            titles = [f"why {a} and not {b}" + f"\n{p:+.1f} {c:+.1f} = {p + c:+.1f}" * is_exact for a, b, p, c in told]
            caption = "pixels + constant = lead of its logit" if is_exact else "gradient times input: no exact sum here"
            heading = f"{name}: ink for what it read is blue (dark),\nand against it orange (light); {caption}"
            figures["why"] = plots.digit_grid(colored(images, pixels), titles, heading)
    except Exception as error:  # a network that does not run here must not fail a run that is done
        say(f"No figures of the network: {error}".partition("\n")[0])
    return figures


def layers(trace: Trace, heading: str) -> Figure:
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
            block = patches.Rectangle((x - wide / 2, y - high / 2), wide, high, fc="#e4e4e4", ec="black", zorder=2)
            axes.add_patch(block)
        if index % columns and not trace.branches:
            lines = [(one, other) for one in before for other in here]
            axes.add_collection(collections.LineCollection(lines, colors="gray", linewidths=0.4, zorder=1))
        before = here
        sizes = ", ".join("B" if size == len(trace.pixels) else str(size) for size in layer.outputs.shape)
        facts = [f"({sizes})"] + [f"{sum(map(Tensor.numel, layer.weights)):,} parameters"] * bool(layer.weights) + facts
        axes.text(x, y - 1.13, layer.name, ha="center", fontsize=9, family="monospace")
        axes.text(x, y + 1.28, kind, ha="center", fontsize=min(10, 150 / len(kind)), weight="bold")
        axes.text(x, y + 1.35, "\n".join(facts), ha="center", va="top", fontsize=9)
    return figure


def weights(pictures: Tensor, digits: Tensor, heading: str) -> Figure:
    """Draw the weights of N units, (N, 28, 28), eight to a row, and under each its digit, (N,)."""
    columns, scale = min(8, len(digits)), pictures.abs().quantile(0.999).item()
    # One picture of all, with gaps: as many axes would take a second to draw.
    tiles = nn.functional.pad(pictures, (0, 3, 0, 10, 0, -len(digits) % columns), value=np.nan)
    tiles = tiles.unflatten(0, (-1, columns)).transpose(1, 2).flatten(2).flatten(0, 1)
    figure = Figure(figsize=(7, 7 * len(tiles) / tiles.shape[1] + 1.1), layout="constrained")
    figure.suptitle(heading, fontsize=11)
    axes = figure.subplots()
    axes.axis("off")
    shown = axes.imshow(tiles, cmap=COLORS, vmin=-scale, vmax=scale)
    for index, digit in enumerate(digits):
        x, y = index % columns * 31 + 13.5, index // columns * 38 + 28
        axes.text(x, y, f"{digit}", ha="center", va="top", weight="bold")
    label = "ink here silences the unit (below 0) or wakes it (above)"
    figure.colorbar(shown, location="bottom", shrink=0.6, aspect=40, pad=0.02, extend="both", label=label)
    return figure


def project(trainer: Any, network: nn.Module, data: Any, predictions: Tensor) -> None:
    """Show test digits in TensorBoard's projector by the activations that the last layer gets."""
    read = predictions[:DIGITS]
    images, true = data.test[0][: len(read)].float() / 255, data.test[1][: len(read)]
    found = Trace(network, images).layers
    points = found[max(index for index, layer in enumerate(found) if layer.weights) - 1].outputs.detach().flatten(1)
    labels, pictures = torch.stack([true, read], 1).tolist(), 1 - images.view(-1, 1, SIDE, SIDE)
    for logger in trainer.loggers:
        if hasattr(logger.experiment, "add_embedding"):
            logger.experiment.add_embedding(points, labels, pictures, trainer.global_step, "hidden", ["digit", "read"])
