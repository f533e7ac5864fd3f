"""Runs on 2 and 3 real processes, which talk over the loopback address, beside the same run on one."""

import contextlib
import functools
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from conftest import Fork, RunCLI, Start, assert_the_same, newest_run, poll, slow, small, wait_for
from engine.test_loop import Foreign, differences, loader
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import DDPStrategy
from lightning_utilities.core.rank_zero import rank_zero_only
from torch import Tensor
from torch.utils.data import DataLoader

from mnist_lightning import Trainer
from mnist_lightning.digits import files
from mnist_lightning.engine.checkpoints import BestAndLast

Launcher = Callable[[int, int, int], dict[str, str]]
StartAll = Callable[..., list[BaseProcess]]
FitAll = Callable[..., list[Any]]

# 2 and 3 divide a minibatch of 102, but not the last one: of 1,023 training digits 3 are left.
UNEVEN = ["--data.val_size=227", "--data.batch_size=102", "--model.hidden_dim=50"]
IN_MID_EPOCH = ["--checkpoint_every=3", "--trainer.log_every_n_steps=5", "--model.hidden_dim=20", "--model.dropout=0.2"]
AUTO = "--ckpt_path=auto"
RESUMES = "ckpt_path auto: resumes lightning_logs/version_"
LOST = "another process of the run has ended or does not answer; to resume: --ckpt_path last"
FIT = [sys.executable, "-m", "mnist_lightning"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def torchrun(rank: int, world_size: int, port: int) -> dict[str, str]:
    """What torchrun tells the processes that it starts."""
    return {
        "TORCHELASTIC_RUN_ID": "test",
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "GROUP_RANK": "0",
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def slurm(rank: int, world_size: int, port: int) -> dict[str, str]:
    """What SLURM tells the processes of `srun`."""
    return {
        "SLURM_JOB_NAME": "digits",
        "SLURM_JOB_ID": "1",
        "SLURM_NTASKS": str(world_size),
        "SLURM_NTASKS_PER_NODE": str(world_size),
        "SLURM_NNODES": "1",
        "SLURM_PROCID": str(rank),
        "SLURM_LOCALID": str(rank),
        "SLURM_NODEID": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


@pytest.fixture
def start_all(start: Start) -> StartAll:
    """Start the command line in several processes, the output of each in `output_RANK.txt`."""

    def start_all(
        directory: Path,
        arguments: list[str],
        world_size: int,
        launcher: Launcher = torchrun,
        environment: dict[str, str] | None = None,
    ) -> list[BaseProcess]:
        port = free_port()
        arguments = [*arguments, f"--trainer.devices={world_size}", "--trainer.strategy=ddp"]
        return [
            start(directory, arguments, f"output_{rank}.txt", launcher(rank, world_size, port) | (environment or {}))
            for rank in range(world_size)
        ]

    return start_all


def ended(processes: list[BaseProcess], seconds: float = 60) -> list[int | None]:
    """The exit codes, once all have ended; None for those that have not by then."""
    deadline = time.monotonic() + seconds
    for process in processes:
        process.join(max(0, deadline - time.monotonic()))
    return [process.exitcode for process in processes]


def output(directory: Path, rank: int = 0) -> str:
    """What a process printed, without seconds, and without what is said of processes only."""
    text = re.sub(r"\d:\d\d:\d\d", "0:00:00", (directory / f"output_{rank}.txt").read_text())
    return re.sub(r"(?m)^(Initializing distributed: |Hooks run in every iteration: the strategy is ).*\n", "", text)


def last(directory: Path) -> dict[str, Any]:
    """The newest run's `last.ckpt`."""
    checkpoint: dict[str, Any] = torch.load(newest_run(directory) / "checkpoints/last.ckpt", weights_only=True)
    return checkpoint


def difference(directory: Path, other: Path) -> float:
    """How far any of the last weights and of Adam's moments differs, relative to its norm in the first run."""

    def tensors(checkpoint: dict[str, Any]) -> dict[str, Tensor]:
        moments = checkpoint["optimizer_states"][0]["state"].items()
        return {**checkpoint["state_dict"], **{f"{i}.{name}": t for i, state in moments for name, t in state.items()}}

    first, second = tensors(last(directory)), tensors(last(other))
    assert first.keys() == second.keys()
    return max(float((first[name] - second[name]).norm() / first[name].norm()) for name in first)


def two_epochs_more(directory: Path) -> str:
    """The setting with which a run that was ended trains on for one or two epochs."""
    return f"--trainer.max_epochs={last(directory)['epoch'] + 2}"


# Several processes are the run on one


@pytest.mark.parametrize(("world_size", "launcher", "val_size"), [(2, slurm, 227), slow(3, torchrun, 228)])
def test_a_run_on_several_processes_is_the_run_on_one(
    tmp_path: Path, start: Start, start_all: StartAll, world_size: int, launcher: Launcher, val_size: int
) -> None:
    """From making the data to the console's lines, the weights, and what tests and predictions leave.

    Of minibatches of 1 digit (of 227 for validation the last one by 113) and of 2 (in training and validation with 228)
    one of the processes has no part.
    """
    is_quick = world_size == 2
    one, several = tmp_path / "one", tmp_path / "several"
    environment = {"EVAL_BATCH_SIZE": "113"} | ({} if is_quick else {"FIGURES": "drawn"})

    def run(*arguments: str) -> None:
        alone = start(one, [*arguments], "output_0.txt", environment)
        together = start_all(several, [*arguments], world_size, launcher, environment)
        assert ended([alone, *together]) == [0] * (1 + world_size), output(one) + output(several)
        assert output(several) == output(one)
        assert [output(several, rank) for rank in range(1, world_size)] == [""] * (world_size - 1)

    settings = ["--data.dataset=synthetic", *UNEVEN[:2], f"--data.val_size={val_size}", "--trainer.precision=64-true"]
    fit = ["--trainer.log_every_n_steps=4", "--trainer.max_epochs=2", "--data.distortions=true", *UNEVEN[2:]]
    run("fit", *settings, *fit)
    assert "Generating 1,250 synthetic digits" in output(several)
    assert difference(one, several) < 1e-10
    if is_quick:
        return
    for command in ("validate", "test", "predict"):
        run(command, *settings, "--ckpt_path=best")
    suffixes = (".csv", ".json", ".png")
    written = [path.relative_to(one) for path in one.glob("lightning_logs/**/*") if path.suffix in suffixes]
    assert len(written) == 1 + 2 + 15
    for path in written:
        if path.suffix == ".json":
            results, others = (json.loads((directory / path).read_text()) for directory in (one, several))
            assert results.pop("processes") == 1
            numbers = [name for name in results if "/" in name]  # of six digits, rounded
            assert [others.pop(name) for name in numbers] == pytest.approx([results.pop(name) for name in numbers])
            assert {**others, "train_seconds": 0} == {**results, "train_seconds": 0, "processes": world_size}
        else:
            assert (several / path).read_bytes() == (one / path).read_bytes(), path


class Saves(pl.Callback):
    """In the second epoch, and at the first one's end."""

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == 15:
            trainer.save_checkpoint(f"{trainer.default_root_dir}/mid.ckpt")

    def on_train_epoch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.current_epoch == 0:
            trainer.save_checkpoint(f"{trainer.default_root_dir}/end.ckpt")


def fit_in_process(directory: Path, rank: int, port: int, trainer_class: Any, ckpt_path: Path | None) -> None:
    """Fit a module that knows nothing of us, as one of two processes, and save what is left."""
    os.environ.update(torchrun(rank, 2, port))
    torch.set_num_threads(1)
    torch.manual_seed(1 + rank)
    trainer = trainer_class(
        accelerator="cpu",
        devices=2,
        strategy=DDPStrategy(timeout=timedelta(seconds=20)),
        max_epochs=2,
        limit_val_batches=0,
        log_every_n_steps=3,
        default_root_dir=directory,
        logger=CSVLogger(directory, "", ""),
        callbacks=[Saves()],
        **dict.fromkeys(("enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False),
    )
    # The worker draws the first indices as it starts: they must be of the sampler's right epoch.
    worker: dict[str, Any] = {"num_workers": 1, "multiprocessing_context": "fork"}
    module, data = Foreign(), DataLoader(loader().dataset, 4, shuffle=True, **worker)
    trainer.fit(module, data, ckpt_path=ckpt_path)
    left = {"weights": module.state_dict(), "metrics": dict(trainer.callback_metrics), "step": trainer.global_step}
    if rank == 0:
        left["curves"] = (directory / "metrics.csv").read_text()
    torch.save(left, directory / f"{rank}.pt")


@pytest.fixture
def fit_all(fork: Fork) -> Iterator[FitAll]:
    """Fit in two processes; return what each of them left."""
    started: list[BaseProcess] = []

    def fit_all(directory: Path, what: Any, ckpt_path: Path | None = None) -> list[Any]:
        directory.mkdir()
        port = free_port()
        for rank in range(2):
            fits = functools.partial(fit_in_process, trainer_class=what) if isinstance(what, type) else what
            started.append(fork.Process(target=fits, args=(directory, rank, port), kwargs={"ckpt_path": ckpt_path}))
            started[-1].start()
        assert ended(started[-2:]) == [0, 0]
        return [torch.load(directory / f"{rank}.pt", weights_only=True) for rank in range(2)]

    yield fit_all
    for process in started:
        process.kill()


def test_with_other_peoples_modules_it_is_lightnings_ddp_resumed_exactly(tmp_path: Path, fit_all: FitAll) -> None:
    theirs, ours = fit_all(tmp_path / "theirs", pl.Trainer), fit_all(tmp_path / "ours", Trainer)
    assert differences(theirs, ours) == []
    assert ours[0]["step"] == 22
    ours[0].pop("curves")
    for saved in ("mid", "end"):
        resumed = fit_all(tmp_path / saved, Trainer, tmp_path / f"ours/{saved}.ckpt")
        resumed[0].pop("curves")  # they begin later
        assert differences(ours, resumed) == [], saved


class LogsItsOwn(Foreign):
    """It logs without `sync_dist`: each process has another accuracy, and another epoch is its best."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val/acc", float(self.current_epoch == self.global_rank))


def best_in_process(directory: Path, rank: int, port: int, ckpt_path: Path | None) -> None:
    """Fit as one of two processes, and save what each takes for the best."""
    os.environ.update(torchrun(rank, 2, port))
    torch.set_num_threads(1)
    strategy, best_and_last = DDPStrategy(timeout=timedelta(seconds=20)), BestAndLast()
    trainer = Trainer(
        accelerator="cpu", devices=2, strategy=strategy, max_epochs=2, default_root_dir=directory,
        logger=CSVLogger(directory, "", ""), callbacks=[best_and_last],
        **dict.fromkeys(("enable_progress_bar", "enable_model_summary"), False),
    )  # fmt: skip
    trainer.fit(LogsItsOwn(), loader(4), loader(4))
    torch.save([best_and_last.best(trainer) is not None, best_and_last.state_dict()], directory / f"{rank}.pt")


def test_the_first_process_decides_which_checkpoint_is_the_best(tmp_path: Path, fit_all: FitAll) -> None:
    assert fit_all(tmp_path / "run", best_in_process) == [[True, {"best": 1.0}]] * 2
    best = torch.load(tmp_path / "run/checkpoints/best.ckpt", weights_only=True)
    assert best["global_step"] == 11


# What is refused


@pytest.mark.parametrize(
    ("environment", "settings", "message"),
    [
        (torchrun(0, 2, 1), [], "2 processes were started, but trainer.devices times trainer.num_nodes is 1"),
        (torchrun(0, 4, 1), ["--trainer.devices=2"], "does not match the world size (4)"),
        (slurm(0, 4, 1), [], ""),  # a script that asked for several tasks may run one process
    ],
)
def test_processes_that_would_not_work_together_are_refused(
    run_cli: RunCLI,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    environment: dict[str, str],
    settings: list[str],
    message: str,
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert run_cli("fit", "--trainer.max_steps=1", "--test_after_fit=false", *settings) == (2 if message else 0)
    assert message in capsys.readouterr().err
    assert Path("lightning_logs").exists() == (not message)


@pytest.mark.parametrize("variable", ["RANK", slow("LOCAL_RANK"), "SLURM_PROCID", slow("JSM_NAMESPACE_RANK")])
def test_a_single_process_is_the_first_whatever_another_jobs_variables_say(
    run_cli: RunCLI, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], variable: str
) -> None:
    monkeypatch.setenv(variable, "1")
    monkeypatch.setattr(rank_zero_only, "rank", 1)  # as Lightning takes it from there, when it is imported
    short = ["--trainer.max_epochs=1", "--test_after_fit=false"]
    assert run_cli("fit", *short) == 0
    assert capsys.readouterr().out.startswith(f"{variable}=1 is of another job: this run has one process\nTraining")
    assert Path("lightning_logs/version_0/checkpoints/best.ckpt").exists()
    assert run_cli("fit", *short, "--trainer.devices=2", "--trainer.strategy=ddp") == 2
    assert f"{variable}=1 is of another job: unset it" in capsys.readouterr().err


@pytest.mark.parametrize("launcher", [torchrun, None])
def test_a_port_in_use_is_named(
    run_cli: RunCLI, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], launcher: Launcher | None
) -> None:
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("a second process starts, and waits"))
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        environment = launcher(0, 2, port) if launcher else {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        assert run_cli("fit", "--trainer.devices=2", "--trainer.strategy=ddp") == 1
    line = f"mnist_lightning: port {port} is in use, maybe by another run; set MASTER_PORT to a free one, or unset it\n"
    assert capsys.readouterr().err.endswith(line)


def test_processes_that_find_different_checkpoints_are_refused(
    run_cli: RunCLI, tmp_path: Path, root: Path, start: Start
) -> None:
    """On two machines, say, that do not share a file system."""
    settings = ["--trainer.max_steps=4", "--test_after_fit=false", AUTO]
    assert run_cli("fit", *settings) == 0
    (newest_run(tmp_path) / "unfinished").touch()
    machines, port = [tmp_path, tmp_path / "other"], free_port()
    two = [*small(root), *settings, "--trainer.devices=2", "--trainer.strategy=ddp"]
    runs = [start(place, two, f"output_{i}.txt", torchrun(i, 2, port)) for i, place in enumerate(machines)]
    assert ended(runs) == [2, 2]
    for rank, place in enumerate(machines):
        *_, error = output(place, rank).splitlines()
        assert "ckpt_path: the processes found different checkpoints: ['lightning_logs/version_0/" in error
        assert "Traceback" not in output(place, rank)
    assert not (tmp_path / "other/lightning_logs").exists()


@pytest.mark.slow
def test_damaged_data_is_named_once(tmp_path: Path, fake_mnist: Path, start_all: StartAll) -> None:
    path = fake_mnist / "MNIST/raw/train-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:-1])
    sums = {"MNIST_MD5": json.dumps(files.MNIST_MD5)}
    assert ended(start_all(tmp_path, ["fit", f"--data.root={fake_mnist}"], 2, environment=sums)) == [1, 1]
    assert output(tmp_path).startswith(f"mnist_lightning: {path} is damaged")
    assert str(path) not in output(tmp_path, 1)


# Runs that are ended, and go on


@pytest.mark.parametrize(("before", "after", "killed"), [(2, 3, 1), slow(2, 1, 0), slow(1, 2, 0)])
def test_a_lost_process_ends_the_run_and_another_number_goes_on(
    tmp_path: Path, root: Path, start: Start, start_all: StartAll, before: int, after: int, killed: int
) -> None:
    one, several = tmp_path / "one", tmp_path / "several"
    settings = [*small(root), *UNEVEN, "--data.batch_size=200", "--checkpoint_every=2", AUTO]  # 3 do not divide it
    settings += ["--trainer.log_every_n_steps=4", "--trainer.precision=64-true", "--test_after_fit=false"]
    runs = start_all(several, [*settings, "--trainer.max_epochs=1000"], before)
    wait_for(several, "lightning_logs/*/checkpoints/best.ckpt")
    runs[killed].kill()
    assert ended(runs) == [-signal.SIGKILL if rank == killed else 1 for rank in range(before)]
    if before == 2:
        who = "process 1: " if killed == 0 else ""
        assert output(several, 1 - killed).splitlines()[-1] == f"mnist_lightning: {who}{LOST}"
        assert "Traceback" not in output(several, 1 - killed)

    settings.append(two_epochs_more(several))
    runs = [start(one, settings, "output_0.txt"), *start_all(several, settings, after)]
    assert ended(runs) == [0] * (1 + after), output(several)
    assert output(several).startswith(RESUMES)
    assert difference(one, several) < 1e-10


@pytest.mark.slow
@pytest.mark.parametrize(
    ("signum", "signalled"), [(signal.SIGTERM, [0]), (signal.SIGTERM, [1]), (signal.SIGINT, [0, 1])]
)
def test_a_signal_to_any_process_saves_and_stops_all_and_resuming_is_exact(
    tmp_path: Path, root: Path, start_all: StartAll, signum: int, signalled: list[int]
) -> None:
    stopped, whole = tmp_path / "stopped", tmp_path / "whole"
    settings = [*small(root), "--data.batch_size=10", "--trainer.log_every_n_steps=7", *IN_MID_EPOCH[2:]]
    runs = start_all(stopped, [*settings, "--trainer.max_epochs=1000"], 2)
    wait_for(stopped, "lightning_logs/*/checkpoints/best.ckpt")
    for rank in signalled:
        os.kill(runs[rank].pid or 0, signum)
    assert ended(runs, 20) == [128 + signum, 0], output(stopped)
    assert f"Stopped and saved at iteration {last(stopped)['global_step']:,}; to resume:\n" in output(stopped)

    settings.append(two_epochs_more(stopped))
    runs = start_all(stopped, [*settings, "--ckpt_path=last"], 2) + start_all(whole, settings, 2)
    assert ended(runs) == [0] * 4, output(stopped) + output(whole)
    assert_the_same(newest_run(whole), newest_run(stopped))


@pytest.mark.slow
def test_a_process_that_hangs_takes_the_run_down_within_a_minute(
    tmp_path: Path, root: Path, start_all: StartAll
) -> None:
    runs = start_all(tmp_path, [*small(root), "--trainer.max_epochs=100000"], 2)
    wait_for(tmp_path, "lightning_logs/*/checkpoints/best.ckpt")
    os.kill(runs[1].pid or 0, signal.SIGSTOP)
    assert ended(runs[:1]) == [1]
    assert output(tmp_path).splitlines()[-1] == f"mnist_lightning: {LOST}"


@pytest.mark.soak
def test_two_processes_killed_at_random_moments_go_on_together(tmp_path: Path, root: Path, start_all: StartAll) -> None:
    settings = [*small(root), *IN_MID_EPOCH, AUTO, "--trainer.max_epochs=30"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert ended(start_all(whole, settings, 2)) == [0, 0], output(whole)
    random_ = random.Random(1)
    for is_training in (False, True):
        processes = start_all(killed, settings, 2)
        if is_training:
            wait_for(killed, "lightning_logs/*/checkpoints/best.ckpt")
        time.sleep(random_.uniform(0, 0.3 if is_training else 1))
        processes[random_.randrange(2)].kill()
        ended(processes, 5)  # while they start, the other one would wait for longer
        for process in processes:
            process.kill()
    assert ended(start_all(killed, settings, 2)) == [0, 0], output(killed)
    assert output(killed).startswith(RESUMES)
    assert_the_same(newest_run(whole), newest_run(killed))


# Launchers


def children(process: subprocess.Popen[str], variable: str) -> list[int]:
    """The processes that a launcher has started with an environment variable."""
    found = []
    for child in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split():
        # The command line would not tell: a fork has its parent's until it executes something else. Such others last a
        # moment only, and may be gone.
        with contextlib.suppress(OSError):
            if variable.encode() in Path(f"/proc/{child}/environ").read_bytes().split(b"\0"):
                found.append(int(child))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("killed", ["first", "second"])
def test_lightning_starts_the_processes_itself(tmp_path: Path, root: Path, killed: str) -> None:
    two = [*FIT, *small(root), *IN_MID_EPOCH, AUTO, "--trainer.devices=2"]
    pipes: Any = {"cwd": tmp_path, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    run = subprocess.Popen([*two, "--trainer.max_epochs=10000"], **pipes)
    try:
        (second,) = poll(lambda: children(run, "LOCAL_RANK=1"), "second process")
        wait_for(tmp_path, "lightning_logs/*/checkpoints/best.ckpt")
        os.kill(second if killed == "second" else run.pid, signal.SIGKILL)
        _, errors = run.communicate(timeout=60)  # waits for the second one too, which has the same pipes
    finally:
        run.kill()
    assert run.returncode == (1 if killed == "second" else -signal.SIGKILL)
    who = "process 1: " if killed == "first" else ""
    assert re.findall("(?m)^(?:mnist_lightning: |Traceback).*$", errors) == [f"mnist_lightning: {who}{LOST}"]

    resumed = subprocess.run([*two, two_epochs_more(tmp_path)], **pipes, timeout=120)
    assert resumed.returncode == 0, resumed.stderr
    assert resumed.stdout.startswith(RESUMES)
    assert "\nRun: lightning_logs/version_0\n" in resumed.stdout
    assert "mnist_lightning" not in resumed.stderr


@pytest.mark.slow
def test_torchrun_on_two_machines(tmp_path: Path, root: Path) -> None:
    """Both are this one, each with a directory of its own."""
    two = ["--trainer.max_epochs=1", "--trainer.num_nodes=2", "--trainer.devices=1", "--trainer.strategy=ddp"]
    rendezvous = ["--nnodes=2", "--nproc-per-node=1", "--master-addr=127.0.0.1", f"--master-port={free_port()}"]
    runs = []
    for node, directory in enumerate([tmp_path / "first", tmp_path / "second"]):
        directory.mkdir()
        command = [*TORCHRUN, *rendezvous, f"--node-rank={node}", *FIT[1:], *small(root), *two]
        pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        runs.append(subprocess.Popen(command, cwd=directory, **pipes))
    outputs = [run.communicate(timeout=120)[0] for run in runs]
    assert [run.returncode for run in runs] == [0, 0], outputs
    assert "Test loss" in outputs[0]
    assert [path.name for path in tmp_path.rglob("version_*")] == ["version_0"]


@pytest.mark.soak
@pytest.mark.parametrize("rendezvous", [[], ["--standalone"]])
def test_torchrun_goes_on_by_itself(tmp_path: Path, root: Path, rendezvous: list[str]) -> None:
    """A process killed at two random moments, restarted by torchrun; in the end nothing is different."""
    command = [*TORCHRUN, *rendezvous, "--nproc-per-node=2", "--max-restarts=3", "--monitor-interval=0.1", *FIT[1:]]
    command += [*small(root), *IN_MID_EPOCH, AUTO, "--trainer.max_epochs=30"]
    command += ["--trainer.devices=2", "--trainer.strategy=ddp"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    whole.mkdir()
    killed.mkdir()
    subprocess.run(command, cwd=whole, check=True, capture_output=True)
    random_ = random.Random(0)
    with (killed / "output_0.txt").open("w") as out:
        process = subprocess.Popen(command, cwd=killed, stdout=out, stderr=out, text=True)
    for is_training in (False, True):
        poll(lambda: len(children(process, "WORLD_SIZE=2")) == 2, "pair of workers")
        if is_training:
            wait_for(killed, "lightning_logs/*/checkpoints/best.ckpt")
        time.sleep(random_.uniform(0, 0.3 if is_training else 2))
        for victim in random_.sample(children(process, "WORLD_SIZE=2"), 1):
            os.kill(victim, signal.SIGKILL)
    assert process.wait(300) == 0, output(killed)
    assert RESUMES in output(killed)
    assert_the_same(newest_run(whole), newest_run(killed))
