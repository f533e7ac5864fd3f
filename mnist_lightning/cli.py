"""`fit`, `validate`, `test` and `predict`: LightningCLI, which turns the arguments of these classes into options."""

from lightning.pytorch.cli import LightningArgumentParser

from mnist_lightning.classifier import MNISTClassifier
from mnist_lightning.datamodule import MNISTDataModule
from mnist_lightning.digits.predictions import PredictionWriter
from mnist_lightning.engine import training
from mnist_lightning.engine.cli import CLI
from mnist_lightning.figures import Figures


class MNISTCLI(CLI):
    """The engine's `CLI`, a `LightningCLI`, with this project's own settings. Making one runs the command."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Let `seed_everything` seed the shuffling, too, and add the settings of the figures."""
        parser.link_arguments("seed_everything", "data.seed")
        parser.add_lightning_class_args(Figures, "figures")
        super().add_arguments_to_parser(parser)


def run(model: type[MNISTClassifier] = MNISTClassifier, data: type[MNISTDataModule] = MNISTDataModule) -> int:
    """Run the command line with these classes; return its exit code."""
    return training.run(lambda: MNISTCLI(model, data, PredictionWriter()))


if __name__ == "__main__":
    raise SystemExit("run `python -m mnist_lightning`")
