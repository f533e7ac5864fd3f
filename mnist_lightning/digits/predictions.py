"""What `predict` leaves: a line for each digit of the test split."""

import csv
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from mnist_lightning.engine.processes import gather
from mnist_lightning.engine.run import run_directory, say


class PredictionWriter(pl.Callback):
    """Writes `predictions.csv`: for each image its number, the digit read, and that digit's probability."""

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin anew: a prediction before may have been interrupted."""
        self._probabilities: list[Tensor] = []

    def on_predict_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, *_: Any) -> None:
        """Keep the probabilities, (B, 10), that `predict_step` returns."""
        self._probabilities.append(gather(trainer, outputs))

    def on_predict_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the file."""
        best, digits = torch.cat(self._probabilities).cpu().float().max(dim=1)
        if folder := run_directory(trainer):
            with (folder / "predictions.csv").open("w", newline="") as file:
                writer = csv.writer(file)
                writer.writerow(["image", "digit", "probability"])
                pairs = zip(digits.tolist(), best.tolist(), strict=True)
                writer.writerows([image, digit, f"{p:.4f}"] for image, (digit, p) in enumerate(pairs))
            say(f"Predictions: {folder / 'predictions.csv'}")
        say(f"Predicted {len(best):,} digits")
