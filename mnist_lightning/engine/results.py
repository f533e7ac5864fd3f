"""`results.json`: what a run has reached, in flat keys."""

import contextlib
import json
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import lightning.pytorch as pl

from .run import PROGRAM, run_directory


def write_results(trainer: pl.Trainer, iterations: int, seconds: float, validated: tuple[float, float] | None) -> None:
    """Write what is known by now, after training and again after a test.

    `validated` are loss and accuracy in validation of the very weights that training left or that were tested.
    """
    if (folder := run_directory(trainer)) is None:
        return
    settings = data_settings(trainer)
    results: dict[str, Any] = {name: settings.get(name) for name in ("dataset", "seed")}
    results |= {"iterations": iterations, "train_seconds": round(seconds, 3)}
    for split, measured in {"val": validated, "test": metrics(trainer, "test")}.items():
        if measured:
            results |= dict(zip((f"{split}/loss", f"{split}/acc"), measured, strict=True))
    results["versions"] = {"python": platform.python_version()}
    for name in ("torch", "torchvision", "lightning", PROGRAM.replace("_", "-")):  # what decides a run's results
        with contextlib.suppress(PackageNotFoundError):
            results["versions"][name] = version(name)
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
