"""Figures of a run: distorted training digits, and what became of the test's images."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torchmetrics.functional.classification import multiclass_confusion_matrix

from mnist_lightning.digits import plots
from mnist_lightning.digits.examples import DRAWN, Examples
from mnist_lightning.digits.plots import Figure
from mnist_lightning.engine.console import say_if_it_fails
from mnist_lightning.engine.data import uniform_noise
from mnist_lightning.engine.report import report
from mnist_lightning.engine.runs import run_directory
from mnist_lightning.engine.tensorboard import log_pictures


def draw_distortions(data: Any, name: str) -> dict[str, Figure]:
    """Draw five training digits of a set up `MNISTDataModule` beside distorted copies."""
    images = data.train[0][:5].float() / 255
    copies = images.repeat_interleave(9, dim=0)
    noise = uniform_noise(len(copies), data.distortions.draws, data.seed)
    distorted = data.distortions(copies, noise).reshape(len(images), 9, -1)
    return {"distortions": plots.distorted_digits(images, distorted, f"{name}: training digits")}


def draw_test(examples: Examples, by_confidence: bool, name: str, are_digits: bool) -> dict[str, Figure]:
    """Draw the confusion matrix, and up to nine of the correct and of the misclassified images.

    Args:
        examples: Those that were tested.
        by_confidence: Draw the mistakes that the network was most confident about, not the first ones.
        name: Of the data.
        are_digits: The images are digits, out of one file.
    """
    what, first = ("test digits", "first in the file") if are_digits else ("test images", "the first ones")

    def grid(numbers: Tensor, kind: str, order: str) -> Figure:
        titles = [f"True: {examples.labels[i]}, Pred: {examples.predictions[i]}" for i in numbers[:DRAWN]]
        heading = f"{name}\n{len(numbers):,} {kind} {what}, {order}"
        return plots.digit_grid(examples.pictures(numbers[:DRAWN]), titles, heading)

    counts = multiclass_confusion_matrix(examples.predictions, examples.labels, num_classes=examples.classes)
    heading = f"{name}\nconfusion matrix of {len(examples.labels):,} {what}"
    figures = {"confusion_matrix": plots.confusion_matrix(counts, heading)}
    with say_if_it_fails("No figures of correct and misclassified images"):
        figures["correct"] = grid(examples.correct(), "correct", first)
        order = "most confident first" if by_confidence else first
        figures["misclassified"] = grid(examples.mistakes(by_confidence), "misclassified", order)
    return figures


def save(figures: Mapping[str, Figure], trainer: Any) -> None:
    """Save figures in the run's `figures/`, and show them in its loggers, in the first process."""
    folder = run_directory(trainer)
    if folder is None:
        return
    (folder / "figures").mkdir(exist_ok=True)
    paths = {f"figures/{name}": folder / "figures" / f"{name}.png" for name in figures}
    for figure, path in zip(figures.values(), paths.values(), strict=True):
        figure.savefig(path, dpi=120)
    found = report(trainer)
    iteration = found.iteration(trainer) if found else trainer.global_step
    log_pictures(trainer, paths, max(0, iteration - 1))
