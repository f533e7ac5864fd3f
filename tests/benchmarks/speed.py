"""Seconds an epoch of the tutorial's network: this project beside a plain PyTorch loop and other frameworks.

    python tests/benchmarks/speed.py --root data                 # all contestants, and a small CNN
    python tests/benchmarks/speed.py --root data --scaling       # other sizes of network, minibatch and training set
    python tests/benchmarks/speed.py --root data --progress-bar  # what a progress bar in a terminal costs
    python tests/benchmarks/speed.py --root data --processes     # the command `fit` on one process and on two
    python tests/benchmarks/speed.py --root data --whole         # whole commands, from Enter to the prompt
    python tests/benchmarks/speed.py --root data --beside        # `fit` beside other processes
    python tests/benchmarks/speed.py --root data --parts         # microseconds of the parts of a step

All contestants train on the same 55,000 images with the same recipe, an epoch each in turn, so that a machine that gets
slower gets slower for all; then each reads the test set, so that nobody is fast by doing less. Each has a process
of its own: thread pools in one process would slow each other down. JAX, Keras (on TensorFlow) and scikit-learn take
part where they are installed. The last column is the anonymous memory after training above that from before it.
"""

import argparse
import contextlib
import logging
import multiprocessing
import os
import platform
import statistics
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

os.environ.setdefault("KERAS_BACKEND", "tensorflow")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from memory import anonymous
from parts import parts
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision.datasets import MNIST
from torchvision.transforms import ToTensor
from whole import beside, seconds_an_epoch, whole

from mnist_lightning import MNISTClassifier, MNISTDataModule, Trainer
from mnist_lightning.digits import idx
from mnist_lightning.engine.progress import EpochBar

Split = tuple[Tensor, Tensor]
Contestants = dict[str, tuple[Callable[..., float], dict[str, Any]]]

PLAIN, PLAIN_CNN = "plain PyTorch loop (reference)", "small CNN, plain PyTorch loop (the CNN's reference)"


class synthetic(MNIST):  # noqa: N801
    """The stand-in digits: torchvision reads the files in the directory of the class's name."""


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

    It has no hooks on batches, so that our Trainer need not stop at each of them.
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


def read_accuracy(network: nn.Module, test: Split) -> float:
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


def small_cnn() -> nn.Sequential:
    """Maps pixels, (B, 784), to logits, (B, 10)."""
    return nn.Sequential(
        nn.Unflatten(1, (1, 28, 28)),
        *(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(8, 16, 3), nn.ReLU(), nn.MaxPool2d(2)),
        nn.Flatten(),
        nn.Linear(16 * 5 * 5, 10),
    )


def reference(turns: Turns, data: MNISTDataModule, hidden: int = 200) -> float:
    return loop_plainly(turns, data, plain_network(hidden))


def cnn_reference(turns: Turns, data: MNISTDataModule) -> float:
    return loop_plainly(turns, data, small_cnn())


def loop_plainly(turns: Turns, data: MNISTDataModule, network: nn.Module) -> float:
    """A plain PyTorch loop over resident tensors, denormals flushed, nothing logged."""
    images, labels = as_floats(data.train)
    optimizer = torch.optim.Adam(network.parameters(), lr=0.001, fused=True)
    for _ in range(turns.epochs):
        with turns.take():
            for index in torch.randperm(len(labels)).split(data.batch_size):
                loss = F.cross_entropy(network(images.index_select(0, index)), labels.index_select(0, index))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
    return read_accuracy(network, data.test)


class Unfused(MNISTClassifier):
    fast_step = None  # type: ignore[assignment]


class Documented(pl.LightningModule):
    """A LightningModule as Lightning's documentation writes it."""

    def __init__(self, network: nn.Module, fused: bool | None = None) -> None:
        super().__init__()
        self.network = network
        self.fused = fused

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
        return torch.optim.Adam(self.parameters(), lr=0.001, fused=self.fused)


def this_project(
    turns: Turns,
    data: MNISTDataModule,
    hidden: int = 200,
    module: type[MNISTClassifier] = MNISTClassifier,
    trainer: type[pl.Trainer] = Trainer,
) -> float:
    return fit(turns, data, module(hidden_dim=hidden), trainer)


def our_cnn(turns: Turns, data: MNISTDataModule) -> float:
    return fit(turns, data, Documented(small_cnn(), fused=True))


def in_terminal(turns: Turns, data: MNISTDataModule, terminal: str, progress_bar: bool) -> float:
    os.environ["TERM"] = "xterm-256color"
    with Path(terminal).open("w") as screen, contextlib.redirect_stdout(screen):
        return fit(turns, data, MNISTClassifier(), progress_bar=progress_bar)


def fit(
    turns: Turns,
    data: MNISTDataModule,
    model: pl.LightningModule,
    trainer: type[pl.Trainer] = Trainer,
    progress_bar: bool = False,
) -> float:
    """With TensorBoard, and with checkpoints of the best and of the last epoch."""
    with tempfile.TemporaryDirectory() as directory:
        best = pl.callbacks.ModelCheckpoint(monitor="val/acc", mode="max", filename="best")
        last = pl.callbacks.ModelCheckpoint(filename="last")
        bar = [EpochBar()] if progress_bar else []
        trainer(
            accelerator="cpu",
            max_epochs=turns.epochs,
            log_every_n_steps=100,
            num_sanity_val_steps=0,
            logger=pl.loggers.TensorBoardLogger(directory),
            callbacks=[TakeTurns(turns), *bar, best, last],
            enable_progress_bar=progress_bar,
            enable_model_summary=False,
        ).fit(model, datamodule=data)
    return read_accuracy(model, data.test)


def lightning_as_documented(turns: Turns, data: MNISTDataModule) -> float:
    """torchvision's dataset, a `DataLoader`, `self.log` in each step."""
    source = MNIST if data.dataset_name == "MNIST" else synthetic
    dataset = torch.utils.data.Subset(source(data.root, transform=ToTensor()), range(5_000, 60_000))
    model = Documented(plain_network(200))
    with tempfile.TemporaryDirectory() as directory:
        pl.Trainer(
            accelerator="cpu",
            max_epochs=turns.epochs,
            default_root_dir=directory,
            callbacks=[TakeTurns(turns)],
            enable_progress_bar=False,
            enable_model_summary=False,
        ).fit(model, DataLoader(dataset, batch_size=100, shuffle=True))
    return read_accuracy(model, data.test)


def jax_scan(turns: Turns, data: MNISTDataModule) -> float:
    """An epoch as one compiled `lax.scan`."""
    import jax
    import jax_scan as script

    train, test = (
        [jax.numpy.asarray(tensor.numpy()) for tensor in as_floats(split)] for split in (data.train, data.test)
    )
    state, run_epoch = script.training(*train)
    for epoch in range(turns.epochs):
        with turns.take():
            state = jax.block_until_ready(run_epoch(state, epoch))
    return script.accuracy(state, *test)


def keras(turns: Turns, data: MNISTDataModule, steps_per_execution: int) -> float:
    import keras

    keras.utils.set_random_seed(0)
    normal = keras.initializers.TruncatedNormal(stddev=0.01)
    model = keras.Sequential(
        [
            keras.layers.Dense(200, "relu", kernel_initializer=normal),
            keras.layers.Dense(10, kernel_initializer=normal),
        ]
    )
    model.compile(
        keras.optimizers.Adam(0.001, epsilon=1e-8),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
        steps_per_execution=steps_per_execution,
    )
    (x, y), (test_x, test_y) = ([part.numpy() for part in as_floats(split)] for split in (data.train, data.test))
    for _ in range(turns.epochs):
        with turns.take():
            model.fit(x, y, batch_size=100, epochs=1, verbose=0)
    return float((model.predict(test_x, verbose=0).argmax(1) == test_y).mean())


def scikit_learn(turns: Turns, data: MNISTDataModule) -> float:
    """`MLPClassifier` with its own initialisation."""
    from sklearn.neural_network import MLPClassifier

    (x, y), (test_x, test_y) = ([part.numpy() for part in as_floats(split)] for split in (data.train, data.test))
    model = MLPClassifier((200,), alpha=0, batch_size=100, random_state=0)
    for _ in range(turns.epochs):
        with turns.take():
            model.partial_fit(x, y, classes=range(10))
    return float(model.score(test_x, test_y))


def load_tiled(load: Callable[..., Split], tiles: int, raw: Path, file: str) -> Split:
    """Read a file with its training images several times over."""
    images, labels = load(raw, file)
    if file == "train":
        images = torch.cat([images[:5_000], images[5_000:].repeat(tiles, 1)])
        labels = torch.cat([labels[:5_000], labels[5_000:].repeat(tiles)])
    return images, labels


def contest(
    pipe: Connection, contestant: Callable[..., float], settings: dict[str, Any], options: argparse.Namespace
) -> None:
    """Run one contestant in this process."""
    warnings.simplefilter("ignore")
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    settings = dict(settings)
    if "tiles" in settings:
        idx.load = partial(load_tiled, idx.load, settings.pop("tiles"))
    data = MNISTDataModule(options.dataset, options.root, settings.pop("batch_size", 100))
    data.prepare_data()
    data.setup("fit")
    torch.manual_seed(0)
    with Path(os.devnull).open("w") as silence, contextlib.redirect_stdout(silence):
        before = anonymous()
        accuracy = contestant(Turns(pipe, options.epochs), data, **settings)
        pipe.send((accuracy, anonymous() - before))
        # Until the main process ends: even ending would be work in another's turn.
        with contextlib.suppress(EOFError):
            pipe.recv()


def in_turns(
    contestants: Contestants, options: argparse.Namespace
) -> tuple[dict[str, list[float]], dict[str, tuple[float, float]]]:
    """Let each run an epoch in turn; return their seconds of each epoch, their accuracies and MB of memory."""
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
    try:
        with Path("/proc/cpuinfo").open() as file:
            return next(line.split(":")[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def compare(options: argparse.Namespace) -> None:
    contestants: Contestants = {
        PLAIN: (reference, {}),
        "this project": (this_project, {}),
        "this project, without the fused step": (this_project, {"module": Unfused}),
        "Lightning's Trainer, our module": (this_project, {"trainer": pl.Trainer}),
        "Lightning as documented": (lightning_as_documented, {}),
    }
    if find_spec("jax"):
        contestants["JAX, one `lax.scan` an epoch"] = jax_scan, {}
    if find_spec("keras") and find_spec("tensorflow"):
        for steps in (1, 50):
            contestants[f"Keras, `steps_per_execution={steps}`"] = keras, {"steps_per_execution": steps}
    if find_spec("sklearn"):
        contestants["scikit-learn"] = scikit_learn, {}
    contestants |= {PLAIN_CNN: (cnn_reference, {}), "small CNN, our Trainer": (our_cnn, {})}
    seconds, found = in_turns(contestants, options)
    print("\n| | seconds an epoch | of the reference | test accuracy | MB of memory |\n| --- | --- | --- | --- | --- |")
    for name, values in seconds.items():
        base = seconds[PLAIN_CNN if "CNN" in name else PLAIN]
        accuracy, memory = found[name]
        times = f"{statistics.median(values[1:]):.2f} | {ratio(values, base):.2f}"
        print(f"| {name} | {times} | {accuracy:.2%} | {memory:.0f} |")
    ours, base = seconds["this project"], seconds[PLAIN]
    print(f"\nThis project's last epoch took {ours[-1] / base[-1] / (ours[1] / base[1]):.2f} of its second's time.")


def scaling(options: argparse.Namespace) -> None:
    print("\n| hidden units | batch size | images | reference, s | this project, s | ratio |\n" + "| --- " * 6 + "|")
    for settings in (
        *({"hidden": hidden} for hidden in (50, 200, 800, 3200)),
        *({"batch_size": batch_size} for batch_size in (10, 1_000, 10_000)),
        {"tiles": 10},
    ):
        seconds, _ = in_turns({"reference": (reference, settings), "ours": (this_project, settings)}, options)
        base, ours = seconds.values()
        size = [settings.get("hidden", 200), settings.get("batch_size", 100), f"{55_000 * settings.get('tiles', 1):,}"]
        medians = [f"{statistics.median(values[1:]):.2f}" for values in (base, ours)]
        print("|", " | ".join(map(str, [*size, *medians, f"{ratio(ours, base):.2f}"])), "|", flush=True)


def progress_bar(options: argparse.Namespace) -> None:
    import pty  # which Windows does not have

    screen, terminal = pty.openpty()
    drawn = bytearray()

    def read() -> None:
        while True:
            drawn.extend(os.read(screen, 65_536))

    threading.Thread(target=read, daemon=True).start()
    bars = {"without a progress bar": False, "with a progress bar": True}
    settings = {"terminal": os.ttyname(terminal)}
    seconds, _ = in_turns({row: (in_terminal, settings | {"progress_bar": bar}) for row, bar in bars.items()}, options)
    base = next(iter(seconds.values()))
    print("\n| this project, in a terminal | seconds an epoch | ratio |\n| --- | --- | --- |")
    for row, values in seconds.items():
        print(f"| {row} | {statistics.median(values[1:]):.2f} | {ratio(values, base):.2f} |")
    print(f"\nThe bar was drawn {drawn.count(b'Epoch'):,} times.")


def processes(options: argparse.Namespace) -> None:
    """Whole epochs of the command `fit`, validation included; the better of two runs."""
    columns = {
        "one process, all cores": ({"OMP_NUM_THREADS": str(os.cpu_count() or 1)}, ["--trainer.devices=1"]),
        "one process, one core": ({"OMP_NUM_THREADS": "1"}, ["--trainer.devices=1"]),
        "two processes, a core each": ({"OMP_NUM_THREADS": "1"}, ["--trainer.devices=2", "--trainer.strategy=ddp"]),
    }
    print("\n| minibatch |", " | ".join(columns), "|\n" + "| --- " * (1 + len(columns)) + "|")
    for batch_size in (100, 1_000, 5_000, 11_000):
        data = [f"--data.dataset={options.dataset}", f"--data.root={options.root}", f"--data.batch_size={batch_size}"]
        runs = [
            [
                seconds_an_epoch([*data, "--trainer.accelerator=cpu", *devices], options.epochs, threads)
                for threads, devices in columns.values()
            ]
            for _ in range(2)
        ]
        better = [f"{min(pair):.2f}" for pair in zip(*runs, strict=True)]
        print(f"| {batch_size:,} |", " | ".join(better), "|", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", default="data", help="directory of the data, as --data.root")
    parser.add_argument("--dataset", default="auto", choices=("auto", "mnist", "synthetic"))
    parser.add_argument("--epochs", type=int, default=10, help="at least 2")
    parser.add_argument("--rounds", type=int, default=5, help="of --whole, --beside and --parts")
    measure = parser.add_mutually_exclusive_group()
    for option, function, text in (
        ("--scaling", scaling, "vary the size of network, minibatch and training set"),
        ("--progress-bar", progress_bar, "compare our Trainer with and without a progress bar in a terminal"),
        ("--processes", processes, "compare the command `fit` on one process and on two"),
        ("--whole", whole, "compare the whole command `fit` with bare scripts (on MNIST)"),
        ("--parts", parts, "time the parts of one optimizer step"),
        ("--beside", beside, "compare `fit` alone, beside busy processes, and twice at once (on MNIST)"),
    ):
        measure.add_argument(option, dest="measure", action="store_const", const=function, default=compare, help=text)
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
