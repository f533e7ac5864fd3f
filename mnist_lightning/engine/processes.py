"""The processes of a run: DDP that counts each example once, checks of how they were started, their settings."""

import contextlib
import gc
import os
import socket
from collections.abc import Iterator
from datetime import timedelta
from itertools import zip_longest
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning_utilities.core.rank_zero import rank_zero_only
from torch import Tensor
from torch.distributed import distributed_c10d

from .console import GC_THRESHOLDS, PROGRAM, say
from .data import DeviceLoader

# Where launchers put a process's number.
RANKS = ("RANK", "LOCAL_RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK")

# A process that did not answer for so long is taken for dead, so that a run ends within a minute. PyTorch's half hour
# is kept for the start, where one machine may still be importing while another one waits.
TIMEOUT = timedelta(seconds=50)


SEVERAL = (
    "trainer.strategy: for several processes, give ddp; a notebook runs the command as a program of its own: "
    f"!python -m {PROGRAM} fit --trainer.strategy ddp"
)


class DDP(DDPStrategy):
    """Lightning's DDP, where processes with unequal parts of a minibatch count each example once.

    Lightning takes the mean of the processes' gradients. Here the loss of each process is first multiplied by its
    loader's `loss_weight`.
    """

    def backward(self, closure_loss: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Lightning's backward pass, with the loss multiplied by the weight of this process's part."""
        assert self.lightning_module
        loader = self.lightning_module.trainer.train_dataloader
        weight = loader.loss_weight if isinstance(loader, DeviceLoader) else 1
        return super().backward(closure_loss if weight == 1 else closure_loss * weight, *args, **kwargs)

    def reduce(self, tensor: Any, group: Any = None, reduce_op: Any = "mean") -> Any:
        """Lightning's, without a barrier before: an all-reduce waits for the other processes by itself."""
        if not isinstance(tensor, Tensor) or reduce_op != "mean" or not tensor.is_floating_point():
            return super().reduce(tensor, group, reduce_op)
        torch.distributed.all_reduce(tensor, group=group)
        return tensor.div_(self.world_size)


def all_reduce_max(trainer: pl.Trainer, number: int) -> int:
    """The largest of the processes' numbers; each process has to call it."""
    strategy = trainer.strategy
    if trainer.world_size == 1:
        return number
    return int(strategy.reduce(torch.tensor(number, device=strategy.root_device), reduce_op="max"))


def all_gather_object(trainer: pl.Trainer, value: Any) -> list[Any]:
    """The processes' values, in order; each process has to call it."""
    if trainer.world_size == 1 or not torch.distributed.is_initialized():  # as after a fit of spawned processes
        return [value]
    values: list[Any] = [None] * trainer.world_size
    torch.distributed.all_gather_object(values, value)
    return values


def gather_parts(trainer: pl.Trainer, parts: list[Any]) -> list[Any]:
    """The processes' lists of a part of each minibatch as one list, in order; each process has to call it."""
    nothing = object()
    minibatches = zip_longest(*all_gather_object(trainer, parts), fillvalue=nothing)
    return [part for minibatch in minibatches for part in minibatch if part is not nothing]


def slurm_without_requeue(plugins: list[Any]) -> list[ClusterEnvironment]:
    """SLURM as Lightning would find it by itself, but without requeueing: that would save past `BestAndLast`.

    Args:
        plugins: The user's; one that says how processes are started is kept.
    """
    given = any(isinstance(plugin, ClusterEnvironment) for plugin in plugins)
    return [SLURMEnvironment(auto_requeue=False)] if _launcher() is SLURMEnvironment and not given else []


def check_launcher(trainer: pl.Trainer) -> None:
    """Refuse a Trainer whose processes would not work together; a single one is the first, whatever variables say.

    Raises:
        MisconfigurationException: Its strategy is another one than `ddp`, or the launcher has started another number of
            processes than its settings say.
        OSError: The port where the processes are to meet is in use.
    """
    kind, variables = _launcher(), [f"{name}={os.environ[name]}" for name in RANKS if os.environ.get(name, "0") != "0"]
    # A script that asked SLURM for several tasks may still run a single process.
    if kind is TorchElasticEnvironment or (kind and trainer.world_size > 1):
        started = kind().world_size()
        if started != trainer.world_size:
            raise MisconfigurationException(
                f"{started} processes were started, but trainer.devices times trainer.num_nodes is "
                f"{trainer.world_size}; give the number of processes on each machine and the number of machines"
            )
    elif trainer.world_size == 1 and variables:
        rank_zero_only.rank = 0  # type: ignore[attr-defined]
        say(f"{', '.join(variables)} is of another job: this run has one process")
    elif not kind and variables and "MASTER_PORT" not in os.environ:
        raise MisconfigurationException(f"{', '.join(variables)} is of another job: unset it")
    if not isinstance(trainer.strategy, SingleDeviceStrategy | DDP):
        raise MisconfigurationException(SEVERAL)
    if not kind and trainer.world_size > 1 and trainer.global_rank == 0 and "MASTER_PORT" in os.environ:
        # Before the others are started, which would wait for this one for half an hour.
        socket.create_server(("", int(os.environ["MASTER_PORT"]))).close()


def _launcher() -> type[TorchElasticEnvironment | SLURMEnvironment] | None:
    """What has started this process, as Lightning sees it."""
    # In Lightning's order: torchrun may itself have been started by SLURM.
    return next((kind for kind in (TorchElasticEnvironment, SLURMEnvironment) if kind.detect()), None)


class Timeout(pl.Callback):
    """Ends a run where a process hangs or its machine is gone."""

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Set the timeout, once all processes have met and the data are there."""
        if trainer.world_size > 1:
            # The second is what older versions of PyTorch have.
            set_timeout = getattr(distributed_c10d, "set_timeout", None) or distributed_c10d._set_pg_timeout
            set_timeout(TIMEOUT)


def is_lost(error: Exception) -> bool:
    """Whether an error means that another process of the run has ended or does not answer."""
    gloo = type(error) is RuntimeError and ("/gloo/" in str(error) or "caused pair closure" in str(error))
    return gloo or isinstance(error, torch.distributed.DistBackendError)


@contextlib.contextmanager
def process_settings() -> Iterator[None]:
    """Flush denormal numbers to zero. At the end, restore that and the number of threads, and end the process group."""
    threads, flushes = torch.get_num_threads(), not torch.tensor(1e-310, dtype=torch.double).mul(1).item()
    thresholds = gc.get_threshold()
    gc.set_threshold(*GC_THRESHOLDS)  # in place of those for importing: a cycle may hold large tensors
    # Adam's moments of rarely lit pixels decay into denormal numbers, which a CPU computes many times slower, so that
    # epochs would get slower and slower.
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        gc.set_threshold(*thresholds)
        torch.set_num_threads(threads)
        torch.set_flush_denormal(flushes)
        if torch.distributed.is_initialized():
            # Its threads may outlive the interpreter and abort it: in 4 of 180 processes that did nothing else.
            torch.distributed.destroy_process_group()
