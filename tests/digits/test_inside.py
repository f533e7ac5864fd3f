"""What is drawn of the network itself: right for this network and for others."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import RunCLI, newest_run, prepare
from PIL import Image
from torch import Tensor, nn

from mnist_lightning.digits import inside, inside_plots, plots
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
    pixels, constants, is_exact = inside.reasons(mlp, every, digits)
    assert is_exact
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
    network, shares = cnn(activation), torch.eye(10)[torch.arange(60) % 10]
    pixels, constants, is_exact = inside.reasons(network, images, shares)
    assert is_exact is is_linear
    # Further on in the same linear piece.
    with torch.no_grad():
        further = (network.double()(images.double() * (1 + 1e-5)) * shares).sum(1)
    errors = (pixels.sum(1) * (1 + 1e-5) + constants - further).abs()
    assert (errors.median().item() < 1e-14) is is_linear


def layers(network: nn.Module, images: Tensor) -> list[tuple[str, str, tuple[int, ...], list[int]]]:
    found = inside.Trace(network, images).layers
    return [(x.name, x.kind, tuple(x.outputs.shape[1:]), [weight.numel() for weight in x.weights]) for x in found]


def test_finds_the_layers(mlp: MLP, images: Tensor) -> None:
    assert layers(mlp, images) == [
        ("", "pixels", (784,), []),
        ("hidden", "Linear\nthen ReLU", (50,), [39200, 50]),
        ("output", "Linear", (10,), [500, 10]),
    ]
    assert [row[:3] for row in layers(cnn(nn.ReLU(inplace=True)), images)] == [
        ("", "pixels", (784,)),
        ("", "Unflatten", (1, 28, 28)),
        ("1", "Conv2d", (4, 24, 24)),
        ("2", "batch_norm\nthen ReLU", (4, 24, 24)),
        ("", "MaxPool2d", (4, 12, 12)),
        ("5", "Conv2d\nthen ReLU", (8, 5, 5)),
        ("", "Flatten", (200,)),
        ("9", "Linear", (10,)),
    ]


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(784, 20), nn.Linear(20, 20), nn.Linear(20, 10)

    def forward(self, images: Tensor) -> Tensor:
        hidden = F.relu(self.first((images - 0.1307) / 0.3081))
        logits: Tensor = self.last(hidden + F.relu(self.second(hidden)))
        return logits


@pytest.mark.figures
def test_branches_are_not_drawn_as_a_chain(mlp: MLP, images: Tensor) -> None:
    assert not inside.Trace(mlp, images).branches
    trace = inside.Trace(Residual(), images)
    assert trace.branches
    figure = inside_plots.layers(trace, "")
    assert not figure.axes[0].collections
    assert "branches" in figure.get_suptitle()
    chain = inside_plots.layers(inside.Trace(mlp, images), "")
    assert len(chain.axes[0].collections) == 2
    shown = [text.get_text() for text in chain.axes[0].texts]
    assert {"(B, 784)", "(B, 50)\n39,250 parameters\nthen ReLU", "(B, 10)\n510 parameters"} < set(shown)


@torch.no_grad()
def test_finds_the_units_that_matter_most(mlp: MLP, images: Tensor) -> None:
    found = inside.detectors(inside.Trace(mlp, images))
    assert found
    weights, digits = found
    importance = F.relu(mlp.hidden(images)).mean(0) * mlp.output.weight.norm(dim=0)
    order = importance.argsort(descending=True)[:40]
    torch.testing.assert_close(weights.flatten(1).float(), mlp.hidden.weight[order])
    assert torch.equal(digits, mlp.output.weight[:, order].argmax(0))
    assert inside.detectors(inside.Trace(cnn(nn.ReLU()), images)) is None


def test_colours_ink_only(images: Tensor) -> None:
    says = torch.zeros_like(images, dtype=torch.double)
    says[0, :2] = torch.tensor([3.0, -3.0])
    rgba = inside.colored(images, says)
    assert torch.equal(rgba[..., 3].float(), images)
    light, grey, dark = ((rgba[0, pixel, :3].numpy() @ [0.3, 0.59, 0.11]) for pixel in (1, 2, 0))
    assert light - 0.2 > grey > dark + 0.2  # told apart in black and white


def test_draws_what_it_can_and_says_the_rest(root: Path, images: Tensor, capsys: pytest.CaptureFixture[str]) -> None:
    data, mistakes = prepare("synthetic", root), torch.arange(12)
    predictions = (data.test[1].long() + 1) % 10

    def draw(network: nn.Module, mistakes: Tensor = mistakes) -> set[str]:
        return set(inside_plots.draw(network, data, predictions, mistakes))

    assert draw(MLP(7).eval()) == {"network", "weights", "why"}
    assert capsys.readouterr().out == ""
    assert draw(cnn(nn.GELU())) == {"network", "why"}
    assert capsys.readouterr().out.startswith("No figure weights.png: ")
    assert draw(MLP(7).eval(), mistakes[:0]) == {"network", "weights"}
    assert capsys.readouterr().out == "No figure why.png: no digit was misread\n"

    class Single(nn.Linear):
        def forward(self, images: Tensor) -> Tensor:
            return super().forward(images.float())

    assert draw(Single(784, 10)) == set()
    assert capsys.readouterr().out.startswith("No figures of the network: ")


@pytest.mark.parametrize("activation", [nn.ReLU(), nn.GELU()], ids=str)
def test_the_caption_says_whether_it_adds_up(
    root: Path, activation: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[tuple[list[str], str]] = []
    monkeypatch.setattr(plots, "digit_grid", lambda _, titles, heading: drawn.append((titles, heading)))
    data = prepare("synthetic", root)
    predictions = (data.test[1].long() + 1) % 10
    network = nn.Sequential(nn.Linear(784, 20), activation, nn.Linear(20, 10))
    inside_plots.draw(network, data, predictions, torch.arange(3))
    ((titles, heading),) = drawn
    for title, digit, label in zip(titles, predictions, data.test[1], strict=False):
        first, second = title.split("\n")
        assert first == f"why {digit} and not {label}"
        if isinstance(activation, nn.ReLU):
            pixels, constant, _, lead = map(float, second.replace("=", "0").split())
            assert pixels + constant == pytest.approx(lead, abs=0.11)
        else:
            assert second == "no exact sum"
    assert ("gradient times input" in heading) is isinstance(activation, nn.GELU)


def test_it_is_drawn_where_it_is_asked_for(run_cli: RunCLI, tmp_path: Path) -> None:
    settings = ["--trainer.max_epochs=1", "--model.hidden_dim=9"]
    assert run_cli("fit", *settings, "--figures.inside=false") == 0
    names = {path.stem for path in (newest_run(tmp_path) / "figures").iterdir()}
    assert names == {"correct", "misclassified", "confusion_matrix", "training_curves"}
    assert run_cli("fit", *settings, "--test_after_fit=false", "--figures.projector=true") == 0
    run = newest_run(tmp_path)
    assert not (run / "figures").exists()
    assert not (run / "projector_config.pbtxt").exists()


def test_the_projector_gets_the_last_hidden_activations(run_cli: RunCLI, tmp_path: Path, root: Path) -> None:
    assert run_cli("fit", "--trainer.max_epochs=1", "--model.hidden_dim=9", "--figures.projector=true") == 0
    run = newest_run(tmp_path)
    checkpoint = torch.load(run / "checkpoints/best.ckpt", weights_only=True)
    mlp = MLP(9).eval()
    mlp.load_state_dict({name.removeprefix("mlp."): tensor for name, tensor in checkpoint["state_dict"].items()})
    pixels, labels = prepare("synthetic", root).test
    with torch.no_grad():
        hidden = F.relu(mlp.hidden(pixels.float() / 255))
    (folder,) = (path.parent for path in run.rglob("tensors.tsv"))
    points = torch.tensor(np.loadtxt(folder / "tensors.tsv")).float()
    torch.testing.assert_close(points, hidden, rtol=0, atol=1e-4)
    header, *rows = csv.reader((folder / "metadata.tsv").open(), delimiter="\t")
    assert header == ["digit", "read"]
    read = mlp.output(hidden).argmax(1)
    assert rows == [[str(a), str(b)] for a, b in zip(labels.tolist(), read.tolist(), strict=True)]
    with Image.open(folder / "sprite.png") as sprite:
        first = 255 - np.asarray(sprite)[:28, :28, 0]
    np.testing.assert_allclose(first, pixels[0].view(28, 28), atol=1)
    assert (
        json.dumps(folder.relative_to(run).as_posix() + "/tensors.tsv") in (run / "projector_config.pbtxt").read_text()
    )
