"""`python -m mnist_lightning`: the commands. Each imports what it uses when it runs, so that it starts soon."""

from mnist_lightning.commands import COMMANDS
from mnist_lightning.engine import main as engine
from mnist_lightning.engine.startup import fast_imports, leave


def main(*classes: type) -> int:
    """Run the command line; return its exit code.

    Args:
        *classes: Subclasses of `MNISTClassifier` and `MNISTDataModule` to train in place of these. They have the
            commands of `LightningCLI` only: `data`, `read` and so on are for ours.
    """

    def train() -> int:
        with fast_imports():
            from mnist_lightning import cli
        return cli.run(*classes)

    return engine.main(train, {} if classes else COMMANDS, "Train a two-layer network to read handwritten digits.")


def run() -> None:
    """Run the command line in a process of its own."""
    leave(main())


if __name__ == "__main__":
    run()
