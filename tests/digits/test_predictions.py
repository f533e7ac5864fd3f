"""`predictions.csv`, whatever a module predicts."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor
from torch.utils.data import DataLoader

from mnist_lightning import Trainer
from mnist_lightning.digits.predictions import PredictionWriter


def predicts(step: Callable[[Tensor], Any]) -> pl.LightningModule:
    class Predicts(pl.LightningModule):
        def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
            return step(batch)

    return Predicts()


NO_PROBABILITIES = "predict_step does not return probabilities, (B, classes)"


@pytest.mark.parametrize(
    ("step", "loaders", "files", "said"),
    [
        (lambda batch: batch.softmax(1), 1, ["predictions.csv"], "Predicted 7 digits"),
        (lambda batch: batch.softmax(1), 2, ["predictions_0.csv", "predictions_1.csv"], "Predicted 7 digits"),
        (lambda batch: batch.exp(), 1, [], f"No predictions.csv: {NO_PROBABILITIES}"),
        (lambda batch: batch - batch.mean(1, True) + 1 / 4, 1, [], f"No predictions.csv: {NO_PROBABILITIES}"),
        (lambda batch: batch.softmax(1)[:, :, None], 1, [], f"No predictions.csv: {NO_PROBABILITIES}"),
        (lambda batch: batch.argmax(1), 2, [], f"No predictions_1.csv: {NO_PROBABILITIES}"),
        (lambda batch: {"digit": batch}, 1, [], f"No predictions.csv: {NO_PROBABILITIES}"),
        (lambda batch: None, 1, [], f"No predictions.csv: {NO_PROBABILITIES}"),
    ],
    ids=[
        "one loader",
        "two loaders",
        "no sums of 1",
        "below 0",
        "three dimensions",
        "classes",
        "dictionary",
        "nothing",
    ],
)
def test_predictions_of_any_module(
    step: Callable[[Tensor], Any],
    loaders: int,
    files: list[str],
    said: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    logger, callbacks = CSVLogger(tmp_path, "", ""), [PredictionWriter()]
    trainer = Trainer(accelerator="cpu", logger=logger, callbacks=callbacks, enable_progress_bar=False)
    given = [DataLoader(torch.randn(7, 4), batch_size=3) for _ in range(loaders)]  # type: ignore[arg-type, var-annotated]
    trainer.predict(predicts(step), given)
    assert sorted(path.name for path in tmp_path.glob("*.csv")) == files
    assert capsys.readouterr().out.splitlines()[-1] == said
