"""Where a run writes its files, and how it speaks on the console."""

import os
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_utilities.core.rank_zero import rank_zero_only  # where Lightning keeps this process's rank

if TYPE_CHECKING:
    import lightning.pytorch as pl

PROGRAM = __name__.partition(".")[0]

RUNS = "lightning_logs"
"""Directory of the runs, by default."""


def rank() -> int:
    """This process's number among those of the run; 0 is the first, or the only one, also before there is a Trainer."""
    return getattr(rank_zero_only, "rank", 0)


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


def numbered_runs(runs: Path) -> list[Path]:
    """The directories `version_N`, the newest first."""
    numbered = {int(match[1]): path for path in runs.glob("*") if (match := re.fullmatch(r"version_(\d+)", path.name))}
    return [numbered[number] for number in sorted(numbered, reverse=True)]


def lock(directory: Path, wait: bool = False) -> int | None:
    """Lock a directory; return the file descriptor that holds the lock, or None where the system has none.

    Raises:
        BlockingIOError: Another process holds it, and this one does not wait.
    """
    if sys.platform == "win32":
        return None
    import fcntl  # Windows has none

    descriptor = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        os.close(descriptor)
        raise
    except OSError:
        pass  # a file system without locks
    return descriptor


def say(line: str, end: str = "\n") -> None:
    """Print a line, in the first process, with "?" for what the console lacks.

    Where nobody reads any more, as after `| head`, training goes on without.
    """
    if rank():
        return
    encoding = sys.stdout.encoding or "utf-8"
    try:
        print(line.encode(encoding, "replace").decode(encoding), end=end, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def printable(text: str, encoding: str = "utf-8") -> str:
    """Untrusted text, without control codes that a terminal would obey, and without what an encoding lacks."""
    text = "".join(character if character.isprintable() else "?" for character in text)
    return text.encode(encoding, "replace").decode(encoding)
