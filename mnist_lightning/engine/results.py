"""`results.json`: what a run has reached, in flat keys."""

import json
from pathlib import Path
from typing import Any

import lightning.pytorch as pl

from .run import versions


def write_results(
    folder: Path, trainer: pl.Trainer, iteration: int, train_seconds: float, validated: tuple[float, float] | None
) -> None:
    """Write what is known by now, after training and again after a test.

    Args:
        folder: The run's directory.
        trainer: With metrics of a test, if it has tested.
        iteration: Optimizer steps of the run.
        train_seconds: Seconds spent in the fit loop.
        validated: Loss and accuracy in validation of the very weights that training left or that were tested.
    """
    settings = data_settings(trainer)
    results: dict[str, Any] = {
        "dataset": settings.get("dataset"),
        "seed": settings.get("seed"),
        "iterations": iteration,
    }
    results["train_seconds"] = round(train_seconds, 3)
    for split, measured in {"val": validated, "test": metrics(trainer, "test")}.items():
        if measured:
            results |= dict(zip((f"{split}/loss", f"{split}/acc"), measured, strict=True))
    results["versions"] = versions()
    (folder / "results.json").write_text(json.dumps(results, indent=4) + "\n")


def data_settings(trainer: pl.Trainer) -> dict[str, Any]:
    """The data module's hyperparameters; a loader that was given to `fit` has none."""
    data = trainer.datamodule  # type: ignore[attr-defined]
    return dict(data.hparams) if data else {}


def metrics(trainer: pl.Trainer, split: str) -> tuple[float, float] | None:
    """Loss and accuracy of a split, where the module logs them."""
    names = (f"{split}/loss", f"{split}/acc")
    if not set(names) <= trainer.callback_metrics.keys():
        return None
    # Six digits: more would show the rounding of the float32 mean.
    loss, acc = (round(trainer.callback_metrics[name].item(), 6) for name in names)
    return loss, acc
