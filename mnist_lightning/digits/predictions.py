"""What `predict` leaves: a line for each digit of the test split."""

import csv
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from mnist_lightning.engine.console import say
from mnist_lightning.engine.processes import gather_parts
from mnist_lightning.engine.runs import run_directory


class PredictionWriter(pl.Callback):
    """Writes `predictions.csv`: for each image its number, the predicted digit, and its probability.

    It takes the probabilities, (B, C), that the Trainer keeps, unless told not to. Where there are several loaders, the
    files are `predictions_0.csv`, `predictions_1.csv` and so on.
    """

    def on_predict_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the files, or say why there are none."""
        predictions, count = trainer.predict_loop.predictions, trainer.predict_loop.num_dataloaders
        for number, minibatches in enumerate([predictions] if count == 1 else predictions):
            parts, folder = gather_parts(trainer, minibatches), run_directory(trainer)
            name = "predictions.csv" if count == 1 else f"predictions_{number}.csv"
            if not parts:  # the Trainer does not keep them
                continue
            if not all(map(_are_probabilities, parts)):
                say(f"No {name}: predict_step does not return probabilities, (B, classes)")
                continue
            best, classes = torch.cat(parts).float().max(dim=1)
            if folder:
                with (folder / name).open("w", newline="") as file:
                    writer = csv.writer(file)
                    writer.writerow(["image", "digit", "probability"])
                    pairs = zip(classes.tolist(), best.tolist(), strict=True)
                    writer.writerows([image, digit, f"{p:.4f}"] for image, (digit, p) in enumerate(pairs))
                say(f"Predictions: {folder / name}")
            say(f"Predicted {len(best):,} digits")


def _are_probabilities(part: Any) -> bool:
    if not isinstance(part, Tensor) or part.ndim != 2 or not part.is_floating_point():
        return False
    # Half precision rounds to three digits.
    return bool((part >= 0).all() and ((part.double().sum(dim=1) - 1).abs() < 0.02).all())
