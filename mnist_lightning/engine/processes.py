"""Several processes: what Lightning's distributed engine leaves to a project. With one process, skip this file."""

import contextlib
import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy, Strategy
from torch import Tensor
from torch.distributed import distributed_c10d
from torch.distributed.rendezvous import rendezvous
from torchmetrics.utilities.distributed import gather_all_tensors

from .data import DeviceLoader
from .run import PROGRAM, rank

# A process that did not answer for so long is taken for dead, so that a run ends within a minute. PyTorch's half hour
# is kept for the start, where one machine may still be importing while another one waits.
TIMEOUT = timedelta(seconds=50)

LAUNCHER = f"{PROGRAM.upper()}_LAUNCHER"


class DDP(DDPStrategy):
    """Lightning's DDP, where processes with unequal parts of a minibatch count each example once.

    Lightning takes the mean of the processes' gradients. Here the loss of each process, and what it logs with
    `sync_dist` in a training step, is first multiplied by its `part_weight`.
    """

    has_timeout = False
    """Whether the user gave one."""

    _in_training_step = False

    @property
    def part_weight(self) -> float:
        """Length of this process's part of the minibatch divided by the mean length; 1 for any loader but ours."""
        assert self.lightning_module
        loader = self.lightning_module.trainer.train_dataloader
        return loader.part_weight if isinstance(loader, DeviceLoader) else 1.0

    def setup_environment(self) -> None:
        """Lightning's meeting of all processes; where it takes long, a line says what is waited for."""
        environment, machines = self.cluster_environment, self.num_nodes
        assert environment
        place = f"{environment.main_address}:{environment.main_port}"
        what = f"until all {self.num_processes * machines} processes meet at {place}"
        if machines > 1:
            what += f"; start this on all {machines} machines, by torchrun or with MASTER_ADDR, MASTER_PORT, NODE_RANK"
        with _waiting(what, 5 if machines > 1 else 60):
            super().setup_environment()

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """Lightning's training step; `reduce` is told of it."""
        self._in_training_step = True
        try:
            return super().training_step(*args, **kwargs)
        finally:
            self._in_training_step = False

    def backward(self, closure_loss: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Lightning's backward pass, with the loss multiplied by the weight of this process's part."""
        weight = self.part_weight
        return super().backward(closure_loss if weight == 1 else closure_loss * weight, *args, **kwargs)

    def reduce(self, tensor: Any, group: Any = None, reduce_op: Any = "mean") -> Any:
        """Lightning's reduction; in a training step, a mean is that over all examples."""
        if self._in_training_step and reduce_op == "mean" and self.part_weight != 1:
            tensor = tensor * self.part_weight
        return super().reduce(tensor, group, reduce_op)


@contextlib.contextmanager
def _waiting(what: str, seconds: float) -> Iterator[None]:
    """Say what is waited for after some seconds, and end at a signal: inside PyTorch, Python would not heed it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def tell(line: str) -> None:
        if os.environ.get("LOCAL_RANK", "0") == "0":
            with contextlib.suppress(OSError):
                print(line, file=sys.stderr, flush=True)

    def listen() -> None:
        with reader:
            if not select.select([reader], [], [], seconds)[0]:
                tell(f"Waiting {what}")
            while received := reader.recv(1):  # nothing, once the other end is closed
                if received[0] in (signal.SIGINT, signal.SIGTERM):
                    tell(f"{PROGRAM}: stopped while it waited {what}")
                    os._exit(128 + received[0])

    reader, writer = socket.socketpair()
    writer.setblocking(False)
    before = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    threading.Thread(target=listen, daemon=True).start()
    with writer:
        try:
            yield
        finally:
            signal.set_wakeup_fd(before)


def agree(strategy: Strategy, number: int, reduce_op: str = "min") -> int:
    """The least (`min`) or the largest (`max`) of the processes' numbers; each process has to call it."""
    return int(strategy.reduce(torch.tensor(number, device=strategy.root_device), reduce_op=reduce_op))


def gather(trainer: pl.Trainer, part: Tensor) -> Tensor:
    """Put the parts that the processes have of a minibatch together, in order; each process has to call it."""
    return torch.cat(gather_all_tensors(part)) if trainer.world_size > 1 else part


def meet(environment: ClusterEnvironment, accelerator: str) -> None:
    """Let the processes that a launcher has started connect before there is a Trainer, which then finds them so."""
    if not torch.distributed.is_initialized():
        os.environ |= {"MASTER_ADDR": environment.main_address, "MASTER_PORT": str(environment.main_port)}
        number, world_size = environment.global_rank(), environment.world_size()
        with _waiting(f"until all {world_size} processes meet at {environment.main_address}", 60):
            store, *_ = next(rendezvous("env://", number, world_size))
            # torchrun keeps its store when it starts processes again, and they would take the dead ones' addresses for
            # living ones. Of several machines each counts for itself; the README says what to set there.
            if os.environ.get("GROUP_WORLD_SIZE") == "1":
                store = distributed_c10d.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
            on_cpu = accelerator == "cpu" or not torch.cuda.is_available()
            backend = "gloo" if on_cpu else "cpu:gloo,cuda:nccl"  # on CPUs Lightning asks whether it is just "gloo"
            torch.distributed.init_process_group(backend, store=store, rank=number, world_size=world_size)


def slurm(plugins: list[Any]) -> list[ClusterEnvironment]:
    """SLURM as Lightning would find it by itself, but without requeueing: that would save past `BestAndLast`.

    Args:
        plugins: The user's; one that says how processes are started is kept.
    """
    given = any(isinstance(plugin, ClusterEnvironment) for plugin in plugins)
    return [SLURMEnvironment(auto_requeue=False)] if launcher() is SLURMEnvironment and not given else []


def check(trainer: pl.Trainer) -> None:
    """Refuse a Trainer whose processes would not work together.

    Raises:
        MisconfigurationException: Its strategy is another one than `ddp`, or the launcher has started another number of
            processes than its settings say.
    """
    kind = launcher()
    # A script that asked SLURM for several tasks may still run a single process.
    if kind is TorchElasticEnvironment or (kind and trainer.world_size > 1):
        started = kind().world_size()
        if started != trainer.world_size:
            raise MisconfigurationException(
                f"{started} processes were started, but trainer.devices times trainer.num_nodes is "
                f"{trainer.world_size}; give the number of processes on each machine and the number of machines"
            )
    if not isinstance(trainer.strategy, SingleDeviceStrategy | DDP):
        raise MisconfigurationException("trainer.strategy: for several processes, give ddp")


def check_share(batch_size: int, world_size: int) -> None:
    """Refuse to begin a run whose processes cannot share a minibatch equally.

    They would count each image once all the same, as a resumed run's do, which keeps its minibatches.

    Raises:
        MisconfigurationException: `batch_size` does not divide; the message names the nearest that do.
    """
    below = batch_size // world_size * world_size
    if below != batch_size:
        nearest = " or ".join(str(size) for size in (below, below + world_size) if size)
        raise MisconfigurationException(
            f"data.batch_size is the minibatch of all {world_size} processes together, and {batch_size} does not "
            f"divide by {world_size}; give {nearest}"
        )


def launcher() -> type[TorchElasticEnvironment | SLURMEnvironment] | None:
    """What has started this process, as Lightning sees it."""
    # In Lightning's order: torchrun may itself have been started by SLURM.
    return next((kind for kind in (TorchElasticEnvironment, SLURMEnvironment) if kind.detect()), None)


class Timeout(pl.Callback):
    """Ends a run where a process hangs or its machine is gone, unless the strategy has a timeout of its own."""

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Set the timeout, once all processes have met."""
        if isinstance(trainer.strategy, DDP) and not trainer.strategy.has_timeout:
            # The second is what older versions of PyTorch have.
            set_timeout = getattr(distributed_c10d, "set_timeout", None) or distributed_c10d._set_pg_timeout
            set_timeout(TIMEOUT)


class OwnRandomNumbers(pl.Callback):
    """Lets each process draw random numbers of its own: with one seed, dropout would leave out the same units."""

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Add the rank to the seed."""
        if trainer.global_rank:
            torch.manual_seed(torch.initial_seed() + trainer.global_rank)


def is_lost(error: Exception) -> bool:
    """Whether an error means that another process of the run has ended or does not answer."""
    gloo = type(error) is RuntimeError and ("/gloo/" in str(error) or "caused pair closure" in str(error))
    return gloo or isinstance(error, torch.distributed.DistBackendError)


def end_with_launcher() -> None:
    """Let a process that Lightning started end with the process that started it; Lightning watches only the reverse."""
    if launcher():
        return
    if LAUNCHER not in os.environ or os.environ.get("LOCAL_RANK", "0") == "0":
        os.environ[LAUNCHER] = str(os.getpid())
        return

    def watch() -> None:
        while str(os.getppid()) == os.environ[LAUNCHER]:
            time.sleep(1)
        with contextlib.suppress(OSError):
            message = f"{PROGRAM}: process {rank()}: the process that started this one has ended"
            print(message, file=sys.stderr, flush=True)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
