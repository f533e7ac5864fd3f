"""Who needs the hooks of each iteration, and the step of an iteration without hooks."""

import time
from collections.abc import Iterator
from datetime import timedelta
from io import StringIO
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import lightning.pytorch as pl
import pytest
import torch
from engine.test_loop import (
    PER_EPOCH,
    BatchNormed,
    Foreign,
    Make,
    Notes,
    PlateauByTheEpoch,
    Schedules,
    Settings,
    compare,
    fit,
    loader,
)
from lightning.pytorch import callbacks
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from mnist_lightning import Trainer
from mnist_lightning.engine import loop

# Always


class NeedsHooks(pl.Callback):
    def on_before_zero_grad(self, *args: Any) -> None:
        pass


class BatchEnd(Foreign):
    def on_train_batch_end(self, *args: Any) -> None:
        self.seen.append(self.global_step)


class BeforeStep(Foreign):
    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.seen.append(
            [float(parameter.grad.norm()) for parameter in self.parameters() if parameter.grad is not None]
        )


class OptimizerStep(Foreign):
    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self.seen.append(self.global_step)
        super().optimizer_step(*args, **kwargs)


class Manual(Foreign):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        optimizer.step()


class TakesIterator(Foreign):
    def training_step(self, dataloader_iter: Any) -> Tensor:  # type: ignore[override]
        return self.loss(next(dataloader_iter)[0])


class PlateauBySteps(PlateauByTheEpoch):
    def configure_optimizers(self) -> Any:
        config = super().configure_optimizers()
        config["lr_scheduler"] |= {"interval": "step", "monitor": "train_loss"}
        return config


class Endless(IterableDataset[Any]):
    """It has no length, but ends."""

    def __iter__(self) -> Iterator[Any]:
        return iter(loader().dataset)


def timed_checkpoints() -> list[pl.Callback]:
    return [callbacks.ModelCheckpoint(train_time_interval=timedelta(hours=1))]


def from_lambda() -> list[pl.Callback]:
    return [callbacks.LambdaCallback(on_train_batch_start=lambda *_: None)]


ALWAYS: dict[str, tuple[Any, Make, Make, Settings]] = {
    "unknown callback": (Foreign, loader, lambda: [NeedsHooks()], {}),
    "LambdaCallback": (Foreign, loader, from_lambda, {}),
    "WeightAveraging": (Foreign, loader, lambda: [callbacks.WeightAveraging()], {}),
    "EMAWeightAveraging": (Foreign, loader, lambda: [callbacks.EMAWeightAveraging(decay=0.9)], {}),
    "on_train_batch_end": (BatchEnd, loader, list, {}),
    "on_before_optimizer_step": (BeforeStep, loader, list, {}),
    "optimizer_step": (OptimizerStep, loader, list, {}),
    "accumulation": (Foreign, loader, list, {"accumulate_grad_batches": 3}),
    "profiler": (Foreign, loader, list, {"profiler": "simple"}),
    "anomalies": (Foreign, loader, list, {"detect_anomaly": True}),
    "manual optimization": (Manual, loader, list, {}),
    "dataloader_iter": (TakesIterator, loader, list, {}),
    "plateau": (PlateauBySteps, loader, list, {}),
    "no length": (Foreign, lambda: DataLoader(Endless(), 8), list, {}),
    "ModelCheckpoint by time": (Foreign, loader, timed_checkpoints, {"enable_checkpointing": True}),
    "max_time": (Foreign, loader, list, {"max_time": "00:01:00:00"}),
    "max_time is over": (Foreign, loader, list, {"min_epochs": 2, "max_epochs": 9, "max_time": {"seconds": 0}}),
    "timed validation": (Foreign, loader, list, {"val_check_interval": "00:01:00:00", "check_val_every_n_epoch": None}),
    "fast=False": (Foreign, loader, list, {"fast": False}),
    "fast_dev_run": (Foreign, loader, list, {"fast_dev_run": 6}),
}


@pytest.mark.parametrize("case", ALWAYS)
def test_always(case: str, tmp_path: Path) -> None:
    """Hooks run in each iteration, and one line says why, where nobody has asked for it."""
    module, data, more, settings = ALWAYS[case]
    run = compare(tmp_path, module, data, more, **settings)
    assert run.with_hooks == list(range(1, 7 if case == "fast_dev_run" else 2 * PER_EPOCH + 1))
    assert len(run.infos) == (case not in ("fast=False", "fast_dev_run", "max_time is over")), run.infos


class Called:
    """An object that is called like a function, but has no code of its own."""

    call_count = 0

    def __call__(self, *args: Any) -> None:
        self.call_count += 1


@pytest.mark.parametrize("hook", ["on_train_batch_start", "on_before_zero_grad"])
@pytest.mark.parametrize("called", [Mock(return_value=None), Called()])
@pytest.mark.parametrize("where", ["LambdaCallback", "callback", "module"])
def test_a_hook_that_is_no_function(hook: str, called: Any, where: str, tmp_path: Path) -> None:
    called.call_count = 0
    callback: pl.Callback = callbacks.LambdaCallback(**{hook: called}) if where == "LambdaCallback" else pl.Callback()

    def module() -> Foreign:
        made = Foreign()
        if where != "LambdaCallback":
            setattr(made if where == "module" else callback, hook, called)
        return made

    fit(Trainer, tmp_path / "a", module, loader, lambda: [callback], {})
    assert called.call_count == 2 * PER_EPOCH


def test_a_mock_of_a_callback(tmp_path: Path) -> None:
    mock = Mock(spec=pl.Callback, state_key="mock", **{"state_dict.return_value": {}})
    fit(Trainer, tmp_path / "a", Foreign, loader, lambda: [mock], {})
    assert mock.on_train_batch_end.call_count == 2 * PER_EPOCH


@pytest.mark.parametrize("bar", [callbacks.TQDMProgressBar, callbacks.RichProgressBar, callbacks.ProgressBar])
def test_a_progress_bar_with_a_batch_hook_of_its_own(bar: Any, tmp_path: Path) -> None:
    seen = []

    class Counts(bar):
        def on_train_batch_end(self, *args: Any) -> None:
            seen.append(1)

    fit(Trainer, tmp_path / "a", Foreign, loader, lambda: [Counts()], {"enable_progress_bar": True})
    assert len(seen) == 2 * PER_EPOCH


class Slow(Foreign):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        time.sleep(0.06)
        return super().training_step(batch, batch_idx)


def test_max_time(tmp_path: Path) -> None:
    """It ends in the middle of an epoch, as soon as the time is over."""
    settings = {"max_time": timedelta(seconds=0.3), "max_epochs": 9, "log_every_n_steps": 50}
    start = time.monotonic()
    run = fit(Trainer, tmp_path / "a", Slow, loader, list, settings)
    assert 0.3 < time.monotonic() - start < 2
    assert 2 < run.trainer.global_step <= 6


# Now and then


def rich() -> list[pl.Callback]:
    return [callbacks.RichProgressBar(console_kwargs={"file": StringIO()})]


FEW: dict[str, tuple[Make, Settings]] = {
    "ModelCheckpoint": (lambda: [callbacks.ModelCheckpoint(monitor="train_loss", save_last=True)], {}),
    "EarlyStopping": (lambda: [callbacks.EarlyStopping("val_loss", patience=0, min_delta=9)], {"max_epochs": 4}),
    "LearningRateMonitor": (lambda: [callbacks.LearningRateMonitor("step")], {}),
    "TQDM": (lambda: [callbacks.TQDMProgressBar(3)], {}),
    "Rich": (rich, {}),
}


@pytest.mark.parametrize("case", FEW)
def test_few(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "REFRESH_AFTER", 60)  # on a busy machine these iterations take more than 0.1 s
    more, settings = FEW[case]
    checkpoints = {"enable_checkpointing": "Checkpoint" in case, "enable_progress_bar": case in ("TQDM", "Rich")}
    run = compare(tmp_path, Schedules, loader, more, **checkpoints, **settings)
    assert run.infos == []
    assert run.with_hooks == [1, 5, 10, 11, 12, 15, 20, 22]


def test_hooks_every_n_steps(tmp_path: Path) -> None:
    """A callback is called at the multiples of its number, counted in steps, and where hooks run anyway."""
    notes = Notes(4)
    fit(Trainer, tmp_path / "a", Foreign, loader, lambda: [notes], {"log_every_n_steps": 50})
    assert notes.steps == [1, 4, 8, 11, 12, 16, 20, 22]


def test_a_progress_bar_is_drawn_where_iterations_are_slow(tmp_path: Path) -> None:
    """Each multiple of its refresh rate, where that takes longer than 0.1 s, and its last state."""
    settings = {"log_every_n_steps": 50, "enable_progress_bar": True, "max_epochs": 1}
    run = fit(Trainer, tmp_path / "a", Slow, loader, lambda: [callbacks.TQDMProgressBar(4)], settings)
    assert run.with_hooks == [1, 4, 8, 11]


# A module's own step


class OwnStep(BatchNormed):
    """Its step is the ordinary one, and spoils what a test asks it to."""

    spoils = ""

    def __init__(self) -> None:
        super().__init__()
        self.net.append(nn.Dropout(0.1))
        self.steps = 0

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)

    def fused_step(self, optimizer: Any, batch: Any) -> None:
        self.steps += 1
        loss = self.loss(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        weight = self.net[0].weight
        parts = {
            "weight": weight,
            "buffer": self.net[1].running_mean,
            "state": optimizer.state[weight]["momentum_buffer"],
        }
        if self.spoils:
            parts[self.spoils].data[0] += 1e-6


@pytest.mark.parametrize("spoils", ["", "weight", "buffer", "state"])
def test_a_modules_own_step_is_taken_where_it_leaves_the_same(
    spoils: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is tried once in each fit. The trial itself changes nothing, and draws no random numbers."""
    monkeypatch.setattr(OwnStep, "spoils", spoils)
    run = compare(tmp_path, OwnStep, loader)
    dropped = ["test_hooks.py's step leaves other weights: training_step is taken"]
    assert (run.module.steps, run.infos) == ((1, dropped) if spoils else (run.without_hooks, []))
    assert run.without_hooks > PER_EPOCH
    run.trainer.fit_loop.max_epochs = 3
    run.trainer.fit(run.module, loader())
    assert run.module.steps == (2 if spoils else run.without_hooks)
