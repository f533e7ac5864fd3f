"""Runs that die, of a signal, a full disk or a loss that is not finite, and go on as if they had not."""

import json
import os
import random
import resource
import shlex
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from conftest import RunCLI, Start, assert_the_same, everything, newest_run, slow, small, wait_for
from lightning.pytorch.loops.optimization.automatic import _AutomaticOptimization
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from mnist_lightning.classifier import MNISTClassifier
from mnist_lightning.engine.checkpoint_io import CheckpointIO
from mnist_lightning.engine.loop import Trainer
from mnist_lightning.engine.step import QuietStep
from mnist_lightning.engine.tensorboard import RunLogger

Act = Callable[[Trainer], None]


RUNS = {
    "default": [],
    "mid_epoch": ["--checkpoint_every=3", "--trainer.log_every_n_steps=2"],
    "each_iteration_visited": ["--checkpoint_every=1", "--trainer.log_every_n_steps=1"],
    "validation_in_mid_epoch": [
        "--checkpoint_every=3",
        "--trainer.log_every_n_steps=5",
        "--trainer.limit_train_batches=8",
        "--trainer.val_check_interval=4",
    ],
    "validation_in_some_epochs": ["--checkpoint_every=4", "--trainer.check_val_every_n_epoch=2"],
    "validation_across_epochs": [
        "--checkpoint_every=5",
        "--trainer.log_every_n_steps=3",
        "--trainer.val_check_interval=7",
        "--trainer.check_val_every_n_epoch=null",
    ],
    "dropout": ["--checkpoint_every=4", "--trainer.log_every_n_steps=3", "--model.dropout=0.2"],
    "distortions": [
        "--checkpoint_every=3",
        "--data.distortions=true",
        "--model.learning_rate_schedule=one_cycle",
        "--model.weight_decay=0.1",
    ],
    "double_precision": ["--checkpoint_every=4", "--trainer.precision=64-true"],
    "max_steps": ["--checkpoint_every=5", "--trainer.max_steps=EPOCHS0"],
    "moving_average": ["--checkpoint_every=3", "--trainer.callbacks=EMAWeightAveraging"],
    "average_of_epochs": [
        "--checkpoint_every=4",
        "--trainer.callbacks=StochasticWeightAveraging",
        "--trainer.callbacks.swa_lrs=0.01",
        "--trainer.callbacks.swa_epoch_start=2",
    ],
}


QUICK = ["mid_epoch", "validation_in_mid_epoch", "distortions"]


def settings_of(name: str, epochs: int) -> list[str]:
    settings = [setting.replace("EPOCHS", str(epochs)) for setting in RUNS[name]]
    return [f"--trainer.max_epochs={epochs}", "--model.hidden_dim=50", *settings]


# Runs in processes of their own, killed at random moments.


@pytest.mark.parametrize(
    ("name", "epochs", "deaths"),
    [
        pytest.param("mid_epoch", 40, 1, marks=pytest.mark.slow, id="once"),
        *(pytest.param(name, 300, 12, marks=pytest.mark.soak, id=name) for name in RUNS),
    ],
)
def test_a_run_killed_at_random_moments_ends_as_if_it_had_not_been(
    tmp_path: Path, root: Path, start: Start, name: str, epochs: int, deaths: int
) -> None:
    settings = [*small(root), *settings_of(name, epochs)]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    process = start(whole, settings)
    process.join()
    assert process.exitcode == 0, (whole / "output.txt").read_text()

    random_ = random.Random(name)
    died: list[int] = []
    while True:
        resume = ["--ckpt_path=last"] if list(killed.glob("lightning_logs/*/checkpoints/last.ckpt")) else []
        process = start(killed, [*settings, *resume])
        if len(died) < deaths:
            if deaths == 1:  # once it has something to resume
                wait_for(killed, "lightning_logs/*/checkpoints/last.ckpt")
                process.join(random_.uniform(0, 0.3))
            else:  # uniform over the start, where nothing is saved yet, and over training
                process.join(random_.uniform(0.3, 3))
            signum = random_.choice([signal.SIGKILL] * 4 + [signal.SIGTERM, signal.SIGINT])
            if process.is_alive() and process.pid:
                os.kill(process.pid, signum)
        process.join()
        output = (killed / "output.txt").read_text()
        if process.exitcode == 0:
            break
        assert process.exitcode in (-signal.SIGKILL, 128 + signal.SIGTERM, 128 + signal.SIGINT), output
        assert "Traceback" not in output
        died.append(process.exitcode)
    assert died, "it was done before it could be killed"
    assert resume
    print(f"{name}: killed {died.count(-signal.SIGKILL)} times, stopped {len(died) - died.count(-signal.SIGKILL)}")
    assert_the_same(newest_run(whole), newest_run(killed))


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_training_with_the_command_that_resumes_it(
    tmp_path: Path, root: Path, start: Start, signum: signal.Signals
) -> None:
    process = start(tmp_path, [*small(root), "--trainer.max_epochs=10000"])
    wait_for(tmp_path, "lightning_logs/*/checkpoints/best.ckpt")
    assert process.pid
    os.kill(process.pid, signum)
    process.join()
    *_, said, command = (tmp_path / "output.txt").read_text().splitlines()
    assert process.exitcode == 128 + signum
    checkpoint = torch.load(tmp_path / "lightning_logs/version_0/checkpoints/last.ckpt", weights_only=True)
    assert said == f"Stopped and saved at iteration {checkpoint['global_step']:,}; to go on:"

    more = ["--trainer.max_epochs", str(checkpoint["epoch"] + 2)]
    process = start(tmp_path, shlex.split(command)[3:] + more)
    process.join()
    output = (tmp_path / "output.txt").read_text()
    assert process.exitcode == 0, output
    run = "lightning_logs/version_0"
    resumes = f"Resuming {run}/checkpoints/last.ckpt after iteration {checkpoint['global_step']:,}"
    assert output.splitlines()[1] == resumes


def test_the_reader_of_the_console_may_die_first(tmp_path: Path, root: Path, start: Start) -> None:
    os.mkfifo(tmp_path / "output.txt")
    process = start(tmp_path, [*small(root), "--trainer.max_epochs=2", "--trainer.log_every_n_steps=1"])
    os.close(os.open(tmp_path / "output.txt", os.O_RDONLY))
    process.join()
    assert process.exitcode == 0
    assert json.loads((tmp_path / "lightning_logs/version_0/results.json").read_text())["iterations"] == 22


def test_two_processes_do_not_resume_one_run(tmp_path: Path, root: Path, start: Start) -> None:
    first = start(tmp_path, [*small(root), "--trainer.max_epochs=10000"])
    wait_for(tmp_path, "lightning_logs/*/checkpoints/best.ckpt")
    run = tmp_path / "lightning_logs/version_0"
    config = (run / "config.yaml").read_text()
    files = sorted(path.name for path in run.iterdir())
    second = start(tmp_path, [*small(root), "--ckpt_path=last", "--trainer.max_epochs=7"])
    second.join(60)
    assert second.exitcode == 2
    assert "another process is training in" in (tmp_path / "output.txt").read_text()
    assert first.is_alive()
    assert (run / "config.yaml").read_text() == config
    added = {path.name for path in run.iterdir()} - set(files)
    assert all(len(EventAccumulator(str(run / name)).Reload().Tags()["scalars"]) == 0 for name in added)


class Slow(pl.Callback):
    """An iteration takes a minute."""

    def on_train_batch_start(self, *_: Any) -> None:
        time.sleep(60)


def test_a_second_ctrl_c_stops_at_once(tmp_path: Path, root: Path, start: Start) -> None:
    process = start(tmp_path, [*small(root), "--trainer.callbacks=test_crashes.Slow"])
    wait_for(tmp_path, "lightning_logs/*/checkpoints/last.ckpt")
    time.sleep(1)
    assert process.pid
    started = time.monotonic()
    os.kill(process.pid, signal.SIGINT)
    while "a second signal stops at once" not in (tmp_path / "output.txt").read_text():  # two signals at once are one
        time.sleep(0.05)
    assert process.is_alive()
    os.kill(process.pid, signal.SIGINT)
    process.join()
    assert time.monotonic() - started < 30
    assert process.exitcode == 130
    assert (tmp_path / "output.txt").read_text().splitlines()[-1] == "mnist_lightning: interrupted"
    checkpoint = torch.load(tmp_path / "lightning_logs/version_0/checkpoints/last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 0


# Runs in this process, ended where a test wants it.


@contextmanager
def at_iteration(iteration: int, act: Act) -> Iterator[list[bool]]:
    """Call `act` before an iteration of the runs in this process; yields whether each iteration was a quiet one."""
    quiet: list[bool] = []
    visit, step = _AutomaticOptimization.run, QuietStep.__call__

    def visited(self: _AutomaticOptimization, *args: Any) -> Any:
        before(self.trainer, is_quiet=False)
        return visit(self, *args)

    def quietly(self: QuietStep, *args: Any) -> Tensor | None:
        before(self.trainer, is_quiet=True)
        return step(self, *args)

    def before(trainer: Any, is_quiet: bool) -> None:
        quiet.append(is_quiet)
        if trainer.global_step + 1 == iteration:
            act(trainer)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_AutomaticOptimization, "run", visited)
        patch.setattr(QuietStep, "__call__", quietly)
        yield quiet


def stop(_: Trainer) -> None:
    signal.raise_signal(signal.SIGTERM)


def iteration_of(run: Path, name: str = "last") -> int:
    iteration: int = torch.load(run / "checkpoints" / f"{name}.ckpt", weights_only=True)["global_step"]
    return iteration


@pytest.mark.parametrize("name", [name if name in QUICK else slow(name) for name in RUNS])
def test_a_run_stopped_again_and_again_goes_on_exactly(run_cli: RunCLI, tmp_path: Path, name: str) -> None:
    settings = [*settings_of(name, 4), "--test_after_fit=false"]
    assert run_cli("fit", *settings) == 0
    run, resume = tmp_path / "lightning_logs/version_1", list[str]()
    for iteration in (3, 11, 12, 30):
        if resume and iteration_of(run) >= iteration:
            continue  # a signal in a quiet iteration is heeded after the next one
        with at_iteration(iteration, stop):
            assert run_cli("fit", *settings, *resume) == 128 + signal.SIGTERM, iteration
        assert iteration_of(run) in (iteration, iteration + 1)
        resume = ["--ckpt_path=last"]
    assert run_cli("fit", *settings, *resume) == 0
    assert_the_same(tmp_path / "lightning_logs/version_0", run)


@pytest.mark.slow
def test_all_iterations_of_two_epochs_can_be_the_one_that_a_run_is_stopped_in(run_cli: RunCLI, tmp_path: Path) -> None:
    settings = ["--trainer.max_epochs=3", "--model.hidden_dim=20", "--test_after_fit=false", "--model.dropout=0.2"]
    settings += ["--trainer.log_every_n_steps=4", "--trainer.val_check_interval=8"]
    assert run_cli("fit", *settings) == 0
    runs = tmp_path / "lightning_logs"
    kinds = set()
    for first in range(1, 12):
        run, resume, done = runs / f"version_{first}", list[str](), 0
        for iteration in (first, first + 11):
            with at_iteration(iteration, stop) as quiet:
                assert run_cli("fit", *settings, *resume) == 128 + signal.SIGTERM, iteration
            was_quiet = quiet[iteration - 1 - done]
            done = iteration_of(run)
            assert done == iteration + was_quiet, iteration
            kinds.add(was_quiet)
            resume = ["--ckpt_path=last"]
        assert run_cli("fit", *settings, *resume) == 0, first
        assert_the_same(runs / "version_0", run)
    assert kinds == {True, False}


@pytest.mark.parametrize("iteration", [21, 22])
def test_a_run_stopped_in_its_last_iterations_is_done(
    run_cli: RunCLI, tmp_path: Path, capsys: pytest.CaptureFixture[str], iteration: int
) -> None:
    settings = ["--trainer.max_epochs=2", "--model.hidden_dim=20"]
    assert run_cli("fit", *settings) == 0
    with at_iteration(iteration, stop):
        assert run_cli("fit", *settings) == 128 + signal.SIGTERM
    capsys.readouterr()
    assert run_cli("fit", *settings, "--ckpt_path=last") == 0
    assert capsys.readouterr().out.startswith("This run is done, at iteration 22; ")
    assert_the_same(tmp_path / "lightning_logs/version_0", tmp_path / "lightning_logs/version_1")


def test_a_signal_is_heeded_in_a_quiet_iteration_of_a_long_epoch(run_cli: RunCLI, tmp_path: Path) -> None:
    settings = ["--data.batch_size=1", "--model.hidden_dim=5", "--trainer.log_every_n_steps=0"]
    for number, iteration in enumerate((2, 150, 151, 637)):
        with at_iteration(iteration, stop) as quiet:
            assert run_cli("fit", *settings) == 128 + signal.SIGTERM
        assert quiet[iteration - 1], iteration
        assert len(quiet) == iteration_of(tmp_path / f"lightning_logs/version_{number}") == iteration + 1


def test_a_second_signal_stops_at_once_within_a_quiet_iteration(
    run_cli: RunCLI, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = ["--trainer.max_epochs=2", "--model.hidden_dim=20", "--test_after_fit=false"]
    assert run_cli("fit", *settings) == 0

    def stop_twice(trainer: Trainer) -> None:
        stop(trainer)
        stop(trainer)
        pytest.fail("it went on after a second signal")

    with at_iteration(15, stop_twice) as quiet:
        assert run_cli("fit", *settings) == 128 + signal.SIGTERM
    assert quiet[-1]
    assert len(quiet) == 15
    assert "Stopped and saved" not in capsys.readouterr().out
    assert iteration_of(tmp_path / "lightning_logs/version_1") == 11
    assert run_cli("fit", *settings, "--ckpt_path=last") == 0
    assert_the_same(tmp_path / "lightning_logs/version_0", tmp_path / "lightning_logs/version_1")


@pytest.mark.parametrize("name", ["validation_in_mid_epoch", *map(slow, ["default", "mid_epoch", "dropout"])])
def test_a_run_that_max_steps_ended_in_mid_epoch_goes_on_exactly(run_cli: RunCLI, tmp_path: Path, name: str) -> None:
    settings = [*settings_of(name, 4), "--test_after_fit=false"]
    assert run_cli("fit", *settings) == 0
    for end in (4, 6, 8, 17, 22, 24, 27):
        assert run_cli("fit", *settings, f"--trainer.max_steps={end}") == 0
        assert iteration_of(tmp_path / "lightning_logs/version_1") == end
        settings = ["--ckpt_path=last"]  # its settings are in config.yaml
    assert run_cli("fit", "--ckpt_path=last", "--trainer.max_steps=-1") == 0
    assert_the_same(tmp_path / "lightning_logs/version_0", tmp_path / "lightning_logs/version_1")


def test_a_schedule_goes_on_by_the_iteration_whatever_else_a_checkpoint_says_of_it(
    run_cli: RunCLI, tmp_path: Path
) -> None:
    settings = [*settings_of("distortions", 4), "--test_after_fit=false"]
    assert run_cli("fit", *settings) == 0
    with at_iteration(12, stop):
        assert run_cli("fit", *settings) == 128 + signal.SIGTERM
    path = tmp_path / "lightning_logs/version_1/checkpoints/last.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    (schedule,) = checkpoint["lr_schedulers"]
    schedule |= {"last_epoch": 0, "step": 5, "_schedule_phases": []}
    torch.save(checkpoint, path)
    assert run_cli("fit", *settings, "--ckpt_path=last") == 0
    assert_the_same(tmp_path / "lightning_logs/version_0", tmp_path / "lightning_logs/version_1")


def test_a_run_stopped_in_the_last_iteration_of_an_epoch_still_ends_the_epoch(
    run_cli: RunCLI, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended = []
    monkeypatch.setattr(MNISTClassifier, "on_train_epoch_end", lambda self: ended.append(self.current_epoch))
    settings = ["--trainer.max_epochs=3", "--trainer.limit_val_batches=0", "--test_after_fit=false"]
    with at_iteration(11, stop):
        assert run_cli("fit", *settings) == 128 + signal.SIGTERM
    assert run_cli("fit", *settings, "--ckpt_path=last") == 0
    assert ended == [0, 1, 2]


def test_checkpoint_every_saves_at_multiples(run_cli: RunCLI, monkeypatch: pytest.MonkeyPatch) -> None:
    saved = []
    save = CheckpointIO.save_checkpoint

    def record(self: CheckpointIO, checkpoint: dict[str, Any], path: Path, storage_options: Any) -> None:
        saved.append((Path(path).name, checkpoint["global_step"]))
        save(self, checkpoint, path, storage_options)

    monkeypatch.setattr(CheckpointIO, "save_checkpoint", record)
    settings = ["--trainer.max_epochs=2", "--test_after_fit=false"]
    assert run_cli("fit", *settings, "--checkpoint_every=5") == 0
    assert [iteration for name, iteration in saved if name == "last.ckpt"] == [0, 5, 10, 11, 15, 20, 22]
    saved.clear()
    assert run_cli("fit", *settings) == 0
    assert [iteration for name, iteration in saved if name == "last.ckpt"] == [0, 11, 22]


def test_resuming_takes_back_what_was_logged_after_the_checkpoint(run_cli: RunCLI, tmp_path: Path) -> None:
    settings = ["--trainer.log_every_n_steps=2"]
    assert run_cli("fit", *settings, "--trainer.max_epochs=4") == 0
    assert run_cli("fit", *settings, "--trainer.max_epochs=1") == 0
    whole, crashed = (tmp_path / "lightning_logs" / f"version_{i}" for i in (0, 1))
    shutil.copy(crashed / "checkpoints/last.ckpt", "old.ckpt")
    assert run_cli("fit", *settings, "--trainer.max_epochs=3", "--ckpt_path=last") == 0
    shutil.copy("old.ckpt", crashed / "checkpoints/last.ckpt")
    assert run_cli("fit", *settings, "--trainer.max_epochs=4", "--ckpt_path=last") == 0
    expected, found = everything(whole), everything(crashed)
    for tag in ("train/loss", "train/acc", "val/loss", "val/acc"):
        assert found[tag] == expected[tag]


def test_a_refused_resume_leaves_the_run_as_it_was(run_cli: RunCLI, tmp_path: Path) -> None:
    assert run_cli("fit", "--trainer.max_epochs=3", "--trainer.log_every_n_steps=2") == 0
    run = tmp_path / "lightning_logs/version_0"
    before = everything(run), (run / "config.yaml").read_text()
    for setting in (
        "--data.batch_size=50",
        "--data.val_size=300",
        "--data.distortions=true",
        "--trainer.limit_train_batches=5",
    ):
        assert run_cli("fit", "--ckpt_path=last", "--trainer.max_epochs=4", setting) == 2
        assert (everything(run), (run / "config.yaml").read_text()) == before


def test_a_resumed_run_keeps_its_settings(run_cli: RunCLI, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = ["--model.learning_rate=0.01", "--data.batch_size=70", "--test_after_fit=false"]
    assert run_cli("fit", "--trainer.max_epochs=4", *settings) == 0
    assert run_cli("fit", "--trainer.max_epochs=2", *settings) == 0
    assert run_cli("fit", "--trainer.max_epochs=4", "--ckpt_path=last") == 0
    assert_the_same(tmp_path / "lightning_logs/version_0", tmp_path / "lightning_logs/version_1")
    capsys.readouterr()
    assert run_cli("fit", "--trainer.max_epochs=5", "--ckpt_path=last", "--model.learning_rate=0.001") == 2
    assert "the checkpoint was trained with 0.01" in capsys.readouterr().err


def test_last_means_the_newest_run_though_it_died_before_its_first_epoch(run_cli: RunCLI, tmp_path: Path) -> None:
    assert run_cli("fit", "--trainer.max_epochs=2") == 0

    def die(_: Trainer) -> None:
        raise RuntimeError("died")

    with at_iteration(3, die):
        assert run_cli("fit", "--trainer.max_epochs=2") == 1
    assert run_cli("fit", "--ckpt_path=last") == 0
    assert_the_same(tmp_path / "lightning_logs/version_0", tmp_path / "lightning_logs/version_1")


def test_the_best_stays_the_best_however_the_runs_directory_is_spelled(run_cli: RunCLI, tmp_path: Path) -> None:
    rate = "--model.learning_rate=0.2"  # so high that the first epochs are the best
    assert run_cli("fit", "--trainer.max_epochs=6", rate) == 0
    run = tmp_path / "lightning_logs/version_0"
    best = (run / "checkpoints/best.ckpt").read_bytes()
    accuracies = [value for _, value in everything(run)["val/acc"]]
    assert max(accuracies) == max(accuracies[:3])
    settings = ["--trainer.max_epochs=7", f"--trainer.default_root_dir={tmp_path}"]
    assert run_cli("fit", "--ckpt_path=last", *settings) == 0
    assert everything(run)["val/acc"][-1][1] < max(accuracies)
    assert (run / "checkpoints/best.ckpt").read_bytes() == best


def test_curves_are_on_disk_before_the_checkpoint(
    run_cli: RunCLI, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    save = CheckpointIO.save_checkpoint

    def look(self: CheckpointIO, checkpoint: dict[str, Any], path: Path, storage_options: Any) -> None:
        if not checkpoint["global_step"]:
            return save(self, checkpoint, path, storage_options)
        events = EventAccumulator(str(newest_run(tmp_path))).Reload()
        seen.append((checkpoint["global_step"], *(events.Scalars(tag)[-1].step for tag in ("train/loss", "val/loss"))))
        save(self, checkpoint, path, storage_options)

    monkeypatch.setattr(CheckpointIO, "save_checkpoint", look)
    assert run_cli("fit", "--trainer.max_epochs=2", "--trainer.log_every_n_steps=1", "--test_after_fit=false") == 0
    assert set(seen) == {(11, 10, 10), (22, 21, 21)}


def test_resuming_a_run_that_is_done_says_how_to_train_longer(
    run_cli: RunCLI, capsys: pytest.CaptureFixture[str]
) -> None:
    for setting in ("max_epochs=2", "max_steps=11"):
        assert run_cli("fit", f"--trainer.{setting}", "--test_after_fit=false") == 0
        capsys.readouterr()
        assert run_cli("fit", "--ckpt_path=last", "--test_after_fit=true") == 0
        out = capsys.readouterr().out
        assert "This run is done" in out.splitlines()[0]
        assert f"--trainer.{setting.split('=')[0]}" in out.splitlines()[0]
        assert "Training on" not in out
        assert "Test loss" in out


def make_losses(value: float) -> Act:
    """Break the network so that its losses are `value` from here on; an infinite one leaves all gradients finite."""

    def act(trainer: Trainer) -> None:
        module = trainer.lightning_module
        assert isinstance(module, MNISTClassifier)
        module.mlp.output.bias.data[3] = -value

    return act


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(("iteration", "is_quiet"), [(15, True), (12, False)])
def test_a_loss_that_is_not_finite_ends_the_run_and_leaves_the_best(
    run_cli: RunCLI, tmp_path: Path, capsys: pytest.CaptureFixture[str], value: float, iteration: int, is_quiet: bool
) -> None:
    with at_iteration(iteration, make_losses(value)) as quiet:
        assert run_cli("fit", "--trainer.max_epochs=5") == 1
    assert quiet[iteration - 1] == is_quiet
    err = capsys.readouterr().err
    assert err.startswith(f"mnist_lightning: the loss is {value} at iteration {iteration};")
    assert err.count("\n") == 1
    assert iteration_of(tmp_path / "lightning_logs/version_0", "best") == 11
    assert run_cli("test", "--ckpt_path=best") == 0


def test_a_loss_that_is_not_finite_is_noticed_within_a_hundred_iterations(
    run_cli: RunCLI, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = ["--data.batch_size=1", "--model.hidden_dim=5", "--trainer.log_every_n_steps=0"]
    with at_iteration(150, make_losses(float("nan"))) as quiet:
        assert run_cli("fit", *settings) == 1
    assert 150 <= len(quiet) <= 250
    assert "the loss is nan at iteration 150;" in capsys.readouterr().err


def test_weights_that_stop_being_finite_in_the_last_step_never_become_the_best(
    run_cli: RunCLI, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def break_weights(self: MNISTClassifier) -> None:
        self.mlp.output.bias.data.fill_(float("nan"))

    monkeypatch.setattr(MNISTClassifier, "on_validation_start", break_weights, raising=False)
    assert run_cli("fit", "--trainer.max_epochs=1") == 1
    assert "weights are not finite after iteration 11" in capsys.readouterr().err
    assert not list(tmp_path.glob("lightning_logs/*/checkpoints/best.ckpt"))


def test_a_full_disk_leaves_the_previous_checkpoints_whole(
    run_cli: RunCLI, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_cli("fit", "--trainer.max_epochs=1", "--test_after_fit=false") == 0
    checkpoints = tmp_path / "lightning_logs/version_0/checkpoints"
    before = {path.name: path.read_bytes() for path in checkpoints.iterdir()}
    capsys.readouterr()
    # The kernel refuses to let a file grow beyond the limit; a checkpoint takes almost twice as much.
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, limits[1]))
        assert run_cli("fit", "--trainer.max_epochs=2", "--ckpt_path=last") == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, ignored)
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "best.ckpt cannot be saved: File too large" in err
    assert {path.name: path.read_bytes() for path in checkpoints.iterdir()} == before
    assert run_cli("fit", "--trainer.max_epochs=2", "--ckpt_path=last") == 0


def test_a_checkpoint_is_synced_before_it_replaces_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = []
    monkeypatch.setattr(os, "fsync", lambda file: done.append(("sync", os.fstat(file).st_size)))
    replace = Path.replace

    def record(path: Path, target: Path) -> Path:
        done.append(("replace", path.stat().st_size))
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", record)
    CheckpointIO(MNISTClassifier).save_checkpoint({"weights": torch.zeros(1000)}, tmp_path / "new" / "last.ckpt")
    size = (tmp_path / "new/last.ckpt").stat().st_size
    assert done == [("sync", size), ("replace", size)]
    assert len(list((tmp_path / "new").iterdir())) == 1


def test_runs_that_start_at_once_get_directories_of_their_own(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        loggers = [RunLogger(tmp_path) for _ in range(8)]
        assert {logger.version for logger in loggers} == {0}  # Lightning asks long before the first use
        directories = list(pool.map(lambda logger: Path(logger.experiment.log_dir).name, loggers))
    assert sorted(directories) == [f"version_{i}" for i in range(8)]
