"""The figures of a run: what they show, and where they are."""

import csv
import io
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from conftest import SMALL, RunCLI, events, prepare
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from mnist_lightning import MNISTClassifier, MNISTDataModule, Trainer, datamodule
from mnist_lightning.digits import plots
from mnist_lightning.digits.predictions import PredictionWriter
from mnist_lightning.figures import Figures

RUN = Path("lightning_logs/version_0")
Grids = dict[str, tuple[Tensor, list[str]]]


@pytest.fixture
def grids(monkeypatch: pytest.MonkeyPatch) -> Grids:
    """The images and titles of each 3x3 figure drawn, by the first words of its heading."""
    drawn, draw = {}, plots.digit_grid

    def record(images: Tensor, titles: list[str], heading: str) -> Figure:
        (kind,) = (words for words in ("misclassified", "correct", "why it") if words in heading)
        drawn[kind] = images, titles
        assert "synthetic digits (not MNIST)" in heading
        return draw(images, titles, heading)

    monkeypatch.setattr(plots, "digit_grid", record)
    return drawn


def test_they_show_what_they_say(run_cli: RunCLI, root: Path, grids: Grids) -> None:
    assert run_cli("fit", "--trainer.max_epochs=2") == 0
    pixels, labels = prepare("synthetic", root).test
    images = pixels.float() / 255
    model = MNISTClassifier.load_from_checkpoint(RUN / "checkpoints/best.ckpt", weights_only=True)
    with torch.no_grad():
        confidences, predictions = model(images).softmax(1).max(1)

    wrong, right = ((predictions == labels).logical_not().nonzero()[:, 0], (predictions == labels).nonzero()[:, 0])
    for name, which in {"misclassified": wrong, "correct": right}.items():
        assert torch.equal(grids[name][0], images[which[:9]])
        assert grids[name][1] == [f"True: {labels[i]}, Pred: {predictions[i]}" for i in which[:9]]

    assert run_cli("test", "--ckpt_path=best", "--figures.misclassified=confidence") == 0
    surest = wrong[confidences[wrong].argsort(descending=True)][:9]
    assert torch.equal(grids["misclassified"][0], images[surest])


@pytest.mark.figures
def test_tensorboard_shows_the_files(run_cli: RunCLI, capsys: pytest.CaptureFixture[str]) -> None:
    distorted = ["--data.distortions.rotation=5", "--trainer.log_every_n_steps=5"]
    assert run_cli("fit", "--trainer.max_epochs=1", *distorted) == 0
    assert capsys.readouterr().err == ""
    names = {"correct", "misclassified", "confusion_matrix", "training_curves", "network", "weights", "attributions"}
    logged, names = events(RUN), names | {"distortions"}
    assert set(logged.Tags()["images"]) == {f"figures/{name}" for name in names}
    assert {path.name for path in (RUN / "figures").iterdir()} == {f"{name}.png" for name in names}
    assert logged.Tags()["graph"]
    for name in names:
        (shown,) = logged.Images(f"figures/{name}")
        # At the iteration whose weights are drawn, counted from 0 as on all curves.
        assert shown.step == (0 if name == "distortions" else 10)
        with (
            Image.open(io.BytesIO(shown.encoded_image_string)) as image,
            Image.open(RUN / f"figures/{name}.png") as png,
        ):
            assert image.width > 100
            assert np.array_equal(np.asarray(image), np.asarray(png))


class Breaks(Callback):
    """Interrupts each test and prediction at its second minibatch, until it is told not to."""

    on = True

    def on_test_batch_end(self, *args: Any) -> None:
        if self.on and args[4] == 1:
            raise RuntimeError("interrupted")

    def on_predict_batch_end(self, *args: Any) -> None:
        self.on_test_batch_end(*args)


def test_one_that_broke_off_leaves_nothing_to_the_next(
    data: MNISTDataModule, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datamodule, "EVAL_BATCH_SIZE", 50)
    monkeypatch.setattr(plots, "confusion_matrix", drawn := Mock(return_value=Figure()))
    breaks, model = Breaks(), MNISTClassifier(8)
    callbacks = [Figures(), PredictionWriter(), breaks]
    trainer = Trainer(accelerator="cpu", logger=CSVLogger(tmp_path, "", ""), callbacks=callbacks)
    for command in (trainer.test, trainer.predict):
        breaks.on = True
        with pytest.raises(RuntimeError, match="interrupted"):
            command(model, datamodule=data)
        breaks.on = False
        command(model, datamodule=data)
    assert [int(call.args[0].sum()) for call in drawn.call_args_list] == [SMALL["t10k"]]
    _, *rows = csv.reader((tmp_path / "predictions.csv").read_text().splitlines())
    with torch.no_grad():
        digits = model.eval()(data.test[0].float() / 255).argmax(1).tolist()
    assert [row[:2] for row in rows] == [[str(image), str(digit)] for image, digit in enumerate(digits)]


@pytest.mark.figures
@pytest.mark.parametrize("count", [0, 1, 9, 12])
def test_digit_grids_of_any_size(count: int, tmp_path: Path) -> None:
    images = torch.rand(count, 784)
    figure = plots.digit_grid(images, [f"True: {i}" for i in range(count)], "heading")
    figure.savefig(tmp_path / "figure.png")
    (axes,) = figure.axes
    titles = [text.get_text() for text in axes.texts]
    assert titles == ([f"True: {i}" for i in range(min(count, 9))] or ["none"])
    for index, image in enumerate(images[:9]):
        row, column = divmod(index, 3)
        grid = axes.images[0].get_array()
        assert grid is not None
        shown = grid[row * 33 + 5 : (row + 1) * 33, column * 30 + 1 : column * 30 + 29]
        assert (shown == image.view(28, 28).numpy()).all(), index


@pytest.mark.figures
def test_the_confusion_matrix_shows_the_counts() -> None:
    counts = torch.arange(100).reshape(10, 10)
    axes = plots.confusion_matrix(counts, "heading").axes[0]
    assert [text.get_text() for text in axes.texts] == ["·", *map(str, range(1, 100))]
