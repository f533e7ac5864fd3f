"""Whole runs that are killed, stopped or disturbed, and end as if they had not been."""

import errno
import os
import random
import shlex
import signal
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
from conftest import RUN, RunCLI, Start, assert_the_same, events, load, newest_run, slow, small, wait_for
from engine.test_checkpoints import at_iteration, stop

from mnist_lightning import MNISTClassifier
from mnist_lightning.engine.data import DeviceLoader

OTHER = RUN.with_name("version_1")

WITHIN = ["--trainer.limit_train_batches=8", "--trainer.val_check_interval=4"]
ACROSS = ["--trainer.val_check_interval=7", "--trainer.check_val_every_n_epoch=null"]
RUNS = {
    "default": [],
    "mid_epoch": ["--checkpoint_every=3", "--trainer.log_every_n_steps=2"],
    "hooks_in_each_iteration": ["--checkpoint_every=1", "--trainer.log_every_n_steps=1"],
    "validation_within_epochs": ["--checkpoint_every=3", "--trainer.log_every_n_steps=5", *WITHIN],
    "validation_across_epochs": ["--checkpoint_every=5", "--trainer.log_every_n_steps=3", *ACROSS],
    "validation_in_some_epochs": ["--checkpoint_every=4", "--trainer.check_val_every_n_epoch=2"],
    "fused": ["--checkpoint_every=4", "--model.fused=true", "--model.weight_decay=0.1"],
    "dropout": ["--checkpoint_every=4", "--trainer.log_every_n_steps=3", "--model.dropout=0.2"],
    "distortions": ["--checkpoint_every=3", "--data.distortions=true", "--model.learning_rate_schedule=one_cycle"],
    "double_precision": ["--checkpoint_every=4", "--trainer.precision=64-true"],
    "max_steps": ["--checkpoint_every=5", "--trainer.max_steps=EPOCHS0"],
    "accumulation": ["--checkpoint_every=2", "--trainer.accumulate_grad_batches=3"],
    "moving_average": ["--checkpoint_every=3", "--trainer.callbacks=EMAWeightAveraging"],
}
QUICK = ["validation_within_epochs", "accumulation", "distortions"]


def settings_of(name: str, epochs: int) -> list[str]:
    settings = [setting.replace("EPOCHS", str(epochs)) for setting in RUNS[name]]
    return [f"--trainer.max_epochs={epochs}", "--model.hidden_dim=50", *settings]


# In processes of their own


@pytest.mark.parametrize(
    ("name", "epochs", "deaths"),
    [
        pytest.param("mid_epoch", 40, 1, marks=pytest.mark.slow, id="once"),
        *(pytest.param(name, 300, 12, marks=pytest.mark.soak, id=name) for name in RUNS),
    ],
)
def test_killed_at_random_moments(
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
        # Before training a signal does what it does to any program.
        ends = (-signal.SIGKILL, -signal.SIGTERM, 128 + signal.SIGTERM, 128 + signal.SIGINT)
        assert process.exitcode in ends, output
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
    os.kill(process.pid or 0, signum)
    process.join()
    *_, said, command = (tmp_path / "output.txt").read_text().splitlines()
    assert process.exitcode == 128 + signum
    checkpoint = load(tmp_path / RUN)
    assert said == f"Stopped and saved at iteration {checkpoint['global_step']:,}; to resume:"
    assert (tmp_path / RUN / "unfinished").exists()

    words = shlex.split(command)
    process = start(tmp_path, [*words[words.index("fit") :], f"--trainer.max_epochs={checkpoint['epoch'] + 2}"])
    process.join()
    output = (tmp_path / "output.txt").read_text()
    assert process.exitcode == 0, output
    resumes = f"Resuming {RUN}/checkpoints/last.ckpt after iteration {checkpoint['global_step']:,}"
    assert output.splitlines()[1] == resumes
    assert not (tmp_path / RUN / "unfinished").exists()


class Slow(pl.Callback):
    """An iteration takes a minute."""

    def on_train_batch_start(self, *_: Any) -> None:
        time.sleep(60)


def test_a_second_ctrl_c_stops_at_once(tmp_path: Path, root: Path, start: Start) -> None:
    process = start(tmp_path, [*small(root), "--trainer.callbacks=commands.test_killed.Slow"])
    wait_for(tmp_path, "lightning_logs/*/checkpoints/last.ckpt")
    time.sleep(1)
    started = time.monotonic()
    os.kill(process.pid or 0, signal.SIGINT)
    while "a second Ctrl-C stops at once" not in (tmp_path / "output.txt").read_text():  # two signals at once are one
        time.sleep(0.05)
    assert process.is_alive()
    os.kill(process.pid or 0, signal.SIGINT)
    process.join()
    assert time.monotonic() - started < 30
    assert process.exitcode == 130
    assert (tmp_path / "output.txt").read_text().splitlines()[-1] == "mnist_lightning: interrupted"
    assert load(tmp_path / RUN)["global_step"] == 0


def test_a_signal_within_a_test_ends_it(
    run_cli: RunCLI, short_run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(MNISTClassifier, "on_test_batch_start", stop)
    monkeypatch.setattr(DeviceLoader, "__len__", lambda _: 2)  # not the last batch
    assert run_cli("test", "--ckpt_path=last") == 128 + signal.SIGTERM
    assert capsys.readouterr().out.splitlines()[-1] == "Stopped by SIGTERM"


def test_two_processes_do_not_resume_one_run(tmp_path: Path, root: Path, start: Start) -> None:
    first = start(tmp_path, [*small(root), "--trainer.max_epochs=10000"])
    wait_for(tmp_path, "lightning_logs/*/checkpoints/best.ckpt")
    run = tmp_path / RUN
    config, files = (run / "config.yaml").read_text(), {path.name for path in run.iterdir()}
    second = start(tmp_path, [*small(root), "--ckpt_path=last", "--trainer.max_epochs=7"])
    second.join(60)
    assert second.exitcode == 1
    assert f"another process is training in {RUN}" in (tmp_path / "output.txt").read_text()
    assert first.is_alive()
    assert (run / "config.yaml").read_text() == config
    added = {path.name for path in run.iterdir()} - files
    assert all(not events(run / name).Tags()["scalars"] for name in added)


# In this process, ended where a test wants it


@pytest.mark.parametrize("name", [name if name in QUICK else slow(name) for name in RUNS])
def test_stopped_again_and_again(run_cli: RunCLI, name: str) -> None:
    settings = [*settings_of(name, 4), "--test_after_fit=false"]
    assert run_cli("fit", *settings) == 0
    resume = list[str]()
    for iteration in (3, 11, 12, 30):
        if resume and load(OTHER)["global_step"] >= iteration:
            continue  # a signal in an iteration without hooks is heeded after the next one
        with at_iteration(iteration, stop):
            assert run_cli("fit", *settings, *resume) in (0, 128 + signal.SIGTERM), iteration
        assert load(OTHER)["global_step"] in (iteration, iteration + 1, load(RUN)["global_step"])
        resume = ["--ckpt_path=last"]
    assert run_cli("fit", *settings, *resume) == 0
    assert_the_same(RUN, OTHER)


@pytest.mark.parametrize("iteration", [21, 22])
def test_stopped_in_its_last_iterations_it_is_done(
    run_cli: RunCLI, capsys: pytest.CaptureFixture[str], iteration: int
) -> None:
    settings = ["--trainer.max_epochs=2", "--model.hidden_dim=20"]
    assert run_cli("fit", *settings) == 0
    with at_iteration(iteration, stop):
        assert run_cli("fit", *settings) == 128 + signal.SIGTERM
    capsys.readouterr()
    assert run_cli("fit", *settings, "--ckpt_path=last") == 0
    done = "This run is done, at iteration 22; to train longer, give a larger --trainer.max_epochs"
    assert capsys.readouterr().out.splitlines()[0] == done
    assert_the_same(RUN, OTHER)


@pytest.mark.parametrize("iteration", [5, 16])
def test_resuming_takes_back_what_was_logged_after_the_checkpoint(run_cli: RunCLI, iteration: int) -> None:
    settings = ["--trainer.max_epochs=2", "--trainer.log_every_n_steps=2", "--model.hidden_dim=20"]
    assert run_cli("fit", *settings) == 0

    def die(_: Any) -> None:
        raise OSError(errno.EIO, "died", "file")

    with at_iteration(iteration, die):
        assert run_cli("fit", *settings) == 1
    assert load(OTHER)["global_step"] == (0 if iteration < 11 else 11)
    assert run_cli("fit", "--ckpt_path=last") == 0
    assert_the_same(RUN, OTHER)
