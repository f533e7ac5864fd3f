"""`--ckpt_path auto`: go on where this job was, or start.

A run's directory holds `unfinished.json` until its `fit` is done: the job that began it, and its model, data and seed.
"""

import contextlib
import json
import os
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from . import processes
from .run import PROGRAM, lock, numbered_runs, rank, run_directory, say
from .tensorboard import RunLogger

UNFINISHED = "unfinished.json"
DECISION = f"{PROGRAM.upper()}_AUTO"


def job() -> str | None:
    """What names this job also after it was restarted: SLURM's id or torchrun's `--rdzv-id`, if it has one."""
    if "SLURM_JOB_ID" in os.environ:
        return f"slurm {os.environ.get('SLURM_CLUSTER_NAME', '')} {os.environ['SLURM_JOB_ID']}"
    run = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    return None if run == "none" else f"torchrun {run}"


def begin(trainer: pl.Trainer, config: Any) -> None:
    """Let the run's directory say from its first moment on what was begun with `fit`'s settings."""
    if isinstance(trainer.logger, RunLogger):
        content = json.dumps({"job": job(), "settings": _settings(config)}, indent=4)
        trainer.logger.unfinished = UNFINISHED, content


def finish(trainer: pl.Trainer) -> None:
    """Note that `fit` is done."""
    if run := run_directory(trainer):
        (run / UNFINISHED).unlink(missing_ok=True)


def find(runs: Path, config: Any) -> tuple[str | None, Path | None, int | None]:
    """Decide in the first process, for all, what `fit` goes on with.

    It is the newest run of this job or, where there is no job, of anybody, that is unfinished, has the same settings of
    model, data and seed, and is held by no other process.

    Returns:
        The checkpoint, or None where there is none; in the first process also the run's directory, and its lock.
    """
    launcher = processes.launcher()
    environment = launcher() if launcher else None
    number = environment.global_rank() if environment else rank()
    run, held = _newest(runs, _settings(config)) if number == 0 else (None, None)
    last = run / "checkpoints" / "last.ckpt" if run else None
    checkpoint = str(last) if last and last.is_file() else None
    devices = config.trainer.devices
    # A script that asked SLURM for many processes may run a single one.
    several = str(len(devices) if isinstance(devices, list) else devices) != "1" or config.trainer.num_nodes > 1
    if environment and several:
        decision = [checkpoint]
        processes.meet(environment, config.trainer.accelerator)
        torch.distributed.broadcast_object_list(decision)
        checkpoint = decision[0]
    elif number == 0:
        os.environ[DECISION] = checkpoint or ""  # for the processes that Lightning starts
    else:
        checkpoint = os.environ.get(DECISION) or None
    if number == 0:
        for curves in run.glob("events.out.tfevents.*") if run and not checkpoint else ():
            curves.unlink()
        whose = "of this job" if job() else "with this model, data and seed"
        anew = f"begins {run} again, which has no checkpoint yet" if run else f"no unfinished run {whose}, starts anew"
        say(f"ckpt_path auto: {f'goes on from {checkpoint}' if checkpoint else anew}")
    return checkpoint, run, held


def _newest(runs: Path, settings: Any) -> tuple[Path | None, int | None]:
    for run in numbered_runs(runs):
        with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
            begun = json.loads((run / UNFINISHED).read_text())
            if begun["settings"] == settings and job() in (None, begun["job"]):
                return run, lock(run)
    return None, None


def _settings(config: Any) -> Any:
    settings = {name: part for name, part in config.as_dict().items() if name in ("model", "data", "seed_everything")}
    return json.loads(json.dumps(settings, default=str))
