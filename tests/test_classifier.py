import math
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from conftest import VAL_SIZE
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint
from torch import Tensor
from torch.optim.lr_scheduler import OneCycleLR

from mnist_lightning.classifier import MNISTClassifier
from mnist_lightning.datamodule import MNISTDataModule
from mnist_lightning.fused import FusedStep
from mnist_lightning.loader import Minibatch


class Recorder(Callback):
    """Remembers the iterations at which things happened, and the minibatches."""

    def __init__(self) -> None:
        self.validated: list[int] = []
        self.points: list[tuple[int, float, float]] = []
        self.minibatches: list[Minibatch] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.points += outputs["points"]
        self.minibatches += batch

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.validated.append(trainer.global_step)


def train(
    root: Path,
    steps_per_execution: int = 4,
    callbacks: tuple[Callback, ...] = (),
    fused: bool = True,
    model_settings: dict[str, Any] | None = None,
    **settings: Any,
) -> tuple[pl.Trainer, MNISTClassifier, Recorder]:
    torch.manual_seed(0)
    recorder = Recorder()
    settings = {"max_epochs": 2, "num_sanity_val_steps": 0, "enable_checkpointing": False, **settings}
    trainer = pl.Trainer(
        accelerator="cpu",
        callbacks=[recorder, *callbacks],
        enable_progress_bar=False,
        enable_model_summary=False,
        logger=False,
        **settings,
    )
    model = MNISTClassifier(hidden_dim=20, fused_step=fused, **model_settings or {})
    data = MNISTDataModule("synthetic", str(root), steps_per_execution=steps_per_execution, val_size=VAL_SIZE)
    trainer.fit(model, datamodule=data)
    return trainer, model, recorder


def weights(model: MNISTClassifier) -> Tensor:
    return torch.nn.utils.parameters_to_vector(model.parameters()).detach()


@pytest.mark.parametrize("precision", ["32-true", "64-true", "bf16-mixed"])
def test_steps_per_execution_changes_nothing(root: Path, precision: str) -> None:
    results = [train(root, steps, precision=precision, log_every_n_steps=3) for steps in (1, 3, 7, 50)]
    trainer, model, recorder = results[0]
    assert trainer.global_step == 22
    assert [point[0] for point in recorder.points] == [3, 6, 9, 12, 15, 18, 21]
    assert all(p.dtype == (torch.float64 if precision == "64-true" else torch.float32) for p in model.parameters())
    for other_trainer, other_model, other in results[1:]:
        assert torch.equal(weights(model), weights(other_model))
        assert recorder.points == other.points
        assert other_trainer.global_step == 22


class Hooked(Callback):
    """Counts the calls of a hook that lies between the passes of a step."""

    calls = 0

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self.calls += 1


RECIPE: dict[str, Any] = {"learning_rate": 0.01, "learning_rate_schedule": "one_cycle", "weight_decay": 0.1}


@pytest.mark.parametrize(("precision", "recipe"), [("32-true", {}), ("64-true", {}), ("32-true", RECIPE)])
def test_the_fused_step_changes_nothing(
    root: Path, monkeypatch: pytest.MonkeyPatch, precision: str, recipe: dict[str, Any]
) -> None:
    sizes: list[int] = []

    class Spy(FusedStep):
        def __call__(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
            sizes.append(len(labels))
            return super().__call__(images, labels)

    monkeypatch.setattr("mnist_lightning.fused.FusedStep", Spy)
    fused = train(root, precision=precision, log_every_n_steps=3, model_settings=recipe)
    assert sizes == [100] * 19  # not the first step, which makes Adam's state, and not the two minibatches of 50
    plain = train(root, precision=precision, log_every_n_steps=3, fused=False, model_settings=recipe)
    assert len(sizes) == 19
    assert torch.equal(weights(fused[1]), weights(plain[1]))
    assert fused[2].points == plain[2].points
    assert fused[0].global_step == plain[0].global_step
    for a, b in zip(*(t.optimizers[0].state.values() for t in (fused[0], plain[0])), strict=True):
        assert all(torch.equal(a[key], b[key]) for key in ("exp_avg", "exp_avg_sq", "step"))


def edited_forward(self: MNISTClassifier, images: Tensor) -> Tensor:
    logits: Tensor = self.mlp.output(F.gelu(self.mlp.hidden(images)))
    return logits


def edited_optimizer(self: MNISTClassifier) -> torch.optim.Optimizer:
    groups: list[dict[str, Any]] = [
        {"params": self.mlp.hidden.parameters()},
        {"params": self.mlp.output.parameters(), "lr": 0.01},
    ]
    return torch.optim.Adam(groups, lr=self.learning_rate, fused=True)


@pytest.mark.parametrize("edit", [{"forward": edited_forward}, {"configure_optimizers": edited_optimizer}])
def test_whoever_changes_the_network_or_the_optimizer_gets_it(
    root: Path, monkeypatch: pytest.MonkeyPatch, edit: dict[str, Any]
) -> None:
    original = weights(train(root)[1])
    for name, function in edit.items():
        monkeypatch.setattr(MNISTClassifier, name, function)
    assert torch.equal(weights(train(root)[1]), weights(train(root, fused=False)[1]))
    assert not torch.equal(weights(train(root)[1]), original)


def test_hooks_on_steps_are_called(root: Path) -> None:
    hooked = Hooked()
    _, model, _ = train(root, callbacks=(hooked,))
    assert hooked.calls == 22
    assert torch.equal(weights(model), weights(train(root)[1]))


def test_frozen_layers_stay_as_they_are(root: Path) -> None:
    class Freeze(Callback):
        def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
            pl_module.mlp.hidden.requires_grad_(False)

    torch.manual_seed(0)
    before = MNISTClassifier(hidden_dim=20).mlp
    _, model, _ = train(root, callbacks=(Freeze(),))
    assert torch.equal(model.mlp.hidden.weight, before.hidden.weight)
    assert not torch.equal(model.mlp.output.weight, before.output.weight)


def test_trains_as_a_plain_loop_does(root: Path) -> None:
    _, model, recorder = train(root, max_epochs=1)
    torch.manual_seed(0)
    plain = MNISTClassifier(hidden_dim=20).mlp
    optimizer = torch.optim.Adam(plain.parameters(), lr=0.001, betas=(0.9, 0.999), eps=1e-8)
    for images, labels in recorder.minibatches:
        # The tutorial's loss: one-hot labels, mean over the minibatch.
        loss = -(F.one_hot(labels, 10) * F.log_softmax(plain(images), dim=1)).sum(dim=1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    torch.testing.assert_close(model.mlp.state_dict(), plain.state_dict(), rtol=1e-3, atol=1e-5)


def test_one_cycle_rises_and_falls_along_cosines(root: Path) -> None:
    rates: list[float] = []

    class Rates(Callback):
        def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            rates.append(optimizer.param_groups[0]["lr"])

    train(root, callbacks=(Rates(),), max_epochs=4, model_settings=RECIPE)  # 44 iterations
    rises = 0.3 * 44 - 1
    for iteration, rate in enumerate(rates):
        up = iteration <= rises
        done = iteration / rises if up else (iteration - rises) / (43 - rises)
        begin, end = (0.01 / 25, 0.01) if up else (0.01, 0.01 / 25 / 1e4)
        assert rate == pytest.approx(end + (begin - end) * (1 + math.cos(math.pi * done)) / 2)
    assert len(rates) == 44


@pytest.mark.parametrize(
    ("limits", "iterations"),
    [({"max_epochs": 3}, 33), ({"max_epochs": 3, "max_steps": 7}, 7), ({"max_epochs": -1, "max_steps": 15}, 15)],
)
def test_one_cycle_ends_where_training_does(root: Path, limits: dict[str, Any], iterations: int) -> None:
    trainer = train(root, model_settings=RECIPE, **limits)[0]
    schedule = trainer.lr_scheduler_configs[0].scheduler
    assert isinstance(schedule, OneCycleLR)
    assert trainer.global_step == schedule.total_steps == iterations


def test_one_cycle_needs_an_end(root: Path) -> None:
    with pytest.raises(MisconfigurationException, match="give max_epochs or max_steps"):
        train(root, max_epochs=-1, model_settings=RECIPE)


def test_weight_decay_shrinks_all_weights_by_the_rate(root: Path) -> None:
    plain, decayed = (
        train(root, max_steps=1, max_epochs=1, model_settings={"weight_decay": decay})[1] for decay in (0.0, 100.0)
    )
    torch.manual_seed(0)
    before = weights(MNISTClassifier(hidden_dim=20))
    torch.testing.assert_close(weights(decayed), weights(plain) - 0.001 * 100 * before)


def test_label_smoothing_spreads_labels_in_training_only(root: Path) -> None:
    trainer, model, recorder = train(
        root, max_steps=1, max_epochs=1, log_every_n_steps=1, model_settings={"label_smoothing": 0.3}
    )
    torch.manual_seed(0)
    network = MNISTClassifier(hidden_dim=20)
    images, labels = recorder.minibatches[0]
    targets = 0.7 * F.one_hot(labels, 10) + 0.3 / 10
    loss = -(targets * F.log_softmax(network(images), dim=1)).sum(dim=1).mean()
    assert recorder.points[0][1] == pytest.approx(loss.item(), rel=1e-5)
    data = trainer.datamodule  # type: ignore[attr-defined]
    trainer.validate(model, datamodule=data, verbose=False)
    loss = F.cross_entropy(model(data.val[0]), data.val[1])
    assert trainer.callback_metrics["val/loss"].item() == pytest.approx(loss.item(), rel=1e-5)


def test_dropout_leaves_out_hidden_units_in_training_only() -> None:
    network = MNISTClassifier(hidden_dim=1000, dropout=0.4)
    hidden: list[Tensor] = []
    network.mlp.output.register_forward_pre_hook(lambda module, inputs: hidden.append(inputs[0]))
    images = torch.rand(50, 784)
    network(images)
    network.eval()(images)
    dropped, whole = hidden
    lit = whole > 0
    assert (dropped[lit] == 0).float().mean().item() == pytest.approx(0.4, abs=0.02)
    kept = dropped > 0
    torch.testing.assert_close(dropped[kept], whole[kept] / 0.6)


@pytest.mark.parametrize("setting", ["dropout", "label_smoothing"])
def test_dropout_and_label_smoothing_are_never_fused_away(
    root: Path, monkeypatch: pytest.MonkeyPatch, setting: str
) -> None:
    """A trial could miss one so small."""
    monkeypatch.setattr(FusedStep, "__init__", lambda *args: pytest.fail("tried"))
    train(root, max_epochs=1, model_settings={setting: 1e-9})


def test_measures_the_whole_validation_split(root: Path) -> None:
    trainer, model, _ = train(root, max_epochs=1)
    data = MNISTDataModule("synthetic", str(root), val_size=VAL_SIZE, batch_size=70)  # 70 does not divide 200
    trainer.validate(model, datamodule=data, verbose=False)
    metrics = trainer.callback_metrics
    images, labels = data.val
    logits = model(images)
    assert metrics["val/loss"].item() == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-5)
    assert metrics["val/acc"].item() == pytest.approx((logits.argmax(1) == labels).float().mean().item())


def test_learns(root: Path) -> None:
    trainer, _, recorder = train(root, max_epochs=30, log_every_n_steps=1)
    assert recorder.points[0][1] == pytest.approx(math.log(10), abs=0.1)
    assert recorder.points[-1][1] < 0.5
    assert trainer.callback_metrics["val/acc"] > 0.8


# An epoch has 11 iterations here, cut into lists of 4.
@pytest.mark.parametrize(
    ("settings", "steps", "validated"),
    [
        ({}, 22, [11, 22]),
        ({"max_steps": 13}, 13, [11]),
        ({"max_steps": 11}, 11, [11]),
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
    ],
)
def test_the_trainers_settings_count_iterations(
    root: Path, settings: dict[str, Any], steps: int, validated: list[int]
) -> None:
    trainer, _, recorder = train(root, **settings)
    assert trainer.global_step == steps
    assert recorder.validated == validated


def test_a_trainer_keeps_its_settings_for_the_next_fit(root: Path) -> None:
    trainer, _, _ = train(root, limit_train_batches=0.5, val_check_interval=4)
    assert (trainer.limit_train_batches, trainer.val_check_interval) == (0.5, 4)


def test_validating_first_or_failing_once_does_not_disturb_them(root: Path) -> None:
    class FailOnce(Callback):
        failed = False

        def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            if not self.failed:
                self.failed = True
                raise KeyError

    recorder = Recorder()
    trainer = pl.Trainer(
        accelerator="cpu", max_epochs=1, val_check_interval=0.5, limit_train_batches=8, num_sanity_val_steps=0,
        callbacks=[FailOnce(), recorder], logger=False, enable_checkpointing=False, enable_progress_bar=False,
    )  # fmt: skip
    data = MNISTDataModule("synthetic", str(root), steps_per_execution=4, val_size=VAL_SIZE)
    model = MNISTClassifier(hidden_dim=20)
    trainer.validate(model, datamodule=data, verbose=False)
    with pytest.raises(KeyError):
        trainer.fit(model, datamodule=data)
    trainer.fit(model, datamodule=data)
    assert recorder.validated == [0, 4, 8]


@pytest.mark.parametrize("settings", [{"val_check_interval": 12}, {"limit_train_batches": 0.01}])
def test_settings_that_no_epoch_can_meet_are_refused(root: Path, settings: dict[str, Any]) -> None:
    with pytest.raises(MisconfigurationException, match=f"{next(iter(settings))}.* 11 minibatches"):
        train(root, **settings)


def test_limits_of_validation_count_minibatches(root: Path) -> None:
    trainer, model, _ = train(root, max_epochs=1, limit_val_batches=1)
    data = trainer.datamodule  # type: ignore[attr-defined]
    loss = F.cross_entropy(model(data.val[0][:100]), data.val[1][:100])
    assert trainer.callback_metrics["val/loss"].item() == pytest.approx(loss.item(), rel=1e-5)


def test_overfitting_sees_the_same_minibatches_each_epoch(root: Path) -> None:
    trainer, _, recorder = train(root, overfit_batches=3)
    labels = torch.cat([labels for _, labels in recorder.minibatches])
    assert torch.equal(labels, trainer.datamodule.train[1][:300].repeat(2))  # type: ignore[attr-defined]


def test_early_stopping_stops(root: Path) -> None:
    stop = EarlyStopping("val/acc", mode="max", patience=1, min_delta=1.0)
    trainer, _, _ = train(root, callbacks=(stop,), max_epochs=9)
    assert trainer.global_step == 22


@pytest.mark.parametrize("steps_per_execution", [1, 4])
def test_validation_in_mid_epoch_saves_and_stops(root: Path, tmp_path: Path, steps_per_execution: int) -> None:
    settings: dict[str, Any] = {"limit_train_batches": 8, "val_check_interval": 4}
    stop = EarlyStopping("val/acc", mode="max", patience=2, min_delta=1.0)
    checkpoint = ModelCheckpoint(tmp_path, filename="{step}", monitor="val/acc", save_top_k=-1)
    trainer, _, _ = train(
        root, steps_per_execution, (stop, checkpoint), max_epochs=9, enable_checkpointing=True, **settings
    )
    assert trainer.global_step == 12
    assert {path.name for path in tmp_path.iterdir()} == {"step=4.ckpt", "step=8.ckpt", "step=12.ckpt"}


def test_checkpoints_by_time_are_refused(root: Path) -> None:
    checkpoint = ModelCheckpoint(train_time_interval=timedelta(seconds=1))
    with pytest.raises(MisconfigurationException, match="train_time_interval"):
        train(root, callbacks=(checkpoint,), enable_checkpointing=True)


def test_plain_dataloaders_are_refused_in_one_sentence(data: MNISTDataModule) -> None:
    data.setup("fit")
    trainer = pl.Trainer(accelerator="cpu", max_epochs=1, logger=False, enable_checkpointing=False)
    with pytest.raises(TypeError, match="MNISTDataModule"):
        trainer.fit(MNISTClassifier(), torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*data.train)))


def test_training_metrics_reach_callbacks(root: Path) -> None:
    stop = EarlyStopping("train/loss", mode="min", stopping_threshold=10.0, check_on_train_epoch_end=True)
    trainer, _, recorder = train(root, callbacks=(stop,), max_epochs=9, log_every_n_steps=5)
    assert trainer.global_step == 11
    assert trainer.callback_metrics["train/loss"].item() == pytest.approx(recorder.points[-1][1])


def test_checkpoints_are_saved_at_the_iterations_asked_for(root: Path, tmp_path: Path) -> None:
    checkpoint = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=6, save_top_k=-1)
    train(root, callbacks=(checkpoint,), enable_checkpointing=True)
    assert {path.name for path in tmp_path.iterdir()} == {"step=6.ckpt", "step=12.ckpt", "step=18.ckpt"}


@pytest.mark.parametrize(
    "settings",
    [
        {"hidden_dim": 0},
        *({"learning_rate": value} for value in (0.0, -1.0, math.nan, math.inf)),
        {"learning_rate_schedule": "cosine"},
        {"init_std": 0.0},
        {"weight_decay": -0.1},
        {"weight_decay": math.inf},
        {"dropout": 1.0},
        {"label_smoothing": math.nan},
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(settings))):
        MNISTClassifier(**settings)
