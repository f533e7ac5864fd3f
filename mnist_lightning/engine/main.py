"""What surrounds every command: exit codes, errors as one line, and an early end. It starts without Lightning."""

import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping

from .parser import UsageError, did_you_mean
from .run import PROGRAM, printable, rank, say

# Of `LightningCLI`, whose import takes seconds.
TRAINER_COMMANDS = {
    "fit": "Train and test.",
    "validate": "Measure the validation split again.",
    "test": "Measure the test split again.",
    "predict": "Predict the test split.",
}


def main(train: Callable[[], int], commands: Mapping[str, Callable[[list[str]], None]], description: str) -> int:
    """Run the command line.

    Args:
        train: Imports Lightning, parses the command line, runs one of `TRAINER_COMMANDS`, and returns the exit code.
        commands: Other commands by their names; each gets the arguments after its name.
        description: For `--help`.

    Returns:
        0 when done, 1 when the job failed, 2 when the command or config was wrong, 128 + the number of a signal. Of
        several processes, none returns: each exits with it.
    """
    if "ipykernel" not in sys.modules:
        # A notebook's `!python -m ...` inherits its variable, which may name a backend that is not installed here.
        os.environ["MPLBACKEND"] = "agg"
    code = _run(train, commands, description)
    say("", end="")  # flushes what others have printed
    torch = sys.modules.get("torch")
    if torch and torch.distributed.is_initialized():
        # PyTorch's threads may outlive the interpreter and abort it: in 4 of 180 processes that did nothing else.
        os._exit(code)
    return code


def _run(train: Callable[[], int], commands: Mapping[str, Callable[[list[str]], None]], description: str) -> int:
    signal.signal(signal.SIGTERM, lambda signum, frame: sys.exit(128 + signum))
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    try:
        if command := commands.get(name):
            command(sys.argv[2:])
        elif name in ("-h", "--help"):
            say(_help(commands, description))
        elif name in TRAINER_COMMANDS:
            return train()
        else:
            raise UsageError(_wrong_command(name, [*TRAINER_COMMANDS, *commands]))
        return 0
    except KeyboardInterrupt:
        return _fail("interrupted", 128 + signal.SIGINT)
    except SystemExit as exit_:
        if isinstance(exit_.__context__, KeyboardInterrupt):  # Lightning's way to end
            return _fail("interrupted", 128 + signal.SIGINT)
        return exit_.code if isinstance(exit_.code, int) else 0  # of SIGTERM, or 0 after `--help`
    except UsageError as error:
        return _fail(error, 2)
    except Exception as error:
        if isinstance(error, OSError) and error.filename is None:  # of a file written to, not opened
            error = OSError(f"a file of the run cannot be written: {error.strerror or error}")
        return _fail(error, 1)


def _help(commands: Mapping[str, Callable[[list[str]], None]], description: str) -> str:
    listed = TRAINER_COMMANDS | {name: str(command.__doc__).partition("\n")[0] for name, command in commands.items()}
    lines = [f"  {name:<10}{does}" for name, does in listed.items()]
    usage = f"usage: python -m {PROGRAM} COMMAND [SETTINGS]"
    return "\n".join([usage, "", description, "", *lines, "", "Each lists its settings with COMMAND --help."])


def _wrong_command(name: str, names: list[str]) -> str:
    # Lightning's error would name its own commands only, and not say that the settings after a command are its own.
    if name.startswith("-"):
        command = next((argument for argument in sys.argv if argument in names), names[0])
        return f"the command comes first, and its settings after it: {command} {name}"
    problem = f"there is no command {name}" if name else "a command is missing"
    return problem + did_you_mean(name, names, f"; give {', '.join(names[:-1])} or {names[-1]}")


def _fail(error: Exception | str, code: int) -> int:
    if os.environ.get(f"{PROGRAM.upper()}_DEBUG") == "1" and isinstance(error, Exception):
        raise error
    # A damaged file's content must not reach the terminal's control codes, nor a closed console hide the exit code.
    message = printable(" ".join(str(error).split())) or type(error).__name__
    if rank():
        # Where all fail, the first one speaks for all: torchrun, and `end_with_launcher`, mostly end this one before.
        time.sleep(3)
        message = f"process {rank()}: {message}"
    with contextlib.suppress(OSError):
        print(f"{PROGRAM}: {message}", file=sys.stderr, flush=True)
    return code
