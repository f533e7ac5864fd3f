from pathlib import Path

import pytest
import torch
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


def test_attributions_are_gradient_times_input_and_add_up_to_the_logits(mlp: MLP, images: Tensor) -> None:
    every, digits = images.repeat_interleave(10, 0).requires_grad_(), torch.eye(10).repeat(len(images), 1)
    logits = (mlp(every) * digits).sum(1)
    pixels, constants = interpretation.attributions(mlp, every, digits)
    torch.testing.assert_close(pixels, every * torch.autograd.grad(logits.sum(), every)[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(pixels.sum(1) + constants, logits, rtol=0, atol=1e-4)


def test_the_units_that_matter_most_change_the_logits_most(mlp: MLP, images: Tensor) -> None:
    weights, digits = interpretation.important_units(mlp, images)
    hidden = mlp.hidden(images).relu()
    parts = hidden.mean(0) * mlp.output.weight  # what each unit adds to the logits
    order = parts.norm(dim=0).argsort(descending=True)[:40]
    torch.testing.assert_close(weights, mlp.hidden.weight[order])
    assert torch.equal(digits, parts[:, order].argmax(0))


def test_colours_ink_only(images: Tensor) -> None:
    attributions = torch.zeros_like(images)
    attributions[0, :2] = torch.tensor([3.0, -3.0])
    images[0, :3], images[0, 3] = 1, 0
    colors = interpretation.color_by_attribution(images, attributions)[0]
    dark, light, grey, white = (float(color @ torch.tensor([0.3, 0.59, 0.11])) for color in colors[:4])
    assert white == pytest.approx(1)
    assert white > light - 0.2 > grey > dark + 0.2  # told apart in black and white
