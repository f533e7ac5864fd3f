from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import prepare
from torch import Tensor, nn

from mnist_lightning.digits import interpretation
from mnist_lightning.model import MLP


@pytest.fixture(scope="module")
def images(root: Path) -> Tensor:
    return prepare("synthetic", root).test[0][:60].float() / 255


@pytest.fixture
def mlp() -> MLP:
    mlp = MLP(50, init_std=0.1, dropout=0.5).eval()
    for layer in (mlp.hidden, mlp.output):
        nn.init.normal_(layer.bias)
    return mlp


def cnn(activation: nn.Module) -> nn.Module:
    features = nn.Unflatten(1, (1, 28, 28)), nn.Conv2d(1, 4, 5), nn.BatchNorm2d(4), activation, nn.MaxPool2d(2)
    network = nn.Sequential(
        *features, nn.Conv2d(4, 8, 3, 2), activation, nn.Flatten(), nn.Dropout(0.5), nn.Linear(200, 10)
    )
    network(torch.rand(50, 784))  # for the running means
    return network.eval()


@torch.no_grad()
def test_pixels_and_constant_add_up_to_the_logits(mlp: MLP, images: Tensor) -> None:
    every, digits = images.repeat_interleave(10, 0), torch.eye(10).repeat(len(images), 1)
    pixels, constants, is_linear = interpretation.attributions(mlp, every, digits)
    assert is_linear
    sums = (pixels.sum(1) + constants).view(-1, 10).float()
    torch.testing.assert_close(sums, mlp(images), rtol=0, atol=1e-4)
    # The constant is no remainder: it is what the biases give while the same units are active.
    active = (mlp.hidden(images) > 0).float()
    expected = (active * mlp.hidden.bias) @ mlp.output.weight.T + mlp.output.bias
    torch.testing.assert_close(constants.view(-1, 10).float(), expected, rtol=0, atol=1e-4)
    by_pixel = torch.einsum("du,nu,up,np->ndp", mlp.output.weight, active, mlp.hidden.weight, images)
    torch.testing.assert_close(pixels.view(-1, 10, 784).float(), by_pixel, rtol=0, atol=1e-4)


ACTIVATIONS = {nn.ReLU(inplace=True): True, nn.LeakyReLU(): True, nn.GELU(): False, nn.Tanh(): False, nn.SiLU(): False}


@pytest.mark.parametrize(("activation", "is_linear"), ACTIVATIONS.items(), ids=str)
def test_only_piecewise_linear_networks_are_said_to_add_up(
    activation: nn.Module, is_linear: bool, images: Tensor
) -> None:
    network, class_weights = cnn(activation), torch.eye(10)[torch.arange(60) % 10]
    pixels, constants, is_linear = interpretation.attributions(network, images, class_weights)
    assert is_linear is is_linear
    # Further on in the same linear piece.
    with torch.no_grad():
        further = (network.double()(images.double() * (1 + 1e-5)) * class_weights).sum(1)
    errors = (pixels.sum(1) * (1 + 1e-5) + constants - further).abs()
    assert (errors.median().item() < 1e-14) is is_linear


@torch.no_grad()
def test_finds_the_units_that_matter_most(mlp: MLP, images: Tensor) -> None:
    units = interpretation.important_units(mlp, images)
    assert units
    weights, digits = units
    importance = F.relu(mlp.hidden(images)).mean(0) * mlp.output.weight.norm(dim=0)
    order = importance.argsort(descending=True)[:40]
    torch.testing.assert_close(weights.flatten(1).float(), mlp.hidden.weight[order])
    assert torch.equal(digits, mlp.output.weight[:, order].argmax(0))
    assert interpretation.important_units(cnn(nn.ReLU()), images) is None


def test_colours_ink_only(images: Tensor) -> None:
    attributions = torch.zeros_like(images, dtype=torch.double)
    attributions[0, :2] = torch.tensor([3.0, -3.0])
    rgba = interpretation.color_by_attribution(images, attributions)
    assert torch.equal(rgba[..., 3].float(), images)
    light, grey, dark = ((rgba[0, pixel, :3].numpy() @ [0.3, 0.59, 0.11]) for pixel in (1, 2, 0))
    assert light - 0.2 > grey > dark + 0.2  # told apart in black and white
