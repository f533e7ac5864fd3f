"""`accelerator="gpu"`: on a GPU, or on the simulated one that `pytest -p sim` loads; skipped where there is neither.

What is to be the same is compared in float64: a GPU rounds otherwise than a CPU, the simulated one does not.
"""

import contextlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from conftest import SILENT, RunCLI, assert_the_same, load, newest_run, results
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor

from mnist_lightning import MNISTClassifier, MNISTDataModule, Trainer
from mnist_lightning.classifier import Batch
from mnist_lightning.engine.checkpoints import BestAndLast
from mnist_lightning.engine.checks import FiniteLosses
from mnist_lightning.engine.console import JobError
from mnist_lightning.engine.loop import EpochLoop
from mnist_lightning.engine.report import Report

SIM: Any = sys.modules.get("sim")
KIND = "sim" if SIM else "cuda"
NOTHING = SILENT | {"enable_checkpointing": False, "num_sanity_val_steps": 0}
GPU = "--trainer.accelerator=gpu"
LAUNCHES_AND_WAITS = {
    "without hooks, 5": (30, 0),
    # Logged, with the command's callbacks: Lightning waits 6 times, Report 4, the learning rate 3, FiniteLosses once.
    "mnist_lightning, 5": (40, 14),
    "lightning, 4": (35, 2),
    "lightning, 5": (35, 6),  # logged, without callbacks
}

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not SIM and not torch.cuda.is_available(),
        reason="there is no GPU, and no simulated one; `.ci/run` shows how to load that",
    ),
]


@pytest.fixture(autouse=True, scope="module")
def _gpu_is_simulated() -> None:
    if SIM:
        SIM.use_in_lightning()


def fit(
    data: MNISTDataModule, accelerator: str, trainer_class: Any = Trainer, module: Any = None, **settings: Any
) -> pl.Trainer:
    torch.manual_seed(0)
    trainer: pl.Trainer = trainer_class(
        accelerator=accelerator, devices=1, **NOTHING | {"max_epochs": 2, "precision": "64-true"} | settings
    )
    trainer.fit(module or MNISTClassifier(), datamodule=data)
    return trainer


def weights(trainer: pl.Trainer) -> dict[str, Tensor]:
    return dict(trainer.lightning_module.cpu().named_parameters())


def assert_alike(run: Path, other: Path) -> None:
    torch.testing.assert_close(load(run)["state_dict"], load(other)["state_dict"], check_device=False)


@contextlib.contextmanager
def no_wait() -> Iterator[None]:
    """Has whatever lets the host wait for the device raise."""
    forbid = SIM.C.forbid if SIM else torch.cuda.set_sync_debug_mode
    forbid("a test forbids it" if SIM else "error")
    try:
        yield
    finally:
        forbid("" if SIM else "default")


# Weights


def test_weights_are_the_cpus(data: MNISTDataModule) -> None:
    on_gpu, on_cpu = fit(data, "gpu"), fit(data, "cpu")
    torch.testing.assert_close(weights(on_gpu), weights(on_cpu), rtol=0 if SIM else None, atol=0 if SIM else None)


@pytest.mark.parametrize("clip", [None, 0.1])
@pytest.mark.parametrize("accelerator", ["gpu", "cpu"])
def test_halves_with_a_scaler(accelerator: str, clip: float | None, data: MNISTDataModule) -> None:
    device, begins_at = KIND if accelerator == "gpu" else "cpu", 2.0**40

    def train(trainer_class: Any) -> pl.Trainer:
        scaler = torch.amp.GradScaler(device, init_scale=begins_at, backoff_factor=2.0**-10)
        plugins = [MixedPrecision("16-mixed", device, scaler)]
        return fit(data, accelerator, trainer_class, precision=None, plugins=plugins, gradient_clip_val=clip)

    ours, lightnings = train(Trainer), train(pl.Trainer)
    for scale in (trainer.precision_plugin.scaler.get_scale() for trainer in (ours, lightnings)):  # type: ignore[attr-defined]
        # The simulated GPU has no autocast, and float32 does not overflow.
        assert scale < begins_at or device == "sim"
    torch.testing.assert_close(weights(ours), weights(lightnings), rtol=0, atol=0)


# Batches


def test_batches_are_where_the_network_is(data: MNISTDataModule) -> None:
    on_gpu = fit(data, "gpu", max_steps=1)
    for trainer in (on_gpu, fit(data, "cpu", max_steps=1, module=on_gpu.lightning_module), on_gpu):
        module = trainer.lightning_module
        trainer.validate(module, datamodule=data, verbose=False)
        for loader in (data.train_dataloader(), data.val_dataloader()):
            assert module.float()(next(iter(loader))[0]).device.type == "cpu"


def test_a_split_that_does_not_fit(data: MNISTDataModule, monkeypatch: pytest.MonkeyPatch) -> None:
    to = Tensor.to

    def full(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if args and isinstance(args[0], torch.device) and args[0].type == KIND and self.dtype == torch.uint8:
            raise torch.OutOfMemoryError
        return to(self, *args, **kwargs)

    monkeypatch.setattr(Tensor, "to", full)
    with pytest.raises(JobError, match=rf"{KIND}:0 has no room for a split of 0\.00 GB, .*; give --trainer\.acc"):
        fit(data, "gpu")


# Waits


class LeavesAnIndexOnTheCPU(MNISTClassifier):
    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        images, labels = batch
        return super().training_step((images.index_select(0, torch.arange(len(images))), labels), batch_idx)


class Waits(MNISTClassifier):
    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        loss.item()
        return loss


FAULTS = {LeavesAnIndexOnTheCPU: "same device|on CPU|is on cpu", Waits: "host would wait|synchronizing"}


@pytest.mark.parametrize("module_class", [MNISTClassifier, *FAULTS])
def test_no_wait_without_hooks(module_class: Any, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, counts = EpochLoop._run_without_hooks, []

    def guarded(self: EpochLoop, fetcher: Any) -> bool:
        before = self.global_step
        with no_wait():
            stops = run(self, fetcher)
        counts.append(self.global_step - before)
        return stops

    monkeypatch.setattr(EpochLoop, "_run_without_hooks", guarded)
    data = MNISTDataModule("synthetic", str(root), batch_size=2, val_size=200)
    settings = {"max_epochs": 1, "log_every_n_steps": 600, "limit_val_batches": 0}
    error = FAULTS.get(module_class)
    with pytest.raises(RuntimeError, match=error) if error else contextlib.nullcontext():
        fit(data, "gpu", module=module_class(), **settings)
    assert error or sum(counts) > 500


@pytest.mark.skipif(not SIM, reason="only the simulated GPU counts")
def test_waits_and_launches_of_an_iteration(
    data: MNISTDataModule, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done, run = _TrainingEpochLoop.on_iteration_done, EpochLoop._run_without_hooks
    commands = [FiniteLosses(), Report(), LearningRateMonitor("step"), BestAndLast()]
    counts: dict[str, tuple[int, int]] = {}

    def count(name: str, iterations: int = 1) -> None:
        launches, waits = (sum(counted().values()) for counted in (SIM.C.kernels, SIM.C.waits))
        counts[name] = launches // iterations, waits
        SIM.C.reset()

    def on_iteration_done(self: Any) -> None:
        done(self)
        count(f"{type(self.trainer).__module__.split('.')[0]}, {self.global_step}")

    def run_without_hooks(self: EpochLoop, fetcher: Any) -> bool:
        before = self.global_step
        stops = run(self, fetcher)
        if iterations := self.global_step - before:
            count(f"without hooks, {before}", iterations)
        return stops

    monkeypatch.setattr(_TrainingEpochLoop, "on_iteration_done", on_iteration_done)
    monkeypatch.setattr(EpochLoop, "_run_without_hooks", run_without_hooks)
    settings: dict[str, Any] = {"precision": None, "max_epochs": 1, "log_every_n_steps": 5}
    for trainer_class, callbacks in {Trainer: commands, pl.Trainer: []}.items():
        settings |= {"enable_checkpointing": None, "logger": TensorBoardLogger(tmp_path), "callbacks": callbacks}
        fit(data, "gpu", trainer_class, **settings)
    assert {name: counts[name] for name in LAUNCHES_AND_WAITS} == LAUNCHES_AND_WAITS


# Commands


def test_one_flag(run_cli: RunCLI, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    clipped = ("--trainer.precision=16-mixed", "--trainer.gradient_clip_val=1")
    assert run_cli("fit", GPU, *clipped, "--trainer.max_epochs=1") == 0
    assert run_cli("fit", "--ckpt_path=last", "--trainer.max_epochs=2") == 0
    assert run_cli("test", GPU, "--ckpt_path=last") == 0
    output = capsys.readouterr().out
    assert f"159,010 parameters on {KIND}:0, seed 0" in output
    assert "Resuming" in output
    run, tested = sorted((tmp_path / "lightning_logs").iterdir())
    assert results(run).items() >= {"device": KIND, "precision": "16-mixed", "processes": 1, "iterations": 22}.items()
    assert results(tested)["device"] == KIND
    assert run_cli("fit", GPU, "--trainer.precision=16-true") == 1
    assert "half precision is too coarse for Adam: give trainer.precision 16-mixed or" in capsys.readouterr().err


def test_resuming_is_exact_with_dropout(run_cli: RunCLI, tmp_path: Path) -> None:
    arguments = (GPU, "--model.dropout=0.5", "--trainer.max_epochs=3", "--trainer.log_every_n_steps=3")
    assert run_cli("fit", *arguments) == 0
    whole = newest_run(tmp_path)
    assert run_cli("fit", *arguments, "--trainer.max_steps=16", "--test_after_fit=false") == 0
    assert run_cli("fit", "--ckpt_path=last", "--trainer.max_steps=-1", "--test_after_fit=true") == 0
    assert_the_same(whole, newest_run(tmp_path))


def test_a_checkpoint_goes_from_device_to_device(run_cli: RunCLI, tmp_path: Path) -> None:
    assert run_cli("fit", "--trainer.max_epochs=3", "--trainer.precision=64-true") == 0
    whole = newest_run(tmp_path)
    assert run_cli("fit", GPU, "--trainer.max_epochs=1", "--trainer.precision=64-true") == 0
    for epochs, accelerator in ((2, "cpu"), (3, "gpu")):
        arguments = (f"--trainer.accelerator={accelerator}", f"--trainer.max_epochs={epochs}")
        assert run_cli("fit", "--ckpt_path=last", *arguments) == 0
        assert results(newest_run(tmp_path))["device"] == ("cpu" if accelerator == "cpu" else KIND)
    assert_alike(newest_run(tmp_path), whole)


UNNAMED = SIM and torch.__version__ >= "2.15"


@pytest.mark.skipif(not SIM and torch.cuda.device_count() < 2, reason="there is one GPU")
@pytest.mark.skipif(UNNAMED, reason="PyTorch 2.15 asks the simulated group of processes for a name")
def test_two_devices(run_cli: RunCLI, root: Path, tmp_path: Path) -> None:
    arguments = ["fit", GPU, "--data.dataset=files", f"--data.root={root / 'synthetic' / 'raw'}", "--data.val_size=200"]
    arguments += ["--trainer.max_epochs=1", "--trainer.precision=64-true"]
    assert run_cli(*arguments, data=False) == 0
    program = [str(Path(SIM.__file__).parent / "fit.py")] if SIM else ["-m", "mnist_lightning"]
    command = [sys.executable, *program, *arguments, "--trainer.strategy", "ddp", "--trainer.devices", "2"]
    subprocess.run(command, check=True, timeout=200)
    one, two = sorted((tmp_path / "lightning_logs").iterdir())
    assert results(two).items() >= {"device": KIND, "processes": 2}.items()
    assert_alike(two, one)
    for name in ("val/loss", "val/acc", "test/loss", "test/acc"):
        assert results(two)[name] == pytest.approx(results(one)[name], abs=1e-5)
