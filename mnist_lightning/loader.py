"""Minibatches out of tensors that already sit on the device, in place of PyTorch's `DataLoader`."""

from collections.abc import Iterator
from math import ceil

import numpy as np
import torch
from torch import Tensor

Minibatch = tuple[Tensor, Tensor]


class DeviceLoader:
    """Cuts inputs and targets into minibatches where they are: no worker processes, no copies between devices.

    The last minibatch of an epoch is smaller where `batch_size` does not divide the number of examples.

    Args:
        inputs: (N, ...) tensor.
        targets: (N,) tensor on the same device.
        batch_size: Examples in a minibatch.
        shuffle_seed: Shuffle with this seed, freshly for each epoch. The order depends on the seed and the epoch's
            number alone. None keeps the order of the tensors.
        steps_per_execution: Hand out lists of so many minibatches instead of single ones, for a `training_step` that
            runs an optimizer step for each. The minibatches and their order stay the same.
        limit: End each epoch after so many minibatches.
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
    ) -> None:
        self.inputs = inputs
        self.targets = targets
        self.batch_size = batch_size
        self.shuffle_seed = shuffle_seed
        self.steps_per_execution = steps_per_execution
        self.epoch = 0
        minibatches = ceil(len(targets) / batch_size)
        self.minibatches = minibatches if limit is None else min(limit, minibatches)
        if shuffle_seed is not None:
            # Before each epoch Lightning calls `set_epoch` of what it finds under this name.
            self.sampler = self

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch, counted from 0, whose order the next iteration follows."""
        self.epoch = epoch

    def __len__(self) -> int:
        """Items in an epoch: minibatches, or lists of them."""
        return ceil(self.minibatches / (self.steps_per_execution or 1))

    def __iter__(self) -> Iterator[Minibatch | list[Minibatch]]:
        """Yield `(inputs, targets)` minibatches, or lists of `steps_per_execution` of them."""
        used = min(len(self.targets), self.minibatches * self.batch_size)
        order = torch.arange(used) if self.shuffle_seed is None else self._shuffled(self.shuffle_seed)[:used]
        for chunk in order.to(self.targets.device).split(self.batch_size * (self.steps_per_execution or 1)):
            # One gather for the whole list; its minibatches are views.
            inputs = self.inputs.index_select(0, chunk).split(self.batch_size)
            targets = self.targets.index_select(0, chunk).split(self.batch_size)
            minibatches = list(zip(inputs, targets, strict=True))
            yield minibatches if self.steps_per_execution else minibatches[0]

    def _shuffled(self, seed: int) -> Tensor:
        # Mixed by NumPy, since seed + epoch would give neighbouring seeds nearly the same epochs; drawn on the CPU,
        # so that every device sees the same order.
        mixed = np.random.SeedSequence((seed, self.epoch)).generate_state(1)[0]
        return torch.randperm(len(self.targets), generator=torch.Generator().manual_seed(int(mixed)))
