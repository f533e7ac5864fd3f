"""MNIST as minibatches: split it as the tutorial does and hand out loaders on the Trainer's device."""

from dataclasses import asdict
from math import ceil, gcd
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from mnist_lightning.digits import files
from mnist_lightning.distortions import Distortions
from mnist_lightning.loader import DeviceLoader

TRAIN_FILE_SIZE = 60_000


class MNISTDataModule(pl.LightningDataModule):
    """MNIST, or digits made on this machine that stand in for it, split as in the tutorial.

    Validation is the first `val_size` images of the training file, in file order; the others are for training, and the
    test file is the test split. Images are (B, 784) float32 in [0, 1], labels (B,) int64.

    Of several processes, each takes its part of every minibatch of each split: together they see what one would.

    A Lightning batch of training data is `Minibatches`, `steps_per_execution` of them. The Trainer's settings keep
    counting single ones; for that, hand the Trainer the data module, not just its loaders. Validation, test and predict
    batches are single minibatches.

    Args:
        dataset: `mnist` downloads MNIST where it is not on disk. `synthetic` makes stand-in digits once. `auto` is
            `mnist`, or `synthetic` with a warning where MNIST is neither on disk nor to be downloaded.
        root: Directory for the files, laid out as `torchvision.datasets.MNIST` does.
        batch_size: Images in a minibatch, of all processes together, at least 1.
        steps_per_execution: Optimizer steps that one call of `training_step` runs, at least 1; the word is Keras'. The
            weights are the same whatever it is. Where validation or a checkpoint is due in mid-epoch, a call runs
            fewer, so that it falls between two calls. Callbacks see each call as one batch: give 1 to those that have
            to see every minibatch.
        val_size: Images held out for validation, 1 to 59,999.
        seed: Seed of the shuffling, 0 or above. An epoch's order depends on it and on the epoch's number alone.
        distortions: Distort each training image anew in each epoch: true, or how much by `rotation`, `scale`, `shear`,
            `shift`, `elastic` and `smoothness`. Images that are validated, tested and predicted stay as they are.

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
        distortions: bool | Distortions = False,
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
        if isinstance(distortions, dict):  # a checkpoint's, by `load_from_checkpoint`
            distortions = Distortions(**distortions)
        self.distortions = Distortions() if distortions is True else distortions or None
        self._steps_per_execution = steps_per_execution
        self._raw = Path()
        self._trainer_settings: tuple[Any, Any] | None = None

    @property
    def dataset_name(self) -> str:
        """`MNIST` or `stand-in digits (not MNIST)`; known once the data is prepared."""
        return files.NAMES[files.dataset_in(self._raw)]

    def prepare_data(self) -> None:
        """Get and verify the files, once, though Lightning asks again for each of `fit` and `test`.

        Of several processes, Lightning asks the first one on each machine, and lets the others wait.

        Raises:
            MisconfigurationException: The Trainer's settings do not fit the data.
        """
        if not self._raw.parts:
            self._raw = files.get(self.dataset, self.root)
            if self.trainer and self.trainer.state.fn == TrainerFn.FITTING:
                # `setup` would refuse them too, but after the loggers have made the run's directory.
                train_size = files.count(self._raw, "train") - self.val_size
                self._in_minibatches(self.trainer, ceil(train_size / self.batch_size))
                for split, size in {"val": self.val_size, "test": files.count(self._raw, "t10k")}.items():
                    limit, minibatches = getattr(self.trainer, f"limit_{split}_batches"), ceil(size / self.batch_size)
                    if isinstance(limit, float) and 0 < limit * minibatches < 1:
                        raise MisconfigurationException(
                            f"limit_{split}_batches {limit} of {minibatches} minibatches is none; give 0 for none"
                        )

    def setup(self, stage: str) -> None:
        """Read and split what `stage` needs: `fit`, `validate`, `test` or `predict`."""
        if self.trainer:
            # What the first process found: another one might come to another end where it may try the download itself.
            self._raw = self.trainer.strategy.broadcast(self._raw)
        else:
            self.prepare_data()
        # Which dataset `auto` meant belongs to the run's hyperparameters; where its files lie does not.
        self.save_hyperparameters(
            {
                "dataset": files.dataset_in(self._raw),
                "batch_size": self.batch_size,
                "steps_per_execution": self.steps_per_execution,
                "val_size": self.val_size,
                "seed": self.seed,
                "distortions": asdict(self.distortions) if self.distortions else False,
            }
        )
        if stage in ("fit", "validate"):
            images, labels = files.read(self._raw, "train")
            images = images.float().div_(255)
            self.val = images[: self.val_size], labels[: self.val_size]
            self.train = images[self.val_size :], labels[self.val_size :]
            self.iterations_per_epoch = ceil(len(self.train[1]) / self.batch_size)
        else:
            images, labels = files.read(self._raw, "t10k")
            self.test = images.float().div_(255), labels
        if stage == "fit" and self.trainer:
            self._count_minibatches(self.trainer)

    def teardown(self, stage: str) -> None:
        """Give the Trainer its own settings back."""
        if stage == "fit" and self.trainer and self._trainer_settings:
            self.trainer.limit_train_batches, self.trainer.val_check_interval = self._trainer_settings
            self._trainer_settings = None

    def on_exception(self, exception: BaseException) -> None:
        """Do what Lightning skips after an exception."""
        self.teardown("fit")

    def state_dict(self) -> dict[str, Any]:
        """What has to be the same for a checkpoint to go on as if nothing had happened."""
        settings = {name: value for name, value in self.hparams.items() if name != "steps_per_execution"}
        return {**settings, "iterations_per_epoch": self.iterations_per_epoch}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Refuse to resume on other data than the checkpoint was trained with.

        Raises:
            MisconfigurationException: A setting differs; the message names it.
        """
        if self.trainer is None or self.trainer.state.fn != TrainerFn.FITTING:
            return
        for name, value in self.state_dict().items():
            trained_with = state_dict.get(name, False if name == "distortions" else None)  # older ones have none
            if trained_with != value:
                raise MisconfigurationException(
                    f"data.{name} is {value}, but the checkpoint was trained with {trained_with}; "
                    "give the same to resume it"
                )

    def train_dataloader(self) -> DeviceLoader:
        """Freshly shuffled lists of minibatches; with `Trainer(overfit_batches)`, the first ones of the split."""
        return self._loader(
            self.train,
            shuffle_seed=None if self.trainer and self.trainer.overfit_batches else self.seed,  # type: ignore[attr-defined]
            augmentation=self.distortions,
            steps_per_execution=self._steps_per_execution,
            limit=self.iterations_per_epoch,
        )

    def val_dataloader(self) -> DeviceLoader:
        """Minibatches of the validation split, in file order."""
        return self._loader(self.val)

    def test_dataloader(self) -> DeviceLoader:
        """Minibatches of the test split, in file order."""
        return self._loader(self.test)

    def predict_dataloader(self) -> DeviceLoader:
        """Minibatches of the test split, in file order."""
        return self._loader(self.test)

    def _loader(self, split: tuple[Tensor, Tensor], **kwargs: Any) -> DeviceLoader:
        images, labels = split
        if self.trainer:
            device = self.trainer.strategy.root_device
            # Lightning would convert each batch to the type of `Trainer(precision)`; here it is done once.
            images, labels = self.trainer.precision_plugin.convert_input(images.to(device)), labels.to(device)
            kwargs |= {"rank": self.trainer.global_rank, "world_size": self.trainer.world_size}
        return DeviceLoader(images, labels, self.batch_size, **kwargs)

    def _count_minibatches(self, trainer: pl.Trainer) -> None:
        """Make the Trainer's settings, which count Lightning batches, mean minibatches until `teardown`."""
        self._trainer_settings = trainer.limit_train_batches, trainer.val_check_interval
        self.iterations_per_epoch, trainer.val_check_interval, self._steps_per_execution = self._in_minibatches(
            trainer, self.iterations_per_epoch
        )
        if trainer.limit_train_batches != 0:
            trainer.limit_train_batches = self.iterations_per_epoch

    def _in_minibatches(self, trainer: pl.Trainer, available: int) -> tuple[int, int | float, int]:
        """Say what the Trainer's settings mean for an epoch of so many minibatches.

        The loader itself ends an epoch after `limit_train_batches` minibatches. Its lists get a length that divides
        every interval at which Lightning has to step in: with validation every 120 of 550 iterations and
        `steps_per_execution` 50, lists of gcd(50, 550, 120) = 10, and validation every 12 of them.

        Returns:
            Iterations in an epoch, `val_check_interval` in lists, and the length of the lists.

        Raises:
            MisconfigurationException: The settings do not fit.
        """
        limit, interval, steps = trainer.limit_train_batches, trainer.val_check_interval, self.steps_per_execution
        iterations = min(available, int(limit * available) if isinstance(limit, float) else limit)
        if trainer.overfit_batches and self.distortions:  # type: ignore[attr-defined]
            raise MisconfigurationException(
                "overfit_batches is to learn a few minibatches by heart, which data.distortions would change; drop one"
            )
        if limit == 0:
            return iterations, interval, steps
        if iterations == 0:
            raise MisconfigurationException(f"limit_train_batches {limit} of {available} minibatches is none")

        intervals = []
        for callback in trainer.checkpoint_callbacks:
            if isinstance(callback, ModelCheckpoint):
                if callback._train_time_interval is not None:
                    raise MisconfigurationException(
                        "ModelCheckpoint's train_time_interval does not work with manual optimization; "
                        "use every_n_train_steps"
                    )
                intervals.append(callback._every_n_train_steps)

        across_epochs = trainer.check_val_every_n_epoch is None
        if interval == 0:
            raise MisconfigurationException("val_check_interval must be above 0; limit_val_batches 0 does not validate")
        if isinstance(interval, float) and interval < 1:
            interval = max(1, int(interval * iterations))
        if interval == iterations and not across_epochs:
            interval = 1.0
        if isinstance(interval, int):
            if interval > iterations and not across_epochs and trainer.limit_val_batches:
                raise MisconfigurationException(
                    f"val_check_interval {interval} is more than the {iterations} minibatches of an "
                    "epoch; to count across epochs, set check_val_every_n_epoch to null"
                )
            intervals.append(interval)
        if any(intervals):
            # The epoch's length too: a shorter last list would put all that follows out of step.
            steps = gcd(steps, iterations, *intervals)
        if isinstance(interval, int):
            if interval == steps > 1:
                # Lightning takes an interval of 1 for 1.0, the whole epoch.
                steps = max(divisor for divisor in range(1, interval) if interval % divisor == 0)
            interval //= steps
        return iterations, interval, steps
