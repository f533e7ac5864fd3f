"""A real SLURM of one node, on the loopback address: jobs that are stopped, killed, requeued, or many."""

import contextlib
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from conftest import Start, assert_the_same, newest_run, poll, small
from engine.test_processes import RESUMES, StartAll, difference, ended, free_port, last, start_all  # noqa: F401

pytestmark = pytest.mark.slurm

ROOT = Path(__file__).parents[2]

CONF = """
ClusterName=test
SlurmctldHost={name}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
SlurmUser=root
AuthInfo=socket={directory}/munge.socket
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
MpiDefault=none
ReturnToService=2
KillWait=20
SlurmdParameters=config_overrides
StateSaveLocation={directory}/state
SlurmdSpoolDir={directory}/spool
SlurmctldPidFile={directory}/slurmctld.pid
SlurmdPidFile={directory}/slurmd.pid
SlurmctldLogFile={directory}/slurmctld.log
SlurmdLogFile={directory}/slurmd.log
NodeName={name} NodeAddr=127.0.0.1 CPUs=32 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES State=UP
"""


@dataclass
class Job:
    """A job that was handed in, and the directory in which it runs."""

    id: str
    directory: Path

    def show(self) -> dict[str, str]:
        shown = subprocess.run(["scontrol", "show", "job", self.id], capture_output=True, text=True, check=True).stdout
        return dict(re.findall(r"(\w+)=(\S*)", shown))

    def wait(self, seconds: float = 120) -> tuple[str, str]:
        """Its state and its exit code, once it has ended."""
        deadline = time.monotonic() + seconds
        while (shown := self.show())["JobState"] in ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING"):
            assert time.monotonic() < deadline, f"{shown['JobState']}\n{self.output()}"
            time.sleep(0.1)
        return shown["JobState"], shown["ExitCode"].partition(":")[0]

    def wait_until_it_trains(self) -> Path:
        """The run's directory, once it has a checkpoint of an epoch."""
        poll(lambda: list(self.directory.glob("lightning_logs/*/checkpoints/best.ckpt")), "epoch")
        return newest_run(self.directory)

    def tasks(self) -> list[int]:
        """The processes of the job's step."""
        found = []
        for path in Path("/proc").glob("[0-9]*/environ"):
            with contextlib.suppress(OSError):
                environment = path.read_bytes().split(b"\0")
                command = (path.parent / "cmdline").read_bytes().split(b"\0")
                is_ours = f"SLURM_JOB_ID={self.id}".encode() in environment
                if is_ours and command[1:3] == [b"-m", b"mnist_lightning"]:
                    found.append(int(path.parent.name))
        return found

    def output(self) -> str:
        return "".join(path.read_text() for path in sorted(self.directory.glob("slurm-*.out")))


Submit = Callable[..., Job]


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The environment in which SLURM's commands find a cluster of this machine."""
    missing = [name for name in ("munged", "slurmctld", "slurmd", "sbatch", "srun") if not shutil.which(name)]
    if missing:
        pytest.skip(f"there is no {missing[0]} here; Debian has it in slurm-wlm and munge")
    if os.geteuid() != 0:
        pytest.skip("SLURM's daemons run as root")
    directory = tmp_path_factory.mktemp("slurm")
    for folder in ("state", "spool"):
        (directory / folder).mkdir()
    name: str = socket.gethostname().partition(".")[0]
    conf = directory / "slurm.conf"
    conf.write_text(CONF.format(name=name, directory=directory, ports=[free_port(), free_port()]))
    key = directory / "munge.key"
    key.write_bytes(os.urandom(1024))
    key.chmod(0o600)
    environment = os.environ | {"SLURM_CONF": str(conf)}
    munge = {"socket": "socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed", "key-file": "key"}
    # `force`: it warns of a directory like pytest's, in which others could write.
    daemons = [["munged", "--force", *(f"--{option}={directory}/munge.{end}" for option, end in munge.items())]]
    daemons += [["slurmctld", "-c", "-f", str(conf)], ["slurmd", "-c", "-f", str(conf), "-N", name]]
    try:
        for daemon in daemons:
            subprocess.run(daemon, env=environment, check=True)
        ping = ["sinfo", "--noheader", "--states=idle", "--format=%n"]
        poll(lambda: subprocess.run(ping, env=environment, capture_output=True).stdout.strip(), "idle node")
        yield environment
    finally:
        for service in ("slurmd", "slurmctld", "munge"):
            with contextlib.suppress(OSError, ValueError):
                os.kill(int((directory / f"{service}.pid").read_text()), signal.SIGTERM)


@pytest.fixture
def submit(cluster: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Submit]:
    """Hand in the README's batch script, with options of sbatch and settings of `fit`."""
    python = str(Path(sys.executable).parent)
    path = f"{python}:{os.environ['PATH']}"
    for name, value in {**cluster, "PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    readme = (ROOT / "mnist_lightning/engine/README.md").read_text()
    (script,) = re.findall(r"(?s)```sh\n(#!/bin/bash\n#SBATCH.*?)```", readme)
    jobs = []

    def submit(directory: Path, settings: list[str], *options: str) -> Job:
        directory.mkdir()
        (directory / "train.sh").write_text(script)
        sbatch = ["sbatch", "--parsable", f"--chdir={directory}", *options, f"{directory}/train.sh", *settings]
        jobs.append(Job(subprocess.run(sbatch, capture_output=True, text=True, check=True).stdout.strip(), directory))
        return jobs[-1]

    yield submit
    for options in (["--signal=KILL"], []):
        subprocess.run(["scancel", *options, *(job.id for job in jobs)], stderr=subprocess.DEVNULL)
    for job in jobs:  # or their steps would wait for daemons that are gone
        job.wait()


def test_cancelled_killed_and_many_jobs(submit: Submit, tmp_path: Path, root: Path, start: Start) -> None:
    """At once, since each takes seconds to start."""
    settings = [*small(root)[1:], "--trainer.precision=64-true", "--model.hidden_dim=50", "--test_after_fit=false"]
    forever = [*settings, "--trainer.max_epochs=100000"]
    cancelled, killed = submit(tmp_path / "cancelled", forever), submit(tmp_path / "killed", forever)
    many = submit(tmp_path / "many", [*settings, "--trainer.max_steps=1"], "--array=0-3", "--ntasks-per-node=1")

    run = cancelled.wait_until_it_trains()
    subprocess.run(["scancel", "--signal=TERM", cancelled.id], check=True)
    assert cancelled.wait() == ("FAILED", "143"), cancelled.output()
    assert "ckpt_path auto: starts, as no run with these settings is unfinished\n" in cancelled.output()
    assert "Stopped and saved at iteration" in cancelled.output()
    assert (run / "unfinished").exists()

    killed.wait_until_it_trains()
    os.kill(killed.tasks()[-1], signal.SIGKILL)
    since = time.monotonic()
    state, code = killed.wait()  # 143 where --kill-on-bad-exit was sooner than the other process
    assert state == "FAILED", killed.output()
    assert code in ("137", "143")
    assert time.monotonic() - since < 60

    # The weights are those of one process that stops at the same iteration.
    steps = f"--trainer.max_steps={last(cancelled.directory)['global_step']}"
    one = tmp_path / "one"
    assert ended([start(one, ["fit", *settings, steps, "--trainer.max_epochs=-1"])]) == [0]
    assert difference(one, cancelled.directory) < 1e-10

    poll(lambda: many.output().count("Run: lightning_logs") == 4, "four runs")
    assert sorted(path.name for path in many.directory.glob("lightning_logs/*")) == [f"version_{i}" for i in range(4)]


@pytest.mark.slow
def test_a_time_limit(submit: Submit, tmp_path: Path, root: Path) -> None:
    settings = [*small(root)[1:], "--test_after_fit=false", "--trainer.max_epochs=100000"]
    # SLURM counts in minutes, and may signal a minute early: from 75 seconds after the start on.
    job = submit(tmp_path / "limited", settings, "--time=3", "--signal=TERM@45", "--ntasks-per-node=1")
    assert job.wait(300) == ("FAILED", "143"), job.output()
    assert "Stopped and saved at iteration" in job.output()


@pytest.mark.slow
def test_a_job_that_is_killed_and_requeued_goes_on_by_itself(
    submit: Submit,
    tmp_path: Path,
    root: Path,
    start_all: StartAll,  # noqa: F811
) -> None:
    settings = [*small(root)[1:], "--checkpoint_every=3", "--model.dropout=0.2", "--model.hidden_dim=50"]
    settings += ["--trainer.max_epochs=100", "--test_after_fit=false", "--trainer.log_every_n_steps=7"]
    whole = tmp_path / "whole"
    assert ended(start_all(whole, ["fit", *settings], 2), 300) == [0, 0]
    job = submit(tmp_path / "killed", settings, "--open-mode=append")
    random_ = random.Random(0)
    for deaths in range(3):
        if deaths:
            poll(lambda: job.output().count("parameters on cpu") >= deaths, "training")  # noqa: B023
        poll(job.tasks, "task")
        time.sleep(random_.uniform(0, 3))
        for task in random_.sample(job.tasks(), 1):
            os.kill(task, signal.SIGKILL)
        assert job.wait()[0] == "FAILED"
        subprocess.run(["scontrol", "requeue", job.id], check=True)
        # In place of two minutes. In the second in which it ended SLURM would refuse the job ("credential revoked").
        time.sleep(3)
        subprocess.run(["scontrol", "update", f"JobId={job.id}", "StartTime=now"], check=True)
    assert job.wait(180) == ("COMPLETED", "0"), job.output()
    assert RESUMES in job.output()
    assert_the_same(newest_run(whole), newest_run(job.directory))
    assert last(job.directory)["global_step"] == 1100
