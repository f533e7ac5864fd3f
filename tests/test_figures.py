"""The figures of a run: what they show, and where they are."""

import csv
import io
import math
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from conftest import RUN, SMALL, RunCLI, events, prepare
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from mnist_lightning import MNISTClassifier, MNISTDataModule, Trainer, datamodule
from mnist_lightning.digits import plots
from mnist_lightning.digits.predictions import PredictionWriter
from mnist_lightning.figures import Figures

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


def on_cpu(logger: Any, *callbacks: Callback) -> Trainer:
    return Trainer(
        accelerator="cpu",
        logger=logger,
        callbacks=[*callbacks],
        max_epochs=1,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )


class Foreign(pl.LightningModule):
    """Another network on other data, without a name."""

    def __init__(self, shape: tuple[int, ...], classes: int) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(math.prod(shape), classes))

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.net(images)
        return logits

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        return self(batch[0])


class ReturnsNothing(Foreign):
    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.log("test/loss", self(batch[0]).mean())


GRIDS = {"confusion_matrix", "correct", "misclassified"}
NO_IMAGES = "No figures of correct and misclassified images: tensors of the shape (20,) are no images"
NO_LOGITS = "No figures of the test: test_step returns no logits, (B, classes), but NoneType"
OTHERS: dict[str, tuple[type[Foreign], tuple[int, ...], int, set[str], list[str]]] = {
    "like MNIST": (Foreign, (1, 28, 28), 10, GRIDS, []),
    "in colour": (Foreign, (3, 32, 32), 3, GRIDS, []),
    "many classes": (Foreign, (50, 40), 30, GRIDS, []),
    "no images": (Foreign, (20,), 2, {"confusion_matrix"}, [NO_IMAGES]),
    "no logits": (ReturnsNothing, (784,), 10, set(), [NO_LOGITS]),
}


@pytest.mark.figures
@pytest.mark.parametrize("loaders", [1, 2])
@pytest.mark.parametrize("name", OTHERS)
def test_other_data_and_networks(
    name: str, loaders: int, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plots, "confusion_matrix", matrix := Mock(wraps=plots.confusion_matrix))
    kind, shape, classes, drawn, said = OTHERS[name]
    images = torch.randn(40, *shape)  # as after a normalization
    data = DataLoader(TensorDataset(images, torch.arange(40) % classes), batch_size=9)
    trainer = on_cpu(CSVLogger(tmp_path, "", ""), Figures(projector=True))
    trainer.test(kind(shape, classes), [data] * loaders if loaders > 1 else data, verbose=False)
    out = capsys.readouterr().out.splitlines()
    if drawn:
        said = ["The figures are of the first test loader"] * (loaders > 1) + said
        said += [
            f"{what}: they are of MNISTClassifier's MLP"
            for what in ("No figures of the network", "Nothing in the projector")
        ]
    assert out == said
    assert {path.stem for path in tmp_path.glob("figures/*.png")} == drawn
    assert [int(call.args[0].sum()) for call in matrix.call_args_list] == [40] * bool(drawn)


class Pictures(CSVLogger):
    """A logger that takes images as W&B's does."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.taken: dict[str, tuple[list[bytes], int]] = {}

    def log_image(self, key: str, images: list[Any], step: int | None = None) -> None:
        assert step is not None
        self.taken[key] = [Path(image).read_bytes() for image in images], step


class Refuses(Pictures):
    def log_image(self, key: str, images: list[Any], step: int | None = None) -> None:
        raise ConnectionError("no network\nno such host")


def test_loggers_that_take_images_get_them(
    data: MNISTDataModule, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    loggers = [Pictures(tmp_path, "", ""), Refuses(tmp_path / "other"), CSVLogger(tmp_path / "third")]
    trainer = on_cpu(loggers, Figures(network=False))
    trainer.fit(model := MNISTClassifier(8), datamodule=data)
    trainer.test(model, datamodule=data, verbose=False)
    pngs = {f"figures/{name}": ([(tmp_path / f"figures/{name}.png").read_bytes()], 10) for name in GRIDS}
    assert loggers[0].taken == pngs  # type: ignore[attr-defined]
    assert capsys.readouterr().out.splitlines() == ["No pictures in Refuses: ConnectionError: no network"]


def test_whatever_goes_wrong_is_a_line(
    data: MNISTDataModule, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plots, "confusion_matrix", Mock(side_effect=KeyError("x")))
    trainer = on_cpu(CSVLogger(tmp_path, "", ""), Figures())
    trainer.test(MNISTClassifier(8), datamodule=data, verbose=False)
    assert capsys.readouterr().out.splitlines() == ["No figures of the test: KeyError: 'x'"]


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


@pytest.mark.parametrize(
    ("images", "drawn"),
    [
        (torch.rand(2, 9), (2, 3, 3)),
        (torch.rand(2, 4, 5), (2, 4, 5)),
        (torch.rand(2, 1, 4, 5, dtype=torch.half), (2, 4, 5)),
        (torch.rand(2, 3, 4, 5) * 9 - 4, (2, 4, 5, 3)),
        (torch.randint(9, (2, 4, 5, 3)), (2, 4, 5, 3)),
        (torch.rand(2, 3, 4, 4), (2, 4, 4, 3)),
        (torch.rand(0, 9), (0, 3, 3)),
        (torch.rand(2, 8), None),
        (torch.rand(2, 2, 4, 5), None),
        (torch.rand(2, 1, 1, 4, 5), None),
    ],
    ids=lambda each: str(tuple(each.shape)) if isinstance(each, Tensor) else "",
)
def test_pictures_of_any_images(images: Tensor, drawn: tuple[int, ...] | None) -> None:
    if drawn is None:
        with pytest.raises(ValueError, match=r"are no images"):
            plots.as_pictures(images)
        return
    pictures = plots.as_pictures(images)
    assert pictures.shape == drawn
    if len(images):
        low, high = (0, 1) if images.max() > 1 else (images.min(), images.max())
        assert (pictures.min(), pictures.max()) == (low, high)


def test_bytes_are_not_brightened() -> None:
    assert plots.as_pictures(torch.full((1, 4), 51, dtype=torch.uint8)).flatten().tolist() == pytest.approx([0.2] * 4)


@pytest.mark.figures
def test_the_confusion_matrix_shows_the_counts() -> None:
    counts = torch.arange(100).reshape(10, 10)
    axes = plots.confusion_matrix(counts, "heading").axes[0]
    assert [text.get_text() for text in axes.texts] == ["·", *map(str, range(1, 100))]
