"""LightningCLI with the engine's settings: threads, optimizers, what is best, where runs are, what is printed."""

import logging
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
import yaml
from conftest import RUN, SHORT, RunCLI, events, load, results, steps
from lightning.pytorch.accelerators import CUDAAccelerator, MPSAccelerator
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.trainer.connectors import accelerator_connector
from torch import Tensor, nn

from mnist_lightning import MNISTClassifier, MNISTDataModule
from mnist_lightning.engine import cli
from mnist_lightning.engine.console import run_command
from mnist_lightning.engine.errors import NOISE


class Subclass(MNISTClassifier):
    pass


@pytest.fixture
def pytorchs_threads() -> None:
    """As if this were PyTorch's own number; the tests run with one otherwise."""
    torch.set_num_threads(2)


@pytest.mark.usefixtures("pytorchs_threads")
@pytest.mark.parametrize(
    ("arguments", "omp_num_threads", "classes", "threads"),
    [
        ([], None, (), 1),
        ([], None, (Subclass,), 2),
        ([], "2", (), 2),
        (["--threads=3"], None, (), 3),
        (["--threads=3"], "2", (), 3),
        (["--threads=1"], "2", (Subclass,), 1),
        (["--threads=0"], None, (), 2),
    ],
)
def test_threads(
    run_cli: RunCLI, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    arguments: list[str], omp_num_threads: str | None, classes: tuple[type, ...], threads: int,
) -> None:  # fmt: skip
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if omp_num_threads:
        monkeypatch.setenv("OMP_NUM_THREADS", omp_num_threads)
    assert run_cli("fit", *SHORT, *arguments, classes=classes) == 0
    assert f" on cpu, {threads} thread{'s' * (threads > 1)}, seed 0\n" in capsys.readouterr().out
    assert yaml.safe_load((RUN / "config.yaml").read_text())["threads"] == threads
    assert results(RUN)["threads"] == threads


@pytest.mark.usefixtures("pytorchs_threads")
def test_a_resumed_run_keeps_its_threads(run_cli: RunCLI, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run_cli("fit", *SHORT, "--threads=3") == 0
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert run_cli("fit", "--ckpt_path=last", "--trainer.max_epochs=2") == 0
    assert results(RUN)["threads"] == 3
    assert run_cli("fit", "--ckpt_path=last", "--trainer.max_epochs=3", "--threads=1") == 0
    assert results(RUN)["threads"] == 1


class WithoutOptimizer(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Linear(784, 10)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.network(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.training_step(batch, batch_idx))

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test_loss", self.training_step(batch, batch_idx))


@pytest.fixture
def run_foreign(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Run the engine's command line on a module that is not this project's."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> int:
        small = ["--data.dataset=synthetic", f"--data.root={root}", "--data.val_size=200", "--trainer.max_epochs=2"]
        monkeypatch.setattr(sys, "argv", ["program", "fit", *small, *arguments])
        return run_command(lambda: cli.train(WithoutOptimizer, MNISTDataModule, [], {}, threads=1), {}, "")

    return run


def test_an_optimizer_and_a_schedule_by_settings(
    run_foreign: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    sgd = ["--optimizer=SGD", "--optimizer.lr=0.1"]
    schedule = ["--lr_scheduler=StepLR", "--lr_scheduler.step_size=1", "--lr_scheduler.gamma=0.5"]
    more = ["--trainer.log_every_n_steps=5", "--monitor=val_loss", "--mode=min"]
    assert run_foreign(*sgd, *schedule, *more) == 0
    assert [point.value for point in events(RUN).Scalars("lr-SGD")] == pytest.approx([0.1, 0.1, 0.05, 0.05])
    assert load(RUN, "best")["global_step"] == 22
    capsys.readouterr()
    for wrong, said in (
        (["--ckpt_path=last", "--optimizer=Adam"], "the optimizer is Adam, but the checkpoint was trained with SGD"),
        (schedule, "lr_scheduler: give --optimizer, too"),
    ):
        assert run_foreign(*wrong) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"mnist_lightning: {said}")
        assert error.count("\n") == 1


def test_what_is_best_is_chosen_by_a_monitor(run_cli: RunCLI) -> None:
    settings = ["--trainer.max_epochs=4", "--model.learning_rate=0.2", "--test_after_fit=false"]
    assert run_cli("fit", *settings) == 0
    assert run_cli("fit", *settings, "--monitor=val/loss", "--mode=min") == 0
    for number, (name, best) in enumerate({"val/acc": max, "val/loss": min}.items()):
        run = RUN.with_name(f"version_{number}")
        curve = [point.value for point in events(run).Scalars(name)]
        assert load(run, "best")["global_step"] == 11 * (1 + curve.index(best(curve)))
    assert load(RUN, "best")["global_step"] != load(run, "best")["global_step"], "the test needs another seed"


PLACES = {
    "default_root_dir": ["--trainer.default_root_dir=there"],
    "CSVLogger": ["--trainer.logger=CSVLogger", "--trainer.logger.save_dir=there"],
    "name": ["--trainer.logger=TensorBoardLogger", "--trainer.logger.save_dir=there", "--trainer.logger.name=mine"],
}


@pytest.mark.parametrize("place", PLACES)
def test_runs_are_looked_for_where_they_are_written(
    run_cli: RunCLI, short_run: Path, capsys: pytest.CaptureFixture[str], place: str
) -> None:
    """And not the run that is here."""
    assert run_cli("fit", *SHORT, *PLACES[place]) == 0
    (best,) = Path("there").glob("*/version_0/checkpoints/best.ckpt")
    capsys.readouterr()
    assert run_cli("test", "--ckpt_path=best", *PLACES[place]) == 0
    assert re.match(rf"Weights of iteration \d+, trained on .*: {best}\n", capsys.readouterr().out)
    assert run_cli("fit", "--ckpt_path=last", "--trainer.max_epochs=3", *PLACES[place]) == 0
    assert f"Resuming {best.with_name('last.ckpt')} after iteration 11" in capsys.readouterr().out


def test_the_users_callbacks_and_loggers_take_the_place_of_ours(run_cli: RunCLI) -> None:
    own = ["--trainer.callbacks+=LearningRateMonitor", "--trainer.callbacks.logging_interval=epoch"]
    own += ["--trainer.callbacks+=TQDMProgressBar"]
    assert run_cli("fit", *SHORT, "--trainer.log_every_n_steps=5", *own) == 0
    assert steps(RUN, "lr-AdamW") == [0]
    assert run_cli("fit", *SHORT, "--trainer.logger=false", "--trainer.enable_checkpointing=false") == 0
    assert not RUN.with_name("version_1").exists()


def test_a_users_checkpoints_are_not_taken_for_the_best(run_cli: RunCLI) -> None:
    ours = ["--trainer.callbacks+=ModelCheckpoint", "--trainer.callbacks.every_n_train_steps=1"]
    assert run_cli("fit", "--trainer.max_epochs=2", *ours, "--trainer.callbacks.dirpath=mine") == 0
    best = max(event.value for event in events(RUN).Scalars("val/acc"))
    assert results(RUN)["val/acc"] == pytest.approx(best)


@pytest.mark.parametrize("is_terminal", [True, False])
def test_there_is_a_progress_bar_on_a_terminal(
    run_cli: RunCLI, monkeypatch: pytest.MonkeyPatch, is_terminal: bool
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: is_terminal)
    monkeypatch.setattr(RichProgressBar, "refresh", drawn := Mock())
    assert run_cli("fit", *SHORT) == 0
    assert drawn.called is is_terminal


def test_what_users_ask_to_be_told_is_told(
    run_cli: RunCLI, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("lightning.pytorch"), "propagate", True)
    asked = ["--trainer.profiler=simple", "--trainer.callbacks=EarlyStopping", "--trainer.callbacks.monitor=val/loss"]
    asked += ["--trainer.callbacks.verbose=true", "--trainer.callbacks+=ModelSummary"]
    caplog.set_level(logging.INFO)
    assert run_cli("fit", *SHORT, *asked) == 0
    assert run_cli("fit", *SHORT, "--trainer.max_epochs=-1", "--trainer.max_time=00:00:00:01") == 0
    told = [record.getMessage() for record in caplog.records if not NOISE.search(record.getMessage())]
    for words in ("FIT Profiler Report", "Metric val/loss improved", "Total params", "Time limit reached"):
        assert any(words in message for message in told), words


@pytest.mark.parametrize("setting", ["trainer.default_root_dir", "trainer.callbacks.dirpath", "data.root"])
@pytest.mark.parametrize("address", ["file:///tmp/there", "s3://bucket/there", "memory://there"])
def test_addresses_are_refused_before_anything_is_made(
    run_cli: RunCLI, tmp_path: Path, capsys: pytest.CaptureFixture[str], setting: str, address: str
) -> None:
    callback = ["--trainer.callbacks+=ModelCheckpoint"] if "callbacks" in setting else []
    assert run_cli("fit", *SHORT, *callback, f"--{setting}={address}") == (1 if setting == "data.root" else 2)
    error = capsys.readouterr().err
    assert "local directory" in error
    assert address.partition(":")[0] in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_machine_without_the_accelerator_says_which_to_give(
    run_cli: RunCLI, short_run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for accelerator in (CUDAAccelerator, MPSAccelerator):
        monkeypatch.setattr(accelerator, "is_available", lambda: False)
    config = short_run / "config.yaml"
    config.write_text(config.read_text().replace("accelerator: cpu", "accelerator: gpu"))  # it was trained on one
    resumed = ["--ckpt_path=last", "--trainer.max_epochs=2"]
    for arguments in (["--trainer.accelerator=gpu"], ["--trainer.accelerator=cuda"], resumed):
        assert run_cli("fit", *arguments) == 2
        line = "mnist_lightning: trainer.accelerator: this machine has no such device; give --trainer.accelerator cpu\n"
        assert capsys.readouterr().err == line
    assert run_cli("fit", *resumed, "--trainer.accelerator=cpu") == 0


@pytest.mark.parametrize("strategy", ["ddp", "ddp_notebook", "auto"])
def test_a_notebook_is_led_to_what_works(
    run_cli: RunCLI, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], strategy: str
) -> None:
    monkeypatch.setattr(accelerator_connector, "_IS_INTERACTIVE", True)
    assert run_cli("fit", *SHORT, "--trainer.devices=2", f"--trainer.strategy={strategy}") == 2
    error = capsys.readouterr().err
    assert "!python -m mnist_lightning fit --trainer.strategy ddp" in error
    assert error.count("\n") == 1


class Manual(MNISTClassifier):
    """Which returns a dictionary of its own, without a loss."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(loss := F.cross_entropy(self(batch[0]), batch[1]))
        optimizer.step()
        return {"mine": loss.detach(), "name": "a text"}


def test_manual_optimization_returns_what_it_likes(run_cli: RunCLI) -> None:
    assert run_cli("fit", *SHORT, "--trainer.log_every_n_steps=1", classes=(Manual,)) == 0
    assert load(RUN, "best")["global_step"] == 11


class TwoLoaders(MNISTDataModule):
    def val_dataloader(self) -> Any:
        return [super().val_dataloader()] * 2


class TakesTwoLoaders(MNISTClassifier):
    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        super().validation_step(batch, batch_idx)


def test_of_several_validation_loaders_one_is_monitored(run_cli: RunCLI, capsys: pytest.CaptureFixture[str]) -> None:
    classes = (TakesTwoLoaders, TwoLoaders)
    assert run_cli("fit", *SHORT, classes=classes) == 0
    assert "There is no best.ckpt: val/acc was not logged; give --monitor one of: " in (out := capsys.readouterr().out)
    assert "val/acc/dataloader_idx_1" in out
    assert not (RUN / "checkpoints/best.ckpt").exists()
    assert run_cli("fit", *SHORT, "--monitor=val/acc/dataloader_idx_1", classes=classes) == 0
    assert load(RUN.with_name("version_1"), "best")["global_step"] == 11
    assert "There is no best.ckpt" not in capsys.readouterr().out
