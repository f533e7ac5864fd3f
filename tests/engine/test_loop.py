"""Our Trainer against Lightning's: the same bits of everything that a run leaves, most iterations without hooks."""

import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from conftest import VAL_SIZE
from lightning.pytorch import callbacks
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy

from mnist_lightning import MNISTClassifier, MNISTDataModule, Trainer
from mnist_lightning.fused import FusedStep

PER_EPOCH = 11  # minibatches of the small digits, and of `loader` below
Settings = dict[str, Any]
Make = Callable[[], Any]


class Notes(pl.Callback):
    """Notes the iterations, counted from 1, whose hooks run."""

    def __init__(self, hooks_every_n_steps: int = 0) -> None:
        self.hooks_every_n_steps = hooks_every_n_steps
        self.steps: list[int] = []

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        self.steps.append(trainer.fit_loop.total_batch_idx + 1)


@dataclass
class Run:
    """A fit and what it left."""

    trainer: pl.Trainer
    module: Any
    with_hooks: list[int]
    fused: int
    infos: list[str]
    left: dict[str, Any] = field(default_factory=dict)

    @property
    def without_hooks(self) -> int:
        return self.trainer.fit_loop.total_batch_idx + 1 - len(self.with_hooks)


@contextmanager
def engine_infos() -> Iterator[list[str]]:
    """Collect the lines that say why hooks run in every iteration, and that a module's own step is not taken."""
    lines: list[str] = []

    class Collect(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            line = record.getMessage()
            lines.extend([line] * ("Hooks run in every iteration: " in line or "training_step is taken" in line))

    loggers, handler = [logging.getLogger(f"lightning.{name}") for name in ("pytorch", "fabric")], Collect()
    for logger in loggers:
        logger.addHandler(handler)
    yield lines
    for logger in loggers:
        logger.removeHandler(handler)


def fit(trainer_class: type[pl.Trainer], path: Path, module: Make, data: Make, more: Make, settings: Settings) -> Run:
    """Fit and read what is left: checkpoints, curves, metrics."""
    path.mkdir(parents=True)
    notes, calls, call = Notes(), [0], FusedStep.__call__

    def count(step: FusedStep, optimizer: Optimizer, batch: tuple[Tensor, Tensor]) -> None:
        calls[0] += 1
        call(step, optimizer, batch)

    with engine_infos() as infos, pytest.MonkeyPatch.context() as patch:
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
            "callbacks": [*more(), notes],
        } | settings
        trainer = trainer_class(**arguments)
        is_module = isinstance(our_data, pl.LightningDataModule)
        trainer.fit(our_module, **{"datamodule" if is_module else "train_dataloaders": our_data})
    run = Run(trainer, our_module, notes.steps, calls[0], infos)
    trainer.save_checkpoint(path / "end.ckpt")
    for file in path.rglob("*.ckpt"):
        run.left[str(file.relative_to(path))] = torch.load(file, weights_only=True)
    curves = path / "metrics.csv"
    run.left["curves"] = curves.read_text().splitlines() if curves.exists() else []
    for metrics in ("callback_metrics", "logged_metrics", "progress_bar_metrics"):
        run.left[metrics] = dict(getattr(trainer, metrics))
    run.left["seen"] = getattr(our_module, "seen", None)
    return run


def differences(theirs: Any, ours: Any, where: str = "") -> list[str]:
    """Where ours is another than Lightning's; ours has random states too."""
    if isinstance(theirs, dict) and isinstance(ours, dict):
        theirs, ours = ({str(key).replace("/theirs", "/ours"): v for key, v in d.items()} for d in (theirs, ours))
        missing = [f"{where}/{key} is missing" for key in theirs if key not in ours]
        extra = [f"{where}/{key} is extra" for key in ours if key not in (*theirs, "random_states")]
        both = [differences(theirs[key], ours[key], f"{where}/{key}") for key in theirs if key in ours]
        return [*missing, *extra, *chain(*both)]
    if isinstance(theirs, list | tuple) and isinstance(ours, list | tuple) and len(theirs) == len(ours):
        pairs = enumerate(zip(theirs, ours, strict=True))
        return list(chain(*(differences(*pair, f"{where}/{i}") for i, pair in pairs)))
    if isinstance(theirs, Tensor) and isinstance(ours, Tensor):
        same = theirs.dtype == ours.dtype and torch.equal(theirs, ours)
    elif isinstance(theirs, str) and isinstance(ours, str):
        same = theirs.replace("/theirs", "/ours") == ours
    else:
        same = "time_elapsed" in where or (type(theirs) is type(ours) and theirs == ours)
    return [] if same else [f"{where}: {theirs} is now {ours}"]


def compare(path: Path, module: Make, data: Make, more: Make = list, **settings: Any) -> Run:
    """Fit with both Trainers; assert that all is the same; return ours."""
    ours = fit(Trainer, path / "ours", module, data, more, settings)
    theirs = fit(pl.Trainer, path / "theirs", module, data, more, {k: v for k, v in settings.items() if k != "fast"})
    assert differences(theirs.left, ours.left) == []
    assert theirs.with_hooks == list(range(1, len(theirs.with_hooks) + 1))
    return ours


# The digits


def digits(root: Path, **settings: Any) -> MNISTDataModule:
    return MNISTDataModule("synthetic", str(root), val_size=VAL_SIZE, **settings)


def classifier(**settings: Any) -> MNISTClassifier:
    return MNISTClassifier(**{"hidden_dim": 8} | settings)


ONE_CYCLE: Settings = {"learning_rate_schedule": "one_cycle", "weight_decay": 0.1}

# Settings of the module, of the data and of the Trainer; of those that `fused.py` does, `test_fused.py` makes use too.
GRID: dict[str, tuple[Settings, Settings, Settings]] = {
    "constant": ({}, {}, {}),
    "one_cycle": (ONE_CYCLE, {}, {}),
    "val by number": ({}, {}, {"val_check_interval": 4}),
    "val by fraction": ({}, {}, {"val_check_interval": 0.3}),
    "val across epochs": ({}, {}, {"val_check_interval": 7, "check_val_every_n_epoch": None}),
    "val each second epoch": ({}, {}, {"check_val_every_n_epoch": 2, "max_epochs": 3}),
    "no val": ({}, {}, {"limit_val_batches": 0}),
    "max_steps": (ONE_CYCLE, {}, {"max_steps": 18, "max_epochs": -1}),
    "max_steps at an end": ({}, {}, {"max_steps": 22, "max_epochs": -1}),
    "even": ({}, {"batch_size": 105}, {}),
    "one in the last": ({}, {"batch_size": 95}, {"max_epochs": 3}),
    "log 3": ({}, {}, {"log_every_n_steps": 3}),
    "log 50": ({}, {}, {"log_every_n_steps": 50, "max_epochs": 5}),
    "64": (ONE_CYCLE, {}, {"precision": "64-true"}),
    "limit_train_batches": ({}, {}, {"limit_train_batches": 7}),
    "limit_train_batches as a fraction": ({}, {}, {"limit_train_batches": 0.8}),
    "overfit": ({}, {}, {"overfit_batches": 6}),
    "reload": ({}, {}, {"reload_dataloaders_every_n_epochs": 1, "max_epochs": 3}),
    "inference mode": ({}, {}, {"inference_mode": False, "barebones": False}),
}
NOT_FUSED: dict[str, tuple[Settings, Settings, Settings]] = {
    "clip norm": ({}, {}, {"gradient_clip_val": 0.1}),
    "clip value": ({}, {}, {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"}),
    "label smoothing": ({"label_smoothing": 0.1}, {}, {}),
    "distortions": ({"dropout": 0.2}, {"distortions": True}, {"max_epochs": 1}),
    "bf16": ({}, {}, {"precision": "bf16-mixed"}),
    "sanity check off": ({"dropout": 0.3}, {}, {"num_sanity_val_steps": 0}),
}


@pytest.mark.parametrize("case", [*GRID, *NOT_FUSED])
def test_digits(case: str, root: Path, tmp_path: Path) -> None:
    module, data, settings = (GRID | NOT_FUSED)[case]
    run = compare(tmp_path, lambda: classifier(**module), lambda: digits(root, **data), **settings)
    assert run.without_hooks >= 0.3 * run.trainer.global_step
    assert (run.fused, run.infos) == (0, [])


def test_hooks_run_only_where_they_are_due(root: Path, tmp_path: Path) -> None:
    """The first and the last of each epoch, what is logged, and before what is validated."""
    run = compare(tmp_path, classifier, lambda: digits(root), val_check_interval=4)
    assert run.with_hooks == [1, 4, 5, 8, 10, 11, 12, 15, 19, 20, 22]
    run = compare(tmp_path / "each", classifier, lambda: digits(root), log_every_n_steps=1, max_epochs=1)
    assert len(run.with_hooks) == PER_EPOCH


def test_checkpoints_within(root: Path, tmp_path: Path) -> None:
    """Each file of ModelCheckpoint is the same, with the loops' states; it needs few hooks."""
    each: Settings = {"every_n_train_steps": 4, "save_top_k": -1, "filename": "{step}"}
    best: Settings = {"monitor": "val/acc", "mode": "max", "filename": "best"}
    run = compare(
        tmp_path,
        lambda: classifier(learning_rate_schedule="one_cycle", dropout=0.1),
        lambda: digits(root),
        lambda: [callbacks.ModelCheckpoint(**each), callbacks.ModelCheckpoint(**best)],
        enable_checkpointing=True,
        log_every_n_steps=50,
    )
    steps = [name for name in run.left if "step=" in name]
    assert sorted(int(name.split("=")[1].removesuffix(".ckpt")) for name in steps) == [4, 8, 12, 16, 20]
    assert run.with_hooks == [1, 4, 8, 11, 12, 16, 20, 22]


# Other people's modules


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
    def log(self, name: str, value: Any, *args: Any, **kwargs: Any) -> None:
        self.seen.append(float(value))
        super().log(name, value * 2, *args, **kwargs)


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
    """Hooks that are called within an ordinary step anyway."""

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


def stops_and_saves() -> list[pl.Callback]:
    stop = callbacks.EarlyStopping("val_loss", patience=2, min_delta=9)
    return [stop, callbacks.ModelCheckpoint(monitor="val_loss", save_top_k=-1)]


PLAIN = [Foreign, UsesBatchIndex, WithoutBatchIndex, Anneals, ReturnsDict, SometimesNone, LogsNowAndThen, LogsForked]
PLAIN += [OwnLog, WithMetrics, UsesExperiment, LooksAround, BatchNormed, Schedules, SchedulesBySteps]
PLAIN += [PlateauByTheEpoch, Stops, UsesLBFGS, TransferHooks, StepHooks]
SWA, Accumulation = callbacks.StochasticWeightAveraging, callbacks.GradientAccumulationScheduler
BY_TRAINING: Settings = {"mode": "min", "stopping_threshold": 10.0, "check_on_train_epoch_end": True}
FOREIGN: dict[str, tuple[Any, Make, Make, Settings]] = {
    **{module.__name__: (module, loader, list, {}) for module in PLAIN},
    "SWA": (BatchNormed, loader, lambda: [SWA(0.01, 1)], {"max_epochs": 3}),
    "stops after min_epochs": (Stops, loader, list, {"min_epochs": 2, "max_epochs": 4}),
    "stops in an epoch to come": (Stops, loader, list, {"min_steps": 15, "max_epochs": 4}),
    "stops by training": (Foreign, loader, lambda: [callbacks.EarlyStopping("train_loss", **BY_TRAINING)], {}),
    "stops within": (Foreign, loader, stops_and_saves, {"val_check_interval": 4, "enable_checkpointing": True}),
    "two loaders": (TwoLoaders, pair, list, {}),
    "CombinedLoader": (TwoLoaders, lambda: CombinedLoader(pair(), "min_size"), list, {"log_every_n_steps": 50}),
    "accumulates later": (Foreign, loader, lambda: [Accumulation({0: 1, 1: 2})], {}),
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
    assert run.without_hooks >= 0.2 * run.trainer.fit_loop.total_batch_idx
    assert len(run.infos) == (case in ("SWA", "accumulates later"))  # for some of their epochs


def test_batch_without_anything(tmp_path: Path) -> None:
    """Lightning leaves out a batch that is None."""
    data = loader()
    data.collate_fn = without_some
    compare(tmp_path, Foreign, lambda: data)


@pytest.mark.parametrize("is_loaded", [False, True])
def test_fit_again(is_loaded: bool, tmp_path: Path) -> None:
    """A second, longer fit of the same Trainer, whose random states are not those of a checkpoint from before."""
    finished = fit(Trainer, tmp_path / "finished", Foreign, loader, list, {}).trainer.default_root_dir
    left: list[Any] = []
    for trainer_class in (pl.Trainer, Trainer):
        no: Settings = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar"), False)
        torch.manual_seed(1)
        module, trainer = Foreign(), trainer_class(accelerator="cpu", devices=1, max_epochs=2, **no)
        trainer.fit(module, loader(), ckpt_path=f"{finished}/end.ckpt" if is_loaded else None, weights_only=True)
        assert trainer.global_step == 2 * PER_EPOCH
        torch.manual_seed(5)
        trainer.fit_loop.max_epochs = 3
        trainer.fit(module, loader())
        assert trainer.global_step == 3 * PER_EPOCH
        left.append([module.state_dict(), dict(trainer.callback_metrics), torch.get_rng_state()])
    assert differences(left[0], left[1]) == []


# Hooks on demand


class AsksForHooks(Foreign):
    how = "thread"

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if self.global_step == 4:
            if self.how == "signal":
                os.kill(os.getpid(), signal.SIGUSR1)
            else:
                thread = threading.Thread(target=setattr, args=(self.trainer, "run_hooks", True))
                thread.start()
                thread.join()
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("how", ["thread", "signal"])
def test_run_hooks(how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked for in the fifth iteration, they run in the sixth."""
    monkeypatch.setattr(AsksForHooks, "how", how)
    trainers: list[Trainer] = []
    previous = signal.signal(signal.SIGUSR1, lambda *_: setattr(trainers[0], "run_hooks", True))

    class Here(pl.Callback):
        def on_fit_start(self, trainer: Any, *args: Any) -> None:
            trainers.append(trainer)

    settings = {"log_every_n_steps": 50, "max_epochs": 1}
    try:
        run = fit(Trainer, tmp_path / "a", AsksForHooks, loader, lambda: [Here()], settings)
    finally:
        signal.signal(signal.SIGUSR1, previous)
    assert run.with_hooks == [1, 6, 11]
    assert not trainers[0].run_hooks
