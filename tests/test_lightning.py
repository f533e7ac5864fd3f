"""What works with every Lightning project works with this one: with Lightning's Trainer, and with ours."""

import csv
import math
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from conftest import SMALL, VAL_SIZE
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import callbacks
from lightning.pytorch.callbacks import EarlyStopping, LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.profilers import SimpleProfiler
from lightning.pytorch.tuner.tuning import Tuner
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler, StepLR
from torch.utils.data import DataLoader, TensorDataset

from mnist_lightning import MNISTClassifier, MNISTDataModule, Trainer
from mnist_lightning.distortions import Distortions

Make = Callable[..., pl.Trainer]
Batch = tuple[Tensor, Tensor]


@pytest.fixture(params=[pl.Trainer, Trainer], ids=["lightning", "ours"])
def make(request: pytest.FixtureRequest, tmp_path: Path) -> Make:
    """Make a Trainer, Lightning's and ours in turn: two epochs of 11 iterations, nothing written or shown."""

    def make(**settings: Any) -> pl.Trainer:
        quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
        defaults = {"accelerator": "cpu", "max_epochs": 2, "num_sanity_val_steps": 0, "default_root_dir": tmp_path}
        trainer: pl.Trainer = request.param(**quiet | defaults | settings)
        return trainer

    return make


@pytest.fixture
def data(data: MNISTDataModule) -> MNISTDataModule:
    """The small stand-in digits, read."""
    data.prepare_data()
    data.setup("fit")
    return data


def network(**settings: Any) -> MNISTClassifier:
    """The classifier, small, with the same weights each time."""
    torch.manual_seed(0)
    return MNISTClassifier(**{"hidden_dim": 20} | settings)


def weights(model: nn.Module) -> Tensor:
    return nn.utils.parameters_to_vector(model.parameters()).detach().clone()


def by_hand(
    model: MNISTClassifier,
    data: MNISTDataModule,
    epochs: int = 2,
    optimizer: Optimizer | None = None,
    loss: Callable[..., Tensor] = F.cross_entropy,
    schedule: LRScheduler | None = None,
    by: str = "step",
) -> Tensor:
    """The weights after a plain PyTorch loop."""
    model.train()
    optimizer = optimizer or AdamW(model.parameters(), lr=0.001, weight_decay=0, fused=True)
    loader = data.train_dataloader()
    for epoch in range(epochs):
        loader.set_epoch(epoch)
        for images, labels in loader:
            optimizer.zero_grad()
            loss(model.mlp(images), labels).backward()
            optimizer.step()
            if schedule and by == "step":
                schedule.step()
        if schedule and by == "epoch":
            schedule.step()
    return weights(model)


def measure(model: MNISTClassifier, split: Batch) -> tuple[float, float]:
    """Mean loss and accuracy of a split."""
    images, labels = split
    logits = model(images.float() / 255).detach()
    return F.cross_entropy(logits, labels).item(), (logits.argmax(1) == labels).double().mean().item()


class Everything(pl.Callback):
    """Watches each iteration: its batch, its loss, and the weights after it."""

    def __init__(self) -> None:
        self.batches: list[Batch] = []
        self.indices: list[int] = []
        self.losses: list[float] = []
        self.expected: list[float] = []
        self.steps: list[int] = []
        self.weights: list[Tensor] = []

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, *_: Any) -> None:
        with torch.no_grad():
            self.expected.append(F.cross_entropy(pl_module(batch[0]), batch[1]).item())

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.batches.append(batch)
        self.indices.append(batch_idx)
        self.losses.append(outputs["loss"].item())
        self.steps.append(trainer.global_step)
        self.weights.append(weights(pl_module))


class Seldom(pl.Callback):
    """Watches no iteration: where validation came, and the weights at the ends of epochs."""

    def __init__(self) -> None:
        self.validated: list[int] = []
        self.weights: list[Tensor] = []

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.validated.append(trainer.global_step)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.weights.append(weights(pl_module))


class Spied(MNISTClassifier):
    """Counts its optimizer's steps, and keeps the norm of the gradients and the rate of each."""

    def configure_optimizers(self) -> OptimizerLRScheduler:
        configured = super().configure_optimizers()
        optimizer = configured["optimizer"] if isinstance(configured, dict) else configured
        assert isinstance(optimizer, Optimizer)
        self.norms: list[float] = []
        self.largest: list[float] = []

        def after(optimizer: Optimizer, *_: Any) -> None:
            gradients = torch.cat([p.grad.flatten() for p in self.parameters() if p.grad is not None])
            self.norms.append(gradients.norm().item())
            self.largest.append(gradients.abs().max().item())

        optimizer.register_step_post_hook(after)
        return configured


def logged(trainer: pl.Trainer, column: str) -> dict[int, float]:
    """A column of a CSVLogger's file by its steps."""
    with Path(str(trainer.log_dir), "metrics.csv").open() as file:
        return {int(row["step"]): float(row[column]) for row in csv.DictReader(file) if row[column]}


# Data and metrics


def test_a_loader_yields_pairs_without_a_trainer(data: MNISTDataModule) -> None:
    loader = data.train_dataloader()
    minibatches = list(loader)
    assert len(loader) == len(minibatches) == 11
    assert [images.shape for images, _ in minibatches] == [(100, 784)] * 10 + [(50, 784)]
    for images, labels in minibatches:
        assert (images.dtype, labels.dtype) == (torch.float32, torch.int64)
        assert (images.min().item(), images.max().item()) == (0, 1)
        assert labels.shape == images.shape[:1]
        assert 0 <= labels.min() <= labels.max() <= 9


def test_metrics_come_back_and_are_those_of_the_whole_split(
    make: Make, data: MNISTDataModule, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mnist_lightning.datamodule.EVAL_BATCH_SIZE", 70)  # divides neither split
    trainer, model = make(max_epochs=1), network()
    trainer.fit(model, datamodule=data)
    fitted = {name: value.item() for name, value in trainer.callback_metrics.items() if name.startswith("val")}
    (validated,) = trainer.validate(model, datamodule=data, verbose=False)
    (tested,) = trainer.test(model, datamodule=data, verbose=False)
    for prefix, metrics, split in [
        ("val", fitted, data.val),
        ("val", validated, data.val),
        ("test", tested, data.test),
    ]:
        loss, accuracy = measure(model, split)
        assert metrics == pytest.approx({f"{prefix}/loss": loss, f"{prefix}/acc": accuracy}, rel=1e-5)


def test_predictions_are_probabilities_of_the_test_digits(make: Make, data: MNISTDataModule) -> None:
    model = network()
    predicted = torch.cat([*iter(make().predict(model, datamodule=data) or [])])
    assert predicted.shape == (SMALL["t10k"], 10)
    torch.testing.assert_close(predicted.sum(1), torch.ones(SMALL["t10k"]))
    torch.testing.assert_close(predicted, model(data.test[0].float() / 255).softmax(1).detach())


def test_plain_dataloaders(make: Make, data: MNISTDataModule) -> None:
    train, val = (
        DataLoader(TensorDataset(images.float() / 255, labels), batch_size=100)
        for images, labels in (data.train, data.val)
    )
    trainer, model = make(), network()
    trainer.fit(model, train_dataloaders=train, val_dataloaders=val)
    assert trainer.global_step == 22
    assert trainer.callback_metrics["val/loss"].item() == pytest.approx(measure(model, data.val)[0], rel=1e-5)
    (validated,) = trainer.validate(model, dataloaders=val, verbose=False)
    assert validated["val/acc"] == pytest.approx(measure(model, data.val)[1], rel=1e-5)

    expected = network()
    optimizer = AdamW(expected.parameters(), lr=0.001, weight_decay=0, fused=True)
    for _ in range(2):
        for images, labels in train:
            optimizer.zero_grad()
            F.cross_entropy(expected(images), labels).backward()
            optimizer.step()
    assert torch.equal(weights(model), weights(expected))


def test_plain_dataloaders_that_shuffle(make: Make, data: MNISTDataModule) -> None:
    images, labels = data.train
    train = DataLoader(TensorDataset(images.float() / 255, labels), batch_size=100, shuffle=True)
    trainer, seen = make(callbacks=[everything := Everything()]), []
    trainer.fit(network(), train)
    for epoch in (everything.batches[:11], everything.batches[11:]):
        seen.append(torch.cat([labels for _, labels in epoch]))
    assert not torch.equal(*seen)
    assert all(torch.equal(epoch.bincount(), labels.bincount()) for epoch in seen)


# The loop


def test_trains_as_a_plain_loop_does(make: Make, data: MNISTDataModule) -> None:
    make().fit(model := network(), datamodule=data)
    assert torch.equal(weights(model), by_hand(network(), data))


def test_a_callback_sees_all_batches_each_with_its_loss(make: Make, data: MNISTDataModule) -> None:
    trainer = make(callbacks=[seen := Everything()])
    trainer.fit(model := network(), datamodule=data)
    assert seen.indices == [*range(11), *range(11)]
    assert seen.steps == list(range(1, 23))
    assert [len(labels) for _, labels in seen.batches] == ([100] * 10 + [50]) * 2
    assert seen.losses == pytest.approx(seen.expected, rel=1e-5)
    assert len(set(seen.losses)) == 22
    assert torch.equal(weights(model), by_hand(network(), data))


@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_gradients_are_clipped(make: Make, data: MNISTDataModule, algorithm: str) -> None:
    found = []
    for limit in (None, 0.001):
        torch.manual_seed(0)
        trainer = make(gradient_clip_val=limit, gradient_clip_algorithm=algorithm)
        trainer.fit(model := Spied(20), datamodule=data)
        found.append(model.norms if algorithm == "norm" else model.largest)
    free, clipped = found
    assert len(free) == len(clipped) == 22
    assert min(free) > 0.002
    assert clipped == pytest.approx([0.001] * 22, rel=1e-2)


def test_gradients_are_accumulated(make: Make, data: MNISTDataModule) -> None:
    trainer = make(accumulate_grad_batches=4, max_epochs=1)
    trainer.fit(model := network(), datamodule=data)
    assert trainer.global_step == 3  # of 4, 4 and 3 minibatches

    expected = network()
    optimizer = AdamW(expected.parameters(), lr=0.001, weight_decay=0, fused=True)
    for number, (images, labels) in enumerate(data.train_dataloader(), 1):
        (F.cross_entropy(expected(images), labels) / 4).backward()
        if number in (4, 8, 11):
            optimizer.step()
            optimizer.zero_grad()
    torch.testing.assert_close(weights(model), weights(expected))


def test_accumulation_counts_the_steps_of_one_cycle(make: Make, data: MNISTDataModule) -> None:
    trainer = make(accumulate_grad_batches=4)
    trainer.fit(network(learning_rate_schedule="one_cycle"), datamodule=data)
    assert trainer.global_step == 6
    schedule = trainer.lr_scheduler_configs[0].scheduler
    assert (schedule.total_steps, schedule.last_epoch) == (6, 6)  # type: ignore[union-attr]


def test_accumulation_by_the_epoch(make: Make, data: MNISTDataModule) -> None:
    trainer = make(callbacks=[callbacks.GradientAccumulationScheduler({1: 4})])
    trainer.fit(network(), datamodule=data)
    assert trainer.global_step == 11 + 3


def test_mixed_precision(make: Make, data: MNISTDataModule) -> None:
    trainer, model, dtypes = make(precision="bf16-mixed", max_epochs=8), network(), set()
    model.mlp.register_forward_hook(lambda module, inputs, output: dtypes.add(output.dtype))
    trainer.fit(model, datamodule=data)
    assert dtypes == {torch.bfloat16}
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert trainer.callback_metrics["train/loss"] < 1.5
    assert not torch.equal(weights(model), by_hand(network(), data, epochs=8))


def test_double_precision(make: Make, data: MNISTDataModule) -> None:
    make(precision="64-true").fit(model := network(), datamodule=data)
    assert weights(model).dtype == torch.float64
    torch.testing.assert_close(weights(model).float(), by_hand(network(), data), rtol=0.01, atol=0.001)


@pytest.mark.parametrize(
    ("settings", "steps", "validated"),
    [
        ({}, 22, [11, 22]),
        ({"max_steps": 13}, 13, [11]),
        ({"max_steps": 11}, 11, [11]),
        ({"max_epochs": -1, "max_steps": 15}, 15, [11]),
        ({"limit_train_batches": 5}, 10, [5, 10]),
        ({"limit_train_batches": 0.5}, 10, [5, 10]),
        ({"limit_train_batches": 100}, 22, [11, 22]),
        ({"val_check_interval": 6}, 22, [6, 17]),
        ({"val_check_interval": 0.3}, 22, [3, 6, 9, 14, 17, 20]),
        ({"val_check_interval": 0.5, "limit_train_batches": 8}, 16, [4, 8, 12, 16]),
        ({"val_check_interval": 8, "check_val_every_n_epoch": None}, 22, [8, 16]),
        ({"check_val_every_n_epoch": 2}, 22, [22]),
        ({"fast_dev_run": True}, 1, [1]),
        ({"fast_dev_run": 6}, 6, [6]),
        ({"limit_val_batches": 0}, 22, []),
        ({"overfit_batches": 3}, 6, [3, 6]),
        ({"min_epochs": 2, "max_epochs": 9, "max_time": {"seconds": 0}}, 22, [11, 22]),
    ],
)
def test_settings_count_iterations(
    make: Make, data: MNISTDataModule, settings: dict[str, Any], steps: int, validated: list[int]
) -> None:
    trainer = make(callbacks=[seldom := Seldom()], **settings)
    trainer.fit(network(), datamodule=data)
    assert trainer.global_step == steps
    assert seldom.validated == validated


@pytest.mark.parametrize("settings", [{"val_check_interval": 12}, {"limit_train_batches": 0.01}])
def test_settings_that_no_epoch_can_meet_are_refused(
    make: Make, data: MNISTDataModule, settings: dict[str, Any]
) -> None:
    with pytest.raises((MisconfigurationException, ValueError), match=next(iter(settings))):
        make(**settings).fit(network(), datamodule=data)


def test_stops_in_mid_epoch_with_the_weights_of_then(make: Make, data: MNISTDataModule) -> None:
    make(max_steps=16).fit(model := network(), datamodule=data)
    make(callbacks=[seen := Everything()]).fit(network(), datamodule=data)
    assert torch.equal(weights(model), seen.weights[15])


def test_limits_of_validation_count_minibatches(
    make: Make, data: MNISTDataModule, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mnist_lightning.datamodule.EVAL_BATCH_SIZE", 70)
    trainer, model = make(max_epochs=1, limit_val_batches=1), network()
    trainer.fit(model, datamodule=data)
    expected = measure(model, (data.val[0][:70], data.val[1][:70].long()))
    assert trainer.callback_metrics["val/loss"].item() == pytest.approx(expected[0], rel=1e-5)


@pytest.mark.parametrize("distortions", [False, True])
def test_overfitting_repeats_the_same_minibatches(make: Make, root: Path, distortions: bool) -> None:
    data = MNISTDataModule("synthetic", str(root), val_size=VAL_SIZE, distortions=distortions)
    make(overfit_batches=3, callbacks=[seen := Everything()]).fit(network(), datamodule=data)
    images, labels = map(torch.cat, zip(*seen.batches, strict=True))
    assert torch.equal(images, data.train[0][:300].float().div(255).repeat(2, 1))
    assert torch.equal(labels, data.train[1][:300].long().repeat(2))


def test_validating_first_does_not_disturb(make: Make, data: MNISTDataModule) -> None:
    trainer, model = make(callbacks=[seldom := Seldom()]), network()
    trainer.validate(model, datamodule=data, verbose=False)
    trainer.fit(model, datamodule=data)
    assert seldom.validated == [0, 11, 22]
    assert torch.equal(weights(model), by_hand(network(), data))


def test_a_trainer_keeps_its_settings_and_survives_an_error(make: Make, data: MNISTDataModule) -> None:
    class FailOnce(pl.Callback):
        failed = False

        def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            if not self.failed:
                self.failed = True
                raise KeyError

    settings: dict[str, Any] = {"limit_train_batches": 0.8, "val_check_interval": 4}
    trainer, model = make(max_epochs=1, callbacks=[FailOnce(), seldom := Seldom()], **settings), network()
    with pytest.raises(KeyError):
        trainer.fit(model, datamodule=data)
    trainer.fit(model, datamodule=data)
    assert seldom.validated == [4, 8]
    assert {name: getattr(trainer, name) for name in settings} == settings


def test_fit_again_for_longer(make: Make, data: MNISTDataModule) -> None:
    trainer, model = make(callbacks=[seldom := Seldom()]), network()
    trainer.fit(model, datamodule=data)
    assert trainer.fit_loop.max_epochs == 2
    trainer.fit_loop.max_epochs = 4
    trainer.fit(model, datamodule=data)
    assert trainer.global_step == 44
    assert seldom.validated == [11, 22, 33, 44]

    expected = network()
    by_hand(expected, data)
    optimizer = AdamW(expected.parameters(), lr=0.001, weight_decay=0, fused=True)  # each `fit` makes a new one
    loader = data.train_dataloader()
    for epoch in (2, 3):
        loader.set_epoch(epoch)
        for images, labels in loader:
            optimizer.zero_grad()
            F.cross_entropy(expected(images), labels).backward()
            optimizer.step()
    assert torch.equal(weights(model), weights(expected))


def test_another_trainer_goes_on_with_the_module(make: Make, data: MNISTDataModule) -> None:
    model, expected = network(), network()
    for _ in range(2):
        make().fit(model, datamodule=data)
        by_hand(expected, data)
    assert torch.equal(weights(model), weights(expected))


# Logging and callbacks


def test_csv_has_the_steps_that_lightning_logs(make: Make, data: MNISTDataModule, tmp_path: Path) -> None:
    trainer = make(logger=CSVLogger(tmp_path), log_every_n_steps=5)
    trainer.fit(network(), datamodule=data)
    make(callbacks=[seen := Everything()]).fit(network(), datamodule=data)
    losses = {step: seen.losses[step] for step in (4, 9, 14, 19)}
    assert logged(trainer, "train/loss") == pytest.approx(losses, rel=1e-5)
    assert list(logged(trainer, "train/acc")) == [4, 9, 14, 19]
    assert list(logged(trainer, "val/loss")) == list(logged(trainer, "val/acc")) == [10, 21]


def one_cycle(step: int, steps: int, peak: float) -> float:
    rises = 0.3 * steps - 1
    up = step <= rises
    done = step / rises if up else (step - rises) / (steps - 1 - rises)
    begin, end = (peak / 25, peak) if up else (peak, peak / 25 / 1e4)
    return end + (begin - end) * (1 + math.cos(math.pi * done)) / 2


@pytest.mark.parametrize("every", [1, 4])
def test_rates_are_logged(make: Make, data: MNISTDataModule, tmp_path: Path, every: int) -> None:
    trainer = make(logger=CSVLogger(tmp_path), log_every_n_steps=every, callbacks=[LearningRateMonitor("step")])
    trainer.fit(network(learning_rate=0.01, learning_rate_schedule="one_cycle"), datamodule=data)
    rates = logged(trainer, "lr-AdamW")
    assert list(rates) == list(range(every - 1, 22, every))
    assert rates == pytest.approx({step: one_cycle(step, 22, 0.01) for step in rates})


def test_stops_early_by_validation(make: Make, data: MNISTDataModule) -> None:
    stop = EarlyStopping("val/acc", mode="max", patience=1, min_delta=1.0)
    trainer = make(callbacks=[stop], max_epochs=9)
    trainer.fit(network(), datamodule=data)
    assert trainer.global_step == 22


def test_stops_early_by_training(make: Make, data: MNISTDataModule) -> None:
    make(max_epochs=1, callbacks=[seen := Everything()]).fit(network(), datamodule=data)
    stop = EarlyStopping("train/loss", mode="min", stopping_threshold=10.0, check_on_train_epoch_end=True)
    trainer = make(callbacks=[stop], max_epochs=9, log_every_n_steps=5)
    trainer.fit(network(), datamodule=data)
    assert trainer.global_step == 11
    assert trainer.callback_metrics["train/loss"].item() == pytest.approx(seen.losses[10], rel=1e-5)


def test_validation_in_mid_epoch_saves_and_stops(make: Make, data: MNISTDataModule, tmp_path: Path) -> None:
    stop = EarlyStopping("val/acc", mode="max", patience=2, min_delta=1.0)
    checkpoint = ModelCheckpoint(tmp_path, filename="{step}", monitor="val/acc", save_top_k=-1)
    settings: dict[str, Any] = {"limit_train_batches": 8, "val_check_interval": 4, "max_epochs": 9}
    trainer = make(callbacks=[stop, checkpoint], enable_checkpointing=True, **settings)
    trainer.fit(network(), datamodule=data)
    assert trainer.global_step == 12
    assert {path.name for path in tmp_path.iterdir()} == {"step=4.ckpt", "step=8.ckpt", "step=12.ckpt"}


def test_checkpoints_by_steps(make: Make, data: MNISTDataModule, tmp_path: Path) -> None:
    checkpoint = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=6, save_top_k=-1)
    make(callbacks=[checkpoint], enable_checkpointing=True).fit(network(), datamodule=data)
    assert {path.name for path in tmp_path.iterdir()} == {"step=6.ckpt", "step=12.ckpt", "step=18.ckpt"}
    make(callbacks=[seen := Everything()]).fit(network(), datamodule=data)
    saved = torch.load(tmp_path / "step=18.ckpt", weights_only=True)["state_dict"]
    model = network()
    model.load_state_dict(saved)
    assert torch.equal(weights(model), seen.weights[17])


class Slow(MNISTClassifier):
    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        time.sleep(0.004)
        return super().training_step(batch, batch_idx)


def test_checkpoints_and_the_end_by_time(make: Make, data: MNISTDataModule, tmp_path: Path) -> None:
    data.batch_size = 2  # an epoch takes three seconds
    checkpoint = ModelCheckpoint(tmp_path, filename="{step}", train_time_interval=timedelta(seconds=0.2), save_top_k=-1)
    trainer = make(
        callbacks=[checkpoint],
        enable_checkpointing=True,
        log_every_n_steps=0,
        max_time=timedelta(seconds=0.9),
    )
    trainer.fit(Slow(20), datamodule=data)
    assert 2 <= len(list(tmp_path.iterdir())) <= 4
    assert 10 < trainer.global_step <= 0.9 / 0.004


@pytest.mark.filterwarnings("ignore:.*lr_scheduler.step")
def test_stochastic_weight_averaging(make: Make, data: MNISTDataModule) -> None:
    average = callbacks.StochasticWeightAveraging(0.001, swa_epoch_start=2)
    trainer = make(max_epochs=5, callbacks=[average, seldom := Seldom()])
    trainer.fit(model := network(), datamodule=data)
    # It takes the weights when epochs begin, from the second one on.
    expected = torch.stack(seldom.weights[:4]).mean(0)
    torch.testing.assert_close(weights(model), expected)
    assert not torch.equal(weights(model), seldom.weights[4])


def test_weight_averaging(make: Make, data: MNISTDataModule) -> None:
    make(callbacks=[callbacks.WeightAveraging()]).fit(model := network(), datamodule=data)
    make(callbacks=[seen := Everything()]).fit(network(), datamodule=data)
    torch.testing.assert_close(weights(model), torch.stack(seen.weights).mean(0))


def test_exponential_weight_averaging(make: Make, data: MNISTDataModule) -> None:
    make(callbacks=[callbacks.EMAWeightAveraging(decay=0.9)]).fit(model := network(), datamodule=data)
    make(callbacks=[seen := Everything()]).fit(network(), datamodule=data)
    average = seen.weights[0]
    for after in seen.weights[1:]:
        average = 0.9 * average + 0.1 * after
    torch.testing.assert_close(weights(model), average)


def test_a_profiler_counts_the_iterations(make: Make, data: MNISTDataModule) -> None:
    profiler = SimpleProfiler()
    make(profiler=profiler).fit(network(), datamodule=data)
    assert len(profiler.recorded_durations["run_training_batch"]) == 22


def test_finds_a_learning_rate(make: Make, data: MNISTDataModule) -> None:
    trainer, model = make(), network()
    found = Tuner(trainer).lr_find(model, datamodule=data, num_training=20, early_stop_threshold=None)
    assert found is not None
    assert len(found.results["lr"]) == len(found.results["loss"]) == 20
    assert found.results["loss"][-1] != found.results["loss"][0]
    assert model.learning_rate == model.hparams["learning_rate"] == found.suggestion() != 0.001
    assert torch.equal(weights(model), weights(network()))  # nothing was learned yet
    trainer.fit(model, datamodule=data)
    assert trainer.global_step == 22
    assert trainer.optimizers[0].param_groups[0]["lr"] == found.suggestion()


def test_finds_a_batch_size(make: Make, data: MNISTDataModule) -> None:
    trainer, model = make(max_epochs=1), network()
    size = Tuner(trainer).scale_batch_size(model, datamodule=data, init_val=16, max_trials=3, steps_per_trial=2)
    assert size == data.batch_size == data.hparams["batch_size"] == 64
    assert torch.equal(weights(model), weights(network()))
    trainer.fit(model, datamodule=data)
    assert trainer.global_step == math.ceil(1050 / 64)


# Checkpoints


@pytest.mark.parametrize("distortions", [False, True, Distortions(rotation=5, elastic=0)])
def test_loads_from_a_checkpoint(make: Make, root: Path, tmp_path: Path, distortions: bool | Distortions) -> None:
    data = MNISTDataModule("synthetic", str(root), 70, val_size=VAL_SIZE, seed=3, distortions=distortions)
    trainer, model = make(max_epochs=1), network(weight_decay=0.1)
    trainer.fit(model, datamodule=data)
    trainer.save_checkpoint(tmp_path / "saved.ckpt")
    loaded = MNISTClassifier.load_from_checkpoint(tmp_path / "saved.ckpt", weights_only=True)
    assert torch.equal(weights(loaded), weights(model))
    assert loaded.hparams == model.hparams
    assert loaded.hparams["weight_decay"] == 0.1
    again = MNISTDataModule.load_from_checkpoint(tmp_path / "saved.ckpt", weights_only=True, root=str(root))
    assert (again.dataset, again.batch_size, again.val_size, again.seed) == ("synthetic", 70, VAL_SIZE, 3)
    assert again.distortions == data.distortions
    again.prepare_data()
    again.setup("fit")
    assert torch.equal(next(iter(again.train_dataloader()))[0], next(iter(data.train_dataloader()))[0])


CONSTANT: dict[str, Any] = {}
SCHEDULED: dict[str, Any] = {"learning_rate_schedule": "one_cycle", "dropout": 0.3, "weight_decay": 0.1}


@pytest.mark.parametrize("step", [6, 12, 18])
@pytest.mark.parametrize("distortions", [False, True])
@pytest.mark.parametrize("settings", [CONSTANT, SCHEDULED], ids=["constant", "one_cycle-dropout"])
def test_goes_on_exactly_from_a_checkpoint_of_mid_epoch(
    make: Make, root: Path, tmp_path: Path, settings: dict[str, Any], distortions: bool, step: int
) -> None:
    if settings and not isinstance(make(), Trainer):
        pytest.skip("Lightning drops the loader's position under a schedule (its issue 20550), and random states")
    data = MNISTDataModule("synthetic", str(root), val_size=VAL_SIZE, distortions=distortions)
    checkpoint = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=6, save_top_k=-1)
    whole = make(callbacks=[checkpoint], enable_checkpointing=True)
    whole.fit(model := network(**settings), datamodule=data)

    torch.manual_seed(1)
    resumed, again = make(), MNISTClassifier(hidden_dim=20, **settings)
    fresh = MNISTDataModule("synthetic", str(root), val_size=VAL_SIZE, distortions=distortions)
    resumed.fit(again, datamodule=fresh, ckpt_path=tmp_path / f"step={step}.ckpt", weights_only=True)
    assert resumed.global_step == 22
    assert torch.equal(weights(again), weights(model))
    for state, other in zip(*(t.optimizers[0].state.values() for t in (whole, resumed)), strict=True):
        assert all(torch.equal(state[key], other[key]) for key in ("exp_avg", "exp_avg_sq", "step"))
    assert resumed.callback_metrics["val/loss"] == whole.callback_metrics["val/loss"]


@pytest.mark.parametrize(("first", "second"), [(pl.Trainer, Trainer), (Trainer, pl.Trainer)])
def test_each_trainer_goes_on_from_the_others_checkpoint(
    data: MNISTDataModule, tmp_path: Path, first: type[pl.Trainer], second: type[pl.Trainer]
) -> None:
    checkpoint = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=16)
    settings: dict[str, Any] = {"accelerator": "cpu", "max_epochs": 2, "logger": False, "enable_progress_bar": False}
    first(callbacks=[checkpoint], **settings).fit(model := network(), datamodule=data)
    resumed = second(enable_checkpointing=False, **settings)
    again = MNISTClassifier(hidden_dim=20)
    resumed.fit(again, datamodule=data, ckpt_path=tmp_path / "step=16.ckpt", weights_only=True)
    assert resumed.global_step == 22
    assert torch.equal(weights(again), weights(model))


def test_other_data_are_not_gone_on_with(make: Make, root: Path, tmp_path: Path, data: MNISTDataModule) -> None:
    trainer = make(max_epochs=1)
    trainer.fit(network(), datamodule=data)
    trainer.save_checkpoint(tmp_path / "saved.ckpt")
    other = MNISTDataModule("synthetic", str(root), val_size=VAL_SIZE, batch_size=70)
    with pytest.raises(MisconfigurationException, match=r"data\.batch_size is 70.* with 100"):
        make().fit(network(), datamodule=other, ckpt_path=tmp_path / "saved.ckpt")
    make().test(network(), datamodule=other, ckpt_path=tmp_path / "saved.ckpt", verbose=False)


# Make it yours


class Momentum(MNISTClassifier):
    def configure_optimizers(self) -> OptimizerLRScheduler:
        return SGD(self.parameters(), lr=0.1, momentum=0.9)


def squares(logits: Tensor, labels: Tensor) -> Tensor:
    return F.mse_loss(logits, F.one_hot(labels, 10).float())


class Squares(MNISTClassifier):
    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        images, labels = batch
        loss = squares(self(images), labels)
        self.log("train/loss", loss)
        return loss


class Annealed(MNISTClassifier):
    def configure_optimizers(self) -> OptimizerLRScheduler:
        optimizer = AdamW(self.parameters(), lr=0.01, weight_decay=0, fused=True)
        return [optimizer], [CosineAnnealingLR(optimizer, 3)]


class Stepped(MNISTClassifier):
    def configure_optimizers(self) -> OptimizerLRScheduler:
        optimizer = AdamW(self.parameters(), lr=0.01, weight_decay=0, fused=True)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": StepLR(optimizer, 5, 0.5), "interval": "step"}}


class Convolutional(MNISTClassifier):
    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.Sequential(  # type: ignore[assignment]
            nn.Unflatten(1, (1, 28, 28)),
            nn.Conv2d(1, 4, 5, stride=3),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(4 * 8 * 8, 10),
        )


def seeded(kind: type[MNISTClassifier]) -> MNISTClassifier:
    torch.manual_seed(0)
    return kind()


@pytest.mark.parametrize("kind", [Momentum, Squares, Annealed, Stepped, Convolutional])
def test_a_subclass_trains_as_a_plain_loop_does(make: Make, data: MNISTDataModule, kind: type[MNISTClassifier]) -> None:
    trainer, model, expected = make(max_epochs=3), seeded(kind), seeded(kind)
    initial = weights(expected)
    trainer.fit(model, datamodule=data)

    rate = 0.01 if kind in (Annealed, Stepped) else 0.001
    optimizer: Optimizer = AdamW(expected.parameters(), lr=rate, weight_decay=0, fused=True)
    how: dict[str, Any] = {}
    if kind is Momentum:
        optimizer = SGD(expected.parameters(), lr=0.1, momentum=0.9)
    elif kind is Squares:
        how = {"loss": squares}
    elif kind is Annealed:
        how = {"schedule": CosineAnnealingLR(optimizer, 3), "by": "epoch"}
    elif kind is Stepped:
        how = {"schedule": StepLR(optimizer, 5, 0.5)}
    by_hand(expected, data, 3, optimizer, **how)
    assert torch.equal(weights(model), weights(expected))
    assert not torch.equal(weights(model), initial)
    assert all(map(torch.equal, model.buffers(), expected.buffers()))
    assert trainer.optimizers[0].param_groups[0]["lr"] == optimizer.param_groups[0]["lr"]


def test_another_network_is_measured_saved_and_loaded(make: Make, data: MNISTDataModule, tmp_path: Path) -> None:
    trainer, model = make(), seeded(Convolutional)
    trainer.fit(model, datamodule=data)
    trainer.save_checkpoint(tmp_path / "saved.ckpt")
    loaded = Convolutional.load_from_checkpoint(tmp_path / "saved.ckpt", weights_only=True).eval()
    (tested,) = make().test(loaded, datamodule=data, verbose=False)
    loss, accuracy = measure(model.eval(), data.test)
    assert tested == pytest.approx({"test/loss": loss, "test/acc": accuracy}, rel=1e-5)


@pytest.mark.slow
def test_a_compiled_model_trains_to_the_same_weights(make: Make, data: MNISTDataModule) -> None:
    torch._dynamo.reset()
    model, plain = network(), network()
    compiled: Any = torch.compile(model, backend="eager")
    for each in (compiled, plain):
        make(max_epochs=1, limit_train_batches=6).fit(each, datamodule=data)
    assert not torch.equal(weights(model), weights(network()))
    assert torch.equal(weights(model), weights(plain))
