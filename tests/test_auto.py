"""`--ckpt_path auto`: the same command goes on where its job was, or starts."""

import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import RunCLI, Start, assert_the_same, newest_run, poll, small, wait_for
from test_processes import StartAll, difference, ended, free_port, output, start_all, torchrun  # noqa: F401 (a fixture)

from mnist_lightning.engine import auto
from mnist_lightning.engine.run import lock as hold

SHORT = ["--trainer.max_epochs=2", "--model.hidden_dim=20", "--ckpt_path=auto"]
QUICK = ["--checkpoint_every=3", "--trainer.log_every_n_steps=5", "--model.hidden_dim=20", "--model.dropout=0.2"]


@pytest.fixture(autouse=True)
def _no_job(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SLURM_JOB_ID", "SLURM_CLUSTER_NAME", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)


def said(capsys: pytest.CaptureFixture[str]) -> str:
    (line,) = re.findall(r"^ckpt_path auto: (.*)$", capsys.readouterr().out, re.MULTILINE)
    return str(line)


@pytest.fixture
def interrupted(run_cli: RunCLI, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Run `fit` with more settings, and lose power after its last checkpoint; return the run's directory."""

    def interrupt(*settings: str) -> Path:
        with monkeypatch.context() as patch:
            patch.setattr(auto, "finish", lambda trainer: None)
            assert run_cli("fit", *SHORT, *settings) == 0
        capsys.readouterr()
        return newest_run(Path.cwd())

    return interrupt


def runs() -> list[str]:
    return sorted(path.name for path in Path("lightning_logs").iterdir())


def test_without_an_unfinished_run_it_starts_and_a_finished_one_is_left_alone(
    run_cli: RunCLI, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(2):
        assert run_cli("fit", *SHORT) == 0
        assert said(capsys) == "no unfinished run with this model, data and seed, starts anew"
        assert newest_run(tmp_path).name == f"version_{number}"
        assert not (newest_run(tmp_path) / "unfinished.json").exists()


def test_it_goes_on_with_an_unfinished_run(
    interrupted: Callable[..., Path], run_cli: RunCLI, capsys: pytest.CaptureFixture[str]
) -> None:
    run = interrupted("--trainer.max_steps=15")
    assert json.loads((run / "unfinished.json").read_text())["settings"]["seed_everything"] == 0
    assert run_cli("fit", *SHORT, "--trainer.log_every_n_steps=7") == 0
    assert said(capsys) == "goes on from lightning_logs/version_0/checkpoints/last.ckpt"
    assert runs() == ["version_0"]
    assert torch.load(run / "checkpoints/last.ckpt", weights_only=True)["global_step"] == 15  # as its own config says


@pytest.mark.parametrize(
    ("setting", "goes_on"),
    [
        ("--trainer.max_epochs=3", True),
        ("--trainer.devices=auto", True),
        ("--trainer.accelerator=auto", True),
        ("--model.hidden_dim=21", False),
        ("--model.dropout=0.1", False),
        ("--data.batch_size=99", False),
        ("--seed_everything=1", False),
        ("--trainer.default_root_dir=other", False),
    ],
)
def test_it_is_the_same_run_with_the_same_model_data_seed_and_root(
    interrupted: Callable[..., Path], run_cli: RunCLI, capsys: pytest.CaptureFixture[str], setting: str, goes_on: bool
) -> None:
    interrupted("--trainer.max_steps=4", "--test_after_fit=false")
    assert run_cli("fit", *SHORT, "--test_after_fit=false", setting) == 0
    assert said(capsys).startswith("goes on" if goes_on else "no unfinished run")


def test_a_run_killed_before_its_first_checkpoint_is_begun_again_in_its_own_directory(
    interrupted: Callable[..., Path], run_cli: RunCLI, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = interrupted()
    for path in (run / "checkpoints").iterdir():
        path.unlink()
    assert run_cli("fit", *SHORT) == 0
    assert said(capsys) == "begins lightning_logs/version_0 again, which has no checkpoint yet"
    assert run_cli("fit", *SHORT) == 0
    assert runs() == ["version_0", "version_1"]
    assert_the_same(tmp_path / "lightning_logs/version_1", run)


def test_a_run_that_another_process_holds_leads_to_a_new_one(
    interrupted: Callable[..., Path], run_cli: RunCLI, capsys: pytest.CaptureFixture[str]
) -> None:
    lock = hold(interrupted())
    assert lock is not None
    try:
        assert run_cli("fit", *SHORT) == 0
    finally:
        os.close(lock)
    assert said(capsys).startswith("no unfinished run")
    assert runs() == ["version_0", "version_1"]
    assert run_cli("fit", *SHORT) == 0  # the first one, now that nobody holds it
    assert said(capsys).startswith("goes on from lightning_logs/version_0")


def test_a_run_is_held_from_the_decision_on(
    interrupted: Callable[..., Path], run_cli: RunCLI, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = interrupted()
    from mnist_lightning.datamodule import MNISTDataModule

    def prepare_data(data: MNISTDataModule) -> None:
        with pytest.raises(BlockingIOError):
            hold(run)
        raise RuntimeError("held")

    monkeypatch.setattr(MNISTDataModule, "prepare_data", prepare_data)
    assert run_cli("fit", *SHORT) == 1
    os.close(hold(run) or -1)  # and is released again


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"job": null}', "\x00"])
def test_a_damaged_mark_is_no_run(
    interrupted: Callable[..., Path], run_cli: RunCLI, capsys: pytest.CaptureFixture[str], content: str
) -> None:
    (interrupted() / "unfinished.json").write_text(content)
    assert run_cli("fit", *SHORT, "--test_after_fit=false") == 0
    assert said(capsys).startswith("no unfinished run")


def test_a_job_goes_on_with_its_own_run_only(
    interrupted: Callable[..., Path],
    run_cli: RunCLI,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    short = [*SHORT, "--test_after_fit=false"]
    for job in ("7", "8"):
        monkeypatch.setenv("SLURM_JOB_ID", job)
        interrupted("--test_after_fit=false")
    monkeypatch.setenv("SLURM_JOB_ID", "9")
    assert run_cli("fit", *short) == 0
    assert said(capsys) == "no unfinished run of this job, starts anew"
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    assert run_cli("fit", *short) == 0
    assert said(capsys) == "goes on from lightning_logs/version_0/checkpoints/last.ckpt"
    monkeypatch.delenv("SLURM_JOB_ID")  # where there is no job, anybody's newest
    assert run_cli("fit", *short) == 0
    assert said(capsys) == "goes on from lightning_logs/version_1/checkpoints/last.ckpt"


def test_what_names_a_job(monkeypatch: pytest.MonkeyPatch) -> None:
    assert auto.job() is None
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    assert auto.job() is None
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "mine")
    assert auto.job() == "torchrun mine"
    monkeypatch.setenv("SLURM_JOB_ID", "3")
    assert auto.job() == "slurm  3"


def test_only_fit_knows_it(run_cli: RunCLI, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_cli("test", "--ckpt_path=auto") == 2
    assert "there is no checkpoint auto" in capsys.readouterr().err


# Several processes


@pytest.mark.soak
def test_two_processes_killed_go_on_together_and_finish_with_another_number(
    tmp_path: Path,
    root: Path,
    start: Start,
    start_all: StartAll,  # noqa: F811
) -> None:
    settings = [*small(root), *QUICK, "--ckpt_path=auto", "--trainer.max_epochs=30"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert ended(start_all(whole, settings, 2)) == [0, 0], output(whole)
    random_ = random.Random(1)
    for is_training in (False, True):
        processes = start_all(killed, settings, 2)
        if is_training:
            wait_for(killed, "lightning_logs/*/checkpoints/best.ckpt")
        time.sleep(random_.uniform(0, 0.3 if is_training else 1))
        processes[random_.randrange(2)].kill()
        ended(processes, 5)  # while they start, the other one would wait for a minute
        for process in processes:
            process.kill()
    assert ended(start_all(killed, settings, 2)) == [0, 0], output(killed)
    assert output(killed).startswith("ckpt_path auto: goes on from lightning_logs/version_N/checkpoints/last.ckpt\n")
    assert [path.name for path in (killed / "lightning_logs").iterdir()] == ["version_0"]
    assert_the_same(newest_run(whole), newest_run(killed))


@pytest.mark.slow
@pytest.mark.parametrize("after", [1, 3])
def test_it_goes_on_with_another_number_of_processes(
    tmp_path: Path,
    root: Path,
    start: Start,
    start_all: StartAll,  # noqa: F811
    after: int,
) -> None:
    settings = [*small(root), "--trainer.precision=64-true", "--ckpt_path=auto", "--test_after_fit=false"]
    one, several = tmp_path / "one", tmp_path / "several"
    processes = start_all(several, [*settings, "--trainer.max_epochs=1000"], 2)
    wait_for(several, "lightning_logs/*/checkpoints/best.ckpt")
    processes[1].kill()
    ended(processes)
    checkpoint = torch.load(newest_run(several) / "checkpoints/last.ckpt", weights_only=True)
    settings.append(f"--trainer.max_epochs={checkpoint['epoch'] + 2}")
    assert ended(start_all(several, settings, after)) == [0] * after, output(several)
    assert "goes on from" in output(several)
    assert ended([start(one, settings, "output_0.txt")]) == [0], output(one)
    assert difference(newest_run(one), newest_run(several)) < 1e-10


@pytest.mark.slow
def test_a_signal_ends_a_process_that_waits_for_another_one(tmp_path: Path, root: Path, start: Start) -> None:
    settings = [*small(root), "--ckpt_path=auto", "--trainer.devices=2", "--trainer.strategy=ddp"]
    process = start(tmp_path, settings, environment=torchrun(0, 2, port := free_port()))
    poll(lambda: is_listening(port), "store that the other one would look for")
    os.kill(process.pid or 0, signal.SIGTERM)
    assert ended([process], 20) == [128 + signal.SIGTERM]
    assert "stopped while it waited until all 2 processes meet at 127.0.0.1" in (tmp_path / "output.txt").read_text()


def is_listening(port: int) -> bool:
    with socket.socket() as asking:
        return asking.connect_ex(("127.0.0.1", port)) == 0


COMMAND = [sys.executable, "-m", "mnist_lightning"]


@pytest.mark.slow
def test_processes_that_lightning_starts_are_told_of_the_decision(tmp_path: Path, root: Path) -> None:
    run = [*COMMAND, *small(root), *QUICK, "--trainer.devices=2", "--trainer.strategy=ddp", "--ckpt_path=auto"]
    process = subprocess.Popen([*run, "--trainer.max_epochs=10000"], cwd=tmp_path, stdout=subprocess.DEVNULL)
    wait_for(tmp_path, "lightning_logs/*/checkpoints/best.ckpt")
    process.kill()
    process.wait()
    epoch = torch.load(newest_run(tmp_path) / "checkpoints/last.ckpt", weights_only=True)["epoch"]
    run.append(f"--trainer.max_epochs={epoch + 2}")
    result = subprocess.run(run, cwd=tmp_path, check=True, capture_output=True, text=True)
    assert result.stdout.startswith("ckpt_path auto: goes on from lightning_logs/version_0/checkpoints/last.ckpt\n")
    assert [path.name for path in (tmp_path / "lightning_logs").iterdir()] == ["version_0"]


@pytest.mark.soak
@pytest.mark.parametrize("identifier", ["digits", None])
def test_torchrun_goes_on_by_itself(tmp_path: Path, root: Path, identifier: str | None) -> None:
    """A process killed at two random moments, restarted by torchrun; in the end nothing is different."""
    settings = [*small(root), *QUICK, "--trainer.max_epochs=60", "--trainer.devices=2", "--trainer.strategy=ddp"]
    name = ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", f"--rdzv-id={identifier}"] if identifier else []
    torchrun = [sys.executable, "-m", "torch.distributed.run", *name, "--nproc-per-node=2", "--max-restarts=3"]
    torchrun += ["--monitor-interval=0.1", "-m", "mnist_lightning", *settings, "--ckpt_path=auto"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    whole.mkdir()
    killed.mkdir()
    subprocess.run(torchrun, cwd=whole, check=True, capture_output=True)
    random_ = random.Random(0)
    with (killed / "output_0.txt").open("w") as out:
        process = subprocess.Popen(torchrun, cwd=killed, stdout=out, stderr=out)
    for is_training in (False, True):
        poll(lambda: len(workers(process.pid)) == 2, "pair of workers")
        if is_training:
            wait_for(killed, "lightning_logs/*/checkpoints/best.ckpt")
        time.sleep(random_.uniform(0, 0.3 if is_training else 2))
        for victim in random_.sample(workers(process.pid), 1):
            os.kill(victim, signal.SIGKILL)
    assert process.wait(300) == 0, output(killed)
    assert "goes on from lightning_logs/version_N/checkpoints/last.ckpt" in output(killed)
    assert [path.name for path in (killed / "lightning_logs").iterdir()] == ["version_0"]
    assert_the_same(newest_run(whole), newest_run(killed))


def workers(launcher: int) -> list[int]:
    return [int(pid) for pid in Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()]
