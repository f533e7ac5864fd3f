import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from conftest import VAL_SIZE
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.optim.lr_scheduler import OneCycleLR

from mnist_lightning import MNISTClassifier, MNISTDataModule, Trainer
from mnist_lightning.fused import FusedStep

RECIPE: dict[str, Any] = {"learning_rate": 0.01, "learning_rate_schedule": "one_cycle", "weight_decay": 0.1}


@pytest.fixture
def data(data: MNISTDataModule) -> MNISTDataModule:
    """The small stand-in digits, read."""
    data.prepare_data()
    data.setup("fit")
    return data


class Losses(pl.Callback):
    """What is logged every third iteration, without watching the others."""

    observe_every = 3

    def __init__(self) -> None:
        self.points: list[tuple[int, float, float]] = []

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step % self.observe_every == 0:
            metrics = trainer.callback_metrics
            self.points.append((trainer.global_step, metrics["train/loss"].item(), metrics["train/acc"].item()))


def train(
    data: MNISTDataModule, model_settings: dict[str, Any] | None = None, **settings: Any
) -> tuple[Trainer, MNISTClassifier, Losses]:
    torch.manual_seed(0)
    losses, others = Losses(), settings.pop("callbacks", [])
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    defaults: dict[str, Any] = {"accelerator": "cpu", "max_epochs": 2, "num_sanity_val_steps": 0}
    trainer = Trainer(callbacks=[losses, *others], **quiet | defaults | settings)
    model = MNISTClassifier(hidden_dim=20, **model_settings or {})
    trainer.fit(model, datamodule=data)
    return trainer, model, losses


def weights(model: MNISTClassifier) -> Tensor:
    return torch.nn.utils.parameters_to_vector(model.parameters()).detach()


def initial(**settings: Any) -> MNISTClassifier:
    torch.manual_seed(0)
    return MNISTClassifier(hidden_dim=20, **settings)


@pytest.fixture
def fused_sizes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of the minibatches with which the fused step is called."""
    sizes: list[int] = []

    class Spy(FusedStep):
        def __call__(self, batch: tuple[Tensor, Tensor]) -> Tensor | None:
            loss = super().__call__(batch)
            if loss is not None:
                sizes.append(len(batch[1]))
            return loss

    monkeypatch.setattr("mnist_lightning.classifier.FusedStep", Spy)
    return sizes


@pytest.mark.parametrize(("precision", "recipe"), [("32-true", {}), ("64-true", {}), ("32-true", RECIPE)])
def test_the_fused_step_changes_nothing(
    data: MNISTDataModule,
    monkeypatch: pytest.MonkeyPatch,
    fused_sizes: list[int],
    precision: str,
    recipe: dict[str, Any],
) -> None:
    fused = train(data, recipe, precision=precision)
    # Lightning visits 0, 2, 5, 8 and 10 of an epoch's 11 iterations; each epoch tries it once, at the second.
    assert 10 <= len(fused_sizes) <= 14
    assert set(fused_sizes) == {100}
    fused_sizes.clear()
    monkeypatch.delattr(MNISTClassifier, "fast_step")
    plain = train(data, recipe, precision=precision)
    assert fused_sizes == []
    assert torch.equal(weights(fused[1]), weights(plain[1]))
    assert weights(plain[1]).dtype == (torch.float64 if precision == "64-true" else torch.float32)
    assert fused[2].points == plain[2].points
    assert [point[0] for point in plain[2].points] == [3, 6, 9, 12, 15, 18, 21]
    assert fused[0].global_step == plain[0].global_step == 22
    for a, b in zip(*(t.optimizers[0].state.values() for t in (fused[0], plain[0])), strict=True):
        assert all(torch.equal(a[key], b[key]) for key in ("exp_avg", "exp_avg_sq", "step"))


def test_quiet_losses_are_those_of_the_steps(data: MNISTDataModule, fused_sizes: list[int]) -> None:
    class Quiet(pl.Callback):
        observe_every = 5
        losses: list[float]

        def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
            self.losses = [loss.item() for loss in trainer.quiet_losses]

    quiet = Quiet()
    train(data, callbacks=[quiet], max_epochs=1, max_steps=5)
    assert len(fused_sizes) > 0
    network, expected = initial(), []
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.001, weight_decay=0, fused=True)
    for images, labels in data.train_dataloader():
        optimizer.zero_grad()
        loss = F.cross_entropy(network(images), labels)
        loss.backward()
        optimizer.step()
        expected.append(loss.item())
    assert len(quiet.losses) > 0
    assert quiet.losses == expected[4 - len(quiet.losses) : 4]


# A trial at the second iteration would miss them.
def edited_forward(self: MNISTClassifier, images: Tensor) -> Tensor:
    logits: Tensor = self.mlp(images)
    return logits if self.trainer.global_step < 5 else 2 * logits


def edited_step(self: MNISTClassifier, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
    images, labels = batch
    loss = F.cross_entropy(self(images), labels) * (1 if batch_idx < 5 else 2)
    self.log_dict({"train/loss": loss, "train/acc": 0.5})
    return loss


def edited_optimizer(self: MNISTClassifier) -> torch.optim.Optimizer:
    groups: list[dict[str, Any]] = [
        {"params": self.mlp.hidden.parameters()},
        {"params": self.mlp.output.parameters(), "lr": 0.01},
    ]
    return torch.optim.Adam(groups, lr=self.learning_rate, fused=True)


EDITS: list[dict[str, Callable[..., Any]]] = [
    {"forward": edited_forward},
    {"training_step": edited_step},
    {"configure_optimizers": edited_optimizer},
]


@pytest.mark.parametrize("edit", EDITS, ids=["forward", "training_step", "configure_optimizers"])
@pytest.mark.parametrize("subclass", [False, True])
def test_whoever_changes_the_step_gets_it(
    data: MNISTDataModule, monkeypatch: pytest.MonkeyPatch, edit: dict[str, Callable[..., Any]], subclass: bool
) -> None:
    original = weights(train(data)[1])
    if subclass:
        edited = type("Edited", (MNISTClassifier,), {"__module__": __name__, **edit})
        monkeypatch.setitem(globals(), "MNISTClassifier", edited)
    else:
        for name, function in edit.items():
            monkeypatch.setattr(MNISTClassifier, name, function)
    found = weights(train(data)[1])
    assert torch.equal(found, weights(train(data, fast=False)[1]))
    assert not torch.equal(found, original)


def test_hooks_on_steps_are_called(data: MNISTDataModule) -> None:
    class Hooked(pl.Callback):
        calls = 0

        def on_before_optimizer_step(self, *_: Any) -> None:
            self.calls += 1

    hooked = Hooked()
    _, model, _ = train(data, callbacks=[hooked])
    assert hooked.calls == 22
    assert torch.equal(weights(model), weights(train(data)[1]))


def test_frozen_layers_stay_as_they_are(data: MNISTDataModule) -> None:
    class Freeze(pl.Callback):
        def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
            pl_module.mlp.hidden.requires_grad_(False)

    before = initial().mlp
    _, model, _ = train(data, callbacks=[Freeze()])
    assert torch.equal(model.mlp.hidden.weight, before.hidden.weight)
    assert not torch.equal(model.mlp.output.weight, before.output.weight)


def test_trains_as_the_tutorial_does(data: MNISTDataModule) -> None:
    _, model, _ = train(data, max_epochs=1)
    plain = initial().mlp
    optimizer = torch.optim.Adam(plain.parameters(), lr=0.001, betas=(0.9, 0.999), eps=1e-8)
    for images, labels in data.train_dataloader():
        # The tutorial's loss: one-hot labels, mean over the minibatch.
        loss = -(F.one_hot(labels, 10) * F.log_softmax(plain(images), dim=1)).sum(dim=1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    torch.testing.assert_close(model.mlp.state_dict(), plain.state_dict(), rtol=1e-3, atol=1e-5)


def test_one_cycle_rises_and_falls_along_cosines(data: MNISTDataModule, monkeypatch: pytest.MonkeyPatch) -> None:
    rates: list[float] = []
    configure = MNISTClassifier.configure_optimizers

    def spied(self: MNISTClassifier) -> Any:
        configured: Any = configure(self)
        configured["optimizer"].register_step_post_hook(
            lambda optimizer, *_: rates.append(optimizer.param_groups[0]["lr"])
        )
        return configured

    monkeypatch.setattr(MNISTClassifier, "configure_optimizers", spied)
    train(data, RECIPE, max_epochs=4)  # 44 iterations, most of them quiet
    rises = 0.3 * 44 - 1
    for iteration, rate in enumerate(rates):
        up = iteration <= rises
        done = iteration / rises if up else (iteration - rises) / (43 - rises)
        begin, end = (0.01 / 25, 0.01) if up else (0.01, 0.01 / 25 / 1e4)
        assert rate == pytest.approx(end + (begin - end) * (1 + math.cos(math.pi * done)) / 2)
    assert len(rates) == 44


@pytest.mark.parametrize(
    ("limits", "iterations"),
    [
        ({"max_epochs": 3}, 33),
        ({"max_epochs": 3, "max_steps": 7}, 7),
        ({"max_epochs": -1, "max_steps": 15}, 15),
        ({"limit_train_batches": 5}, 10),
        ({"limit_train_batches": 0.5, "max_epochs": 3}, 15),
        ({"overfit_batches": 3}, 6),
        ({"fast_dev_run": 6}, 6),
    ],
)
def test_one_cycle_ends_where_training_does(data: MNISTDataModule, limits: dict[str, Any], iterations: int) -> None:
    trainer = train(data, RECIPE, **limits)[0]
    schedule = trainer.lr_scheduler_configs[0].scheduler
    assert isinstance(schedule, OneCycleLR)
    assert trainer.global_step == schedule.total_steps == schedule.last_epoch == iterations


def test_one_cycle_needs_an_end(data: MNISTDataModule) -> None:
    with pytest.raises(MisconfigurationException, match="max_epochs or max_steps"):
        train(data, RECIPE, max_epochs=-1)


def test_weight_decay_shrinks_all_weights_by_the_rate(data: MNISTDataModule) -> None:
    plain, decayed = (train(data, {"weight_decay": decay}, max_steps=1)[1] for decay in (0.0, 100.0))
    torch.testing.assert_close(weights(decayed), weights(plain) - 0.001 * 100 * weights(initial()))


def test_label_smoothing_spreads_labels_in_training_only(data: MNISTDataModule) -> None:
    trainer, model, _ = train(data, {"label_smoothing": 0.3}, max_steps=1, log_every_n_steps=1)
    images, labels = next(iter(data.train_dataloader()))
    targets = 0.7 * F.one_hot(labels, 10) + 0.3 / 10
    loss = -(targets * F.log_softmax(initial()(images), dim=1)).sum(dim=1).mean()
    assert trainer.callback_metrics["train/loss"].item() == pytest.approx(loss.item(), rel=1e-5)
    (metrics,) = trainer.test(model, datamodule=data, verbose=False)
    loss = F.cross_entropy(model(data.test[0].float() / 255), data.test[1].long())
    assert metrics["test/loss"] == pytest.approx(loss.item(), rel=1e-5)


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
    data: MNISTDataModule, monkeypatch: pytest.MonkeyPatch, setting: str
) -> None:
    """A trial could miss one so small."""
    monkeypatch.setattr(FusedStep, "__init__", lambda *args: pytest.fail("tried"))
    _, model, _ = train(data, {setting: 1e-9})
    assert torch.equal(weights(model), weights(train(data, {setting: 1e-9}, fast=False)[1]))


def test_learns(data: MNISTDataModule) -> None:
    trainer, _, losses = train(data, max_epochs=30, log_every_n_steps=1)
    assert losses.points[0][1] == pytest.approx(math.log(10), abs=0.1)
    assert losses.points[-1][1] < 0.5
    assert trainer.callback_metrics["val/acc"] > 0.8


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


@pytest.mark.parametrize("removed", ["fused_step", "steps_per_execution"])
def test_removed_settings_are_no_settings(removed: str) -> None:
    kind: Any = MNISTClassifier if removed == "fused_step" else MNISTDataModule
    with pytest.raises(TypeError, match=removed):
        kind(**{removed: 1})


def test_hyperparameters_are_plain_values() -> None:
    assert dict(MNISTClassifier(**RECIPE).hparams) == {
        "hidden_dim": 200,
        "dropout": 0,
        "label_smoothing": 0,
        "init_std": 0.01,
        **RECIPE,
    }


def test_distorted_images_train_the_same_by_either_loop(root: Path) -> None:
    found = []
    for fast in (True, False):
        data = MNISTDataModule("synthetic", str(root), val_size=VAL_SIZE, distortions=True)
        found.append(weights(train(data, fast=fast)[1]))
    assert torch.equal(*found)
