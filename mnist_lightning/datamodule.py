"""MNIST as minibatches: get the files, verify them, split them, hand out loaders on the Trainer's device."""

import shutil
import socket
import threading
import time
from math import ceil, gcd
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_only
from rich.console import Console
from rich.panel import Panel
from torch import Tensor
from torchvision.datasets import MNIST
from torchvision.datasets.utils import check_integrity

from mnist_lightning.loader import DeviceLoader
from mnist_lightning.synthetic import SyntheticMNIST

TRAIN_FILE_SIZE = 60_000

# MD5 sums of the unpacked files; torchvision knows those of the gzipped ones.
MNIST_MD5 = {
    "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
    "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
    "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
    "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
}

# A mirror that sends nothing for so long is given up, and so is the whole download.
MIRROR_TIMEOUT, DOWNLOAD_TIMEOUT = 10.0, 25.0


class DataError(RuntimeError):
    """Files that are damaged, missing or cannot be written; the message names them and says what to do."""


class UnreachableError(DataError):
    """There is nothing of MNIST on disk, and it could not be downloaded either."""


class MNISTDataModule(pl.LightningDataModule):
    """MNIST, or digits made on this machine that stand in for it, split as in the tutorial.

    Validation is the first `val_size` images of the training file, in file order; the others are for training, and the
    test file is the test split. Images are (B, 784) float32 in [0, 1], labels (B,) int64.

    Training minibatches come in lists of `steps_per_execution`, one Lightning batch each; the Trainer's settings keep
    counting minibatches all the same. Validation, test and predict batches are single minibatches.

    Args:
        dataset: `mnist` downloads MNIST where it is not on disk. `synthetic` makes stand-in digits once. `auto` is
            `mnist`, or `synthetic` with a warning where MNIST is neither on disk nor to be downloaded.
        root: Directory for the files, laid out as `torchvision.datasets.MNIST` does.
        batch_size: Images in a minibatch, at least 1.
        steps_per_execution: Optimizer steps that one call of `training_step` runs, at least 1. It changes speed alone.
            Where validation or a checkpoint is due in mid-epoch, so many that both fall between two calls.
        val_size: Images held out for validation, 1 to 59,999.
        seed: Seed of the shuffling, 0 or above. An epoch's order depends on it and on the epoch's number alone.

    Raises:
        ValueError: A setting is out of its range.
        DataError: The files are damaged, missing or cannot be written.
    """

    def __init__(
        self,
        dataset: Literal["auto", "mnist", "synthetic"] = "auto",
        root: str = "data",
        batch_size: int = 100,
        steps_per_execution: int = 50,
        val_size: int = 5000,
        seed: int = 0,
    ) -> None:
        super().__init__()
        for name, value in {"batch_size": batch_size, "steps_per_execution": steps_per_execution}.items():
            if value < 1:
                raise ValueError(f"{name} must be at least 1, not {value}")
        if not 1 <= val_size < TRAIN_FILE_SIZE:
            raise ValueError(f"val_size must be 1 to {TRAIN_FILE_SIZE - 1:,} of the training file, not {val_size}")
        if seed < 0:
            raise ValueError(f"seed must be 0 or above, not {seed}")
        self.dataset = dataset
        self.root = Path(root)
        self.batch_size = batch_size
        self.steps_per_execution = steps_per_execution
        self.val_size = val_size
        self.seed = seed
        self._prepared = False

    @property
    def dataset_name(self) -> str:
        """`MNIST`, or `stand-in digits (not MNIST)`; what there is on disk decides where `dataset` is `auto`."""
        return "MNIST" if self._source() is MNIST else "stand-in digits (not MNIST)"

    def prepare_data(self) -> None:
        """Get and verify the files, once; Lightning calls this in one process of each machine."""
        if self._prepared:
            return
        try:
            if self.dataset == "synthetic":
                _get_synthetic(self.root)
            else:
                try:
                    _get_mnist(self.root)
                except UnreachableError as error:
                    if self.dataset == "mnist":
                        raise
                    _warn_of_stand_in(error)
                    _get_synthetic(self.root)
        except OSError as error:
            raise DataError(f"{error.filename or self.root}: {error.strerror or error}; see --data.root") from error
        self._prepared = True

    def setup(self, stage: str) -> None:
        """Read and split what `stage` needs: `fit`, `validate`, `test` or `predict`."""
        source = self._source()
        # Which one `auto` meant belongs to the run's hyperparameters; where its files lie does not.
        self.save_hyperparameters(
            {
                "dataset": "mnist" if source is MNIST else "synthetic",
                "batch_size": self.batch_size,
                "steps_per_execution": self.steps_per_execution,
                "val_size": self.val_size,
                "seed": self.seed,
            }
        )
        if stage in ("fit", "validate"):
            images, labels = _read(source, self.root, train=True)
            self.val = images[: self.val_size], labels[: self.val_size]
            self.train = images[self.val_size :], labels[self.val_size :]
            self._count_minibatches()
        else:
            self.test = _read(source, self.root, train=False)

    def teardown(self, stage: str) -> None:
        """Give the Trainer its own settings back."""
        if stage == "fit" and self.trainer:
            self.trainer.limit_train_batches, self.trainer.val_check_interval = self._trainer_settings

    def train_dataloader(self) -> DeviceLoader:
        """Freshly shuffled lists of minibatches; with `Trainer(overfit_batches)`, the first ones of the split."""
        return DeviceLoader(
            *self._on_device(self.train),
            self.batch_size,
            shuffle_seed=None if self.trainer and self.trainer.overfit_batches else self.seed,  # type: ignore[attr-defined]
            steps_per_execution=self._steps_per_execution,
            limit=self.iterations_per_epoch,
        )

    def val_dataloader(self) -> DeviceLoader:
        """Minibatches of the validation split, in file order."""
        return DeviceLoader(*self._on_device(self.val), self.batch_size)

    def test_dataloader(self) -> DeviceLoader:
        """Minibatches of the test split, in file order."""
        return DeviceLoader(*self._on_device(self.test), self.batch_size)

    def predict_dataloader(self) -> DeviceLoader:
        """Minibatches of the test split, in file order."""
        return DeviceLoader(*self._on_device(self.test), self.batch_size)

    def _source(self) -> type[MNIST]:
        raw = self.root / "MNIST" / "raw"
        complete = all((raw / name).exists() for name in MNIST_MD5)
        return MNIST if self.dataset == "mnist" or (self.dataset == "auto" and complete) else SyntheticMNIST

    def _on_device(self, split: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        device = self.trainer.strategy.root_device if self.trainer else "cpu"
        images = split[0].to(device)
        # Lightning would convert each batch to `Trainer(precision)`'s type; here it is done once.
        return self.trainer.precision_plugin.convert_input(images) if self.trainer else images, split[1].to(device)

    def _count_minibatches(self) -> None:
        """Make the Trainer's settings, which count Lightning batches, mean minibatches.

        The loader itself ends an epoch after `limit_train_batches` minibatches. The lists that it hands out get a
        length that divides every interval at which Lightning has to step in.
        """
        self.iterations_per_epoch = ceil(len(self.train[1]) / self.batch_size)
        self._steps_per_execution = self.steps_per_execution
        if self.trainer is None:
            return
        trainer, available = self.trainer, self.iterations_per_epoch
        self._trainer_settings = trainer.limit_train_batches, trainer.val_check_interval

        limit = trainer.limit_train_batches
        self.iterations_per_epoch = min(available, int(limit * available) if isinstance(limit, float) else limit)
        if self.iterations_per_epoch == 0 and limit:
            raise ValueError(f"limit_train_batches {limit} of {available} minibatches is none")
        trainer.limit_train_batches = self.iterations_per_epoch

        interval = trainer.val_check_interval
        if isinstance(interval, float) and interval < 1:
            interval = max(1, int(interval * self.iterations_per_epoch))
        if isinstance(interval, int) and interval > self.iterations_per_epoch and trainer.check_val_every_n_epoch:
            raise ValueError(
                f"val_check_interval {interval} is more than the {self.iterations_per_epoch} minibatches of an epoch; "
                "to count across epochs, set check_val_every_n_epoch to null"
            )
        intervals = [c._every_n_train_steps for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint)]
        if isinstance(interval, int):
            intervals.append(interval)
        if any(intervals):
            # The epoch's length too: a shorter last list would put all that follows out of step.
            self._steps_per_execution = gcd(self._steps_per_execution, self.iterations_per_epoch, *intervals)
        if isinstance(interval, int):
            trainer.val_check_interval = interval // self._steps_per_execution


def _read(source: type[MNIST], root: Path, train: bool) -> tuple[Tensor, Tensor]:
    file = source(str(root), train=train)
    return file.data.flatten(1).float().div_(255), file.targets


def _get_mnist(root: Path) -> None:
    raw = root / "MNIST" / "raw"
    bad = [raw / name for name, md5 in MNIST_MD5.items() if not check_integrity(raw / name, md5)]
    if not bad:
        return
    present = [path for name in MNIST_MD5 for path in (raw / name, raw / f"{name}.gz") if path.exists()]
    raw.mkdir(parents=True, exist_ok=True)
    # Everything is made in a directory of its own and moved when it is whole: a killed download leaves nothing that
    # could be taken for MNIST, and two downloads at once do not meet.
    with TemporaryDirectory(dir=root, prefix=".download-", ignore_cleanup_errors=True) as directory:
        stage = Path(directory, "MNIST", "raw")
        stage.mkdir(parents=True)
        for path in raw.glob("*.gz"):
            shutil.copy(path, stage)
        failure = _download(directory)
        fetched = [stage / name for name, md5 in MNIST_MD5.items() if check_integrity(stage / name, md5)]
        if len(fetched) < len(MNIST_MD5):
            reason = failure or "the files do not have the known MD5 sums"
            if not present:
                raise UnreachableError(f"{raw}: MNIST is not there, and the download failed: {reason}")
            state = "is damaged" if bad[0].exists() else "is missing or damaged"
            raise DataError(f"{bad[0]} {state}, and fetching it again failed: {reason}; delete it or go online")
        for path in fetched:
            path.replace(raw / path.name)


def _download(root: str) -> str:
    """Let torchvision download into `root`; return what went wrong in one line, or nothing."""
    failure = ""

    def fetch() -> None:
        nonlocal failure
        try:
            MNIST(root, download=True)
        except Exception as error:  # whatever a mirror may answer
            failure = " ".join(str(error).split()) or type(error).__name__

    # torchvision sets no time limit, and no socket's would cover looking up a name or a host with many addresses.
    thread = threading.Thread(target=fetch, daemon=True)
    default = socket.getdefaulttimeout()
    socket.setdefaulttimeout(MIRROR_TIMEOUT)
    try:
        thread.start()
        size, since = -1, time.monotonic()
        while thread.is_alive() and time.monotonic() - since < DOWNLOAD_TIMEOUT:
            thread.join(0.1)
            now = sum(path.stat().st_size for path in Path(root).rglob("*"))
            if now != size:
                size, since = now, time.monotonic()
    finally:
        socket.setdefaulttimeout(default)
    return f"nothing arrived for {DOWNLOAD_TIMEOUT:.0f} s" if thread.is_alive() else failure


def _get_synthetic(root: Path) -> None:
    if SyntheticMNIST.is_cached(root):
        return
    root.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=root, prefix=".make-") as directory:
        made = Path(SyntheticMNIST(directory, download=True).raw_folder)
        raw = SyntheticMNIST.folder(root)
        raw.mkdir(parents=True, exist_ok=True)
        for path in made.iterdir():
            path.replace(raw / path.name)


@rank_zero_only
def _warn_of_stand_in(error: UnreachableError) -> None:
    Console(stderr=True).print(
        Panel(
            f"{error}\n\n"
            "Training on digits made on this machine instead. [bold]Results on them are not MNIST results.[/bold]\n\n"
            "To get MNIST, go online and run [bold]python -m mnist_lightning data --data.dataset mnist[/bold], or copy "
            "its four files to MNIST/raw/ under --data.root.",
            title="[bold]NOT MNIST[/bold]",
            border_style="bold red",
        )
    )
