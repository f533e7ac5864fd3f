"""Figures of the network itself, and where they are drawn."""

import csv
import json
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import RunCLI, newest_run, prepare
from matplotlib.collections import LineCollection
from PIL import Image
from torch import nn

from mnist_lightning import MNISTClassifier
from mnist_lightning.digits import network_figures, plots
from mnist_lightning.digits.examples import Examples
from mnist_lightning.model import MLP


@pytest.fixture
def examples(root: Path) -> Examples:
    """All of the small test split, misclassified."""
    pixels, labels = prepare("synthetic", root).test
    numbers = torch.arange(len(labels))
    return Examples(10, labels.long(), (labels.long() + 1) % 10, torch.ones(len(labels)), numbers, pixels / 255)


def test_draws_any_mlp_and_says_that_it_draws_no_other_network(
    examples: Examples, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plots, "digit_grid", drawn := Mock())
    network = MNISTClassifier(7).double().eval()
    for mistakes in (3, 0):
        figures = network_figures.draw(network, examples, torch.arange(mistakes), "digits")
        assert list(figures) == ["network", "weights", "attributions"]
    pictures, titles, _ = drawn.call_args_list[0].args
    assert pictures.shape == (3, 28, 28, 3)
    for title, digit, label in zip(titles, examples.predictions, examples.labels, strict=False):
        first, second = title.split("\n")
        assert first == f"True: {label}, Pred: {digit}"
        ink, constant, _, lead = map(float, second.replace("=", "0").split())
        assert ink + constant == pytest.approx(lead, abs=0.11)
    assert capsys.readouterr().out == ""
    network.mlp = nn.Sequential(nn.Linear(784, 10))  # type: ignore[assignment]
    assert network_figures.draw(network, examples, torch.arange(3), "digits") == {}
    assert capsys.readouterr().out == "No figures of the network: they are of MNISTClassifier's MLP\n"


@pytest.mark.figures
def test_layers_are_columns_of_units(tmp_path: Path) -> None:
    figure = network_figures.draw_layers(MLP(200), "heading")
    figure.savefig(path := tmp_path / "network.png", dpi=120)
    assert path.stat().st_size < 150_000
    (axes,) = figure.axes
    assert [np.size(column.get_ydata()) for column in axes.lines] == [10, 10, 10]
    lines = [each for each in axes.collections if isinstance(each, LineCollection)]
    assert [len(each.get_segments()) for each in lines] == [0, 100, 100]
    assert [text.get_text() for text in axes.texts] == ["⋮", "784", "pixels", "⋮", "200", "ReLU", "10", "logits"]


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
