"""Seconds an epoch of the tutorial's network: this project beside a plain PyTorch loop and other frameworks.

    python tests/benchmarks/speed.py --root data
    python tests/benchmarks/speed.py --root data --scaling

All contestants train on the same 55,000 images with the same recipe, an epoch each in turn, so that a machine that gets
slower gets slower for all; then each reads the test set, so that nobody is fast by doing less. JAX, Keras (on
TensorFlow) and scikit-learn take part where they are installed.
"""

import argparse
import contextlib
import logging
import math
import os
import platform
import statistics
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from queue import SimpleQueue
from typing import Any

os.environ.setdefault("KERAS_BACKEND", "tensorflow")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision.datasets import MNIST
from torchvision.transforms import ToTensor

from mnist_lightning.callbacks import Report
from mnist_lightning.classifier import MNISTClassifier
from mnist_lightning.datamodule import MNISTDataModule

Split = tuple[Tensor, Tensor]
# First the seconds of each epoch, then, when there are no more, the accuracy on the test set.
Contestant = Iterator[float]


class synthetic(MNIST):  # noqa: N801
    """The stand-in digits: torchvision reads the files in the directory of the class's name."""


class Turns(pl.Callback):
    """Makes a Trainer wait for its turn before each epoch, and reports the seconds from its first to its last step."""

    def __init__(self) -> None:
        self.turn: SimpleQueue[None] = SimpleQueue()
        self.seconds: SimpleQueue[float] = SimpleQueue()

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.turn.get()
        self.start = time.perf_counter()

    def on_train_batch_end(self, *_: Any) -> None:
        self.end = time.perf_counter()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.seconds.put(self.end - self.start)


def fit_in_turns(epochs: int, fit: Callable[[Turns], None], accuracy: Callable[[], float]) -> Contestant:
    turns = Turns()
    thread = threading.Thread(target=fit, args=(turns,), daemon=True)
    thread.start()
    for _ in range(epochs):
        turns.turn.put(None)
        yield turns.seconds.get()
    thread.join()
    yield accuracy()


def read_accuracy(network: nn.Module, test: Split) -> float:
    with torch.no_grad():
        logits: Tensor = network(test[0])
    return (logits.argmax(1) == test[1]).float().mean().item()


def plain_network(hidden: int) -> nn.Sequential:
    network = nn.Sequential(nn.Linear(784, hidden), nn.ReLU(), nn.Linear(hidden, 10))
    for layer in (network[0], network[2]):
        nn.init.trunc_normal_(layer.weight, std=0.01, a=-0.02, b=0.02)  # type: ignore[arg-type]
        nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
    return network


def reference(train: Split, test: Split, epochs: int, hidden: int = 200, batch_size: int = 100) -> Contestant:
    """A plain PyTorch loop over resident tensors, denormals flushed, nothing logged."""
    torch.manual_seed(0)
    images, labels = train
    network = plain_network(hidden)
    optimizer = torch.optim.Adam(network.parameters(), lr=0.001, fused=True)
    for _ in range(epochs):
        start = time.perf_counter()
        for index in torch.randperm(len(labels)).split(batch_size):
            loss = F.cross_entropy(network(images.index_select(0, index)), labels.index_select(0, index))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        yield time.perf_counter() - start
    yield read_accuracy(network, test)


def this_project(
    train: Split, test: Split, epochs: int, hidden: int = 200, batch_size: int = 100, fused: bool = True
) -> Contestant:
    """With TensorBoard, checkpoints and the console report."""
    pl.seed_everything(0)

    class Resident(MNISTDataModule):
        def prepare_data(self) -> None:
            pass

        def setup(self, stage: str) -> None:
            self.save_hyperparameters({"dataset": "mnist"})
            self.train, self.val = train, (train[0][:5000], train[1][:5000])
            self.iterations_per_epoch = math.ceil(len(train[1]) / self.batch_size)
            assert self.trainer
            self._count_minibatches(self.trainer)

    model = MNISTClassifier(hidden_dim=hidden, fused_step=fused)

    def fit(turns: Turns) -> None:
        with tempfile.TemporaryDirectory() as directory:
            checkpoint = pl.callbacks.ModelCheckpoint(monitor="val/acc", mode="max", filename="best", save_last=True)
            pl.Trainer(
                accelerator="cpu",
                max_epochs=epochs,
                log_every_n_steps=100,
                num_sanity_val_steps=0,
                logger=pl.loggers.TensorBoardLogger(directory),
                callbacks=[turns, Report(), checkpoint],
                enable_progress_bar=False,
                enable_model_summary=False,
            ).fit(model, datamodule=Resident(batch_size=batch_size))

    return fit_in_turns(epochs, fit, lambda: read_accuracy(model, test))


def this_project_unfused(train: Split, test: Split, epochs: int) -> Contestant:
    """The same, every step through autograd and Lightning's optimizer."""
    return this_project(train, test, epochs, fused=False)


class Documented(pl.LightningModule):
    """A LightningModule as Lightning's documentation writes it."""

    def __init__(self) -> None:
        super().__init__()
        self.network = plain_network(200)

    def training_step(self, batch: Split, batch_idx: int) -> Tensor:
        images, labels = batch
        logits = self.network(images.flatten(1))
        loss = F.cross_entropy(logits, labels)
        self.log("train_loss", loss)
        self.log("train_acc", (logits.argmax(1) == labels).float().mean())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=0.001)


def lightning_as_documented(source: type[MNIST], root: str, test: Split, epochs: int) -> Contestant:
    """torchvision's dataset, a `DataLoader`, `self.log` in each step."""
    pl.seed_everything(0)
    dataset = torch.utils.data.Subset(source(root, transform=ToTensor()), range(5_000, 60_000))
    model = Documented()

    def fit(turns: Turns) -> None:
        with tempfile.TemporaryDirectory() as directory:
            pl.Trainer(
                accelerator="cpu", max_epochs=epochs, default_root_dir=directory, callbacks=[turns],
                enable_progress_bar=False, enable_model_summary=False,
            ).fit(model, DataLoader(dataset, batch_size=100, shuffle=True))  # fmt: skip

    return fit_in_turns(epochs, fit, lambda: read_accuracy(model.network, test))


def jax_scan(train: Split, test: Split, epochs: int) -> Contestant:
    """An epoch as one compiled `lax.scan`."""
    import jax
    import jax.numpy as jnp

    images, labels = (jnp.asarray(tensor.numpy()) for tensor in train)
    keys = jax.random.split(jax.random.key(0), 3)
    parameters = (
        0.01 * jax.random.truncated_normal(keys[0], -2, 2, (784, 200)),
        jnp.zeros(200),
        0.01 * jax.random.truncated_normal(keys[1], -2, 2, (200, 10)),
        jnp.zeros(10),
    )

    def forward(p: Any, x: Any) -> Any:
        return jax.nn.relu(x @ p[0] + p[1]) @ p[2] + p[3]

    def loss(p: Any, x: Any, y: Any) -> Any:
        return -jnp.take_along_axis(jax.nn.log_softmax(forward(p, x)), y[:, None], 1).mean()

    def step(state: Any, index: Any) -> Any:
        p, m, v, t = state
        gradients, t = jax.grad(loss)(p, images[index], labels[index]), t + 1
        m = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, m, gradients)
        v = jax.tree.map(lambda v, g: 0.999 * v + 0.001 * g * g, v, gradients)
        rate = 0.001 * jnp.sqrt(1 - 0.999**t) / (1 - 0.9**t)
        p = jax.tree.map(lambda p, m, v: p - rate * m / (jnp.sqrt(v) + 1e-8), p, m, v)
        return (p, m, v, t), None

    @jax.jit
    def run_epoch(state: Any, key: Any) -> Any:
        order = jax.random.permutation(key, len(labels)).reshape(-1, 100)
        return jax.lax.scan(step, state, order)[0]

    zeros = jax.tree.map(jnp.zeros_like, parameters)
    state = (parameters, zeros, zeros, jnp.float32(0))
    for epoch in range(epochs):
        start = time.perf_counter()
        state = jax.block_until_ready(run_epoch(state, jax.random.fold_in(keys[2], epoch)))
        yield time.perf_counter() - start
    predictions = forward(state[0], jnp.asarray(test[0].numpy())).argmax(1)
    yield float((predictions == jnp.asarray(test[1].numpy())).mean())


def keras(train: Split, test: Split, epochs: int, steps_per_execution: int) -> Contestant:
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
    (x, y), (test_x, test_y) = ((images.numpy(), labels.numpy()) for images, labels in (train, test))
    for _ in range(epochs):
        start = time.perf_counter()
        model.fit(x, y, batch_size=100, epochs=1, verbose=0)
        yield time.perf_counter() - start
    yield float((model.predict(test_x, verbose=0).argmax(1) == test_y).mean())


def scikit_learn(train: Split, test: Split, epochs: int) -> Contestant:
    """`MLPClassifier` with its own initialisation."""
    from sklearn.neural_network import MLPClassifier

    model = MLPClassifier((200,), alpha=0, batch_size=100, random_state=0)
    for _ in range(epochs):
        start = time.perf_counter()
        model.partial_fit(train[0].numpy(), train[1].numpy(), classes=range(10))
        yield time.perf_counter() - start
    yield float(model.score(test[0].numpy(), test[1].numpy()))


def in_turns(contestants: dict[str, Contestant], epochs: int) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Let each run an epoch in turn; return their seconds of each epoch and their accuracies."""
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    with Path(os.devnull).open("w") as silence, contextlib.redirect_stdout(silence):
        for _ in range(epochs):
            for name, contestant in contestants.items():
                seconds[name].append(next(contestant))
        return seconds, {name: next(contestant) for name, contestant in contestants.items()}


def ratio(seconds: list[float], base: list[float]) -> float:
    """Median of the ratios epoch by epoch, from the second on: the first holds compilation and page faults."""
    return statistics.median(a / b for a, b in zip(seconds[1:], base[1:], strict=True))


def processor() -> str:
    try:
        with Path("/proc/cpuinfo").open() as file:
            return next(line.split(":")[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def compare(source: type[MNIST], root: str, train: Split, test: Split, epochs: int) -> None:
    contestants = {
        "plain PyTorch loop (reference)": reference(train, test, epochs),
        "this project": this_project(train, test, epochs),
        "this project, `--model.fused_step false`": this_project_unfused(train, test, epochs),
        "Lightning as documented": lightning_as_documented(source, root, test, epochs),
    }
    if find_spec("jax"):
        contestants["JAX, one `lax.scan` an epoch"] = jax_scan(train, test, epochs)
    if find_spec("keras") and find_spec("tensorflow"):
        for steps in (1, 50):
            contestants[f"Keras, `steps_per_execution={steps}`"] = keras(train, test, epochs, steps)
    if find_spec("sklearn"):
        contestants["scikit-learn"] = scikit_learn(train, test, epochs)
    seconds, accuracies = in_turns(contestants, epochs)
    base = next(iter(seconds.values()))
    print("\n| | seconds an epoch | of the reference | test accuracy |\n| --- | --- | --- | --- |")
    for name, values in seconds.items():
        print(f"| {name} | {statistics.median(values[1:]):.2f} | {ratio(values, base):.2f} | {accuracies[name]:.2%} |")
    ours = seconds["this project"]
    print(f"\nThis project's last epoch took {ours[-1] / base[-1] / (ours[1] / base[1]):.2f} of its second's time.")


def scaling(train: Split, test: Split, epochs: int) -> None:
    print("\n| hidden units | batch size | images | reference, s | this project, s | ratio |\n" + "| --- " * 6 + "|")
    tiled = (train[0].repeat(10, 1), train[1].repeat(10))
    settings = [(hidden, 100, train) for hidden in (50, 200, 800, 3200)]
    settings += [(200, batch_size, train) for batch_size in (10, 1_000, 10_000)]
    settings += [(200, 100, tiled)]
    for hidden, batch_size, data in settings:
        contestants = {
            "reference": reference(data, test, epochs, hidden, batch_size),
            "ours": this_project(data, test, epochs, hidden, batch_size),
        }
        seconds, _ = in_turns(contestants, epochs)
        base, ours = seconds.values()
        medians = " | ".join(f"{statistics.median(values[1:]):.2f}" for values in (base, ours))
        print(f"| {hidden} | {batch_size} | {len(data[1]):,} | {medians} | {ratio(ours, base):.2f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", default="data", help="directory of the data, as --data.root")
    parser.add_argument("--dataset", default="auto", choices=("auto", "mnist", "synthetic"))
    parser.add_argument("--epochs", type=int, default=10, help="at least 2")
    parser.add_argument("--scaling", action="store_true", help="vary the size of network, minibatch and training set")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)

    data = MNISTDataModule(options.dataset, options.root)
    data.prepare_data()
    data.setup("fit")
    data.setup("test")
    machine = f"{os.cpu_count()} cores of {processor()}"
    print(f"{data.dataset_name}, {options.epochs} epochs, {machine}, torch {torch.__version__}")
    if options.scaling:
        scaling(data.train, data.test, options.epochs)
    else:
        compare(
            MNIST if data.dataset_name == "MNIST" else synthetic, options.root, data.train, data.test, options.epochs
        )


if __name__ == "__main__":
    main()
