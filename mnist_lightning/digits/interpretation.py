"""What a trained network responds to: its most important hidden units, and attributions of its logits to the pixels.

All of it works for any network in evaluation mode, by autograd, in double precision on the CPU.
"""

import numpy as np
import torch
from torch import Tensor, nn

from mnist_lightning.model import PIXELS, SIDE

# From negative over zero to positive: told apart by the colour blind, and in black and white, as light, grey and dark.
ORANGE_TO_BLUE = ((255, 192, 98), (232, 152, 46), (130, 130, 130), (58, 103, 181), (11, 31, 92))


def logits_in_double(network: nn.Module, images: Tensor) -> Tensor:
    """Run a network on images, (N, ...), in double precision on the CPU: (N, C) logits."""
    tensors = {}
    for name, tensor in [*network.named_parameters(), *network.named_buffers()]:
        # In this order: Apple's devices have no double precision.
        tensors[name] = tensor.detach().cpu().to(torch.double if tensor.is_floating_point() else tensor.dtype)
    logits: Tensor = torch.func.functional_call(network, tensors, images.cpu().double())
    return logits


@torch.inference_mode(False)  # in which Lightning tests; gradients are on
def attributions(network: nn.Module, images: Tensor, class_weights: Tensor) -> tuple[Tensor, Tensor, bool]:
    """Attribute a weighted sum of logits to the pixels: gradient times input.

    A network of ReLUs is piecewise linear. For it the attributions and a constant add up to the sum, exactly.

    Args:
        network: Maps (N, ...) to (N, C).
        images: (N, ...) pixels, such as (N, 784) in [0, 1].
        class_weights: (N, C) weights of the logits in the sum, such as 1 for one class and -1 for another.

    Returns:
        Attributions, (N, ...); constants, (N,); and whether the network is linear around each image.
    """
    pixels = images.cpu().double().clone()
    # Within a linear piece, the gradient is the same a little further on. A step of 1e-7 is too small to switch a unit.
    inputs = torch.cat([pixels, pixels * (1 + 1e-7)]).requires_grad_()
    sums = (logits_in_double(network, inputs) * class_weights.repeat(2, 1)).sum(1)
    gradients, further = torch.autograd.grad(sums.sum(), inputs)[0].chunk(2)
    pixels *= gradients
    is_linear = torch.allclose(gradients, further, rtol=0, atol=1e-11 * gradients.abs().max().item())
    return pixels, sums.detach()[: len(images)] - pixels.flatten(1).sum(1), is_linear


@torch.inference_mode(False)
def important_units(network: nn.Module, images: Tensor) -> tuple[Tensor, Tensor] | None:
    """Find the forty most important units of the first layer: those with the largest attributions of the logits.

    A unit's attribution is the mean over images, (N, ...), of its output times a logit's derivative with respect to it:
    for a ReLU before the last layer, its mean activation times its outgoing weight.

    Returns:
        Incoming weights, (U, 28, 28), and the class whose logit each unit raises most, (U,); or None where the first
        layer is not a `Linear` of 784 pixels.
    """
    first = next((module for module in network.modules() if [*module.parameters(recurse=False)]), None)
    if not isinstance(first, nn.Linear) or first.in_features != PIXELS:
        return None
    outputs: list[Tensor] = []

    def keep(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        outputs.append(output.detach().requires_grad_())
        return outputs[-1]

    with first.register_forward_hook(keep):
        logits = logits_in_double(network, images)
    gradients = [torch.autograd.grad(logit.sum(), outputs, retain_graph=True)[0] for logit in logits.unbind(1)]
    each = (outputs[0].detach() * torch.stack(gradients)).mean(1)  # (C, units)
    order = each.norm(dim=0).argsort(descending=True)[:40]
    return first.weight.detach().cpu()[order].unflatten(1, (SIDE, SIDE)), each[:, order].argmax(0)


def color_by_attribution(images: Tensor, attributions: Tensor) -> Tensor:
    """Colour images, (N, 784) in [0, 1], by attributions, (N, 784), from orange (negative) to blue.

    Each image has a scale of its own. Returns red, green, blue and opacity in [0, 1], (N, 784, 4).
    """
    largest = attributions.abs().amax(1, keepdim=True).clamp(min=1e-9)
    place = 2 + 2 * (attributions / (0.7 * largest)).numpy()
    rgb = [np.interp(place, range(5), channel) / 255 for channel in zip(*ORANGE_TO_BLUE, strict=True)]
    return torch.stack([*map(torch.from_numpy, rgb), images.double()], 2)
