"""`python -m mnist_lightning`: Lightning's commands on this project's classes, and those that train nothing."""

import sys

from lightning.pytorch.cli import LightningArgumentParser

from mnist_lightning.classifier import MNISTClassifier
from mnist_lightning.commands import COMMANDS
from mnist_lightning.datamodule import MNISTDataModule
from mnist_lightning.digits.predictions import PredictionWriter
from mnist_lightning.engine import main as engine
from mnist_lightning.engine.cli import CLI
from mnist_lightning.figures import Figures

HELP = {
    "prog": "mnist_lightning",
    "description": "Train a two-layer network to read handwritten digits.",
    "epilog": "Besides: `data` gets and verifies the data, `read` reads pictures of your own, `demo` writes a page to "
    "draw digits on, and `export` hands a network on to ONNX, TorchScript or safetensors; see `read --help` and so on.",
}


class MNISTCLI(CLI):
    """The settings that only this project has."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Shuffle by `seed_everything`, and add the settings of the figures."""
        parser.link_arguments("seed_everything", "data.seed")
        parser.add_lightning_class_args(Figures, "figures")
        super().add_arguments_to_parser(parser)


def main(
    model_class: type[MNISTClassifier] = MNISTClassifier, datamodule_class: type[MNISTDataModule] = MNISTDataModule
) -> int:
    """Run the command line with these classes; return its exit code. `data`, `read` and so on are for ours only."""
    commands = COMMANDS if (model_class, datamodule_class) == (MNISTClassifier, MNISTDataModule) else {}
    return engine.main(lambda: MNISTCLI(model_class, datamodule_class, (PredictionWriter,), HELP), commands)


if __name__ == "__main__":
    sys.exit(main())
