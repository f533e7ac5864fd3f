"""What every Lightning project expects, with Lightning's Trainer and with ours."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from conftest import SILENT, SMALL
from engine.test_loop import digits
from lightning.pytorch.tuner.tuning import Tuner
from torch import Tensor, nn
from torch.optim import AdamW

from mnist_lightning import MNISTClassifier, MNISTDataModule, Trainer
from mnist_lightning.distortions import Distortions

Make = Callable[..., pl.Trainer]
Batch = tuple[Tensor, Tensor]


@pytest.fixture(params=[pl.Trainer, Trainer], ids=["lightning", "ours"])
def make(request: pytest.FixtureRequest, tmp_path: Path) -> Make:
    """Make a Trainer, Lightning's and ours in turn: two epochs of 11 iterations, nothing written or shown."""

    def make(**settings: Any) -> pl.Trainer:
        defaults = {"accelerator": "cpu", "max_epochs": 2, "num_sanity_val_steps": 0, "default_root_dir": tmp_path}
        trainer: pl.Trainer = request.param(**SILENT | {"enable_checkpointing": False} | defaults | settings)
        return trainer

    return make


def network(**settings: Any) -> MNISTClassifier:
    """The classifier, small, with the same weights each time."""
    torch.manual_seed(0)
    return MNISTClassifier(**{"hidden_dim": 20} | settings)


def weights(model: nn.Module) -> Tensor:
    return nn.utils.parameters_to_vector(model.parameters()).detach().clone()


def by_hand(model: MNISTClassifier, loader: Any) -> Tensor:
    """The weights after two epochs of a plain PyTorch loop."""
    model.train()
    optimizer = AdamW(model.parameters(), lr=0.001, weight_decay=0, fused=True)
    for epoch in range(2):
        loader.set_epoch(epoch)
        for images, labels in loader:
            optimizer.zero_grad()
            F.cross_entropy(model.mlp(images), labels).backward()
            optimizer.step()
    return weights(model)


def measure(model: MNISTClassifier, split: Batch) -> tuple[float, float]:
    """Mean loss and accuracy of a split."""
    images, labels = split
    logits = model(images.float() / 255).detach()
    return F.cross_entropy(logits, labels).item(), (logits.argmax(1) == labels).double().mean().item()


class Everything(pl.Callback):
    """Keeps the batch and the loss of each iteration, and the loss that this batch ought to have."""

    def __init__(self) -> None:
        self.batches: list[Batch] = []
        self.losses: list[float] = []
        self.expected: list[float] = []
        self.steps: list[tuple[int, int]] = []

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, *_: Any) -> None:
        with torch.no_grad():
            self.expected.append(F.cross_entropy(pl_module(batch[0]), batch[1]).item())

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.batches.append(batch)
        self.losses.append(outputs["loss"].item())
        self.steps.append((trainer.global_step, batch_idx))


# Data and metrics


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


# The loop


def test_trains_as_a_plain_loop_does(make: Make, data: MNISTDataModule) -> None:
    """Also where a second Trainer goes on with the module, with a new optimizer and the epochs from the first on."""
    model, expected = network(), network()
    for _ in range(2):
        make().fit(model, datamodule=data)
        assert torch.equal(weights(model), by_hand(expected, data.train_dataloader()))


def test_a_callback_sees_all_batches_each_with_its_loss(make: Make, data: MNISTDataModule) -> None:
    make(callbacks=[seen := Everything()]).fit(network(), datamodule=data)
    assert seen.steps == list(zip(range(1, 23), [*range(11), *range(11)], strict=True))
    assert [len(labels) for _, labels in seen.batches] == ([100] * 10 + [50]) * 2
    assert seen.losses == pytest.approx(seen.expected, rel=1e-5)
    assert len(set(seen.losses)) == 22


def test_a_trainer_keeps_its_settings_and_survives_an_error(make: Make, data: MNISTDataModule) -> None:
    class FailOnce(pl.Callback):
        failed = False

        def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            if not self.failed:
                self.failed = True
                raise KeyError

    settings: dict[str, Any] = {"limit_train_batches": 0.8, "val_check_interval": 4}
    trainer, model = make(max_epochs=1, callbacks=[FailOnce()], **settings), network()
    with pytest.raises(KeyError):
        trainer.fit(model, datamodule=data)
    trainer.fit(model, datamodule=data)
    assert trainer.global_step == 8
    assert {name: getattr(trainer, name) for name in settings} == settings


def test_finds_a_learning_rate(make: Make, data: MNISTDataModule) -> None:
    trainer, model = make(), network()
    found = Tuner(trainer).lr_find(model, datamodule=data, num_training=20, early_stop_threshold=None)
    assert found is not None
    assert len(found.results["lr"]) == len(found.results["loss"]) == 20
    assert found.results["loss"][-1] != found.results["loss"][0]
    assert model.hparams["learning_rate"] == found.suggestion() != 0.001
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
    data = digits(root, batch_size=70, seed=3, distortions=distortions)
    trainer, model = make(max_epochs=1), network(weight_decay=0.1)
    trainer.fit(model, datamodule=data)
    trainer.save_checkpoint(tmp_path / "saved.ckpt")
    loaded = MNISTClassifier.load_from_checkpoint(tmp_path / "saved.ckpt", weights_only=True)
    assert torch.equal(weights(loaded), weights(model))
    assert loaded.hparams == model.hparams
    assert loaded.hparams["weight_decay"] == 0.1
    again = MNISTDataModule.load_from_checkpoint(tmp_path / "saved.ckpt", weights_only=True, root=str(root))
    assert again.hparams == {name: value for name, value in data.hparams.items() if name != "dataset_name"}
    assert again.distortions == data.distortions
    again.prepare_data()
    again.setup("fit")
    assert torch.equal(next(iter(again.train_dataloader()))[0], next(iter(data.train_dataloader()))[0])


@pytest.mark.slow
def test_a_compiled_model_trains_to_the_same_weights(make: Make, data: MNISTDataModule) -> None:
    torch._dynamo.reset()
    model, plain = network(), network()
    compiled: Any = torch.compile(model, backend="eager")
    for each in (compiled, plain):
        make(max_epochs=1, limit_train_batches=6).fit(each, datamodule=data)
    assert not torch.equal(weights(model), weights(network()))
    assert torch.equal(weights(model), weights(plain))
