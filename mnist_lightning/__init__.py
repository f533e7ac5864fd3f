"""The classic MNIST tutorial, rebuilt as a PyTorch Lightning project."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mnist_lightning.classifier import MNISTClassifier
    from mnist_lightning.datamodule import MNISTDataModule
    from mnist_lightning.engine.loop import Trainer

__all__ = ["MNISTClassifier", "MNISTDataModule", "Trainer"]

MODULES = {"MNISTClassifier": "classifier", "MNISTDataModule": "datamodule", "Trainer": "engine.loop"}


def __getattr__(name: str) -> Any:
    # Imported when they are asked for, so that `from mnist_lightning.model import MLP` does not wait for Lightning.
    if name not in MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{MODULES[name]}"), name)
