"""What the classifier learns, by which rates and losses; and that what one edits in it is what runs."""

import importlib.util
import math
from pathlib import Path
from typing import Any

import jsonargparse
import pytest
import torch
import torch.nn.functional as F
from conftest import SILENT
from engine.test_loop import ONE_CYCLE, PER_EPOCH, compare, digits, fit
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.optim.lr_scheduler import OneCycleLR

from mnist_lightning import MNISTClassifier, MNISTDataModule, Trainer, classifier

LOSS, VALIDATION = "        return loss\n", "    def validation_step"
PRINT = "        print('a step')\n"
EDITS = {
    "a print": (LOSS, f"{PRINT}{LOSS}"),
    "a loss by the epoch": (LOSS, "        return loss * (2 if self.current_epoch > 0 else 1)\n"),
    "a loss by the batch": (LOSS, "        return loss * (1 + batch_idx % 3)\n"),
    "another forward": ("self.mlp(images)", "self.mlp(1 - images)"),
    "a hook": (VALIDATION, f"    def on_after_backward(self) -> None:\n{PRINT}\n{VALIDATION}"),
}


@pytest.mark.parametrize("edit", EDITS)
def test_what_one_edits_is_what_runs(edit: str, root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A copy of `classifier.py` is edited: in each iteration, and as with Lightning's Trainer."""
    source, (old, new) = Path(classifier.__file__).read_text(), EDITS[edit]
    assert source.count(old) == 1
    (tmp_path / "edited.py").write_text(source.replace(old, new))
    spec = importlib.util.spec_from_file_location("edited", tmp_path / "edited.py")
    assert spec
    assert spec.loader
    spec.loader.exec_module(edited := importlib.util.module_from_spec(spec))
    run = compare(tmp_path, edited.MNISTClassifier, lambda: digits(root))
    is_silent = edit.startswith(("a loss", "another"))
    assert capsys.readouterr().out.count("a step") == (0 if is_silent else 2 * 2 * PER_EPOCH)
    unedited = fit(Trainer, tmp_path / "unedited", MNISTClassifier, lambda: digits(root), list, {})
    assert torch.equal(weights(run.module), weights(unedited.module)) is not is_silent


def initial(**settings: Any) -> MNISTClassifier:
    torch.manual_seed(0)
    return MNISTClassifier(hidden_dim=20, **settings)


def make_trainer(**settings: Any) -> Trainer:
    defaults = {"accelerator": "cpu", "max_epochs": 2, "num_sanity_val_steps": 0, "enable_checkpointing": False}
    return Trainer(**SILENT | defaults | settings)


def train(data: MNISTDataModule, module: MNISTClassifier | None = None, **settings: Any) -> tuple[Trainer, Any]:
    trainer, module = make_trainer(**settings), module or initial()
    trainer.fit(module, datamodule=data)
    return trainer, module


def weights(module: MNISTClassifier) -> Tensor:
    return torch.nn.utils.parameters_to_vector(module.parameters()).detach()


def test_trains_as_the_tutorial_does(data: MNISTDataModule) -> None:
    _, module = train(data, max_epochs=1)
    plain = initial().mlp
    optimizer = torch.optim.Adam(plain.parameters(), lr=0.001, betas=(0.9, 0.999), eps=1e-8)
    for images, labels in data.train_dataloader():
        # The tutorial's loss: one-hot labels, mean over the minibatch.
        loss = -(F.one_hot(labels, 10) * F.log_softmax(plain(images), dim=1)).sum(dim=1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    torch.testing.assert_close(module.mlp.state_dict(), plain.state_dict(), rtol=1e-3, atol=1e-5)


def test_learns(data: MNISTDataModule) -> None:
    trainer, _ = train(data, max_epochs=1, max_steps=1, log_every_n_steps=1)
    assert trainer.callback_metrics["train/loss"] == pytest.approx(math.log(10), abs=0.1)
    trainer, _ = train(data, max_epochs=30)
    assert trainer.callback_metrics["train/loss"] < 0.5
    assert trainer.callback_metrics["val/acc"] > 0.8


@pytest.mark.parametrize(
    ("limits", "iterations"),
    [
        ({"max_epochs": 3}, 33),
        ({"max_epochs": 3, "max_steps": 7}, 7),
        ({"max_epochs": -1, "max_steps": 15}, 15),
        ({"limit_train_batches": 5}, 10),
        ({"limit_train_batches": 0.5, "max_epochs": 3}, 15),
        ({"accumulate_grad_batches": 4}, 6),  # of 4, 4 and 3 minibatches, twice
        ({"overfit_batches": 3}, 6),
        ({"fast_dev_run": 6}, 6),
    ],
)
def test_one_cycle_ends_where_training_does(data: MNISTDataModule, limits: dict[str, Any], iterations: int) -> None:
    trainer, _ = train(data, initial(**ONE_CYCLE), **limits)
    schedule = trainer.lr_scheduler_configs[0].scheduler
    assert isinstance(schedule, OneCycleLR)
    assert trainer.global_step == schedule.total_steps == schedule.last_epoch == iterations


def test_one_cycle_needs_an_end(data: MNISTDataModule) -> None:
    with pytest.raises(MisconfigurationException, match="max_epochs or max_steps"):
        train(data, initial(**ONE_CYCLE), max_epochs=-1)


def test_weight_decay_shrinks_all_weights_by_the_rate(data: MNISTDataModule) -> None:
    plain, decayed = (train(data, initial(weight_decay=decay), max_steps=1)[1] for decay in (0.0, 100.0))
    torch.testing.assert_close(weights(decayed), weights(plain) - 0.001 * 100 * weights(initial()))


def test_label_smoothing_spreads_labels_in_training_only(data: MNISTDataModule) -> None:
    trainer, module = train(data, initial(label_smoothing=0.3), max_steps=1, log_every_n_steps=1)
    images, labels = next(iter(data.train_dataloader()))
    targets = 0.7 * F.one_hot(labels, 10) + 0.3 / 10
    loss = -(targets * F.log_softmax(initial()(images), dim=1)).sum(dim=1).mean()
    assert trainer.callback_metrics["train/loss"].item() == pytest.approx(loss.item(), rel=1e-5)
    (metrics,) = trainer.test(module, datamodule=data, verbose=False)
    loss = F.cross_entropy(module(data.test[0].float() / 255), data.test[1].long())
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


@pytest.mark.parametrize(("precision", "exact"), [("32-true", 1e-5), ("64-true", 1e-12)])
def test_metrics_are_summed_as_precisely_as_the_network_computes(
    data: MNISTDataModule, precision: Any, exact: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Already in the first epoch, and in a `fit` that follows a `validate`."""
    monkeypatch.setattr("mnist_lightning.datamodule.EVAL_BATCH_SIZE", 70)  # does not divide the split
    trainer, module = make_trainer(precision=precision, max_epochs=1), initial()
    trainer.validate(module, datamodule=data, verbose=False)
    trainer.fit(module, datamodule=data)
    logits = module((data.val[0].float() / 255).to(module.mlp.output.bias.dtype)).detach()
    loss = F.cross_entropy(logits, data.val[1].long()).item()
    assert trainer.callback_metrics["val/loss"].item() == pytest.approx(loss, rel=exact)
    _, other = train(data, precision=precision, max_epochs=1)
    assert torch.equal(weights(module), weights(other))


OUT_OF_RANGE: dict[str, list[Any]] = {
    "hidden_dim": [0],
    "learning_rate": [0, -1, "nan"],
    "learning_rate_schedule": ["cosine"],
    "weight_decay": [-0.1, "nan"],
    "dropout": [-0.1, 1.1],
    "label_smoothing": ["nan"],
    "init_std": [0],
}


def test_settings_out_of_range_are_refused() -> None:
    """On the command line all of them; in Python PyTorch refuses the others where it uses them."""
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(MNISTClassifier)
    for name, values in OUT_OF_RANGE.items():
        for value in values:
            with pytest.raises(jsonargparse.ArgumentError, match=name):
                parser.parse_args([f"--{name}={value}"])
    with pytest.raises(ValueError, match="hidden_dim must be at least 1"):
        MNISTClassifier(hidden_dim=0)
