"""Several processes: what Lightning's distributed engine leaves to a project. With one process, skip this file."""

import os
import threading
import time
from datetime import timedelta

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor
from torch.distributed import distributed_c10d
from torch.distributed.constants import default_pg_timeout
from torchmetrics.utilities.distributed import gather_all_tensors

# A process that did not answer for so long is taken for dead. PyTorch's half an hour is kept for the start, where one
# machine may still be importing while another one waits.
PATIENCE = timedelta(seconds=50)

LAUNCHER = "MNIST_LIGHTNING_LAUNCHER"


def rank() -> int:
    """This process's number among those of the run; 0 is the first, or the only one."""
    return getattr(rank_zero_only, "rank", 0)


def check(trainer: pl.Trainer) -> None:
    """Refuse a Trainer whose processes would not work together.

    Raises:
        MisconfigurationException: Its strategy is another one than `ddp`, or the launcher has started another number of
            processes than its settings say.
    """
    for environment in (TorchElasticEnvironment, SLURMEnvironment):
        if environment.detect() and (started := environment().world_size()) != trainer.world_size:
            raise MisconfigurationException(
                f"{started} processes were started, but trainer.devices times trainer.num_nodes is "
                f"{trainer.world_size}; give the number of processes on each machine and the number of machines"
            )
    strategy = trainer.strategy
    if not isinstance(strategy, SingleDeviceStrategy) and not (
        isinstance(strategy, DDPStrategy) and strategy._start_method == "popen"
    ):
        raise MisconfigurationException("trainer.strategy: for several processes, give ddp")


class Patience(pl.Callback):
    """Ends a run where a process hangs or its machine is gone, unless the strategy has a timeout of its own."""

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Set the timeout, once all processes have met."""
        if isinstance(trainer.strategy, DDPStrategy) and trainer.strategy._timeout == default_pg_timeout:
            # The second is what PyTorch before 2.15 has.
            getattr(distributed_c10d, "set_timeout", distributed_c10d._set_pg_timeout)(PATIENCE)


def whole(trainer: pl.Trainer, part: Tensor) -> Tensor:
    """Put the parts that the processes have of a minibatch together, in order; each process has to call it."""
    return torch.cat(gather_all_tensors(part)) if trainer.world_size > 1 else part


def is_lost(error: Exception) -> bool:
    """Whether an error means that another process of the run has ended or does not answer."""
    return isinstance(error, torch.distributed.DistError) or (type(error) is RuntimeError and "/gloo/" in str(error))


def end_with_launcher() -> None:
    """Let a process that Lightning started end with the process that started it; Lightning watches only the reverse."""
    if LAUNCHER not in os.environ or os.environ.get("LOCAL_RANK", "0") == "0":
        os.environ[LAUNCHER] = str(os.getpid())
        return

    def watch() -> None:
        while str(os.getppid()) == os.environ[LAUNCHER]:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
