"""Minibatches out of tensors that already sit on the device, in place of PyTorch's `DataLoader`."""

from collections.abc import Iterable, Iterator, Sequence
from math import ceil
from typing import Protocol

import numpy as np
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor

Minibatch = tuple[Tensor, Tensor]


class Augmentation(Protocol):
    """Makes new training inputs out of old ones, each with random numbers of its own, as `Distortions` does."""

    draws: int
    """Random numbers that an example takes."""

    def __call__(self, inputs: Tensor, noise: Tensor, /) -> Tensor:
        """Map inputs, (B, ...), and uniform random numbers in [-1, 1), (B, `draws`), to new inputs, (B, ...)."""


def uniform_noise(length: int, draws: int, seed: int, device: torch.device | str = "cpu") -> Tensor:
    """Draw what an augmentation takes for so many examples: (`length`, `draws`) float32 in [-1, 1)."""
    # Always in float32, so that a run in another precision draws the same.
    noise = torch.empty(length, draws, dtype=torch.float32, device=device)
    return noise.uniform_(-1, 1, generator=torch.Generator(device).manual_seed(seed))


class Minibatches:
    """Several minibatches as one Lightning batch.

    Each is gathered when its turn comes: gathering fifty at once took longer, by a tenth of this network's training
    time on two CPU cores. Only an augmentation gets them all at once.

    Args:
        inputs: (N, ...) tensor to take minibatches from.
        targets: (N,) tensor on the same device.
        order: (M,) indices of the examples.
        batch_size: Examples in a minibatch; the last one may be smaller.
        rank: Of several processes, this one: the parts of a minibatch that they take are in the order of their ranks.
        world_size: Number of processes that share each minibatch, equally or to within one example.
        augmentation: Applied to the inputs.
        seeds: With an augmentation, the seed of each minibatch's random numbers.

    Attributes:
        sizes: For each minibatch, its number of examples divided by the number of processes. Divide the sum over a
            process's part by it, and the mean over the processes is the mean over the whole minibatch, also where the
            parts differ in size.
    """

    def __init__(
        self,
        inputs: Tensor,
        targets: Tensor,
        order: Tensor,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        augmentation: Augmentation | None = None,
        seeds: Sequence[int] = (),
    ) -> None:
        self.inputs = inputs
        self.targets = targets
        self.augmentation = augmentation
        minibatches = order.split(batch_size)
        self.sizes = [len(index) / world_size for index in minibatches]
        self.indices = [index.tensor_split(world_size)[rank] for index in minibatches]
        self._seeds, self._lengths = seeds, list(map(len, minibatches))
        self._rank, self._world_size = rank, world_size

    def __len__(self) -> int:
        """Number of minibatches."""
        return len(self.indices)

    def __iter__(self) -> Iterator[Minibatch]:
        """Yield `(inputs, targets)`, a minibatch at a time."""
        for inputs, index in zip(self._inputs(), self.indices, strict=True):
            yield inputs, self.targets.index_select(0, index)

    def _inputs(self) -> Iterable[Tensor]:
        if self.augmentation is None:
            return (self.inputs.index_select(0, index) for index in self.indices)
        noise = []
        for seed, length in zip(self._seeds, self._lengths, strict=True):
            # For the whole minibatch, so that several processes see what one would.
            numbers = uniform_noise(length, self.augmentation.draws, seed, self.inputs.device)
            noise.append(numbers.tensor_split(self._world_size)[self._rank])
        inputs = self.augmentation(self.inputs.index_select(0, torch.cat(self.indices)), torch.cat(noise))
        augmented: tuple[Tensor, ...] = inputs.split(list(map(len, self.indices)))
        return augmented


class DeviceLoader:
    """Cuts inputs and targets into minibatches where they are: no worker processes, no copies between devices.

    The last minibatch of an epoch is smaller where `batch_size` does not divide the number of examples.

    Args:
        inputs: (N, ...) tensor.
        targets: (N,) tensor on the same device.
        batch_size: Examples in a minibatch.
        shuffle_seed: Shuffle with this seed, freshly for each epoch. The order depends on the seed and the epoch's
            number alone. None keeps the order of the tensors.
        steps_per_execution: Hand out so many `Minibatches` at once instead of single ones, for a `training_step` that
            runs an optimizer step for each. The minibatches and their order stay the same.
        limit: End each epoch after so many minibatches.
        augmentation: Applied to the inputs, with random numbers that depend on `shuffle_seed`, the epoch's number and
            the minibatch alone (and on the model of device).
        rank: Of several processes, this one.
        world_size: Number of processes. Each hands out its part of every minibatch, which may be empty where a
            minibatch has fewer examples than there are processes.

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
        steps_per_execution: int | None = None,
        limit: int | None = None,
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
        self.steps_per_execution = steps_per_execution
        self.augmentation = augmentation
        self.rank = rank
        self.world_size = world_size
        self.epoch = 0
        minibatches = ceil(len(targets) / batch_size)
        self.minibatches = minibatches if limit is None else min(limit, minibatches)
        self._done = self._resume_at = 0  # minibatches of the epoch
        if shuffle_seed is not None:
            # Before each epoch Lightning calls `loader.sampler.set_epoch(epoch)`; a loader that keeps its order has no
            # sampler, or Lightning would warn of shuffling where `overfit_batches` forbids it.
            self.sampler = self

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch, counted from 0, whose order the next iteration follows."""
        self.epoch = epoch

    def state_dict(self) -> dict[str, int | None]:
        """How far into its epoch the loader is, for Lightning's checkpoints."""
        return {"done": self._done % self.minibatches, "steps_per_execution": self.steps_per_execution}

    def load_state_dict(self, state_dict: dict[str, int | None]) -> None:
        """Let the next iteration go on where the loader of the checkpoint was.

        Raises:
            MisconfigurationException: In mid-epoch, with another number of steps an execution: Lightning counts those.
        """
        self._resume_at = state_dict["done"] or 0
        if self._resume_at and state_dict["steps_per_execution"] != self.steps_per_execution:
            raise MisconfigurationException(
                f"the checkpoint is from mid-epoch, with {state_dict['steps_per_execution']} steps an execution, not "
                f"{self.steps_per_execution}; give the same steps_per_execution and intervals to resume it"
            )

    def __len__(self) -> int:
        """Items in an epoch: minibatches, or `Minibatches` of several."""
        return ceil(self.minibatches / (self.steps_per_execution or 1))

    def __iter__(self) -> Iterator[Minibatch | Minibatches]:
        """Yield `(inputs, targets)` minibatches, or `Minibatches` of `steps_per_execution` each."""
        order, seeds = torch.arange(len(self.targets)), []
        if self.shuffle_seed is not None:
            # Mixed by NumPy, since seed + epoch would give neighbouring seeds nearly the same epochs.
            mixed = np.random.SeedSequence((self.shuffle_seed, self.epoch)).generate_state(1 + self.minibatches)
            shuffle, *seeds = map(int, mixed)
            # Drawn on the CPU, so that every device sees the same order.
            order = torch.randperm(len(self.targets), generator=torch.Generator().manual_seed(shuffle))
        self._done, self._resume_at = self._resume_at, 0
        order = order[self._done * self.batch_size : self.minibatches * self.batch_size].to(self.targets.device)
        steps = self.steps_per_execution or 1
        for indices in order.split(self.batch_size * steps):
            minibatches = Minibatches(
                self.inputs,
                self.targets,
                indices,
                self.batch_size,
                self.rank,
                self.world_size,
                self.augmentation,
                seeds[self._done : self._done + steps],
            )
            self._done += len(minibatches)
            yield minibatches if self.steps_per_execution else next(iter(minibatches))
