"""A run that is resumed from any of its checkpoints ends as one that was never interrupted, to the bit."""

import random
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from conftest import slow
from engine.test_hooks import Endless, Manual
from engine.test_loop import (
    PER_EPOCH,
    Foreign,
    Make,
    Run,
    Schedules,
    SchedulesBySteps,
    Settings,
    TwoLoaders,
    classifier,
    differences,
    digits,
    fit,
    loader,
    pair,
)
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import CombinedLoader
from torch import nn
from torch.utils.data import DataLoader, Dataset, WeightedRandomSampler
from torchdata.stateful_dataloader import StatefulDataLoader

from mnist_lightning import Trainer
from mnist_lightning.engine.checkpoints import CheckpointIO
from mnist_lightning.engine.checks import Checks
from mnist_lightning.engine.runs import RunLock

# Callbacks, data and modules


class BeforeTheFirstIteration(pl.Callback):
    """Saves there."""

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if trainer.global_step == 0:
            trainer.save_checkpoint(f"{trainer.default_root_dir}/start.ckpt")


class Draws(pl.Callback):
    """Draws random numbers where a callback may: at both ends of each epoch and after each validation."""

    def on_train_epoch_start(self, *args: Any) -> None:
        torch.rand(2)

    def on_train_epoch_end(self, *args: Any) -> None:
        torch.rand(1)

    def on_validation_end(self, *args: Any) -> None:
        torch.rand(3)


class Noisy(Dataset[Any]):
    """A random transform, as a data set's author writes it."""

    data: Any = loader().dataset

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Any:
        inputs, label = self.data[index]
        return inputs + 0.3 * torch.randn(6) + random.gauss(0, 0.1) + np.float32(np.random.normal(0, 0.1)), label


class BiasesFirst(Foreign):
    """Two groups, so that the optimizer has its parameters in another order than the module."""

    def configure_optimizers(self) -> Any:
        weights, biases = ([p for p in self.parameters() if (p.ndim == 1) is bias] for bias in (False, True))
        groups: list[Settings] = [{"params": biases, "weight_decay": 0}, {"params": weights}]
        return torch.optim.AdamW(groups, lr=0.02)


class ChannelsLast(Foreign):
    """Its weights and their moments are not contiguous, but lie alike."""

    def __init__(self) -> None:
        super().__init__()
        layers = nn.Unflatten(1, (2, 3, 1)), nn.Conv2d(2, 4, (2, 1)), nn.Flatten(), nn.Linear(8, 3)
        self.net = nn.Sequential(*layers).to(memory_format=torch.channels_last)


class CountsSteps(torch.optim.SGD):
    """In a plain number, as some optimizers do."""

    def step(self, closure: Any = None) -> Any:
        for parameter in self.param_groups[0]["params"]:
            self.state[parameter]["step"] = self.state[parameter].get("step", 0) + 1
        return super().step(closure)


class OwnOptimizer(Foreign):
    def configure_optimizers(self) -> Any:
        return CountsSteps(self.parameters(), 0.1, momentum=0.9)


class DrawsInSteps(Foreign):
    """From NumPy's and Python's random numbers."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return super().training_step(batch, batch_idx) * (1 + random.random() + float(np.random.rand()))


class Shuffled(Endless):
    """An iterable in another order each time."""

    def __iter__(self) -> Iterator[Any]:
        order = torch.randperm(len(self.data)).tolist()
        return (self.data[i] for i in order)

    data: Any = loader().dataset


def noisy(**settings: Any) -> DataLoader[Any]:
    settings = {"shuffle": "sampler" not in settings} | settings
    return DataLoader(Noisy(), 8, **settings)


def weighted(**settings: Any) -> DataLoader[Any]:
    return noisy(sampler=WeightedRandomSampler(torch.arange(1.0, 86).tolist(), 85, **settings))


def saver(filename: str, **when: Any) -> ModelCheckpoint:
    return ModelCheckpoint(save_top_k=-1, filename=filename, **when)


def every(steps: int) -> ModelCheckpoint:
    return saver("{step}", every_n_train_steps=steps)


def validated() -> ModelCheckpoint:
    return saver("validated {step}", monitor="val_loss", save_on_train_epoch_end=False)


def by_the_clock() -> ModelCheckpoint:
    return saver("clock {step}", train_time_interval=timedelta(microseconds=1))


# Train once, resume each checkpoint


SAVING: Settings = {"more": list, "enable_checkpointing": True}  # `more` callbacks


def resume(path: Path, module: Any, data: Make, settings: Settings, ckpt_path: Path, kind: Any = Trainer) -> Run:
    """Go on from a checkpoint, in a process whose random numbers are others."""

    class Resuming(kind):
        def fit(self, *args: Any, **kwargs: Any) -> None:
            for seed in (random.seed, np.random.seed, torch.manual_seed):
                seed(99)
            super().fit(*args, ckpt_path=ckpt_path, **kwargs)

    settings = SAVING | settings
    return fit(Resuming, path, module, data, settings.pop("more"), settings)


def train(path: Path, module: Any, data: Make, settings: Settings, kind: Any = Trainer) -> Run:
    """Train without interruption, and save often: also at the end of each epoch's training, before its validation."""
    settings = SAVING | settings
    more = settings.pop("more")

    def savers() -> list[pl.Callback]:
        return [BeforeTheFirstIteration(), every(4), saver("end of {epoch}", save_on_train_epoch_end=True), *more()]

    return fit(kind, path, module, data, savers, settings)


def result(run: Run) -> dict[str, Any]:
    """What must be the same at the end, however often a run was interrupted."""
    end = run.left["end.ckpt"]
    left = {name: end[name] for name in ("global_step", "state_dict", "optimizer_states", "lr_schedulers")}
    if run.with_hooks:  # one that is resumed from the very end does nothing
        left |= {"epoch": end["epoch"], "random": end["random_states"][0]["now"]}
        left["logged at"] = end["loops"]["fit_loop"]["epoch_loop.state_dict"]["_batches_that_stepped"]
        left["metrics"] = {name: value for name, value in run.left["callback_metrics"].items() if "val" in name}
    return left


def assert_exact_from_each(path: Path, module: Any, data: Make, settings: Settings, again: Settings) -> None:
    """Train once, and resume each checkpoint that this left, with other settings that must not matter."""
    whole = train(path / "whole", module, data, settings)
    expected, wrong = result(whole), []
    names = [name for name in whole.left if name.endswith(".ckpt") and name != "end.ckpt"]
    assert {"start.ckpt", "checkpoints/end of epoch=1.ckpt"} <= {*names}
    assert any("step=" in name for name in names)
    for name in names:
        run = resume(path / name.replace("/", " "), module, data, settings | again, path / "whole" / name)
        left = result(run)
        found = differences({key: expected[key] for key in left}, left)
        # It is not validated again where it was already.
        wrong += [f"{name} {line[:80]}" for line in found if not (line.startswith("/metrics") and "missing" in line)]
    assert wrong == []


SAFE: Settings = {"more": lambda: [Checks(RunLock())], "plugins": [CheckpointIO()]}
"""All that the engine has to resume safely."""


# Module, data, settings, and others that a resumed run has. Each trains two epochs where it does not say otherwise.
CASES: dict[str, tuple[Any, Make, Settings, Settings]] = {
    "plain": (Foreign, loader, {"max_epochs": 3}, {"log_every_n_steps": 50}),
    "Lightning's loop": (Foreign, loader, {}, {"fast": False}),
    "draws in steps": (DrawsInSteps, noisy, {}, {}),
    "own generator": (Foreign, lambda: noisy(generator=torch.Generator().manual_seed(3)), {}, {}),
    "sampler": (Foreign, weighted, {}, {}),
    "stateful": (Foreign, lambda: StatefulDataLoader(Noisy(), 8, shuffle=True), {}, {}),
    "iterable": (Foreign, lambda: DataLoader(Shuffled(), 8), {}, {}),
    "manual": (Manual, loader, {}, {}),
    "validates within": (Foreign, loader, {"val_check_interval": 4, "more": lambda: [validated()]}, {}),
    "no validation": (Foreign, loader, {"limit_val_batches": 0, "more": lambda: [every(PER_EPOCH)]}, {}),
    "accumulates": (Foreign, loader, {"accumulate_grad_batches": 2, "log_every_n_steps": 3}, {}),
    "Schedules": (Schedules, loader, SAFE, {}),
}
SLOW: dict[str, tuple[Any, Make, Settings, Settings]] = {
    "workers": (Foreign, lambda: noisy(num_workers=2), {}, {}),
    "sampler's generator": (Foreign, lambda: weighted(generator=torch.Generator().manual_seed(3)), {}, {}),
    "iterable, workers": (Foreign, lambda: DataLoader(Shuffled(), 8, num_workers=1), {}, {}),
    "two loaders": (TwoLoaders, lambda: CombinedLoader(pair(), "min_size"), {}, {}),
    "reload": (Foreign, loader, {"reload_dataloaders_every_n_epochs": 1, "max_epochs": 3}, {}),
    "in double": (Foreign, loader, {"precision": "64-true"}, {"log_every_n_steps": 7}),
    "max_steps": (Foreign, loader, {"max_steps": 18, "max_epochs": -1}, {"log_every_n_steps": 2}),
    "draws": (Foreign, loader, {"more": lambda: [Draws()]}, {}),
    "by the clock": (Foreign, loader, {"more": lambda: [by_the_clock()]}, {"more": list}),
    "BiasesFirst": (BiasesFirst, loader, SAFE, {}),
    "ChannelsLast": (ChannelsLast, loader, SAFE, {}),
    "OwnOptimizer": (OwnOptimizer, loader, SAFE, {}),
    "SchedulesBySteps": (SchedulesBySteps, loader, SAFE, {}),
}


@pytest.mark.filterwarnings("error:.*dataloader is not resumable")
@pytest.mark.parametrize("case", [*CASES, *map(slow, SLOW)])
def test_exact(case: str, tmp_path: Path) -> None:
    assert_exact_from_each(tmp_path, *(CASES | SLOW)[case])


DIGITS: dict[str, tuple[Settings, Settings, Settings]] = {
    "distortions": ({"learning_rate_schedule": "one_cycle", "dropout": 0.2}, {"distortions": True}, {}),
    "max_steps, fused": ({"fused": True}, {}, {"max_steps": 29, "max_epochs": -1}),
}


@pytest.mark.parametrize("case", DIGITS)
def test_digits(case: str, root: Path, tmp_path: Path) -> None:
    """With the digits' own loader and the step written out by hand."""
    module, data, settings = DIGITS[case]
    again = {"log_every_n_steps": 3}
    assert_exact_from_each(tmp_path, lambda: classifier(**module), lambda: digits(root, **data), settings, again)


def test_twice(tmp_path: Path) -> None:
    """A run that was resumed is as good a start as the first."""
    settings: Settings = {"max_epochs": 3, "more": lambda: [every(7)]}
    whole = train(tmp_path / "whole", Foreign, loader, settings)
    resume(tmp_path / "2nd", Foreign, loader, settings, tmp_path / "whole/checkpoints/step=8.ckpt")
    third = resume(tmp_path / "3rd", Foreign, loader, settings, tmp_path / "2nd/checkpoints/step=14.ckpt")
    assert differences(result(whole), result(third)) == []


@pytest.mark.parametrize("steps", [6, PER_EPOCH, 15])
def test_longer(steps: int, tmp_path: Path) -> None:
    """`max_steps` ends an epoch early, and a resumed run the epoch."""
    whole = train(tmp_path / "whole", Foreign, loader, {})
    train(tmp_path / "short", Foreign, loader, {"max_steps": steps})
    for name in ("end.ckpt", f"checkpoints/end of epoch={steps // (PER_EPOCH + 1)}.ckpt"):
        run = resume(tmp_path / name, Foreign, loader, {}, tmp_path / "short" / name)
        assert differences(result(whole), result(run)) == []


IN_MID_EPOCH = [f"step={step}" for step in (4, 8, 12)]


@pytest.mark.parametrize(
    ("first", "second", "names"), [(pl.Trainer, Trainer, IN_MID_EPOCH), (Trainer, pl.Trainer, ["end of epoch=0"])]
)
def test_lightnings_trainer(first: Any, second: Any, names: list[str], root: Path, tmp_path: Path) -> None:
    """Each Trainer resumes the other's checkpoints; where nothing is drawn, Lightning's is exact at an epoch's end."""

    def data() -> Any:
        return digits(root)

    whole = train(tmp_path / "first", classifier, data, {}, first)
    for name in names:
        file = tmp_path / f"first/checkpoints/{name}.ckpt"
        run = resume(tmp_path / name, classifier, data, {}, file, second)
        for part in ("state_dict", "optimizer_states", "global_step"):
            assert differences(whole.left["end.ckpt"][part], run.left["end.ckpt"][part]) == []
