"""Minibatches out of tensors that already sit on the device, in place of PyTorch's `DataLoader`."""

from collections.abc import Iterator
from math import ceil

import numpy as np
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor

Minibatch = tuple[Tensor, Tensor]


class Minibatches:
    """Several minibatches as one Lightning batch.

    Each is gathered when its turn comes: gathering fifty at once took longer, by a tenth of this network's training
    time on two CPU cores.

    Args:
        inputs: (N, ...) tensor to take minibatches from.
        targets: (N,) tensor on the same device.
        order: (M,) indices of the examples.
        batch_size: Examples in a minibatch; the last one may be smaller.
        rank: Of several processes, this one: the parts of a minibatch that they take are in the order of their ranks.
        world_size: Number of processes that share each minibatch, equally or to within one example.

    Attributes:
        sizes: For each minibatch, its number of examples divided by the number of processes. Divide the sum over a
            process's part by it, and the mean over the processes is the mean over the whole minibatch, also where the
            parts differ in size.
    """

    def __init__(
        self, inputs: Tensor, targets: Tensor, order: Tensor, batch_size: int, rank: int = 0, world_size: int = 1
    ) -> None:
        self.inputs = inputs
        self.targets = targets
        minibatches = order.split(batch_size)
        self.sizes = [len(index) / world_size for index in minibatches]
        self.indices = [index.tensor_split(world_size)[rank] for index in minibatches]

    def __len__(self) -> int:
        """Number of minibatches."""
        return len(self.indices)

    def __iter__(self) -> Iterator[Minibatch]:
        """Yield `(inputs, targets)`, a minibatch at a time."""
        for index in self.indices:
            yield self.inputs.index_select(0, index), self.targets.index_select(0, index)


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
        rank: Of several processes, this one.
        world_size: Number of processes. Each hands out its part of every minibatch, which may be empty where a
            minibatch has fewer examples than there are processes.
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
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.inputs = inputs
        self.targets = targets
        self.batch_size = batch_size
        self.shuffle_seed = shuffle_seed
        self.steps_per_execution = steps_per_execution
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
        used = min(len(self.targets), self.minibatches * self.batch_size)
        order = torch.arange(used) if self.shuffle_seed is None else self._shuffled(self.shuffle_seed)[:used]
        self._done, self._resume_at = self._resume_at, 0
        order = order[self._done * self.batch_size :].to(self.targets.device)
        for indices in order.split(self.batch_size * (self.steps_per_execution or 1)):
            minibatches = Minibatches(self.inputs, self.targets, indices, self.batch_size, self.rank, self.world_size)
            self._done += len(minibatches)
            yield minibatches if self.steps_per_execution else next(iter(minibatches))

    def _shuffled(self, seed: int) -> Tensor:
        # Mixed by NumPy, since seed + epoch would give neighbouring seeds nearly the same epochs; drawn on the CPU,
        # so that every device sees the same order.
        mixed = np.random.SeedSequence((seed, self.epoch)).generate_state(1)[0]
        return torch.randperm(len(self.targets), generator=torch.Generator().manual_seed(int(mixed)))
