"""Figures of the network itself: right for this network and for others."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import RunCLI, newest_run, prepare
from digits.test_interpretation import cnn
from matplotlib.collections import LineCollection
from PIL import Image
from torch import Tensor, nn

from mnist_lightning.digits import network_figures, plots
from mnist_lightning.digits.examples import Examples
from mnist_lightning.model import MLP


@pytest.fixture
def examples(root: Path) -> Examples:
    """All of the small test split, misclassified."""
    pixels, labels = prepare("synthetic", root).test
    numbers = torch.arange(len(labels))
    return Examples(10, labels.long(), (labels.long() + 1) % 10, torch.ones(len(labels)), numbers, pixels / 255)


class Single(nn.Linear):
    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images.float())


NOT_A_CHAIN = "No figure network.png: the network is not a chain of Linear layers and activations\n"


@pytest.mark.parametrize(
    ("network", "mistakes", "drawn", "said"),
    [
        (MLP(7).eval(), 9, {"network", "weights", "attributions"}, ""),
        (cnn(nn.GELU()), 9, {"attributions"}, f"{NOT_A_CHAIN}No figure weights.png: the first layer is not a Linear "),
        (MLP(7).eval(), 0, {"network", "weights"}, "No figure attributions.png: nothing was misclassified\n"),
        (Single(784, 10), 9, set(), "No figures of the network: RuntimeError: mat1 and mat2 must have the same dtype"),
    ],
    ids=["MLP", "CNN", "no mistakes", "float32 only"],
)
def test_draws_what_it_can_and_says_the_rest(
    examples: Examples,
    capsys: pytest.CaptureFixture[str],
    network: nn.Module,
    mistakes: int,
    drawn: set[str],
    said: str,
) -> None:
    assert set(network_figures.draw(network, examples, torch.arange(mistakes), "digits")) == drawn
    out = capsys.readouterr().out
    assert out.startswith(said)
    assert bool(out) is bool(said)


class Skips(nn.Linear):
    def forward(self, images: Tensor) -> Tensor:
        return images + super().forward(images)


CHAINS: dict[str, tuple[nn.Module, list[tuple[int, str]] | None]] = {
    "MLP": (MLP(7, dropout=0.5), [(784, ""), (7, "ReLU"), (10, "")]),
    "deep": (
        nn.Sequential(nn.Flatten(), nn.Linear(784, 30), nn.ReLU(True), nn.Linear(30, 3), nn.LogSoftmax(1)),
        [(784, ""), (30, "ReLU"), (3, "LogSoftmax")],
    ),
    "with a sum": (nn.Sequential(nn.Linear(784, 10), Skips(10, 10)), None),
    "normalized": (nn.Sequential(nn.Linear(784, 10), nn.BatchNorm1d(10)), None),
    "two outputs of one": (nn.Sequential(nn.Linear(784, 10), nn.Unflatten(1, (5, 2)), nn.Linear(2, 2)), None),
    "convolution": (cnn(nn.ReLU()), None),
}


@pytest.mark.parametrize("name", CHAINS)
def test_a_chain_of_layers_is_told_from_other_networks(name: str) -> None:
    network, expected = CHAINS[name]
    assert network_figures.chain(network.eval(), torch.rand(1, 784)) == expected


@pytest.mark.figures
def test_layers_are_columns_of_units(tmp_path: Path) -> None:
    figure = network_figures.draw_layers([(784, ""), (200, "ReLU"), (11, "")], "heading")
    figure.savefig(path := tmp_path / "network.png", dpi=120)
    assert path.stat().st_size < 150_000
    (axes,) = figure.axes
    assert [np.size(column.get_ydata()) for column in axes.lines] == [10, 10, 11]
    lines = [each for each in axes.collections if isinstance(each, LineCollection)]
    assert [len(each.get_segments()) for each in lines] == [0, 100, 110]
    texts = [text.get_text() for text in axes.texts]
    assert texts == ["⋮", "784", "pixels", "⋮", "200", "ReLU", "11", "logits"]


@pytest.mark.parametrize("activation", [nn.ReLU(), nn.GELU()], ids=str)
def test_the_caption_says_whether_it_adds_up(
    examples: Examples, activation: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[tuple[list[str], str]] = []
    monkeypatch.setattr(plots, "digit_grid", lambda _, titles, heading: drawn.append((titles, heading)))
    network = nn.Sequential(nn.Linear(784, 20), activation, nn.Linear(20, 10))
    network_figures.draw(network, examples, torch.arange(3), "digits")
    ((titles, heading),) = drawn
    for title, digit, label in zip(titles, examples.predictions, examples.labels, strict=False):
        first, second = title.split("\n")
        assert first == f"True: {label}, Pred: {digit}"
        if isinstance(activation, nn.ReLU):
            pixels, constant, _, lead = map(float, second.replace("=", "0").split())
            assert pixels + constant == pytest.approx(lead, abs=0.11)
        else:
            assert second == "no exact sum"
    assert ("gradient times input" in heading) is isinstance(activation, nn.GELU)


def test_it_is_drawn_where_it_is_asked_for(run_cli: RunCLI, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = ["--trainer.max_epochs=1", "--model.hidden_dim=9"]
    assert run_cli("fit", *settings, "--figures.network=false") == 0
    names = {path.stem for path in (newest_run(tmp_path) / "figures").iterdir()}
    assert names == {"correct", "misclassified", "confusion_matrix"}
    for setting in ("--test_after_fit=false", "--figures.enabled=false"):
        assert run_cli("fit", *settings, "--figures.projector=true", "--data.distortions.scale=0.1", setting) == 0
        run = newest_run(tmp_path)
        assert (run / "figures").exists() is (setting == "--test_after_fit=false")  # the distortions
        assert not (run / "projector_config.pbtxt").exists()
        assert "No figure" not in capsys.readouterr().out


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
    assert header == ["true", "predicted"]
    predicted = mlp.output(hidden).argmax(1)
    assert rows == [[str(a), str(b)] for a, b in zip(labels.tolist(), predicted.tolist(), strict=True)]
    with Image.open(folder / "sprite.png") as sprite:
        first = 255 - np.asarray(sprite)[:28, :28, 0]
    np.testing.assert_allclose(first, pixels[0].view(28, 28), atol=1)
    assert (
        json.dumps(folder.relative_to(run).as_posix() + "/tensors.tsv") in (run / "projector_config.pbtxt").read_text()
    )
