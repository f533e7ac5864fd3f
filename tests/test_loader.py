from typing import Any

import pytest
import torch
from torch import Tensor

from mnist_lightning.loader import DeviceLoader, Minibatches

N = 1050


def loader(**kwargs: Any) -> DeviceLoader:
    return DeviceLoader(torch.arange(N)[:, None], torch.arange(N), 100, **kwargs)


def epoch(loader: DeviceLoader, number: int = 0) -> list[Tensor]:
    loader.set_epoch(number)
    minibatches = [pair for item in loader for pair in (item if isinstance(item, Minibatches) else [item])]
    for inputs, targets in minibatches:
        assert torch.equal(inputs[:, 0], targets)
    return [targets for _, targets in minibatches]


def test_without_a_seed_keeps_the_order() -> None:
    minibatches = epoch(loader())
    assert [len(targets) for targets in minibatches] == [100] * 10 + [50]
    assert torch.equal(torch.cat(minibatches), torch.arange(N))


def test_a_shuffled_epoch_has_every_example_once() -> None:
    order = torch.cat(epoch(loader(shuffle_seed=0)))
    assert not torch.equal(order, torch.arange(N))
    assert torch.equal(order.sort().values, torch.arange(N))


def test_the_order_depends_on_seed_and_epoch_alone() -> None:
    first, second = loader(shuffle_seed=3), loader(shuffle_seed=3)
    epoch(first, 0)
    torch.rand(10)
    assert torch.equal(torch.cat(epoch(first, 5)), torch.cat(epoch(second, 5)))


def test_no_two_epochs_or_seeds_share_an_order() -> None:
    orders = {tuple(torch.cat(epoch(loader(shuffle_seed=s), e)).tolist()) for s in range(4) for e in range(4)}
    assert len(orders) == 16


@pytest.mark.parametrize("steps", [1, 3, 7, 50])
def test_lists_hold_the_same_minibatches_in_the_same_order(steps: int) -> None:
    listed = loader(shuffle_seed=1, steps_per_execution=steps)
    assert len(listed) == len(list(listed)) == -(-11 // steps)
    assert [len(item) for item in listed] == [steps] * (11 // steps) + ([11 % steps] if 11 % steps else [])
    for a, b in zip(epoch(listed, 2), epoch(loader(shuffle_seed=1), 2), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("steps", [None, 2, 50])
def test_limit_ends_an_epoch_after_so_many_minibatches(steps: int | None) -> None:
    limited = loader(shuffle_seed=1, limit=5, steps_per_execution=steps)
    for a, b in zip(epoch(limited), epoch(loader(shuffle_seed=1))[:5], strict=True):
        assert torch.equal(a, b)
    assert len(limited) == {None: 5, 2: 3, 50: 1}[steps]


@pytest.mark.parametrize("world_size", [2, 3, 4])
@pytest.mark.parametrize("steps", [None, 4])
def test_processes_share_each_minibatch(world_size: int, steps: int | None) -> None:
    whole = epoch(loader(shuffle_seed=1), 3)
    parts = [
        epoch(loader(shuffle_seed=1, steps_per_execution=steps, rank=rank, world_size=world_size), 3)
        for rank in range(world_size)
    ]
    for targets, *shares in zip(whole, *parts, strict=True):
        assert torch.equal(torch.cat(shares), targets)
        assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_sizes_make_the_mean_over_processes_that_over_the_minibatch() -> None:
    minibatches = Minibatches(torch.arange(N), torch.arange(N), torch.arange(N), 100, rank=1, world_size=3)
    assert minibatches.sizes == [100 / 3] * 10 + [50 / 3]


class Jitter:
    draws = 2

    def __call__(self, inputs: Tensor, noise: Tensor) -> Tensor:
        return inputs + noise


def augmented(number: int = 0, resume_at: int = 0, **kwargs: Any) -> list[Tensor]:
    """The inputs of an epoch, a tensor of each minibatch."""
    jittered = loader(shuffle_seed=1, augmentation=Jitter(), **kwargs)
    jittered.load_state_dict({"done": resume_at, "steps_per_execution": jittered.steps_per_execution})
    jittered.set_epoch(number)
    minibatches = [pair for item in jittered for pair in (item if isinstance(item, Minibatches) else [item])]
    assert all(0 < (inputs - targets[:, None]).abs().max() <= 1 for inputs, targets in minibatches)
    return [inputs for inputs, _ in minibatches]


def test_an_augmentation_gets_other_noise_for_each_example_and_epoch() -> None:
    epochs = [torch.cat(augmented(number)) for number in (0, 1)]
    noise = [(inputs - inputs.round())[:, 0] for inputs in epochs]
    assert len(set(torch.cat(noise).tolist())) > 2 * N * 0.9  # rounded to floats of up to 1,050
    assert torch.equal(torch.cat(augmented(1)), epochs[1])


@pytest.mark.parametrize("steps", [1, 3, 50])
def test_augmented_inputs_depend_on_seed_epoch_and_minibatch_alone(steps: int) -> None:
    whole = augmented(2)
    for a, b in zip(augmented(2, steps_per_execution=steps), whole, strict=True):
        assert torch.equal(a, b)
    for a, b in zip(augmented(2, resume_at=6, steps_per_execution=steps), whole[6:], strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("world_size", [2, 3])
def test_processes_share_what_is_augmented(world_size: int) -> None:
    parts = [augmented(steps_per_execution=4, rank=rank, world_size=world_size) for rank in range(world_size)]
    for inputs, *shares in zip(augmented(), *parts, strict=True):
        assert torch.equal(torch.cat(shares), inputs)
