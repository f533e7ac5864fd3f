"""`python -m mnist_lightning`: the commands. Each imports what it uses when it runs, so that it starts fast."""

import sys

from mnist_lightning.commands import commands_for
from mnist_lightning.engine.console import run_command, without_garbage_collector


def main(*classes: type) -> int:
    """Run the command line; return its exit code. It leaves the process as it was, and can be called again.

    Args:
        *classes: Subclasses of `MNISTClassifier` and `MNISTDataModule` to train in place of these. They have the
            commands of `LightningCLI`, `fit`, `validate`, `test` and `predict`; `data` is MNIST's.
    """

    def train() -> None:
        with without_garbage_collector():
            from mnist_lightning.classifier import MNISTClassifier
            from mnist_lightning.datamodule import MNISTDataModule
            from mnist_lightning.digits.predictions import PredictionWriter
            from mnist_lightning.engine import cli
            from mnist_lightning.figures import Figures
        chosen = [
            next((each for each in classes if issubclass(each, kind)), kind)
            for kind in (MNISTClassifier, MNISTDataModule)
        ]
        cli.train(*chosen, [PredictionWriter()], {"figures": Figures}, threads=0 if classes else 1)

    return run_command(train, commands_for(classes), "Train a two-layer network to classify handwritten digits.")


if __name__ == "__main__":
    sys.exit(main())
