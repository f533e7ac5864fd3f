"""Seconds an epoch of the tutorial's network: this project beside a plain PyTorch loop and Lightning's Trainer.

    python tests/benchmarks/speed.py --root data              # all contestants
    python tests/benchmarks/speed.py --root data --steps      # milliseconds an iteration, of smaller and larger steps
    python tests/benchmarks/speed.py --root data --parts      # microseconds of the parts of a step
    python tests/benchmarks/speed.py --root data --processes  # the command `fit` on one process and on two
    python tests/benchmarks/speed.py --root data --whole      # whole commands, from Enter to the prompt
    python tests/benchmarks/speed.py --root data --beside     # `fit` beside a busy process, and twice at once

All contestants train on the same 55,000 images with the same recipe, each on one thread in a process of its own. They
take turns, an epoch each, so that a machine that gets slower gets slower for all. Then each reads the test set, so that
nobody is fast by doing less.
"""

import argparse
import contextlib
import logging
import multiprocessing
import os
import platform
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from parts import parts
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision.datasets import MNIST
from torchvision.transforms import ToTensor
from whole import beside, seconds_an_epoch, whole

from mnist_lightning import MNISTClassifier, MNISTDataModule, Trainer

Split = tuple[Tensor, Tensor]
Contestants = dict[str, tuple[Callable[..., float], dict[str, Any]]]


class Turns:
    """One side of the pipe between a contestant and the main process."""

    def __init__(self, pipe: Connection, epochs: int) -> None:
        self.pipe = pipe
        self.epochs = epochs

    def wait(self) -> None:
        """Be ready for an epoch, and wait until it is this contestant's turn."""
        self.pipe.send("ready")
        self.pipe.recv()

    @contextlib.contextmanager
    def take(self) -> Iterator[None]:
        """Wait for the turn, and report how long what follows took."""
        self.wait()
        start = time.perf_counter()
        yield
        self.pipe.send(time.perf_counter() - start)


class TakeTurns(pl.Callback):
    """Makes a Trainer take turns; its epoch is timed until it validates or, without validation, ends.

    It has no hooks on batches, so that our Trainer need not run them.
    """

    def __init__(self, turns: Turns) -> None:
        self.turns = turns

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.turns.wait()
        self.start = time.perf_counter()
        self.end: float | None = None

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.end = time.perf_counter()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.turns.pipe.send((self.end or time.perf_counter()) - self.start)


def as_floats(split: Split) -> Split:
    """The pixels as float32 in [0, 1] and the labels as int64, resident in memory."""
    return split[0].float().div_(255), split[1].long()


def test_accuracy(network: nn.Module, test: Split) -> float:
    images, labels = as_floats(test)
    with torch.no_grad():
        logits: Tensor = network(images)
    return (logits.argmax(1) == labels).float().mean().item()


def plain_network(hidden: int) -> nn.Sequential:
    network = nn.Sequential(nn.Linear(784, hidden), nn.ReLU(), nn.Linear(hidden, 10))
    for layer in (network[0], network[2]):
        nn.init.trunc_normal_(layer.weight, std=0.01, a=-0.02, b=0.02)  # type: ignore[arg-type]
        nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
    return network


def plain_loop(turns: Turns, data: MNISTDataModule, hidden: int = 200) -> float:
    """Over resident tensors; nothing is logged."""
    model, (images, labels) = plain_network(hidden), as_floats(data.train)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.001, fused=True)
    for _ in range(turns.epochs):
        with turns.take():
            for index in torch.randperm(len(labels)).split(data.batch_size):
                loss = F.cross_entropy(model(images.index_select(0, index)), labels.index_select(0, index))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
    return test_accuracy(model, data.test)


class Documented(pl.LightningModule):
    """A LightningModule as Lightning's documentation writes it."""

    def __init__(self) -> None:
        super().__init__()
        self.network = plain_network(200)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.network(images.flatten(1))
        return logits

    def training_step(self, batch: Split, batch_idx: int) -> Tensor:
        images, labels = batch
        logits = self(images)
        loss = F.cross_entropy(logits, labels)
        self.log("train/loss", loss)
        self.log("train/acc", (logits.argmax(1) == labels).float().mean())
        return loss

    def validation_step(self, batch: Split, batch_idx: int) -> None:
        images, labels = batch
        self.log("val/acc", (self(images).argmax(1) == labels).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=0.001)


def ours(turns: Turns, data: MNISTDataModule, trainer: type[pl.Trainer] = Trainer, **settings: Any) -> float:
    """With TensorBoard, and with checkpoints of the best and of the last epoch."""
    model = MNISTClassifier(**settings)
    with tempfile.TemporaryDirectory() as directory:
        best = pl.callbacks.ModelCheckpoint(monitor="val/acc", mode="max", filename="best")
        last = pl.callbacks.ModelCheckpoint(filename="last")
        trainer(
            accelerator="cpu",
            max_epochs=turns.epochs,
            log_every_n_steps=100,
            num_sanity_val_steps=0,
            logger=pl.loggers.TensorBoardLogger(directory),
            callbacks=[TakeTurns(turns), best, last],
            enable_progress_bar=False,
            enable_model_summary=False,
        ).fit(model, datamodule=data)
    return test_accuracy(model, data.test)


def lightning_as_documented(turns: Turns, data: MNISTDataModule) -> float:
    """torchvision's dataset, a `DataLoader`, `self.log` in each step."""
    dataset = torch.utils.data.Subset(MNIST(data.root, transform=ToTensor()), range(5_000, 60_000))
    model = Documented()
    with tempfile.TemporaryDirectory() as directory:
        pl.Trainer(
            accelerator="cpu",
            max_epochs=turns.epochs,
            default_root_dir=directory,
            callbacks=[TakeTurns(turns)],
            enable_progress_bar=False,
            enable_model_summary=False,
        ).fit(model, DataLoader(dataset, batch_size=100, shuffle=True))
    return test_accuracy(model, data.test)


def contest(
    pipe: Connection, contestant: Callable[..., float], settings: dict[str, Any], options: argparse.Namespace
) -> None:
    """Run one contestant in this process."""
    warnings.simplefilter("ignore")
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)  # as `fit` does
    torch.manual_seed(0)
    settings = dict(settings)
    data = MNISTDataModule(options.dataset, options.root, settings.pop("batch_size", 100))
    data.prepare_data()
    data.setup("fit")
    with Path(os.devnull).open("w") as silence, contextlib.redirect_stdout(silence):
        pipe.send(contestant(Turns(pipe, options.epochs), data, **settings))
        # Until the main process ends: even ending would be work in another's turn.
        with contextlib.suppress(EOFError):
            pipe.recv()


def in_turns(contestants: Contestants, options: argparse.Namespace) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Let each run an epoch in turn; return their seconds of each epoch, and their accuracies."""
    spawn = multiprocessing.get_context("spawn")
    pipes = {}
    for name, (contestant, settings) in contestants.items():
        pipes[name], theirs = spawn.Pipe()
        spawn.Process(target=contest, args=(theirs, contestant, settings, options), daemon=True).start()
        theirs.close()  # so that a contestant that dies ends the pipe
    for pipe in pipes.values():
        pipe.recv()  # ready
    seconds: dict[str, list[float]] = {name: [] for name in pipes}
    found = {}
    for _ in range(options.epochs):
        for name, pipe in pipes.items():
            pipe.send("go")
            seconds[name].append(pipe.recv())
            # Ready for the next epoch or, after the last one, what it found: nobody works in another's turn.
            found[name] = pipe.recv()
    return seconds, found


def ratio(seconds: list[float], base: list[float]) -> float:
    """Median of the ratios epoch by epoch, from the second on: the first holds compilation and page faults."""
    return statistics.median(a / b for a, b in zip(seconds[1:], base[1:], strict=True))


def processor() -> str:
    with contextlib.suppress(OSError, StopIteration), Path("/proc/cpuinfo").open() as file:
        return next(line.split(":")[1].strip() for line in file if line.startswith("model name"))
    return platform.processor() or platform.machine()


def compare(options: argparse.Namespace) -> None:
    contestants: Contestants = {
        "plain PyTorch loop (reference)": (plain_loop, {}),
        "this project": (ours, {}),
        "this project, `fused=True`": (ours, {"fused": True}),
        "Lightning's Trainer, our module and loader": (ours, {"trainer": pl.Trainer}),
    }
    if options.dataset == "mnist":  # which torchvision reads
        contestants["Lightning as documented"] = lightning_as_documented, {}
    seconds, accuracies = in_turns(contestants, options)
    print("\n| | seconds an epoch | of the reference | test accuracy |\n| --- | --- | --- | --- |")
    base, *_ = seconds.values()
    for name, values in seconds.items():
        times = f"{statistics.median(values[1:]):.2f} | {ratio(values, base):.2f}"
        print(f"| {name} | {times} | {accuracies[name]:.2%} |")


def steps(options: argparse.Namespace) -> None:
    """Milliseconds an iteration, where a step has less to do and more."""
    columns = ("plain loop", "this Trainer", "Lightning's Trainer")
    print("\n| hidden units, minibatch |", " | ".join(columns), "|\n" + "| --- " * 4 + "|")
    for hidden, batch_size in ((10, 10), (100, 100), (800, 200), (3200, 200)):
        size = {"batch_size": batch_size}
        contestants: Contestants = {
            columns[0]: (plain_loop, size | {"hidden": hidden}),
            columns[1]: (ours, size | {"hidden_dim": hidden}),
            columns[2]: (ours, size | {"hidden_dim": hidden, "trainer": pl.Trainer}),
        }
        seconds, _ = in_turns(contestants, options)
        each = [1000 * statistics.median(values[1:]) * batch_size / 55_000 for values in seconds.values()]
        print(f"| {hidden}, {batch_size} |", " | ".join(f"{ms:.2f}" for ms in each), "|", flush=True)


def processes(options: argparse.Namespace) -> None:
    """Seconds an epoch of the command `fit`, validation included; the better of two runs."""
    columns = {"one process": ["--trainer.devices=1"], "two": ["--trainer.devices=2", "--trainer.strategy=ddp"]}
    print("\n| minibatch |", " | ".join(columns), "|\n" + "| --- " * (1 + len(columns)) + "|")
    for batch_size in (100, 1_000, 5_000, 11_000):
        data = [f"--data.dataset={options.dataset}", f"--data.root={options.root}", f"--data.batch_size={batch_size}"]
        better = [
            min(seconds_an_epoch([*data, *devices], options.epochs) for _ in range(2)) for devices in columns.values()
        ]
        print(f"| {batch_size:,} |", " | ".join(f"{seconds:.2f}" for seconds in better), "|", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", default="data", help="directory of the data, as --data.root")
    parser.add_argument("--dataset", default="auto", choices=("auto", "mnist", "synthetic"))
    parser.add_argument("--epochs", type=int, default=10, help="at least 2")
    parser.add_argument("--rounds", type=int, default=5, help="of --whole, --beside and --parts")
    measure = parser.add_mutually_exclusive_group()
    for option, function in (
        ("--steps", steps),
        ("--parts", parts),
        ("--processes", processes),
        ("--whole", whole),
        ("--beside", beside),
    ):
        measure.add_argument(option, dest="measure", action="store_const", const=function, default=compare)
    options = parser.parse_args()
    data = MNISTDataModule(options.dataset, options.root)
    data.prepare_data()
    data.setup("fit")
    options.dataset = data.hparams["dataset"]  # so that no contestant tries to download it again
    machine = f"{os.cpu_count()} cores of {processor()}"
    print(f"{data.dataset_name}, {options.epochs} epochs, {machine}, torch {torch.__version__}", flush=True)
    options.measure(options)


if __name__ == "__main__":
    main()
