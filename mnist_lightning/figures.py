"""The callback that draws a run: distorted digits as training begins, correct and misclassified ones after the test."""

from typing import Any, Literal

import lightning.pytorch as pl
import torch
from matplotlib.figure import Figure
from torch import Tensor
from torchmetrics.functional.classification import multiclass_confusion_matrix

from mnist_lightning.digits import network_figures, plots
from mnist_lightning.engine.data import uniform_noise
from mnist_lightning.engine.processes import gather_parts
from mnist_lightning.engine.report import report, save_figures
from mnist_lightning.engine.runs import run_directory
from mnist_lightning.model import CLASSES


class Figures(pl.Callback):
    """Draws figures to TensorBoard and to `figures/*.png`. Lightning calls the `on_...` hooks of a `Callback`.

    Args:
        misclassified: Which nine of the misclassified digits to show: the first of the test file (`file_order`), or
            those that the network was most confident about (`confidence`).
        interpretation: Draw weights of hidden units, and attributions of misclassified digits.
        projector: Show 1,000 test digits in TensorBoard's projector, by the activations of the last hidden layer.
    """

    def __init__(
        self,
        misclassified: Literal["file_order", "confidence"] = "file_order",
        interpretation: bool = True,
        projector: bool = False,
    ) -> None:
        self.misclassified, self.interpretation, self.projector = misclassified, interpretation, projector

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Draw five training digits beside distorted copies, where there are distortions."""
        data = trainer.datamodule  # type: ignore[attr-defined]
        if data.distortions is None or trainer.global_step or run_directory(trainer) is None:
            return
        images = data.train[0][:5].float() / 255
        copies = images.repeat_interleave(9, dim=0)
        noise = uniform_noise(len(copies), data.distortions.draws, data.seed)
        distorted = data.distortions(copies, noise).reshape(len(images), 9, -1)
        figure = plots.distorted_digits(images, distorted, f"{data.dataset_name}: training digits")
        save_figures({"distortions": figure}, trainer)

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Forget the logits of an earlier test, which may have been interrupted."""
        self._logits: list[Tensor] = []

    def on_test_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, *_: Any) -> None:
        """Keep `outputs`, the logits, (B, 10), that `test_step` returned, of all processes."""
        self._logits.append(gather_parts(trainer, outputs))

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Draw correct and misclassified digits, the confusion matrix, the curves, and what tells of the network."""
        logits = torch.cat(self._logits).cpu().float()
        if run_directory(trainer) is None:
            return
        data = trainer.datamodule  # type: ignore[attr-defined]
        images, labels = data.test[0][: len(logits)], data.test[1][: len(logits)].long()
        confidences, predictions = logits.softmax(dim=1).max(dim=1)
        correct, mistakes = (mask.nonzero().squeeze(1) for mask in (predictions == labels, predictions != labels))
        if self.misclassified == "confidence":
            mistakes = mistakes[confidences[mistakes].argsort(descending=True, stable=True)]

        def digits(which: Tensor, heading: str) -> Figure:
            which = which[:9]
            titles = [f"True: {labels[i]}, Pred: {predictions[i]}" for i in which]
            return plots.digit_grid(images[which].float() / 255, titles, f"{data.dataset_name}\n{heading}")

        counts = multiclass_confusion_matrix(predictions, labels, num_classes=CLASSES)
        order = {"file_order": "first in the file", "confidence": "most confident first"}[self.misclassified]
        heading = f"{data.dataset_name}\nconfusion matrix of {len(labels):,} test digits"
        figures = {
            "correct": digits(correct, f"{len(correct):,} correct test digits, first in the file"),
            "misclassified": digits(mistakes, f"{len(mistakes):,} misclassified test digits, {order}"),
            "confusion_matrix": plots.confusion_matrix(counts, heading),
        }
        history = report(trainer)
        if history and history.train:
            train, val = (torch.tensor(rows).reshape(-1, 3) for rows in (history.train, history.val))
            figures["training_curves"] = plots.training_curves(train, val, f"{data.dataset_name}: training curves")
        if self.interpretation:
            figures |= network_figures.draw(pl_module, data, predictions, mistakes)
        save_figures(figures, trainer)
        if self.projector:
            network_figures.add_to_projector(trainer, pl_module, data, predictions)
