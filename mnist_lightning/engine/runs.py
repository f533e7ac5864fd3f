"""The directories of runs, `lightning_logs/version_N`: the Trainer's own, its lock, and how others are found."""

import contextlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from filelock import FileLock, Timeout

from .console import JobError, UsageError

if TYPE_CHECKING:
    import lightning.pytorch as pl

RUNS = "lightning_logs"
"""Directory of the runs, by default."""

# What two runs have in common where one may go on with the other.
IDENTITY = ("model", "data", "seed_everything", "optimizer", "lr_scheduler")


class CheckpointError(JobError):
    """A checkpoint cannot be found or written, or must not be loaded; the message names it and says why."""


def run_directory(trainer: "pl.Trainer") -> Path | None:
    """The directory of the run, that of `checkpoints/`.

    None where nothing is logged, as in `fast_dev_run`, and in all processes but the first, which write no files.
    """
    if not trainer.loggers or trainer.fast_dev_run or not trainer.is_global_zero:  # type: ignore[attr-defined]
        return None
    logger = trainer.loggers[0]
    if logger.log_dir is not None:
        return Path(logger.log_dir)
    version = logger.version if isinstance(logger.version, str) else f"version_{logger.version}"
    directory = Path(logger.save_dir or trainer.default_root_dir, str(logger.name), version)
    directory.mkdir(parents=True, exist_ok=True)
    return directory


def runs_directory(trainer: Any) -> Path:
    """Where a Trainer with these settings writes its runs: by the first logger of the user's, or by ours.

    Raises:
        UsageError: It is no local directory.
    """
    loggers = trainer.logger if isinstance(trainer.logger, list) else [trainer.logger]
    given = loggers[0].get("init_args", {}) if hasattr(loggers[0], "get") else {}
    root = str(given.get("save_dir") or trainer.default_root_dir or ".")
    for place in (root, *re.findall(r"dirpath='(.*?)'", str(trainer.callbacks))):
        if "://" in place:
            raise UsageError(f"{place}: runs and checkpoints can only be written to a local directory; give one")
    return Path(root).expanduser() / (given.get("name", RUNS) or "")


class RunLock:
    """A lock on a run's directory while a process trains or tests it, and the file `unfinished` until that is done.

    The lock is a file of its own: where it is given back on Windows, it is gone.
    """

    _lock: FileLock | None = None
    is_new = False
    """Whether the run was not unfinished before."""

    def acquire(self, run: Path) -> None:
        """Take the lock.

        Raises:
            JobError: Another process holds it.
        """
        if self._lock is None:
            self._lock, self._unfinished = _acquire(run), run / "unfinished"
            if self._lock is None:
                raise JobError(f"another process is training in {run}")
            self.is_new = not self._unfinished.exists()
            self._unfinished.touch()

    def release(self, is_done: bool) -> None:
        """Give the lock back, and remove the files where the run is done."""
        if self._lock is not None:
            self._lock.release()
            if is_done:
                for path in (self._unfinished, Path(self._lock.lock_file)):
                    path.unlink(missing_ok=True)
            self._lock = None


def _acquire(run: Path) -> FileLock | None:
    """A run's lock, or None where another process holds it."""
    # It waits: another process of this job may be looking whether the lock is free.
    lock = FileLock(run / ".lock", timeout=1, thread_local=False)
    try:
        lock.acquire()
    except Timeout:
        return None
    except (OSError, NotImplementedError):
        pass  # the file system has no locks
    return lock


def find_checkpoint(name: str, runs: Path) -> Path:
    """The file that `best` or `last` of the newest run that trained means, or a path.

    Raises:
        CheckpointError: There is none.
    """
    if name not in ("best", "last"):
        path = Path(name).expanduser()
        if not path.is_file():
            raise CheckpointError(f"there is no checkpoint {name}")
        return path
    # Each run has the two, if it was validated; what only tests has a directory too, and no checkpoints.
    kinds = ("checkpoints/best.ckpt", "checkpoints/last.ckpt")
    newest = next((run for run in _numbered(runs) if any((run / kind).exists() for kind in kinds)), None)
    if newest is None:
        raise CheckpointError(f"there is no {name}.ckpt of any run in {runs} yet; train one with `fit`")
    path = newest / "checkpoints" / f"{name}.ckpt"
    if not path.is_file():
        ways = "give `last`, or a path for another run's" if name == "best" else "give a path"
        raise CheckpointError(f"there is no {path}: the newest run has not come to it; {ways}")
    return path


def find_unfinished(runs: Path, settings: Mapping[str, Any]) -> Path | None:
    """The checkpoint `last.ckpt` of the newest unfinished run that has the same settings and that no process holds.

    Args:
        runs: Directory of the runs.
        settings: As `config.yaml` would have them; those of `IDENTITY` have to be the same.
    """
    for run in _numbered(runs):
        last = run / "checkpoints" / "last.ckpt"
        if not (run / "unfinished").is_file() or not last.is_file():
            continue
        with contextlib.suppress(OSError, ValueError, yaml.YAMLError, AttributeError):
            config = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
            is_same = all(config.get(name) == settings.get(name) for name in IDENTITY)
            if is_same and (lock := _acquire(run)):
                lock.release()
                return last
    return None


def _numbered(runs: Path) -> list[Path]:
    """The directories `version_N`, the newest first."""
    numbered = {int(match[1]): path for path in runs.glob("*") if (match := re.fullmatch(r"version_(\d+)", path.name))}
    return [numbered[number] for number in sorted(numbered, reverse=True)]
