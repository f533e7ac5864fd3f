"""What surrounds every command: exit codes, errors as one line, and silence about what no user can act on."""

import contextlib
import logging
import os
import re
import shlex
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path

from lightning.fabric.utilities.exceptions import MisconfigurationException

from . import processes
from .checkpoints import Stopped
from .cli import CLI
from .parser import UsageError, did_you_mean
from .processes import PROGRAM
from .run import printable, say

# Lightning announces itself, and says what our own lines say.
SILENT = re.compile(
    r"(GPU|TPU|HPU|IPU) available|💡 Tip|Seed set to|`Trainer\.fit` stopped: `max_|Restor(ing|ed) (all )?states"
    r"|Loaded model weights|Loading `train_dataloader`|Initializing distributed|distributed_backend=|`Trainer\(limit_"
)


def main(cli: Callable[[], CLI], commands: Mapping[str, Callable[[list[str]], None]]) -> int:
    """Run the command line.

    Args:
        cli: Parses the command line and runs one of Lightning's commands.
        commands: Other commands by their names; each gets the arguments after its name.

    Returns:
        0 when done, 1 when the job failed, 2 when the command or config was wrong, 128 + the number of a signal. Of
        several processes, none returns: each exits with it.
    """
    code = _run(cli, commands)
    processes.leave(code)
    return code


def _run(cli: Callable[[], CLI], commands: Mapping[str, Callable[[list[str]], None]]) -> int:
    _silence_what_no_user_can_act_on()
    processes.end_with_launcher()
    if not _debugs():
        # TensorBoard's: on a full disk its writer fails in a thread, and then again where it is called.
        default = threading.excepthook
        threading.excepthook = lambda error: None if issubclass(error.exc_type, OSError) else default(error)
    signal.signal(signal.SIGTERM, lambda signum, frame: sys.exit(128 + signum))
    try:
        name = sys.argv[1] if len(sys.argv) > 1 else ""
        if command := commands.get(name):
            command(sys.argv[2:])
        else:
            _check_command(name, [*CLI.subcommands(), *commands])
            cli()
        return 0
    except Stopped as stopped:
        run = stopped.run
        config = ["--config", str(run / "config.yaml")] if run and (run / "config.yaml").exists() else []
        script = Path(sys.argv[0])
        own = script.suffix == ".py" and script.name != "__main__.py"
        program = [str(script)] if own else ["-m", PROGRAM]
        resume = ["python", *program, "fit", *config, "--ckpt_path", str(stopped.checkpoint)]
        say(f"Stopped and saved at iteration {stopped.iteration:,}; to go on:\n{shlex.join(resume)}")
        # The first process answers for all; Lightning would kill it, should it see that another one has failed.
        return 128 + stopped.signum if processes.rank() == 0 else 0
    except KeyboardInterrupt:
        return _fail("interrupted", 128 + signal.SIGINT)
    except SystemExit as exit_:
        if isinstance(exit_.__context__, KeyboardInterrupt):  # Lightning's way to end
            return _fail("interrupted", 128 + signal.SIGINT)
        raise
    except (UsageError, MisconfigurationException) as error:
        return _fail(error, 2)
    except Exception as error:
        if isinstance(error, OSError) and error.filename is None:  # of a file written to, not opened
            error = OSError(f"a file of the run cannot be written: {error.strerror or error}")
        elif processes.is_lost(error):
            error = RuntimeError("another process of the run has ended or does not answer; to go on: --ckpt_path last")
        return _fail(error, 1)


def _debugs() -> bool:
    return os.environ.get(f"{PROGRAM.upper()}_DEBUG") == "1"


def _check_command(name: str, names: list[str]) -> None:
    # Lightning's error would name its own commands only.
    if name in names or name.startswith("-"):  # settings may come before the command
        return
    problem = f"there is no command {name}" if name else "a command is missing"
    raise UsageError(problem + did_you_mean(name, names, f"; give {', '.join(names[:-1])} or {names[-1]}"))


def _silence_what_no_user_can_act_on() -> None:
    for name in ("lightning.pytorch", "lightning.fabric"):
        for handler in logging.getLogger(name).handlers:
            handler.addFilter(lambda record: not SILENT.search(record.getMessage()))
    for message in (
        r".*`torch.jit.trace",  # TensorBoard's graph, inside PyTorch
        r".*`isinstance\(treespec, LeafSpec\)` is deprecated",  # inside Lightning
        r"The number of training batches .* is smaller than the logging interval",  # a short run is no mistake
        r"Checkpoint directory .* exists and is not empty",  # of the run that is being resumed
        r"LightningCLI's args parameter is intended to run from within Python",  # to add a run's own config
        r"Be aware that when using `ckpt_path`, callbacks",  # only `fit` writes checkpoints
    ):
        warnings.filterwarnings("ignore", message)


def _fail(error: Exception | str, code: int) -> int:
    if _debugs() and isinstance(error, Exception):
        raise error
    message = " ".join(str(error).split()) or type(error).__name__
    # A damaged file's content must not reach the terminal's control codes, nor a closed console hide the exit code.
    message = printable(message)
    if rank := processes.rank():
        # Where all fail, the first one speaks for all: torchrun, and `end_with_launcher`, mostly end this one before.
        time.sleep(3)
        message = f"process {rank}: {message}"
    with contextlib.suppress(OSError):
        print(f"{PROGRAM}: {message}", file=sys.stderr, flush=True)
    return code
