"""What becomes of others' errors and lines: one line for what a user can mend, silence for what nobody can act on."""

import contextlib
import logging
import os
import re
import signal
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path

import jsonargparse
import lightning
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.exceptions import SIGTERMException

from . import processes
from .console import JobError, Stopped, UsageError
from .parser import one_line

# Lightning announces itself, and says what our own lines say.
NOISE = re.compile(
    r"(GPU|TPU|HPU|IPU) available|💡 Tip|Seed set to|`Trainer\.fit` stopped: `max_|Restor(ing|ed) (all )?states"
    r"|Loaded model weights|Loading `train_dataloader`|distributed_backend=|`Trainer\(limit_|LOCAL_RANK: \d+ - CUDA"
    r"|You are using a CUDA device .* Tensor Cores|Using (16bit|bfloat16)"
)
NOISY_WARNINGS = (
    r".*`torch.jit.trace",  # TensorBoard's graph, inside PyTorch
    r".*`isinstance\(treespec, LeafSpec\)` is deprecated",  # inside Lightning
    r"The number of training batches .* is smaller than the logging interval",  # a short run is no mistake
    r"Checkpoint directory .* exists and is not empty",  # of the run that is being resumed
    r"The `srun` command is available on your system",  # also on a machine that only hands jobs in
    r"Be aware that when using `ckpt_path`, callbacks",  # only `fit` writes checkpoints
)

# Where Lightning does not name the setting, or names another way than the one that works here.
CLEARER = {
    "No supported gpu backend|accelerator is not available": (
        "trainer.accelerator: this machine has no such device; give --trainer.accelerator cpu"
    ),
    "not compatible with an interactive environment": processes.SEVERAL,
}


@contextlib.contextmanager
def in_one_line() -> Iterator[None]:
    """Raise what Lightning, PyTorch and jsonargparse refuse as a `UsageError` or `JobError`; leave bugs as they are."""
    try:
        yield
    except MisconfigurationException as error:
        message = str(error)
        raise UsageError(next((CLEARER[each] for each in CLEARER if re.search(each, message)), message)) from error
    except (JobError, Stopped):
        raise
    except SIGTERMException as error:  # outside of training, where nothing is to be saved
        raise Stopped(signal.SIGTERM, "Stopped by SIGTERM") from error
    except Exception as error:
        if not has_user_code(error):
            frames = traceback.extract_tb(error.__traceback__)
            if any(re.match(r"_?restore_|load_state_dict", frame.name) for frame in frames):
                cause = f"{type(error).__name__}: {error}"
                raise JobError(f"ckpt_path: the checkpoint cannot be loaded: {cause}") from error
            if isinstance(error, ValueError | TypeError | ImportError):  # one of Lightning's checks
                raise UsageError(one_line(str(error))) from error
        if "address already in use" in str(error).lower():
            used = f"port {os.environ.get('MASTER_PORT')} is in use, maybe by another run"
            raise JobError(f"{used}; set MASTER_PORT to a free one, or unset it") from error
        if processes.is_lost(error):
            lost = "another process of the run has ended or does not answer; to resume: --ckpt_path last"
            raise JobError(lost) from error
        raise


def has_user_code(error: Exception) -> bool:
    """Whether a file outside of this folder, Lightning and its libraries led to an error, or to what led to it."""
    modules = (lightning.__file__, torch.__file__, jsonargparse.__file__, __file__)
    libraries = tuple(f"{Path(str(module)).parent}{os.sep}" for module in modules)
    cause = error.__cause__ or error.__context__
    is_library = all(each.filename.startswith(libraries) for each in traceback.extract_tb(error.__traceback__))
    return not is_library or (isinstance(cause, Exception) and has_user_code(cause))


@contextlib.contextmanager
def without_noise() -> Iterator[None]:
    """Leave out Lightning's lines and warnings that no user can act on."""

    def is_wanted(record: logging.LogRecord) -> bool:
        return not NOISE.search(record.getMessage())

    with warnings.catch_warnings(), contextlib.ExitStack() as at_the_end:
        warnings.filterwarnings("ignore", "|".join(NOISY_WARNINGS))
        for part in ("pytorch", "fabric"):
            for handler in logging.getLogger(f"lightning.{part}").handlers:
                handler.addFilter(is_wanted)
                at_the_end.callback(handler.removeFilter, is_wanted)
        yield
