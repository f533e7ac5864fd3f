"""Minibatches out of tensors that already sit on the device, and the data module that hands them out."""

from collections.abc import Iterator
from math import ceil
from typing import Protocol

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.trainer.states import TrainerStatus
from torch import Tensor

from .console import JobError


class Augmentation(Protocol):
    """Makes new training inputs out of old ones, each with random numbers of its own."""

    draws: int
    """Random numbers that an example takes."""

    def __call__(self, inputs: Tensor, noise: Tensor, /) -> Tensor:
        """Map inputs, (B, ...), and uniform random numbers in [-1, 1), (B, `draws`), to new inputs, (B, ...)."""


def uniform_noise(length: int, draws: int, seed: int, device: torch.device | str = "cpu") -> Tensor:
    """Draw what an augmentation takes for so many examples: (`length`, `draws`) float32 in [-1, 1)."""
    # Always in float32, so that a run in another precision draws the same.
    noise = torch.empty(length, draws, dtype=torch.float32, device=device)
    return noise.uniform_(-1, 1, generator=torch.Generator(device).manual_seed(seed))


class DeviceLoader:
    """Cuts inputs and targets into minibatches where they are: no worker processes, no copies between devices.

    The last minibatch of an epoch is smaller where `batch_size` does not divide the number of examples.

    Args:
        inputs: (N, ...) tensor. Pixels in uint8 are handed out as float32 in [0, 1]: the same numbers in a quarter of
            the memory.
        targets: (N,) tensor on the same device. Labels in uint8 are handed out as int64.
        batch_size: Examples in a minibatch of all processes together.
        shuffle_seed: Shuffle with this seed, freshly for each epoch. The order depends on the seed and the epoch's
            number alone. None keeps the order of the tensors.
        augmentation: Applied to the inputs, with random numbers that depend on `shuffle_seed`, the epoch's number and
            the minibatch alone (and on the model of device).
        rank: This process's number among those that share each minibatch.
        world_size: Number of processes. Each hands out its part of every minibatch. Parts are equal or differ by one
            example. An empty part is handed out empty, but while shuffling as one example of weight 0.

    Attributes:
        loss_weight: The weight of this process's loss in the mean over the processes: the length of its part of the
            last minibatch divided by the mean length of all parts.

    Raises:
        ValueError: An augmentation without `shuffle_seed`.
    """

    def __init__(
        self,
        inputs: Tensor,
        targets: Tensor,
        batch_size: int,
        *,
        shuffle_seed: int | None = None,
        augmentation: Augmentation | None = None,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if augmentation and shuffle_seed is None:
            raise ValueError("an augmentation needs shuffle_seed")
        self.inputs = inputs
        self.targets = targets
        self.batch_size = batch_size
        self.shuffle_seed = shuffle_seed
        self.augmentation = augmentation
        self.rank = rank
        self.world_size = world_size
        self.epoch = 0
        self.loss_weight = 1.0
        if shuffle_seed is not None:
            # Before each epoch Lightning calls `loader.sampler.set_epoch(epoch)`; a loader that keeps its order has no
            # sampler, or Lightning would warn of shuffling where `overfit_batches` forbids it.
            self.sampler = self

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch, counted from 0, whose order the next iteration follows."""
        self.epoch = epoch

    def __len__(self) -> int:
        """Number of minibatches in an epoch."""
        return ceil(len(self.targets) / self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield `(inputs, targets)`, a minibatch at a time."""
        order, seeds = self._order()
        for minibatch, seed in zip(order.to(self.targets.device).split(self.batch_size), seeds, strict=True):
            part = self._part(minibatch)
            inputs, targets = self.inputs.index_select(0, part), self.targets.index_select(0, part)
            inputs = inputs.float().div_(255) if inputs.dtype == torch.uint8 else inputs
            targets = targets.long() if targets.dtype == torch.uint8 else targets
            if self.augmentation:
                # Drawn for the whole minibatch, so that several processes see what one would.
                noise = uniform_noise(len(minibatch), self.augmentation.draws, seed, inputs.device)
                inputs = self.augmentation(inputs, self._part(noise))
            yield inputs, targets

    def _order(self) -> tuple[Tensor, list[int]]:
        """Indices of the epoch's examples, (N,), and a seed for each minibatch."""
        if self.shuffle_seed is None:
            return torch.arange(len(self.targets), dtype=torch.int32), [0] * len(self)
        # Mixed by NumPy, since seed + epoch would give neighbouring seeds nearly the same epochs.
        mixed = np.random.SeedSequence((self.shuffle_seed, self.epoch)).generate_state(1 + len(self))
        shuffle, *seeds = map(int, mixed)
        # Drawn on the CPU, so that every device sees the same order; int32 halves the memory of many examples.
        generator = torch.Generator().manual_seed(shuffle)
        return torch.randperm(len(self.targets), generator=generator, dtype=torch.int32), seeds

    def _part(self, minibatch: Tensor) -> Tensor:
        """This process's part of indices or of noise, (B, ...), and its weight."""
        if self.world_size == 1:
            return minibatch
        part = minibatch.tensor_split(self.world_size)[self.rank]
        self.loss_weight = len(part) * self.world_size / len(minibatch)
        # An empty part's mean loss would be NaN, and so would NaN times 0: it gets one example of weight 0.
        return part if len(part) or self.shuffle_seed is None else minibatch[:1]


class DeviceDataModule(pl.LightningDataModule):
    """A data module whose loaders take minibatches on the Trainer's device.

    `save_hyperparameters` says what the data are: the commands resume a run only where all of it is the same. Where
    there is a `fingerprint`, it identifies the data, and their `dataset_name` may differ.
    """

    def loader(
        self,
        inputs: Tensor,
        targets: Tensor,
        batch_size: int,
        *,
        shuffle_seed: int | None = None,
        augmentation: Augmentation | None = None,
    ) -> DeviceLoader:
        """A `DeviceLoader` for this process's part of each minibatch, on the device of a Trainer while it runs.

        Else it is on the CPU, where Lightning leaves the network. With `Trainer(overfit_batches)` it neither shuffles
        nor augments: the same minibatches each epoch.

        Raises:
            JobError: The tensors do not fit in the device's memory.
        """
        share: dict[str, int] = {}
        if trainer := self.trainer:
            if trainer.overfit_batches:  # type: ignore[attr-defined]
                shuffle_seed = augmentation = None
            if trainer.state.status == TrainerStatus.RUNNING:
                inputs, targets = (_to_device(tensor, trainer.strategy.root_device) for tensor in (inputs, targets))
            share = {"rank": trainer.global_rank, "world_size": trainer.world_size}
        return DeviceLoader(inputs, targets, batch_size, shuffle_seed=shuffle_seed, augmentation=augmentation, **share)


def _to_device(tensor: Tensor, device: torch.device) -> Tensor:
    try:
        return tensor.to(device)
    except torch.OutOfMemoryError as error:
        raise JobError(
            f"{device} has no room for a split of {tensor.nbytes / 1e9:.2f} GB, all of which DeviceLoader keeps there; "
            "give --trainer.accelerator cpu, or return a DataLoader of PyTorch's from the data module"
        ) from error
