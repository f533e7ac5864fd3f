"""What surrounds the commands of a Trainer: silence about what no user can act on, and how a run ends early."""

import logging
import re
import shlex
import sys
import threading
import warnings
from collections.abc import Callable

from lightning.fabric.utilities.exceptions import MisconfigurationException

from . import processes
from .checkpoints import Stopped
from .cli import CLI
from .parser import UsageError
from .run import PROGRAM, rank, say

# Lightning announces itself, and says what our own lines say.
SILENT = re.compile(
    r"(GPU|TPU|HPU|IPU) available|💡 Tip|Seed set to|`Trainer\.fit` stopped: `max_|Restor(ing|ed) (all )?states"
    r"|Loaded model weights|Loading `train_dataloader`|Initializing distributed|distributed_backend=|`Trainer\(limit_"
)

DEFAULT_HOOK = threading.excepthook


def run(cli: Callable[[], CLI]) -> int:
    """Run one of Lightning's commands, by `cli`; return 0, or 128 + the number of a signal that ended training.

    Raises:
        UsageError: The command or the config is wrong.
        Exception: The job failed.
    """
    _silence_what_no_user_can_act_on()
    processes.end_with_launcher()
    threading.excepthook = _say_of_thread
    try:
        cli()
        return 0
    except Stopped as stopped:
        config = ["--config", str(stopped.run / "config.yaml")] if stopped.run else []
        script = sys.argv[0]
        own = script.endswith(".py") and not script.endswith("__main__.py")
        program = [script] if own else ["-m", PROGRAM]
        resume = ["python", *program, "fit", *config, "--ckpt_path", str(stopped.checkpoint)]
        say(f"Stopped and saved at iteration {stopped.iteration:,}; to go on:\n{shlex.join(resume)}")
        # The first process answers for all; Lightning would kill it, should it see that another one has failed.
        return 128 + stopped.signum if rank() == 0 else 0
    except MisconfigurationException as error:
        raise UsageError(str(error)) from error
    except Exception as error:
        if processes.is_lost(error):
            lost = "another process of the run has ended or does not answer; to go on: --ckpt_path last"
            raise RuntimeError(lost) from error
        raise


def _say_of_thread(error: threading.ExceptHookArgs) -> None:
    # On a full disk TensorBoard's writer fails in a thread, and then again where it is called.
    if not issubclass(error.exc_type, OSError):
        DEFAULT_HOOK(error)


def _is_said(record: logging.LogRecord) -> bool:
    return not SILENT.search(record.getMessage())


def _silence_what_no_user_can_act_on() -> None:
    for name in ("lightning.pytorch", "lightning.fabric"):
        for handler in logging.getLogger(name).handlers:
            handler.addFilter(_is_said)  # the same function is added once
    for message in (
        r".*`torch.jit.trace",  # TensorBoard's graph, inside PyTorch
        r".*`isinstance\(treespec, LeafSpec\)` is deprecated",  # inside Lightning
        r"The number of training batches .* is smaller than the logging interval",  # a short run is no mistake
        r"Checkpoint directory .* exists and is not empty",  # of the run that is being resumed
        r"The `srun` command is available on your system",  # also on a machine that only hands jobs in
        r"(?s)\s*Unable to serialize instance",  # `config.py` writes it all the same
        r"Be aware that when using `ckpt_path`, callbacks",  # only `fit` writes checkpoints
    ):
        warnings.filterwarnings("ignore", message)
