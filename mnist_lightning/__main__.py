"""`python -m mnist_lightning`: the commands. Each imports what it uses when it runs, so that it starts fast."""

from mnist_lightning.commands import COMMANDS
from mnist_lightning.engine import main as engine
from mnist_lightning.engine.startup import fast_imports, leave


def main(*classes: type) -> int:
    """Run the command line; return its exit code.

    Args:
        *classes: Subclasses of `MNISTClassifier` and `MNISTDataModule` to train in place of these. They have only
            the commands of `LightningCLI`: `fit`, `validate`, `test` and `predict`.
    """

    def train() -> int:
        with fast_imports():
            from mnist_lightning import cli
        return cli.run(*classes)

    return engine.main(train, {} if classes else COMMANDS, "Train a two-layer network to classify handwritten digits.")


def run() -> None:
    """Run the command line, then end this process."""
    leave(main())


if __name__ == "__main__":
    run()
