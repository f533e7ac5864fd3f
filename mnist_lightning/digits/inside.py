"""What a network has become, in numbers: its layers, what the first one looks for, and why it read a digit.

It works for any network in evaluation mode: a forward pass records the calls, and autograd gives the slopes, in double
precision on the CPU.
"""

from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from mnist_lightning.model import CLASSES, PIXELS, SIDE

# Against, neither, for: told apart by the colour blind, and in black and white, as light, grey and dark.
ORANGE_TO_BLUE = ((255, 192, 98), (232, 152, 46), (130, 130, 130), (58, 103, 181), (11, 31, 92))
KINDS = {name.lower(): name for name in dir(nn)}  # the function `max_pool2d` is named as its module


class Trace(TorchFunctionMode):
    """A forward pass from `pixels`, (B, 784) in [0, 1], to `logits`, (B, 10), in double precision.

    Its `layers`, the pixels first, have parameters or change the shape. Each has a `kind`, with activations behind it,
    `outputs`, (B, ...), `weights`, and its module's `name`. `branches`: some layer does not follow on the one before.
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
def detectors(trace: Trace) -> tuple[Tensor, Tensor] | None:
    """Find the forty units of the first layer that matter most: mean activation times the norm of ten effects.

    An effect is the mean derivative of a logit by a unit's activation: before the last layer, the outgoing weight.
    Returns incoming weights, (N, 28, 28), and the digits that the units speak for most, (N,); None where the units have
    not one weight for each pixel.
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


@torch.inference_mode(False)
def reasons(network: nn.Module, images: Tensor, shares: Tensor) -> tuple[Tensor, Tensor, bool]:
    """Say why logits are what they are: what each pixel of images, (N, 784) in [0, 1], adds, and a constant, (N,).

    They add up to the sum of logits by `shares`, (N, 10), such as 1 for a digit and -1 for another. A network of ReLUs
    is piecewise linear: with the active units held, this is exact. Else the third value is false, and the first ones
    are gradient times input.
    """
    pixels = images.to("cpu", torch.double, copy=True)
    # Within a linear piece, the slope is the same a little further on. A step of 1e-7 is too small to switch a unit.
    trace = Trace(network, torch.cat([pixels, pixels * (1 + 1e-7)]))
    sums = (trace.logits * shares.repeat(2, 1)).sum(1)
    slopes, further = torch.autograd.grad(sums.sum(), trace.pixels)[0].chunk(2)
    pixels *= slopes
    is_exact = torch.allclose(slopes, further, rtol=0, atol=1e-11 * slopes.abs().max().item())
    return pixels, sums.detach()[: len(images)] - pixels.sum(1), is_exact


def colored(images: Tensor, pixels: Tensor) -> Tensor:
    """Colour ink, (N, 784) in [0, 1], by what it says, (N, 784), each digit by its own scale: (N, 784, 4) in [0, 1]."""
    place = 2 + 2 * (pixels / (0.7 * pixels.abs().amax(1, keepdim=True).clamp(min=1e-9))).numpy()
    rgb = [np.interp(place, range(5), channel) / 255 for channel in zip(*ORANGE_TO_BLUE, strict=True)]
    return torch.stack([*map(torch.from_numpy, rgb), images.double()], 2)
