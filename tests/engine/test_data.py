"""Minibatches cut from tensors: order, parts, augmentation; and the data module."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from conftest import SILENT
from engine.test_loop import classifier, digits
from torch import Tensor

from mnist_lightning import Trainer
from mnist_lightning.engine.data import DeviceLoader

N = 1050
NOTHING = SILENT | {"accelerator": "cpu", "enable_checkpointing": False}


def loader(**kwargs: Any) -> DeviceLoader:
    return DeviceLoader(torch.arange(N)[:, None], torch.arange(N), 100, **kwargs)


def epoch(loader: DeviceLoader, number: int = 0) -> list[Tensor]:
    loader.set_epoch(number)
    minibatches = list(loader)
    assert all(torch.equal(inputs[:, 0], targets) for inputs, targets in minibatches)
    return [targets for _, targets in minibatches]


def assert_same(some: list[Tensor], others: list[Tensor]) -> None:
    assert len(some) == len(others)
    assert all(map(torch.equal, some, others))


def test_without_a_seed_keeps_the_order() -> None:
    minibatches = epoch(loader())
    assert [len(targets) for targets in minibatches] == [100] * 10 + [50]
    assert len(loader()) == 11
    assert torch.equal(torch.cat(minibatches), torch.arange(N))


def test_a_shuffled_epoch_has_every_example_once() -> None:
    order = torch.cat(epoch(loader(shuffle_seed=0)))
    assert not torch.equal(order, torch.arange(N))
    assert torch.equal(order.sort().values, torch.arange(N))


def test_the_order_depends_on_seed_and_epoch_alone() -> None:
    first = loader(shuffle_seed=3)
    epoch(first, 0)
    torch.rand(10)
    assert_same(epoch(first, 5), epoch(loader(shuffle_seed=3), 5))


def test_no_two_epochs_or_seeds_share_an_order() -> None:
    orders = {tuple(torch.cat(epoch(loader(shuffle_seed=s), e)).tolist()) for s in range(4) for e in range(4)}
    assert len(orders) == 16


def test_lightning_can_set_the_epoch_of_a_shuffling_loader_only() -> None:
    shuffling = loader(shuffle_seed=1)
    shuffling.sampler.set_epoch(2)
    assert_same([targets for _, targets in shuffling], epoch(loader(shuffle_seed=1), 2))
    assert not hasattr(loader(), "sampler")  # or Lightning would warn of shuffling


def test_uint8_comes_out_as_float32_in_0_to_1_and_floats_as_they_are() -> None:
    pixels = torch.arange(256, dtype=torch.uint8)[:, None]
    inputs = torch.cat([inputs for inputs, _ in DeviceLoader(pixels, torch.arange(256), 100)])
    assert inputs.dtype == torch.float32
    assert torch.equal(inputs, pixels.float() / 255)
    for dtype in (torch.float32, torch.float64):
        given = torch.full((3, 2), 7, dtype=dtype)
        ((inputs, _),) = DeviceLoader(given, torch.arange(3), 3)
        assert inputs.dtype == dtype
        assert torch.equal(inputs, given)


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_processes_share_each_minibatch(world_size: int) -> None:
    whole = epoch(loader(shuffle_seed=1), 3)
    parts = [epoch(loader(shuffle_seed=1, rank=rank, world_size=world_size), 3) for rank in range(world_size)]
    for targets, *shares in zip(whole, *parts, strict=True):
        assert torch.equal(torch.cat(shares), targets)
        assert max(map(len, shares)) - min(map(len, shares)) <= 1


@pytest.mark.parametrize("world_size", [1, 2, 3, 60])  # of 60 parts, ten of the last minibatch are empty
def test_weights_make_the_mean_over_processes_that_over_the_minibatch(world_size: int) -> None:
    parts = [loader(shuffle_seed=1, rank=rank, world_size=world_size) for rank in range(world_size)]
    for (_, whole), *shares in zip(loader(shuffle_seed=1), *parts, strict=True):
        assert all(len(targets) > 0 for _, targets in shares)
        means = [part.loss_weight * targets.double().mean() for part, (_, targets) in zip(parts, shares, strict=True)]
        torch.testing.assert_close(sum(means) / world_size, whole.double().mean())


def test_an_empty_part_is_empty_where_nothing_is_learned() -> None:
    assert [len(targets) for targets in epoch(loader(rank=59, world_size=60))] == [1] * 10 + [0]
    learning = loader(shuffle_seed=1, rank=59, world_size=60)
    assert [len(targets) for targets in epoch(learning)] == [1] * 11
    assert learning.loss_weight == 0


class Jitter:
    draws = 2

    def __call__(self, inputs: Tensor, noise: Tensor) -> Tensor:
        return inputs + noise


def augmented(number: int = 0, seed: int = 1, **kwargs: Any) -> list[Tensor]:
    """The inputs of an epoch, a tensor of each minibatch."""
    jittered = loader(shuffle_seed=seed, augmentation=Jitter(), **kwargs)
    jittered.set_epoch(number)
    minibatches = list(jittered)
    assert all(0 < (inputs - targets[:, None]).abs().max() <= 1 for inputs, targets in minibatches)
    return [inputs for inputs, _ in minibatches]


def test_an_augmentation_gets_other_noise_for_each_example_epoch_and_seed() -> None:
    epochs = [torch.cat(augmented(number)) for number in (0, 1)]
    noise = [(inputs - inputs.round())[:, 0] for inputs in epochs]
    assert len(set(torch.cat(noise).tolist())) > 2 * N * 0.9  # rounded to floats of up to 1,050
    assert torch.equal(torch.cat(augmented(1)), epochs[1])
    by_seed = [torch.cat(augmented(seed=seed)).sort(dim=0).values for seed in (1, 2)]
    assert not torch.equal(*by_seed)


@pytest.mark.parametrize("world_size", [2, 3])
def test_processes_share_what_is_augmented(world_size: int) -> None:
    parts = [augmented(rank=rank, world_size=world_size) for rank in range(world_size)]
    for inputs, *shares in zip(augmented(), *parts, strict=True):
        assert torch.equal(torch.cat(shares), inputs)


def test_an_augmentation_needs_a_seed() -> None:
    with pytest.raises(ValueError, match="shuffle_seed"):
        loader(augmentation=Jitter())


# The data module


@pytest.mark.parametrize("distortions", [False, True])
def test_overfitting_repeats_the_same_minibatches(distortions: bool, root: Path) -> None:
    batches: list[tuple[Tensor, Tensor]] = []

    class Keep(pl.Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            batches.append(batch)

    data = digits(root, distortions=distortions)
    Trainer(max_epochs=2, overfit_batches=3, callbacks=[Keep()], **NOTHING).fit(classifier(), datamodule=data)
    images, labels = map(torch.cat, zip(*batches, strict=True))
    assert torch.equal(images, data.train[0][:300].float().div(255).repeat(2, 1))
    assert torch.equal(labels, data.train[1][:300].long().repeat(2))
