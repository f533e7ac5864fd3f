"""MNIST as minibatches, cut from tensors on the device."""

from dataclasses import asdict
from pathlib import Path

from jsonargparse.typing import PositiveInt
from lightning.fabric.utilities.exceptions import MisconfigurationException

from mnist_lightning.digits import files, idx
from mnist_lightning.distortions import Distortions
from mnist_lightning.engine.data import DeviceDataModule, DeviceLoader

EVAL_BATCH_SIZE = 1000  # the metrics do not depend on it, and larger is faster


class MNISTDataModule(DeviceDataModule):
    """A `LightningDataModule` of MNIST, or of synthetic digits made on this machine, split as in the tutorial.

    Validation is the first `val_size` images of the training file, in file order, and training the rest; the test file
    is the test split. A minibatch is a pair: images, (B, 784) float32 in [0, 1], and labels, (B,) int64.

    Args:
        dataset: `mnist` downloads MNIST if it is not on disk. `synthetic` makes the synthetic digits once. `auto` is
            `mnist`, or `synthetic` with a warning if MNIST is not on disk and cannot be downloaded. `files` takes your
            own files, in MNIST's format and under its names, from `root` or from `MNIST/raw` below it.
        root: Directory for the files, laid out as `torchvision.datasets.MNIST` does.
        batch_size: Training images in a minibatch, over all processes, at least 1.
        val_size: Images held out for validation, at least 1 and not all.
        seed: Seed of the shuffling, 0 or above. An epoch's order depends on it and on the epoch's number alone.
        distortions: `True` distorts each training image anew in each epoch; `rotation`, `scale`, `shear`, `shift`,
            `elastic` and `smoothness` say how much. Validation and test images stay as they are.

    Raises:
        DataError: The files are damaged, missing or cannot be written.
    """

    def __init__(
        self,
        dataset: files.Dataset = "auto",
        root: str = "data",
        batch_size: PositiveInt = 100,
        val_size: PositiveInt = 5000,
        seed: int = 0,
        distortions: bool | Distortions = False,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(ignore="root")  # where the files lie does not change the result
        self.dataset, self.root = dataset, Path(root).expanduser()
        self.batch_size, self.val_size, self.seed = batch_size, val_size, seed
        self.distortions = Distortions.of(distortions)
        self._is_prepared = False

    def prepare_data(self) -> None:
        """Download and verify the files. Lightning calls it in one process per machine, `setup` in every process."""
        if not self._is_prepared:  # Lightning calls it for `fit`, and again for the test
            files.get(self.dataset, self.root)
            self._is_prepared = True

    def setup(self, stage: str) -> None:
        """Read and split the files: images, (N, 784) uint8, and labels, (N,) uint8."""
        raw = self._raw_of_all_processes()
        images, labels = idx.load(raw, "train")  # a file is a header of 8 or 16 bytes, then a byte a pixel or label
        if self.val_size >= len(labels):
            raise MisconfigurationException(
                f"data.val_size must be 1 to {len(labels) - 1:,} of the training file, not {self.val_size:,}"
            )
        self.train = images[self.val_size :], labels[self.val_size :]
        self.val = images[: self.val_size], labels[: self.val_size]
        self.test = idx.load(raw, "t10k")

    def train_dataloader(self) -> DeviceLoader:
        """The training split in minibatches, reshuffled in each epoch."""
        # 55,000 images / 100 = 550 minibatches, and as many iterations in an epoch, each a small step of the weights.
        # `loader` is DeviceDataModule's, and does what DataLoader(TensorDataset(images / 255, labels), batch_size,
        # shuffle=True) would, but faster, and in an order that follows from the seed and the epoch alone.
        return self.loader(*self.train, self.batch_size, shuffle_seed=self.seed, augmentation=self.distortions)

    def val_dataloader(self) -> DeviceLoader:
        """The validation split in minibatches, in file order."""
        return self.loader(*self.val, EVAL_BATCH_SIZE)

    def test_dataloader(self) -> DeviceLoader:
        """The test split in minibatches, in file order."""
        return self.loader(*self.test, EVAL_BATCH_SIZE)

    predict_dataloader = test_dataloader

    # Not needed to learn Lightning.

    @property
    def raw(self) -> Path:
        """Directory of the files."""
        return files.find(self.dataset, self.root)

    def _raw_of_all_processes(self) -> Path:
        """The first process's directory: else one machine might train on MNIST, another on synthetic digits."""
        raw: Path = self.trainer.strategy.broadcast(self.raw) if self.trainer else self.raw
        # Which data `auto` took, and how they are distorted: into `self.hparams`, and so into checkpoints.
        found = files.describe(self.dataset, self.root, raw)
        self.save_hyperparameters({**found, "distortions": asdict(self.distortions) if self.distortions else False})
        self.dataset_name = found["dataset_name"]  # `MNIST`, `synthetic digits (not MNIST)` or `files in DIRECTORY`
        return raw
