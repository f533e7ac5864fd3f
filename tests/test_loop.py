"""Our Trainer against Lightning's: the same bits of everything that a run leaves, and most iterations quiet."""

import logging
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from io import StringIO
from itertools import chain
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from conftest import VAL_SIZE
from lightning.pytorch import callbacks
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy

from mnist_lightning import MNISTClassifier, MNISTDataModule, Trainer
from mnist_lightning.engine import loop
from mnist_lightning.engine.checkpoints import FiniteLosses
from mnist_lightning.fused import FusedStep

PER_EPOCH = 11  # minibatches of the small digits, and of `loader` below
Settings = dict[str, Any]
Make = Callable[[], Any]


class Visits(pl.Callback):
    """Notes the iterations, counted from 1, whose hooks are called."""

    def __init__(self, observe_every: int | timedelta = 0) -> None:
        self.observe_every = observe_every
        self.steps: list[int] = []

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        self.steps.append(trainer.fit_loop.total_batch_idx + 1)


@dataclass
class Run:
    """A fit and what it left."""

    trainer: pl.Trainer
    module: Any
    visits: list[int]
    fused: int
    infos: list[str]
    left: dict[str, Any] = field(default_factory=dict)

    @property
    def quiet(self) -> int:
        return self.trainer.fit_loop.total_batch_idx + 1 - len(self.visits)


@contextmanager
def reasons() -> Iterator[list[str]]:
    """Collect the lines that say why every iteration is visited."""
    lines: list[str] = []

    class Collect(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.extend([record.getMessage()] * record.getMessage().startswith("Lightning visits every iteration: "))

    loggers, handler = [logging.getLogger(f"lightning.{name}") for name in ("pytorch", "fabric")], Collect()
    for logger in loggers:
        logger.addHandler(handler)
    yield lines
    for logger in loggers:
        logger.removeHandler(handler)


def fit(trainer_class: type[pl.Trainer], path: Path, module: Make, data: Make, more: Make, settings: Settings) -> Run:
    """Fit and read what is left: checkpoints, curves, metrics."""
    path.mkdir(parents=True)
    visits, calls, call = Visits(), [0], FusedStep.__call__

    def count(step: FusedStep, batch: tuple[Tensor, Tensor]) -> Tensor | None:
        calls[0] += 1
        return call(step, batch)

    with reasons() as infos, pytest.MonkeyPatch.context() as patch:
        patch.setattr(FusedStep, "__call__", count)
        torch.manual_seed(1)
        our_module, our_data = module(), data()
        arguments: Settings = {
            "accelerator": "cpu",
            "devices": 1,
            "max_epochs": 2,
            "log_every_n_steps": 5,
            "logger": CSVLogger(path, "", ""),
            "default_root_dir": path,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "callbacks": [*more(), visits],
        } | settings
        trainer = trainer_class(**arguments)
        is_module = isinstance(our_data, pl.LightningDataModule)
        trainer.fit(our_module, **{"datamodule" if is_module else "train_dataloaders": our_data})
    run = Run(trainer, our_module, visits.steps, calls[0], infos)
    trainer.save_checkpoint(path / "end.ckpt")
    for file in path.rglob("*.ckpt"):
        run.left[str(file.relative_to(path))] = torch.load(file, weights_only=True)
    curves = path / "metrics.csv"
    run.left["curves"] = curves.read_text().splitlines() if curves.exists() else []
    run.left["callback_metrics"] = dict(trainer.callback_metrics)
    run.left["logged_metrics"] = dict(trainer.logged_metrics)
    run.left["progress_bar_metrics"] = dict(trainer.progress_bar_metrics)
    run.left["seen"] = getattr(our_module, "seen", None)
    return run


def differences(theirs: Any, ours: Any, where: str = "") -> list[str]:
    """Where ours is another than Lightning's; ours may have more keys in the loops' states."""
    if isinstance(theirs, dict) and isinstance(ours, dict):
        theirs, ours = ({str(key).replace("/theirs", "/ours"): v for key, v in d.items()} for d in (theirs, ours))
        missing = [f"{where}/{key} is missing" for key in theirs if key not in ours]
        extra = [f"{where}/{key} is extra" for key in ours if key not in theirs and "/loops" not in where]
        both = [differences(theirs[key], ours[key], f"{where}/{key}") for key in theirs if key in ours]
        return [*missing, *extra, *chain(*both)]
    if isinstance(theirs, list | tuple) and isinstance(ours, list | tuple) and len(theirs) == len(ours):
        pairs = enumerate(zip(theirs, ours, strict=True))
        return list(chain(*(differences(*pair, f"{where}/{i}") for i, pair in pairs)))
    if isinstance(theirs, Tensor) and isinstance(ours, Tensor):
        same = theirs.dtype == ours.dtype and torch.equal(theirs, ours)
    elif isinstance(theirs, str) and isinstance(ours, str):
        same = theirs.replace("/theirs", "/ours") == ours
    elif "time_elapsed" in where:
        same = True
    else:
        same = type(theirs) is type(ours) and theirs == ours
    return [] if same else [f"{where}: {theirs} is now {ours}"]


def compare(path: Path, module: Make, data: Make, more: Make = list, **settings: Any) -> Run:
    """Fit with both Trainers; assert that all is the same; return ours."""
    ours = fit(Trainer, path / "ours", module, data, more, settings)
    theirs = fit(pl.Trainer, path / "theirs", module, data, more, {k: v for k, v in settings.items() if k != "fast"})
    assert differences(theirs.left, ours.left) == []
    assert theirs.visits == list(range(1, len(theirs.visits) + 1))
    return ours


# A: the digits


@pytest.fixture
def digits(root: Path) -> Callable[..., MNISTDataModule]:
    def make(**settings: Any) -> MNISTDataModule:
        return MNISTDataModule("synthetic", str(root), val_size=VAL_SIZE, **settings)

    return make


def classifier(**settings: Any) -> MNISTClassifier:
    return MNISTClassifier(**{"hidden_dim": 8} | settings)


def every(steps: int) -> callbacks.ModelCheckpoint:
    return callbacks.ModelCheckpoint(every_n_train_steps=steps, save_top_k=-1, filename="{step}")


# Settings of the module, of the data and of the Trainer; and whether the fused step takes the quiet iterations.
GRID: dict[str, tuple[Settings, Settings, Settings, bool]] = {
    "constant": ({}, {}, {}, True),
    "one_cycle": ({"learning_rate_schedule": "one_cycle", "weight_decay": 0.1}, {}, {}, True),
    "weight_decay": ({"weight_decay": 0.01}, {}, {}, True),
    "clip norm": ({}, {}, {"gradient_clip_val": 0.1}, False),
    "clip value": ({}, {}, {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"}, False),
    "val by number": ({}, {}, {"val_check_interval": 4}, True),
    "val by fraction": ({}, {}, {"val_check_interval": 0.5}, True),
    "val across epochs": ({}, {}, {"val_check_interval": 7, "check_val_every_n_epoch": None}, True),
    "val each second epoch": ({}, {}, {"check_val_every_n_epoch": 2, "max_epochs": 3}, True),
    "no val": ({}, {}, {"limit_val_batches": 0}, True),
    "max_steps": ({"learning_rate_schedule": "one_cycle"}, {}, {"max_steps": 18, "max_epochs": -1}, True),
    "max_steps at an end": ({}, {}, {"max_steps": 22, "max_epochs": -1}, True),
    "even": ({}, {"batch_size": 105}, {}, True),
    "one in the last": ({}, {"batch_size": 95}, {"max_epochs": 3}, True),
    "log 3": ({}, {}, {"log_every_n_steps": 3}, True),
    "log 50": ({}, {}, {"log_every_n_steps": 50, "max_epochs": 5}, True),
    "dropout": ({"dropout": 0.3}, {}, {}, False),
    "label smoothing": ({"label_smoothing": 0.1}, {}, {}, False),
    "distortions": ({"dropout": 0.2}, {"distortions": True}, {"max_epochs": 1}, False),
    "bf16": ({}, {}, {"precision": "bf16-mixed"}, False),
    "64": ({"learning_rate_schedule": "one_cycle"}, {}, {"precision": "64-true"}, True),
    "limit_train_batches": ({}, {}, {"limit_train_batches": 7}, True),
    "limit_train_batches as a fraction": ({}, {}, {"limit_train_batches": 0.8}, True),
    "sanity check off": ({"dropout": 0.2}, {}, {"num_sanity_val_steps": 0}, False),
    "overfit": ({}, {}, {"overfit_batches": 6}, True),
    "reload": ({}, {}, {"reload_dataloaders_every_n_epochs": 1, "max_epochs": 3}, True),
    "inference mode": ({}, {}, {"inference_mode": False, "barebones": False}, True),
}


@pytest.mark.parametrize("case", GRID)
def test_digits(case: str, digits: Callable[..., MNISTDataModule], tmp_path: Path) -> None:
    module, data, settings, fused = GRID[case]
    run = compare(tmp_path, lambda: classifier(**module), lambda: digits(**data), **settings)
    assert run.quiet >= 0.3 * run.trainer.global_step
    assert run.fused == (run.quiet if fused else 0)
    assert run.infos == []


def test_visits_only_what_is_due(digits: Callable[..., MNISTDataModule], tmp_path: Path) -> None:
    """The first and the last of each epoch, what is logged, and before what is validated."""
    run = compare(tmp_path, classifier, digits, val_check_interval=4)
    assert run.visits == [1, 4, 5, 8, 10, 11, 12, 15, 19, 20, 22]


def test_logs_each(digits: Callable[..., MNISTDataModule], tmp_path: Path) -> None:
    run = compare(tmp_path, classifier, digits, log_every_n_steps=1, max_epochs=1)
    assert len(run.visits) == PER_EPOCH


def test_checkpoints_within(digits: Callable[..., MNISTDataModule], tmp_path: Path) -> None:
    """Each file of ModelCheckpoint is the same, with the loops' states; it is not in the way of quiet iterations."""
    run = compare(
        tmp_path,
        lambda: classifier(learning_rate_schedule="one_cycle", dropout=0.1),
        digits,
        lambda: [every(4), callbacks.ModelCheckpoint(monitor="val/acc", mode="max", filename="best")],
        enable_checkpointing=True,
        log_every_n_steps=50,
    )
    steps = [name for name in run.left if "step=" in name]
    assert sorted(int(name.split("=")[1].removesuffix(".ckpt")) for name in steps) == [4, 8, 12, 16, 20]
    assert run.visits == [1, 4, 8, 11, 12, 16, 20, 22]


# B: other people's modules


def loader(batch_size: int = 8, shuffle: bool = True) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(85, 6, generator=generator)
    return DataLoader(TensorDataset(inputs, inputs.sum(1).long() % 3), batch_size, shuffle=shuffle)


class Foreign(pl.LightningModule):
    """A module of someone who has never heard of us."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Dropout(0.1), nn.Linear(12, 3))
        self.seen: list[Any] = []

    def forward(self, inputs: Tensor) -> Tensor:
        logits: Tensor = self.net(inputs)
        return logits

    def loss(self, batch: Any) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.loss(batch)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch))

    def val_dataloader(self) -> Any:
        return loader(30, shuffle=False)

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=0.02)


class UsesBatchIndex(Foreign):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss(batch) * (1 + batch_idx % 3)


class WithoutBatchIndex(Foreign):
    def training_step(self, batch: Any) -> Tensor:  # type: ignore[override]
        return self.loss(batch)


class Anneals(Foreign):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.log("weight", 1 / (1 + self.global_step))
        return self.loss(batch) / (1 + self.global_step)


class ReturnsDict(Foreign):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return {"loss": super().training_step(batch, batch_idx), "more": batch}


class SometimesNone(Foreign):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        return None if self.global_step % 4 == 2 or (batch_idx == 0 and self.current_epoch == 1) else loss


class LogsNowAndThen(Foreign):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        if batch_idx % 7 == 3:
            self.log("now and then", loss)
        return loss


class LogsByTheEpochNowAndThen(Foreign):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        if batch_idx % 7 == 3:
            self.log("mean", loss, on_step=False, on_epoch=True)
            self.log("most", loss, on_step=False, on_epoch=True, reduce_fx="max")
            self.log("sum", loss, on_step=False, on_epoch=True, reduce_fx=torch.sum)
            self.log("weighted", loss, on_epoch=True, batch_size=batch_idx)
        return loss


class LogsForked(Foreign):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        self.log("forked", loss, on_step=True, on_epoch=True)
        self.log_dict({"a": loss.double() * 2, "b": (loss > 1).float(), "c": batch_idx, "d": 0.5}, on_epoch=True)
        return loss


class OwnLog(Foreign):
    """Its `log` is its own."""

    prefix = ""

    def log(self, name: str, value: Any, *args: Any, **kwargs: Any) -> None:
        self.seen.append(float(value))
        super().log(self.prefix + name, value * 2, *args, **kwargs)


class OwnLogAndName(OwnLog):
    prefix = "mine/"


class WithMetrics(Foreign):
    def __init__(self) -> None:
        super().__init__()
        self.accuracy, self.mean, self.each = MulticlassAccuracy(3), MeanMetric(), MulticlassAccuracy(3)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        logits = self(batch[0])
        loss = F.cross_entropy(logits, batch[1])
        self.mean.update(loss)
        self.log("mean", self.mean, on_epoch=True, on_step=False)
        self.log("both", self.accuracy, on_epoch=True, on_step=True, metric_attribute="accuracy")
        self.accuracy(logits, batch[1])
        self.each(logits, batch[1])
        self.log("each", self.each)
        return loss


class UsesExperiment(Foreign):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        assert isinstance(self.logger, CSVLogger)
        if batch_idx % 3 == 0:
            self.logger.experiment.log_metrics({"own": loss.item()}, step=self.global_step)
        self.logger.log_metrics({"own 2": loss.item()}, step=self.global_step)
        return loss


class LooksAround(Foreign):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        trainer, loss = self.trainer, self.loss(batch)
        metrics: list[dict[str, Any]] = [trainer.callback_metrics, trainer.logged_metrics, trainer.progress_bar_metrics]
        self.seen.append([{name: float(value) for name, value in group.items()} for group in metrics])
        self.seen.append([trainer.is_last_batch, trainer.training, trainer.global_step, trainer.current_epoch])
        self.seen.append([trainer.fit_loop.batch_idx, trainer.fit_loop.total_batch_idx, batch_idx, len(batch[1])])
        self.seen.append([trainer.num_training_batches, self.training, torch.is_grad_enabled(), torch.rand(()).item()])
        self.seen.append([self.optimizers().param_groups[0]["lr"], self.net[0].weight.grad is None])  # type: ignore
        self.log("loss", loss, prog_bar=True)
        self.log("forked", loss, on_step=True, on_epoch=True)
        self.seen.append(float(trainer.callback_metrics["loss"]))
        return loss


class ChangesLoss(Foreign):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if self.current_epoch == 1:
            return F.mse_loss(self(batch[0]).softmax(1), F.one_hot(batch[1], 3).float())
        return self.loss(batch)


class BatchNormed(Foreign):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, 3))


class Schedules(Foreign):
    interval, frequency = "epoch", 1

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.8)
        config = {"scheduler": schedule, "interval": self.interval, "frequency": self.frequency}
        return {"optimizer": optimizer, "lr_scheduler": config}


class SchedulesBySteps(Schedules):
    interval, frequency = "step", 3


class PlateauByTheEpoch(Foreign):
    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.5)
        schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "monitor": "val_loss"}}


class Stops(Foreign):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if self.global_step == 6:
            self.trainer.should_stop = True
        return super().training_step(batch, batch_idx)


class TwoLoaders(Foreign):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss(batch["a"]) + 0.1 * self.loss(batch["b"])


class UsesLBFGS(Foreign):
    def configure_optimizers(self) -> Any:
        return torch.optim.LBFGS(self.parameters(), lr=0.1, max_iter=3)


class TransferHooks(Foreign):
    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return [batch[0] + 0.5, batch[1]]

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return [batch[0] * (2 if self.training else 1), batch[1]]


class StepHooks(Foreign):
    """Hooks that need no visit: they are called within an ordinary step."""

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        (loss * 2).backward()

    def configure_gradient_clipping(self, optimizer: Any, *args: Any, **kwargs: Any) -> None:
        self.clip_gradients(optimizer, gradient_clip_val=0.05, gradient_clip_algorithm="norm")


class Unfreezes(callbacks.BaseFinetuning):
    def freeze_before_training(self, pl_module: Any) -> None:
        self.freeze(pl_module.net[0])

    def finetune_function(self, pl_module: Any, epoch: int, optimizer: Any) -> None:
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.net[0], optimizer)


class OnlyThoseThatLearn(Foreign):
    def configure_optimizers(self) -> Any:
        return torch.optim.Adam([p for p in self.parameters() if p.requires_grad], lr=0.01)


def without_some(batch: list[Any]) -> Any:
    """A `collate_fn` that has nothing where all of a batch is unusable."""
    inputs, labels = (torch.stack(part) for part in zip(*batch, strict=True))
    return None if inputs[0, 0] > 0.6 else (inputs, labels)


def pair() -> dict[str, DataLoader[Any]]:
    return {"a": loader(), "b": loader(20)}


SWA = callbacks.StochasticWeightAveraging
FOREIGN: dict[str, tuple[Any, Make, Make, Settings]] = {
    **{
        module.__name__: (module, loader, list, {})
        for module in (
            Foreign,
            UsesBatchIndex,
            WithoutBatchIndex,
            Anneals,
            ReturnsDict,
            SometimesNone,
            LogsNowAndThen,
            LogsByTheEpochNowAndThen,
            LogsForked,
            OwnLog,
            OwnLogAndName,
            WithMetrics,
            UsesExperiment,
            LooksAround,
            ChangesLoss,
            BatchNormed,
            Schedules,
            SchedulesBySteps,
            PlateauByTheEpoch,
            Stops,
            UsesLBFGS,
            TransferHooks,
            StepHooks,
        )
    },
    "SWA": (BatchNormed, loader, lambda: [SWA(0.01, 1)], {"max_epochs": 3}),
    "stops after min_epochs": (Stops, loader, list, {"min_epochs": 2, "max_epochs": 4}),
    "stops in an epoch to come": (Stops, loader, list, {"min_steps": 15, "max_epochs": 4}),
    "two loaders": (TwoLoaders, pair, list, {}),
    "CombinedLoader": (TwoLoaders, lambda: CombinedLoader(pair(), "min_size"), list, {"log_every_n_steps": 50}),
    "accumulates later": (Foreign, loader, lambda: [callbacks.GradientAccumulationScheduler({0: 1, 1: 2})], {}),
    "finetuning": (OnlyThoseThatLearn, loader, lambda: [Unfreezes()], {"max_epochs": 3}),
    "in double": (LogsForked, loader, list, {"precision": "64-true"}),
    "validation within": (LogsForked, loader, list, {"val_check_interval": 4}),
    "clipped": (WithMetrics, loader, list, {"gradient_clip_val": 0.1, "precision": "bf16-mixed"}),
    "no logger": (LooksAround, loader, list, {"logger": False}),
    "never logged": (LogsForked, loader, list, {"log_every_n_steps": 0}),
}


@pytest.mark.parametrize("case", FOREIGN)
def test_foreign(case: str, tmp_path: Path) -> None:
    module, data, more, settings = FOREIGN[case]
    run = compare(tmp_path, module, data, more, **settings)
    assert run.quiet >= 0.2 * run.trainer.fit_loop.total_batch_idx
    assert len(run.infos) == (case in ("SWA", "accumulates later"))  # for some of their epochs


def test_batch_without_anything(tmp_path: Path) -> None:
    """Lightning leaves out a batch that is None."""
    data = loader()
    data.collate_fn = without_some
    compare(tmp_path, Foreign, lambda: data)


def test_fit_again(tmp_path: Path) -> None:
    """A second, longer fit of the same Trainer."""
    left: list[Any] = []
    for trainer_class in (Trainer, pl.Trainer):
        run = fit(trainer_class, tmp_path / trainer_class.__module__, Foreign, loader, list, {"max_epochs": 1})
        assert run.trainer.fit_loop.max_epochs == 1
        run.trainer.fit_loop.max_epochs = 3
        run.trainer.fit(run.module, loader())
        left.append({**run.module.state_dict(), "metrics": dict(run.trainer.callback_metrics)})
        assert run.trainer.global_step == 3 * PER_EPOCH
    assert differences(left[0], left[1]) == []


def test_fit_again_after_a_finished_run_was_loaded(tmp_path: Path) -> None:
    """The random states of its checkpoint are not for the second fit."""
    finished = fit(Trainer, tmp_path / "finished", Foreign, loader, list, {})
    assert finished.trainer.current_epoch == 2
    left: list[Any] = []
    quiet: Settings = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar"), False)
    for trainer_class in (pl.Trainer, Trainer):
        module, trainer = Foreign(), trainer_class(accelerator="cpu", devices=1, max_epochs=2, **quiet)
        trainer.fit(module, loader(), ckpt_path=tmp_path / "finished/end.ckpt", weights_only=True)
        assert trainer.global_step == 2 * PER_EPOCH
        torch.manual_seed(5)
        trainer.fit_loop.max_epochs = 3
        trainer.fit(module, loader())
        assert trainer.global_step == 3 * PER_EPOCH
        left.append({**module.state_dict(), "random": torch.get_rng_state()})
    assert differences(left[0], left[1]) == []


# C: who watches


class Watches(pl.Callback):
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


WATCHED: dict[str, tuple[Any, Make, Make, Settings]] = {
    "unknown callback": (Foreign, loader, lambda: [Watches()], {}),
    "LambdaCallback": (
        Foreign,
        loader,
        lambda: [callbacks.LambdaCallback(on_train_batch_start=lambda *_: None)],
        {},
    ),
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
    "fast=False": (Foreign, loader, list, {"fast": False}),
}


@pytest.mark.parametrize("case", WATCHED)
def test_watched(case: str, tmp_path: Path) -> None:
    """Each iteration is visited, and one line says why."""
    module, data, more, settings = WATCHED[case]
    run = compare(tmp_path, module, data, more, **settings)
    assert run.visits == list(range(1, 2 * PER_EPOCH + 1))
    assert len(run.infos) == (case != "fast=False"), run.infos


class Called:
    """An object that is called like a function, but has no code of its own."""

    def __init__(self) -> None:
        self.call_count = 0

    def __call__(self, *args: Any) -> None:
        self.call_count += 1


@pytest.mark.parametrize("hook", ["on_train_batch_start", "on_train_batch_end", "on_before_zero_grad"])
@pytest.mark.parametrize("kind", [Mock, Called])
@pytest.mark.parametrize("where", ["LambdaCallback", "callback", "module"])
def test_a_hook_that_is_no_function_is_called_in_each_iteration(
    hook: str, kind: Any, where: str, tmp_path: Path
) -> None:
    called = kind(return_value=None) if kind is Mock else kind()
    callback: pl.Callback = callbacks.LambdaCallback(**{hook: called}) if where == "LambdaCallback" else pl.Callback()

    def module() -> Foreign:
        made = Foreign()
        if where == "module":
            setattr(made, hook, called)
        return made

    if where == "callback":
        setattr(callback, hook, called)
    fit(Trainer, tmp_path / "a", module, loader, lambda: [callback], {})
    assert called.call_count == 2 * PER_EPOCH


def test_a_mock_of_a_callback_is_called_in_each_iteration(tmp_path: Path) -> None:
    mock = Mock(spec=pl.Callback, state_key="mock", **{"state_dict.return_value": {}})
    fit(Trainer, tmp_path / "a", Foreign, loader, lambda: [mock], {})
    assert mock.on_train_batch_end.call_count == 2 * PER_EPOCH


def rich() -> callbacks.RichProgressBar:
    return callbacks.RichProgressBar(console_kwargs={"file": StringIO()})


@pytest.mark.parametrize("bar", [callbacks.TQDMProgressBar, callbacks.RichProgressBar, callbacks.ProgressBar])
def test_a_progress_bar_with_a_batch_hook_of_its_own(bar: Any, tmp_path: Path) -> None:
    seen = []

    class Counts(bar):
        def on_train_batch_end(self, *args: Any) -> None:
            seen.append(1)

    fit(Trainer, tmp_path / "a", Foreign, loader, lambda: [Counts()], {"enable_progress_bar": True})
    assert len(seen) == 2 * PER_EPOCH


NOT_WATCHED: dict[str, tuple[Make, Settings]] = {
    "ModelCheckpoint": (lambda: [callbacks.ModelCheckpoint(monitor="train_loss", save_last=True)], {}),
    "ModelCheckpoint by time": (lambda: [callbacks.ModelCheckpoint(train_time_interval=timedelta(hours=1))], {}),
    "EarlyStopping": (lambda: [callbacks.EarlyStopping("val_loss", patience=0, min_delta=9)], {"max_epochs": 4}),
    "LearningRateMonitor": (lambda: [callbacks.LearningRateMonitor("step")], {}),
    "Timer": (lambda: [callbacks.Timer(timedelta(hours=1))], {}),
    "max_time": (list, {"max_time": "00:01:00:00"}),
    "TQDM": (lambda: [callbacks.TQDMProgressBar(3)], {}),
    "Rich": (lambda: [rich()], {}),
    "by time": (lambda: [Visits(timedelta(seconds=60))], {}),
    "never": (lambda: [Visits(0)], {}),
    "timed validation": (list, {"val_check_interval": "00:01:00:00", "check_val_every_n_epoch": None}),
}


@pytest.mark.parametrize("case", NOT_WATCHED)
def test_not_watched(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "LOOK_EVERY", 60)  # on a busy machine these iterations take more than 0.1 s
    more, settings = NOT_WATCHED[case]
    checkpoints = {"enable_checkpointing": "Checkpoint" in case, "enable_progress_bar": case in ("TQDM", "Rich")}
    run = compare(tmp_path, Schedules, loader, more, **checkpoints, **settings)
    assert run.infos == []
    expected = [1, 5, 10, 11, 12, 15, 20, 22]
    assert run.visits == expected if case != "timed validation" else len(run.visits) <= len(expected)


def test_observe_every(tmp_path: Path) -> None:
    """A callback is called at the multiples of its number, counted in steps, and where there is a visit anyway."""
    watching: list[Visits] = []

    def more() -> list[pl.Callback]:
        watching.append(Visits(4))
        return [watching[-1]]

    compare(tmp_path, Foreign, loader, more, log_every_n_steps=50)
    assert watching[0].steps == [1, 4, 8, 11, 12, 16, 20, 22]


class Slow(Foreign):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        time.sleep(0.03)
        return super().training_step(batch, batch_idx)


def test_looks_at_the_clock(tmp_path: Path) -> None:
    """A callback that goes by the clock is called a few iterations of 0.03 s apart, one that does not is not."""
    run = fit(Trainer, tmp_path / "a", Slow, loader, lambda: [Visits(timedelta(seconds=1))], {"log_every_n_steps": 50})
    gaps = [after - before for before, after in zip(run.visits, run.visits[1:], strict=False)]
    assert max(gaps) <= 6
    assert run.quiet > 5


def test_max_time(tmp_path: Path) -> None:
    """It ends in the middle of an epoch, soon after the time is over."""
    settings = {"max_time": timedelta(seconds=0.3), "max_epochs": 9, "log_every_n_steps": 50}
    start = time.monotonic()
    run = fit(Trainer, tmp_path / "a", Slow, lambda: loader(1), list, settings)
    assert 0.3 < time.monotonic() - start < 2
    assert 5 < run.trainer.global_step < 30


def test_one_clock_does_not_hide_another(tmp_path: Path) -> None:
    """A bar that wants each 40th iteration does not keep the timer from ending the run at any other."""

    def more() -> list[pl.Callback]:
        return [callbacks.Timer(timedelta(seconds=0.3)), callbacks.TQDMProgressBar(refresh_rate=40)]

    settings = {"enable_progress_bar": True, "log_every_n_steps": 50}
    run = fit(Trainer, tmp_path / "a", Slow, lambda: loader(1), more, settings)
    assert run.trainer.global_step < 30  # 10 are 0.3 s
    assert run.quiet > 0


# D: visits on demand


class AsksForVisit(Foreign):
    how = "thread"

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if self.global_step == 4:
            if self.how == "signal":
                os.kill(os.getpid(), signal.SIGUSR1)
            else:
                thread = threading.Thread(target=setattr, args=(self.trainer, "visit", True))
                thread.start()
                thread.join()
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("how", ["thread", "signal"])
def test_visit(how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked for in the fifth iteration, it is the sixth."""
    monkeypatch.setattr(AsksForVisit, "how", how)
    trainers: list[Trainer] = []
    previous = signal.signal(signal.SIGUSR1, lambda *_: setattr(trainers[0], "visit", True))

    class Here(pl.Callback):
        def on_fit_start(self, trainer: Any, *args: Any) -> None:
            trainers.append(trainer)

    settings = {"log_every_n_steps": 50, "max_epochs": 1}
    try:
        run = fit(Trainer, tmp_path / "a", AsksForVisit, loader, lambda: [Here()], settings)
    finally:
        signal.signal(signal.SIGUSR1, previous)
    assert run.visits == [1, 6, 11]
    assert isinstance(run.trainer, Trainer)
    assert not run.trainer.visit


@pytest.mark.parametrize("module", [Foreign, classifier])
def test_quiet_losses(module: Make, digits: Callable[..., MNISTDataModule], tmp_path: Path) -> None:
    """What a visited iteration finds are the losses since the last one: all together those of Lightning's Trainer."""

    class Losses(Visits):
        def __init__(self) -> None:
            super().__init__()
            self.losses: list[float] = []
            self.counts: list[int] = []

        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, *args: Any) -> None:
            quiet = getattr(trainer, "quiet_losses", [])
            self.counts.append(len(quiet))
            self.losses += [float(loss) for loss in (*quiet, outputs["loss"])]

    found = []
    for trainer_class in (Trainer, pl.Trainer):
        losses = Losses()
        data = loader if module is Foreign else digits
        fit(trainer_class, tmp_path / trainer_class.__module__, module, data, partial(list, [losses]), {})
        found.append(losses)
    assert found[0].losses == found[1].losses
    assert found[0].counts == [0, 3, 4, 0, 0, 2, 4, 1]


class StopsAtNaN(Stops):
    """Its loss is no number in the iteration that asks to stop."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        was_to_stop = self.trainer.should_stop
        loss = super().training_step(batch, batch_idx)
        return loss * math.nan if self.trainer.should_stop and not was_to_stop else loss


@pytest.mark.parametrize("settings", [{}, {"limit_val_batches": 0}, {"min_epochs": 2}], ids=str)
def test_the_loss_of_a_quiet_iteration_that_stops_is_looked_at(settings: Settings, tmp_path: Path) -> None:
    visits = Visits()
    with pytest.raises(FloatingPointError, match="nan at iteration 7;"):
        fit(Trainer, tmp_path / "a", StopsAtNaN, loader, lambda: [FiniteLosses(), visits], settings)
    assert 7 not in visits.steps
