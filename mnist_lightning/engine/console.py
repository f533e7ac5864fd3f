"""What a command says, and how it ends: lines, errors in one line, exit codes. It starts without PyTorch."""

import atexit
import contextlib
import gc
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TextIO

from lightning_utilities.core.rank_zero import rank_zero_only  # where Lightning keeps this process's rank

PROGRAM = __name__.partition(".")[0]

GC_THRESHOLDS = gc.get_threshold()  # which differ by Python's version; a command that imports has others

# Of `LightningCLI`, whose import takes seconds.
TRAINER_COMMANDS = {
    "fit": "Train and test.",
    "validate": "Measure the validation split again.",
    "test": "Measure the test split again.",
    "predict": "Predict the test split.",
}

Command = Callable[[list[str]], None]


class JobError(Exception):
    """The job failed, and the message tells a user why and what to do: one line, and exit code 1."""


class UsageError(JobError):
    """The command or the config is wrong; the message names the setting and what to do: one line, and exit code 2."""


class Stopped(Exception):  # noqa: N818 (no error, as StopIteration is none)
    """A signal ended training, and all is saved. Its arguments are the signal's number and what to say of it."""


def run_command(train: Callable[[], None], commands: Mapping[str, Command], description: str) -> int:
    """Run the command line. It leaves the process as it was.

    Args:
        train: Imports Lightning, parses the command line, and runs one of `TRAINER_COMMANDS`.
        commands: Other commands by their names; each gets the arguments after its name.
        description: For `--help`.

    Returns:
        0 when done, 1 when the job failed, 2 when the command or config was wrong, 128 + the number of a signal.

    Raises:
        Exception: There is a bug, ours or the user's: Python shows where.
    """
    environment, thresholds = dict(os.environ), gc.get_threshold()
    gc.set_threshold(100_000)  # imports make much that stays: looking through it again and again takes a second
    if "ipykernel" not in sys.modules:
        # A notebook's `!python -m ...` inherits its variable, which may name a backend that is not installed here.
        os.environ["MPLBACKEND"] = "agg"
    with contextlib.redirect_stdout(_opened(sys.stdout)), contextlib.redirect_stderr(_opened(sys.stderr)):
        try:
            return _exit_code(train, commands, description)
        finally:
            say("", end="")  # flushes what others have printed
            os.environ.clear()
            os.environ.update(environment)
            gc.set_threshold(*thresholds)


def exit_early(main: Callable[[], int]) -> None:
    """Run a whole program, and exit as soon as all exit functions have run.

    Python would free each object first: 1.9 s after a `fit`, 1.5 s after an import of Lightning alone.
    """
    code = 1  # after a traceback

    def leave() -> None:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(AttributeError, OSError, ValueError):  # it is missing, or nobody reads it any more
                stream.flush()
        os._exit(code)

    atexit.register(leave)  # before all others, and so run after them
    code = main()


def _opened(stream: TextIO | None) -> TextIO:
    """A standard stream, or where it is missing or closed, as in a program without a console, one to nowhere."""
    return stream if stream and not stream.closed else open(os.devnull, "w")  # noqa: PTH123


def _exit_code(train: Callable[[], None], commands: Mapping[str, Command], description: str) -> int:
    try:
        _dispatch(train, commands, description)
        return 0
    except (SystemExit, KeyboardInterrupt) as end:
        # Lightning answers Ctrl-C with the first.
        if isinstance(end, KeyboardInterrupt) or isinstance(end.__context__, KeyboardInterrupt):
            return _fail("interrupted", 128 + signal.SIGINT)
        return end.code if isinstance(end.code, int) else 0  # 0 after `--help`
    except Stopped as stopped:
        signum, message = stopped.args
        say(message)
        # The first process answers for all; Lightning would kill it, should it see that another one has failed.
        return 128 + int(signum) if rank() == 0 else 0
    except (JobError, OSError) as error:
        if isinstance(error, OSError) and error.filename is None:
            raise
        return _fail(error, 2 if isinstance(error, UsageError) else 1)


def _dispatch(train: Callable[[], None], commands: Mapping[str, Command], description: str) -> None:
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if command := commands.get(name):
        command(sys.argv[2:])
    elif name in ("-h", "--help"):
        listed = TRAINER_COMMANDS | {name: str(each.__doc__).partition("\n")[0] for name, each in commands.items()}
        lines = [f"  {name:<10}{does}" for name, does in listed.items()]
        usage = f"usage: python -m {PROGRAM} COMMAND [SETTINGS]"
        say("\n".join([usage, "", description, "", *lines, "", "Each lists its settings with COMMAND --help."]))
    elif name in TRAINER_COMMANDS:
        train()
    else:
        # Lightning's error would name its own commands only, and not say that the settings after a command are its own.
        names = [*TRAINER_COMMANDS, *commands]
        if name.startswith("-"):
            command_name = next((argument for argument in sys.argv if argument in names), names[0])
            raise UsageError(f"the command comes first, and its settings after it: {command_name} {name}")
        problem = f"there is no command {name}" if name else "a command is missing"
        raise UsageError(f"{problem}; give {', '.join(names[:-1])} or {names[-1]}")


def _fail(error: Exception | str, code: int) -> int:
    # A damaged file's content must not reach the terminal's control codes, nor a closed console hide the exit code.
    message = printable(" ".join(str(error).split())) or type(error).__name__
    if rank():
        time.sleep(3)  # where all fail, the first one speaks for all: torchrun mostly ends this one before
        message = f"process {rank()}: {message}"
    with contextlib.suppress(OSError):
        print(f"{PROGRAM}: {message}", file=sys.stderr, flush=True)
    return code


def command_line(*arguments: str) -> str:
    """A command of this program, as it was started, to be typed again."""
    script = sys.argv[0]
    program = ["python", "-m", PROGRAM] if script.endswith("__main__.py") else ["python", script]
    if not script.endswith(".py"):  # pip's, on the path
        program = [Path(script).stem]
    words = [*program, *arguments]
    return subprocess.list2cmdline(words) if sys.platform == "win32" else shlex.join(words)


def rank() -> int:
    """This process's number among those of the run; 0 is the first, or the only one, also before there is a Trainer."""
    return getattr(rank_zero_only, "rank", 0)


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


@contextlib.contextmanager
def say_if_it_fails(what: str) -> Iterator[None]:
    """Do what a run does not depend on: where it fails, say in a line `what` there is not, and why."""
    try:
        yield
    except Exception as error:  # whatever others' code may raise
        text = " ".join(str(error).partition("\n")[0].split())
        say(f"{what}: {text if isinstance(error, ValueError) and text else f'{type(error).__name__}: {text}'}")
