"""The callback that draws a run: distorted digits as training begins, correct and misclassified ones after the test."""

from typing import Any, Literal

import lightning.pytorch as pl
import torch

from mnist_lightning.datamodule import MNISTDataModule
from mnist_lightning.digits import network_figures, plots, run_figures
from mnist_lightning.digits.examples import DRAWN, Collector, join
from mnist_lightning.engine.console import say, say_if_it_fails
from mnist_lightning.engine.processes import gather_parts
from mnist_lightning.engine.report import data_name, report
from mnist_lightning.engine.runs import run_directory


class Figures(pl.Callback):
    """Draws figures to `figures/*.png` and to the loggers. Lightning calls the `on_...` hooks of a `Callback`.

    An accuracy does not say whether the network is to blame for a mistake, or the handwriting: look at them. Any module
    will do whose `test_step` returns logits, (B, C), of images in grey or in colour; a line says what is left out.

    Args:
        misclassified: Which nine of the misclassified images to show: the first of the test file (`file_order`), or
            those that the network was most confident about (`confidence`).
        network: Draw the network's layers, weights of hidden units, and attributions of misclassified digits.
        projector: Show 1,000 test digits in TensorBoard's projector, by the activations of the last hidden layer.
        enabled: Draw figures at all.
    """

    def __init__(
        self,
        misclassified: Literal["file_order", "confidence"] = "file_order",
        network: bool = True,
        projector: bool = False,
        enabled: bool = True,
    ) -> None:
        self.misclassified, self.network, self.projector, self.enabled = misclassified, network, projector, enabled

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Draw five training digits beside distorted copies, where there are distortions."""
        data = trainer.datamodule  # type: ignore[attr-defined]
        if self.enabled and not trainer.global_step and getattr(data, "distortions", None):
            with say_if_it_fails("No figure distortions.png"):
                run_figures.save(run_figures.draw_distortions(data, data_name(trainer)), trainer)

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Forget an earlier test, which may have been interrupted."""
        self._collector = Collector(self.misclassified == "confidence", keeps_first=self.projector)

    def on_test_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, _: int, loader: int = 0
    ) -> None:
        """Keep `outputs`, the logits, (B, C), that `test_step` returned, as predictions, and the images to draw."""
        if self.enabled and loader == 0:
            self._collector.add(outputs, batch)

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Draw the curves, the confusion matrix, correct and misclassified digits, and what tells of the network."""
        parts, name = gather_parts(trainer, self._collector.parts), data_name(trainer)
        if not self.enabled or run_directory(trainer) is None:
            return
        history, by_confidence = report(trainer), self.misclassified == "confidence"
        with say_if_it_fails("No figure training_curves.png"):
            if history and history.train:
                train, val = (torch.tensor(rows).reshape(-1, 3) for rows in (history.train, history.val))
                curves = plots.training_curves(train, val, f"{name}: training curves")
                run_figures.save({"training_curves": curves}, trainer)
        with say_if_it_fails("No figures of the test"):
            examples = join(parts)
            if len(trainer.num_test_batches) > 1:
                say("The figures are of the first test loader")
            are_digits = type(trainer.datamodule) is MNISTDataModule  # type: ignore[attr-defined]
            run_figures.save(run_figures.draw_test(examples, by_confidence, name, are_digits), trainer)
            if self.network:
                mistakes = examples.mistakes(by_confidence)[:DRAWN]
                run_figures.save(network_figures.draw(pl_module, examples, mistakes, name), trainer)
            with say_if_it_fails("Nothing in the projector"):
                if self.projector:
                    network_figures.add_to_projector(trainer, pl_module, examples)
