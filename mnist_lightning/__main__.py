"""`python -m mnist_lightning`: the commands. Each imports what it uses when it runs, so that it starts fast."""

import sys

from mnist_lightning.commands import commands_for
from mnist_lightning.engine.console import run_command, without_garbage_collector


def main(*classes: type) -> int:
    """Run the command line; return its exit code. It leaves the process as it was, and can be called again.

    Args:
        *classes: A `LightningModule` and a `LightningDataModule`, or one of the two, to train in place of
            `MNISTClassifier` and `MNISTDataModule`. They have the commands of `LightningCLI`, `fit`, `validate`,
            `test` and `predict`; `data` is MNIST's.
    """

    def train() -> None:
        with without_garbage_collector():
            import lightning.pytorch as pl

            from mnist_lightning.classifier import MNISTClassifier
            from mnist_lightning.datamodule import MNISTDataModule
            from mnist_lightning.digits.predictions import PredictionWriter
            from mnist_lightning.engine import cli
            from mnist_lightning.figures import Figures
        defaults = {pl.LightningModule: MNISTClassifier, pl.LightningDataModule: MNISTDataModule}
        chosen = [next((each for each in classes if issubclass(each, kind)), ours) for kind, ours in defaults.items()]
        cli.train(*chosen, [PredictionWriter()], {"figures": Figures}, threads=0 if classes else 1)

    return run_command(train, commands_for(classes), "Train a two-layer network to classify handwritten digits.")


if __name__ == "__main__":
    sys.exit(main())
