"""`python -m mnist_lightning`: the command line. Lightning, whose import takes seconds, is imported where it trains."""

from mnist_lightning.commands import commands_for
from mnist_lightning.engine.console import exit_early, run_command


def main(module: type | None = None, datamodule: type | None = None) -> int:
    """Run the command line; return its exit code. It leaves the process as it was, and can be called again.

    Args:
        module: A `LightningModule` to train in place of `MNISTClassifier`.
        datamodule: A `LightningDataModule` to take in place of `MNISTDataModule`.
    """
    own = [each for each in (module, datamodule) if each]

    def train() -> None:
        from mnist_lightning.classifier import MNISTClassifier
        from mnist_lightning.datamodule import MNISTDataModule
        from mnist_lightning.digits.predictions import PredictionWriter
        from mnist_lightning.engine import cli
        from mnist_lightning.figures import Figures

        chosen = module or MNISTClassifier, datamodule or MNISTDataModule
        # On one thread the shipped network trains fastest beside other work; another one may need more (0: PyTorch's).
        cli.train(*chosen, [PredictionWriter()], {"figures": Figures}, threads=0 if own else 1)

    return run_command(train, commands_for(own), "Train a two-layer network to classify handwritten digits.")


if __name__ == "__main__":
    exit_early(main)
