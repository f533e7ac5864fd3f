"""What a trained network computes: its layers, its most important hidden units, and attributions of its logits.

All of it works for any network in evaluation mode: a forward pass records the calls, and autograd gives derivatives, in
double precision on the CPU.
"""

from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from mnist_lightning.model import CLASSES, PIXELS, SIDE

# From negative over zero to positive: told apart by the colour blind, and in black and white, as light, grey and dark.
ORANGE_TO_BLUE = ((255, 192, 98), (232, 152, 46), (130, 130, 130), (58, 103, 181), (11, 31, 92))
KINDS = {name.lower(): name for name in dir(nn)}  # the function `max_pool2d` is named as its module


class Trace(TorchFunctionMode):
    """A forward pass of a network, recorded: from `pixels`, (B, 784) in [0, 1], to `logits`, (B, 10).

    Attributes:
        layers: The pixels, and each call that has parameters or changes the shape. A layer has a `kind`, followed by
            its activation's; `outputs`, (B, ...); `weights`; and the `name` of its module.
        branches: Whether some layer takes other inputs than the outputs of the one before it.
    """

    @torch.inference_mode(False)  # in which Lightning tests; gradients are on
    def __init__(self, network: nn.Module, images: Tensor) -> None:
        super().__init__()
        tensors = {}
        for name, tensor in [*network.named_parameters(), *network.named_buffers()]:
            copy = tensor.detach().to("cpu", torch.double if tensor.is_floating_point() else tensor.dtype)
            tensors[name] = nn.Parameter(copy, False) if isinstance(tensor, nn.Parameter) else copy
        self._names = {id(tensor): name for name, tensor in tensors.items()}
        self.pixels = images.detach().to("cpu", torch.double, copy=True).requires_grad_()
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


@torch.inference_mode(False)
def important_units(trace: Trace) -> tuple[Tensor, Tensor] | None:
    """Find the forty most important units of the first layer: those of the largest mean activation times effect.

    A unit's effect on a logit is the mean derivative of the logit with respect to its activation: in the layer before
    the last one, its outgoing weight. Its effect is the norm of those on the ten logits.

    Returns:
        Incoming weights, (N, 28, 28), and the class whose logit each unit raises most, (N,); or None where the units do
        not have one weight for each pixel.
    """
    layer = next(layer for layer in trace.layers if layer.weights)
    weights, rows = layer.weights[0], torch.arange(len(trace.logits))
    if weights.shape != (layer.outputs.shape[1], PIXELS):
        return None
    # In one backward pass, each logit for every tenth image.
    (gradients,) = torch.autograd.grad(trace.logits[rows, rows % CLASSES].sum(), layer.outputs)
    effects = torch.stack([gradients[label::CLASSES].mean(0) for label in range(CLASSES)])
    order = (layer.outputs.detach().mean(0) * effects.norm(dim=0)).argsort(descending=True)[:40]
    return weights[order].unflatten(1, (SIDE, SIDE)), effects[:, order].argmax(0)


@torch.inference_mode(False)
def attributions(network: nn.Module, images: Tensor, class_weights: Tensor) -> tuple[Tensor, Tensor, bool]:
    """Attribute a weighted sum of logits to the pixels: gradient times input.

    A network of ReLUs is piecewise linear. For it the attributions and a constant add up to the sum, exactly.

    Args:
        network: Maps (N, 784) to (N, 10).
        images: (N, 784) pixels in [0, 1].
        class_weights: (N, 10) weights of the logits in the sum, such as 1 for one class and -1 for another.

    Returns:
        Attributions, (N, 784); constants, (N,); and whether the network is linear around each image.
    """
    pixels = images.to("cpu", torch.double, copy=True)
    # Within a linear piece, the gradient is the same a little further on. A step of 1e-7 is too small to switch a unit.
    trace = Trace(network, torch.cat([pixels, pixels * (1 + 1e-7)]))
    sums = (trace.logits * class_weights.repeat(2, 1)).sum(1)
    gradients, further = torch.autograd.grad(sums.sum(), trace.pixels)[0].chunk(2)
    pixels *= gradients
    is_linear = torch.allclose(gradients, further, rtol=0, atol=1e-11 * gradients.abs().max().item())
    return pixels, sums.detach()[: len(images)] - pixels.sum(1), is_linear


def color_by_attribution(images: Tensor, attributions: Tensor) -> Tensor:
    """Colour ink by its attribution, from orange (negative) to blue, each image on a scale of its own.

    Args:
        images: (N, 784) pixels in [0, 1], which become opacity.
        attributions: (N, 784).

    Returns:
        (N, 784, 4) of red, green, blue and opacity in [0, 1].
    """
    largest = attributions.abs().amax(1, keepdim=True).clamp(min=1e-9)
    place = 2 + 2 * (attributions / (0.7 * largest)).numpy()
    rgb = [np.interp(place, range(5), channel) / 255 for channel in zip(*ORANGE_TO_BLUE, strict=True)]
    return torch.stack([*map(torch.from_numpy, rgb), images.double()], 2)
