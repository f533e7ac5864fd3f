"""Runs on 2 and 3 real processes, which talk over the loopback address, beside the same run on one."""

import contextlib
import json
import os
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
from conftest import Start, assert_the_same, fork, newest_run, poll, slow, small, wait_for
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import DDPStrategy
from test_loop import Foreign, Watches, differences, loader
from torch import Tensor

from mnist_lightning import Trainer
from mnist_lightning.digits import files
from mnist_lightning.engine.data import DeviceDataModule, DeviceLoader

StartAll = Callable[..., list[BaseProcess]]

# 2 and 3 divide a minibatch of 198, but not the last ones: of 1,049 training digits 59 are left, of 201 for validation
# 3, of 230 for testing 32.
UNEVEN = ["--data.val_size=201", "--data.batch_size=198", "--model.hidden_dim=50"]
EVAL_BY_99 = {"EVAL_BATCH_SIZE": "99", "FIGURES": "drawn"}


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
        "OMP_NUM_THREADS": "1",
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
        launcher: Callable[[int, int, int], dict[str, str]] = torchrun,
        environment: dict[str, str] | None = None,
    ) -> list[BaseProcess]:
        port = free_port()
        arguments = [*arguments, f"--trainer.devices={world_size}", "--trainer.strategy=ddp"]
        return [
            start(
                directory,
                arguments,
                output=f"output_{rank}.txt",
                environment={**launcher(rank, world_size, port), **(environment or {})},
            )
            for rank in range(world_size)
        ]

    return start_all


def test_a_run_says_that_it_waits_for_another_machine_and_heeds_signals(
    tmp_path: Path, root: Path, start: Start
) -> None:
    runs = []
    for signum in (signal.SIGTERM, signal.SIGINT):
        port = free_port()
        two, alone = [*small(root), "--trainer.num_nodes=2"], {"MASTER_PORT": str(port)}
        runs.append((signum, port, start(tmp_path, two, f"{signum}.txt", alone)))
    for signum, port, process in runs:
        output = tmp_path / f"{signum}.txt"
        while process.is_alive() and "Waiting" not in output.read_text():
            time.sleep(0.05)
        assert process.pid
        os.kill(process.pid, signum)
        process.join(10)
        assert process.exitcode == 128 + signum
        waiting, stopped = output.read_text().splitlines()
        what = f"until all 2 processes meet at 127.0.0.1:{port}; start this on all 2 machines, by torchrun or with "
        assert waiting.startswith(f"Waiting {what}MASTER_ADDR")
        assert stopped.startswith(f"mnist_lightning: stopped while it waited {what}MASTER_ADDR")
    assert not list(tmp_path.glob("lightning_logs"))


def ended(processes: list[BaseProcess], seconds: float = 60) -> list[int | None]:
    """The exit codes, once all have ended; None for those that have not by then."""
    deadline = time.monotonic() + seconds
    for process in processes:
        process.join(max(0, deadline - time.monotonic()))
    return [process.exitcode for process in processes]


def output(directory: Path, rank: int = 0) -> str:
    """What a process printed, without the run's number."""
    return re.sub(r"version_\d+", "version_N", (directory / f"output_{rank}.txt").read_text())


def difference(run: Path, other: Path) -> float:
    """How far any of the last weights and of Adam's moments differs, relative to its norm in the first run."""

    def tensors(run: Path) -> dict[str, Tensor]:
        checkpoint = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
        moments = checkpoint["optimizer_states"][0]["state"].items()
        return {**checkpoint["state_dict"], **{f"{i}.{name}": t for i, state in moments for name, t in state.items()}}

    first, second = tensors(run), tensors(other)
    assert first.keys() == second.keys()
    return max(float((first[name] - second[name]).norm() / first[name].norm()) for name in first)


@pytest.mark.parametrize(("world_size", "log_every"), [(2, 1), slow(2, 4), slow(3, 4)])
def test_a_run_on_several_processes_is_the_run_on_one(
    tmp_path: Path, root: Path, start: Start, start_all: StartAll, world_size: int, log_every: int
) -> None:
    settings = [
        *small(root),
        *UNEVEN,
        f"--trainer.log_every_n_steps={log_every}",
        "--trainer.precision=64-true",
        "--trainer.max_epochs=2",
        "--data.distortions=true",
    ]
    one, several = tmp_path / "one", tmp_path / "several"

    def run(arguments: list[str]) -> None:
        assert ended([start(one, arguments, "output_0.txt", EVAL_BY_99)]) == [0], output(one)
        codes = ended(start_all(several, arguments, world_size, environment=EVAL_BY_99))
        assert codes == [0] * world_size, output(several)
        assert output(several) == output(one)

    run(settings)
    assert difference(newest_run(one), newest_run(several)) < 1e-10
    assert all(output(several, rank) == "" for rank in range(1, world_size))

    if world_size == 2:
        return  # 3 are enough for what follows
    for command in ("test", "predict"):
        run([command, *small(root)[1:], "--ckpt_path=best"])
    written = sorted(path.relative_to(one) for path in one.rglob("*") if path.suffix in (".png", ".csv", ".json"))
    assert len(written) == 1 + 2 * 7 + 1 + 2  # figures, predictions, results
    for path in written:
        if path.suffix == ".json":
            results, others = (json.loads((directory / path).read_text()) for directory in (one, several))
            assert {**results, "train_seconds": 0} == {**others, "train_seconds": 0}
        else:
            assert (several / path).read_bytes() == (one / path).read_bytes(), path


def test_in_float32_the_first_iterations_are_those_of_one_process(
    tmp_path: Path, root: Path, start: Start, start_all: StartAll
) -> None:
    # Not seed 0: there the first gradient of one weight is 2e-8, about Adam's eps, and its rounding decides the step.
    settings = [*small(root), "--trainer.max_steps=10", "--test_after_fit=false", "--seed_everything=2"]
    one, several = tmp_path / "one", tmp_path / "several"
    assert ended([start(one, settings, output="output_0.txt")]) == [0], output(one)
    assert ended(start_all(several, settings, 2)) == [0, 0], output(several)
    assert difference(newest_run(one), newest_run(several)) < 1e-5


@pytest.mark.slow
def test_minibatches_smaller_than_the_number_of_processes_count_once(
    tmp_path: Path, root: Path, start: Start, start_all: StartAll
) -> None:
    """One of three processes has no part in any of the minibatches."""
    assert ended([start(tmp_path, [*small(root), "--trainer.max_epochs=1"])]) == [0]
    validate = ["validate", *small(root)[1:], "--ckpt_path=last"]
    by_2 = {"EVAL_BATCH_SIZE": "2"}
    assert ended([start(tmp_path, validate, "output_0.txt", by_2)]) == [0], output(tmp_path)
    alone = output(tmp_path)
    assert ended(start_all(tmp_path, validate, 3, environment=by_2)) == [0, 0, 0], output(tmp_path)
    assert output(tmp_path) == alone


@pytest.mark.slow
def test_dropout_differs_between_processes_and_resuming_with_as_many_is_exact(
    tmp_path: Path, root: Path, start_all: StartAll
) -> None:
    mid_epoch = ["--trainer.log_every_n_steps=5", "--checkpoint_every=3", "--trainer.max_epochs=4"]
    settings = [*small(root), *mid_epoch, "--model.dropout=0.2"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert ended(start_all(whole, settings, 2)) == [0, 0], output(whole)
    checkpoint = torch.load(newest_run(whole) / "checkpoints/last.ckpt", weights_only=True)
    first, second = checkpoint["loops"]["fit_loop"]["state_dict"]["random_states"][-1]
    assert not torch.equal(first, second)

    runs = start_all(killed, [*settings, "--trainer.max_epochs=400"], 2)
    wait_for(killed, "lightning_logs/*/checkpoints/best.ckpt")
    for process in runs:
        process.kill()
    ended(runs)
    assert ended(start_all(killed, [*settings, "--ckpt_path=last"], 2)) == [0, 0], output(killed)
    assert_the_same(newest_run(whole), newest_run(killed))


@pytest.mark.parametrize(("before", "after"), [slow(1, 2), slow(2, 1), (2, 3)])
def test_a_run_goes_on_with_another_number_of_processes(
    tmp_path: Path, root: Path, start: Start, start_all: StartAll, before: int, after: int
) -> None:
    quiet = ["--trainer.log_every_n_steps=4", "--trainer.precision=64-true", "--test_after_fit=false"]
    settings = [*small(root), *UNEVEN, "--data.batch_size=200", *quiet]  # 3 do not divide it
    one, several = tmp_path / "one", tmp_path / "several"
    runs = start_all(several, [*settings, "--trainer.max_epochs=1000"], before)
    wait_for(several, "lightning_logs/*/checkpoints/best.ckpt")
    os.kill(runs[0].pid or 0, signal.SIGTERM)
    assert ended(runs) == [128 + signal.SIGTERM] + [0] * (before - 1), output(several)

    checkpoint = torch.load(newest_run(several) / "checkpoints/last.ckpt", weights_only=True)
    settings.append(f"--trainer.max_epochs={checkpoint['epoch'] + 2}")
    assert ended(start_all(several, [*settings, "--ckpt_path=last"], after)) == [0] * after, output(several)
    assert ended([start(one, settings, output="output_0.txt")]) == [0], output(one)
    assert difference(newest_run(one), newest_run(several)) < 1e-10


@pytest.mark.slow
@pytest.mark.parametrize("signalled", [0, 1])
def test_a_signal_to_any_process_stops_all_among_quiet_iterations(
    tmp_path: Path, root: Path, start_all: StartAll, signalled: int
) -> None:
    settings = [*small(root), "--data.batch_size=10", "--trainer.log_every_n_steps=0", "--model.dropout=0.2"]
    settings += ["--model.hidden_dim=20", "--test_after_fit=false"]
    stopped, whole = tmp_path / "stopped", tmp_path / "whole"
    runs = start_all(stopped, [*settings, "--trainer.max_epochs=1000"], 2)
    wait_for(stopped, "lightning_logs/*/checkpoints/best.ckpt")
    os.kill(runs[signalled].pid or 0, signal.SIGTERM)
    assert ended(runs, 20) == [128 + signal.SIGTERM, 0], output(stopped)

    checkpoint = torch.load(newest_run(stopped) / "checkpoints/last.ckpt", weights_only=True)
    settings.append(f"--trainer.max_epochs={checkpoint['epoch'] + 2}")
    assert ended(start_all(stopped, [*settings, "--ckpt_path=last"], 2)) == [0, 0], output(stopped)
    assert ended(start_all(whole, settings, 2)) == [0, 0], output(whole)
    assert_the_same(newest_run(whole), newest_run(stopped))


@pytest.mark.parametrize("killed", [0, slow(1)])
def test_a_process_that_dies_takes_the_run_down(tmp_path: Path, root: Path, start_all: StartAll, killed: int) -> None:
    runs = start_all(tmp_path, [*small(root), "--trainer.max_epochs=10000"], 2)
    wait_for(tmp_path, "lightning_logs/*/checkpoints/best.ckpt")
    runs[killed].kill()
    assert ended(runs)[1 - killed] == 1
    process = "process 1: " if killed == 0 else ""
    message = f"mnist_lightning: {process}another process of the run has ended or does not answer"
    assert output(tmp_path, 1 - killed).splitlines()[-1].startswith(message)


@pytest.mark.slow
def test_a_process_that_hangs_takes_the_run_down_within_a_minute(
    tmp_path: Path, root: Path, start_all: StartAll
) -> None:
    runs = start_all(tmp_path, [*small(root), "--trainer.max_epochs=100000"], 2)
    wait_for(tmp_path, "lightning_logs/*/checkpoints/best.ckpt")
    os.kill(runs[1].pid or 0, signal.SIGSTOP)
    assert ended(runs[:1]) == [1]
    assert "does not answer" in output(tmp_path)


def test_one_process_makes_the_data_for_all(tmp_path: Path, start_all: StartAll) -> None:
    arguments = ["fit", "--data.dataset=synthetic", "--data.val_size=200", "--trainer.max_steps=1"]
    assert ended(start_all(tmp_path, arguments, 2)) == [0, 0], output(tmp_path)
    assert "Drawing 1,250 stand-in digits" in output(tmp_path, 0)
    assert output(tmp_path, 1) == ""


@pytest.mark.slow
def test_damaged_data_is_named_once(tmp_path: Path, fake_mnist: Path, start_all: StartAll) -> None:
    path = fake_mnist / "MNIST/raw/train-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:-1])
    sums = {"MNIST_MD5": json.dumps(files.MNIST_MD5)}
    runs = start_all(tmp_path, ["fit", f"--data.root={fake_mnist}"], 2, environment=sums)
    assert ended(runs) == [1, 1]
    assert output(tmp_path).startswith(f"mnist_lightning: {path} is damaged")


def test_slurm_is_detected(tmp_path: Path, root: Path, start_all: StartAll) -> None:
    settings = [*small(root), "--trainer.max_epochs=1"]
    assert ended(start_all(tmp_path, settings, 2, launcher=slurm)) == [0, 0], output(tmp_path)
    assert "Epoch: 1, validation loss" in output(tmp_path)
    assert output(tmp_path, 1) == ""


def test_settings_that_the_launcher_contradicts_are_refused(tmp_path: Path, root: Path, start: Start) -> None:
    settings = [*small(root), "--trainer.devices=1"]
    runs = [start(tmp_path, settings, output=f"output_{i}.txt", environment=torchrun(i, 2, 1)) for i in range(2)]
    assert ended(runs) == [2, 2]
    assert "2 processes were started, but trainer.devices times trainer.num_nodes is 1" in output(tmp_path)


def test_a_script_for_several_slurm_tasks_may_run_one_process(tmp_path: Path, root: Path, start: Start) -> None:
    run = start(tmp_path, [*small(root), "--trainer.max_epochs=1"], environment=slurm(0, 4, free_port()))
    assert ended([run]) == [0], (tmp_path / "output.txt").read_text()


# The Trainer alone, in other people's scripts

FitAll = Callable[..., list[Any]]


def fit_in_process(directory: Path, rank: int, port: int, trainer_class: Any, make: Any, settings: Any) -> None:
    """Fit what `make` makes of the rank, as one of two processes, and save what is left."""
    os.environ.update(torchrun(rank, 2, port))
    torch.set_num_threads(1)
    torch.manual_seed(1)
    module, data, callbacks = make(rank)
    quiet = dict.fromkeys(("enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    trainer = trainer_class(
        accelerator="cpu",
        devices=2,
        strategy=DDPStrategy(timeout=timedelta(seconds=20)),
        limit_val_batches=0,
        logger=CSVLogger(directory, "", ""),
        callbacks=callbacks,
        **quiet,
        **settings,
    )
    trainer.fit(module, data)
    metrics, curves = dict(trainer.callback_metrics), directory / "metrics.csv"
    left = {"weights": module.state_dict(), "metrics": metrics, "step": trainer.global_step, "seen": module.seen}
    if rank == 0:
        left["curves"] = curves.read_text() if curves.exists() else ""
    torch.save(left, directory / f"{rank}.pt")


@pytest.fixture
def fit_all() -> Iterator[FitAll]:
    """Fit in two processes; return what each of them left."""
    started: list[BaseProcess] = []

    def fit_all(directory: Path, trainer_class: Any, make: Any, **settings: Any) -> list[Any]:
        directory.mkdir()
        port = free_port()
        processes: list[BaseProcess] = [
            fork.Process(target=fit_in_process, args=(directory, rank, port, trainer_class, make, settings))
            for rank in range(2)
        ]
        started.extend(processes)
        for process in processes:
            process.start()
        assert ended(processes) == [0, 0]
        return [torch.load(directory / f"{rank}.pt", weights_only=True) for rank in range(2)]

    yield fit_all
    for process in started:
        process.kill()


def first_is_watched(rank: int) -> Any:
    return Foreign(), loader(4), [Watches()] if rank == 0 else []


def second_is_watched(rank: int) -> Any:
    return Foreign(), loader(4), [Watches()] if rank == 1 else []


@pytest.mark.parametrize("make", [slow(first_is_watched), second_is_watched])
def test_one_process_alone_may_have_a_callback_that_watches(tmp_path: Path, fit_all: FitAll, make: Any) -> None:
    theirs = fit_all(tmp_path / "theirs", pl.Trainer, make, max_epochs=2)
    ours = fit_all(tmp_path / "ours", Trainer, make, max_epochs=2)
    assert differences(theirs, ours) == []
    assert ours[0]["step"] == 22


class Unequal(DeviceDataModule):
    """17 minibatches of 5: one process has 3 examples of each, the other 2."""

    def train_dataloader(self) -> DeviceLoader:
        inputs, labels = loader().dataset.tensors  # type: ignore[attr-defined]
        return self.loader(inputs, labels, 5, shuffle_seed=1)


class LogsNowAndThenOfAll(Foreign):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        self.seen.append(len(batch[1]))
        if batch_idx % 4 == 3:
            self.log("now and then", loss, sync_dist=True)
        if batch_idx in (4, 6):
            self.log("before a visit", loss, sync_dist=True)
        return loss


def unequal(rank: int) -> Any:
    return LogsNowAndThenOfAll(), Unequal(), []


def test_what_quiet_iterations_log_now_and_then_is_the_mean_over_all_examples(tmp_path: Path, fit_all: FitAll) -> None:
    visited = fit_all(tmp_path / "visited", Trainer, unequal, max_epochs=2, log_every_n_steps=10, fast=False)
    quiet = fit_all(tmp_path / "quiet", Trainer, unequal, max_epochs=2, log_every_n_steps=10)
    assert [set(left["seen"]) for left in quiet] == [{3}, {2}]
    assert quiet[0]["curves"].count("\n") == 3  # a header, and points at iterations 10 and 30
    assert differences(visited, quiet) == []


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", *arguments]


def child_of(process: subprocess.Popen[str]) -> int | None:
    """The run's second process, if Lightning has started it."""
    for child in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split():
        # Lightning starts it with LOCAL_RANK=1. Its command line would not tell: a fork has its parent's until it
        # executes something else. Such others last a moment only, and may be gone.
        with contextlib.suppress(OSError):
            if b"LOCAL_RANK=1" in Path(f"/proc/{child}/environ").read_bytes().split(b"\0"):
                return int(child)
    return None


@pytest.mark.slow
@pytest.mark.parametrize("death", ["none", "of the first", "of the second", "of the first, before they have met"])
def test_lightning_starts_the_processes_itself(tmp_path: Path, root: Path, death: str) -> None:
    settings = [*small(root), "--trainer.devices=2", f"--trainer.max_epochs={1 if death == 'none' else 10000}"]
    run = subprocess.Popen(
        command("mnist_lightning", *settings), cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        if death != "none":
            child = poll(lambda: child_of(run), "second process")
            if "before" not in death:
                wait_for(tmp_path, "lightning_logs/*/checkpoints/best.ckpt")
            os.kill(child if "second" in death else run.pid, signal.SIGKILL)
        out, err = run.communicate(timeout=60)  # waits for the child too, which has the same output
    finally:
        run.kill()
    if death == "none":
        assert (run.returncode, err) == (0, "")
        assert out.splitlines()[-2] == "Run: lightning_logs/version_0"
    else:
        assert run.returncode != 0


@pytest.mark.slow
def test_torchrun_on_two_machines(tmp_path: Path, root: Path) -> None:
    """Both are this one, each with a directory of its own."""
    settings = [*small(root), "--trainer.max_epochs=1"]
    settings += ["--trainer.num_nodes=2", "--trainer.devices=1", "--trainer.strategy=ddp"]
    machines = [tmp_path / "first", tmp_path / "second"]
    for directory in machines:
        directory.mkdir()
    rendezvous = ["--nnodes=2", "--nproc-per-node=1", "--master-addr=127.0.0.1", f"--master-port={free_port()}"]
    runs = [
        subprocess.Popen(
            command("torch.distributed.run", *rendezvous, f"--node-rank={node}", "-m", "mnist_lightning", *settings),
            cwd=directory,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for node, directory in enumerate(machines)
    ]
    outputs = [run.communicate(timeout=120)[0] for run in runs]
    assert [run.returncode for run in runs] == [0, 0], outputs
    assert "Test loss" in outputs[0]
    assert [path.name for path in tmp_path.rglob("version_*")] == ["version_0"]
