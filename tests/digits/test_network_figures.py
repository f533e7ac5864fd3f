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
from PIL import Image
from torch import Tensor, nn

from mnist_lightning.digits import network_figures, plots
from mnist_lightning.model import MLP


def test_draws_what_it_can_and_says_the_rest(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, mistakes = prepare("synthetic", root), torch.arange(12)
    predictions = (data.test[1].long() + 1) % 10

    def draw(network: nn.Module, mistakes: Tensor = mistakes) -> set[str]:
        return set(network_figures.draw(network, data, predictions, mistakes))

    assert draw(MLP(7).eval()) == {"weights", "attributions"}
    assert capsys.readouterr().out == ""
    assert draw(cnn(nn.GELU())) == {"attributions"}
    assert capsys.readouterr().out.startswith("No figure weights.png: ")
    assert draw(MLP(7).eval(), mistakes[:0]) == {"weights"}
    assert capsys.readouterr().out == "No figure attributions.png: no digit was misclassified\n"

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
    network_figures.draw(network, data, predictions, torch.arange(3))
    ((titles, heading),) = drawn
    for title, digit, label in zip(titles, predictions, data.test[1], strict=False):
        first, second = title.split("\n")
        assert first == f"True: {label}, Pred: {digit}"
        if isinstance(activation, nn.ReLU):
            pixels, constant, _, lead = map(float, second.replace("=", "0").split())
            assert pixels + constant == pytest.approx(lead, abs=0.11)
        else:
            assert second == "no exact sum"
    assert ("gradient times input" in heading) is isinstance(activation, nn.GELU)


def test_it_is_drawn_where_it_is_asked_for(run_cli: RunCLI, tmp_path: Path) -> None:
    settings = ["--trainer.max_epochs=1", "--model.hidden_dim=9"]
    assert run_cli("fit", *settings, "--figures.interpretation=false") == 0
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
    assert header == ["digit", "predicted"]
    predicted = mlp.output(hidden).argmax(1)
    assert rows == [[str(a), str(b)] for a, b in zip(labels.tolist(), predicted.tolist(), strict=True)]
    with Image.open(folder / "sprite.png") as sprite:
        first = 255 - np.asarray(sprite)[:28, :28, 0]
    np.testing.assert_allclose(first, pixels[0].view(28, 28), atol=1)
    assert (
        json.dumps(folder.relative_to(run).as_posix() + "/tensors.tsv") in (run / "projector_config.pbtxt").read_text()
    )
