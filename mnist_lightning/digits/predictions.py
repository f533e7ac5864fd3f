"""What `predict` leaves: a line for each digit of the test split."""

import csv

import lightning.pytorch as pl
import torch

from mnist_lightning.engine.console import say
from mnist_lightning.engine.processes import gather_parts
from mnist_lightning.engine.runs import run_directory


class PredictionWriter(pl.Callback):
    """Writes `predictions.csv`: for each image its number, the predicted digit, and its probability.

    It takes the probabilities, (B, 10), that the Trainer keeps of one loader, unless told not to.
    """

    def on_predict_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the file."""
        parts = (gather_parts(trainer, part.to(pl_module.device)) for part in trainer.predict_loop.predictions)
        best, digits = torch.cat(list(parts)).cpu().float().max(dim=1)
        if folder := run_directory(trainer):
            with (folder / "predictions.csv").open("w", newline="") as file:
                writer = csv.writer(file)
                writer.writerow(["image", "digit", "probability"])
                pairs = zip(digits.tolist(), best.tolist(), strict=True)
                writer.writerows([image, digit, f"{p:.4f}"] for image, (digit, p) in enumerate(pairs))
            say(f"Predictions: {folder / 'predictions.csv'}")
        say(f"Predicted {len(best):,} digits")
