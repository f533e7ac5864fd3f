"""What a trained `MLP` responds to: its most important hidden units, and attributions of its logits to the pixels."""

import numpy as np
import torch
from torch import Tensor

from mnist_lightning.model import MLP

# From negative over zero to positive: told apart by the colour blind, and in black and white, as light, grey and dark.
ORANGE_TO_BLUE = ((255, 192, 98), (232, 152, 46), (130, 130, 130), (58, 103, 181), (11, 31, 92))


@torch.no_grad()
def attributions(mlp: MLP, images: Tensor, class_weights: Tensor) -> tuple[Tensor, Tensor]:
    """Attribute a weighted sum of logits to the pixels: gradient times input.

    While the same hidden units are active, the network is linear: the sum is a constant, which the biases give, and for
    each pixel its value times a gradient. So the attributions and the constant add up to the sum, exactly.

    Args:
        mlp: The network, on the CPU and in float32.
        images: (N, 784) pixels in [0, 1].
        class_weights: (N, 10) weights of the logits in the sum, such as 1 for one digit and -1 for another.

    Returns:
        Attributions, (N, 784), and constants, (N,).
    """
    # How fast the sum grows with each unit's input: not at all where the ReLU is at 0.
    units = (class_weights @ mlp.output.weight) * (mlp.hidden(images) > 0)
    return images * (units @ mlp.hidden.weight), units @ mlp.hidden.bias + class_weights @ mlp.output.bias


@torch.no_grad()
def important_units(mlp: MLP, images: Tensor) -> tuple[Tensor, Tensor]:
    """Find the forty most important hidden units: those that change the logits most.

    That is the mean activation over the images, (N, 784), times the norm of the outgoing weights.

    Returns:
        Incoming weights, (U, 784), and the digit whose logit each unit raises most, (U,).
    """
    importance = mlp.hidden(images).relu().mean(0) * mlp.output.weight.norm(dim=0)
    order = importance.argsort(descending=True)[:40]
    return mlp.hidden.weight[order], mlp.output.weight[:, order].argmax(0)


def color_by_attribution(images: Tensor, attributions: Tensor) -> Tensor:
    """Colour images, (N, 784) in [0, 1], by attributions, (N, 784), from orange (negative) to blue, on white.

    Each image has a scale of its own. Returns red, green and blue in [0, 1], (N, 784, 3).
    """
    largest = attributions.abs().amax(1, keepdim=True).clamp(min=1e-9)
    place = 2 + 2 * (attributions / (0.7 * largest)).numpy()
    rgb = [np.interp(place, range(5), channel) / 255 for channel in zip(*ORANGE_TO_BLUE, strict=True)]
    return torch.lerp(torch.ones(()), torch.from_numpy(np.stack(rgb, 2)).float(), images[..., None])
