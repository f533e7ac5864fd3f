"""Fixtures: small data sets in MNIST's file format, and the command line run in this process."""

import os

# Before PyTorch is loaded: idle threads of one test would otherwise spin on the core that another test needs.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import contextlib
import errno
import fcntl
import functools
import io
import json
import multiprocessing
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from importlib.metadata import entry_points
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import pytest
import torch
from lightning.fabric.utilities import registry
from matplotlib.figure import Figure
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer import event_file_writer
from torchvision.datasets import MNIST
from torchvision.datasets.utils import calculate_md5

from mnist_lightning.datamodule import MNISTDataModule
from mnist_lightning.digits import files, network_figures, plots, synthetic
from mnist_lightning.engine.cli import CLI
from mnist_lightning.engine.tensorboard import RunLogger

SMALL = {"train": 1250, "t10k": 230}
SILENT: dict[str, Any] = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary"), False)
"""Settings of a Trainer that logs and shows nothing."""
VAL_SIZE = 200  # leaves 1,050 training digits: 11 minibatches of 100, the last one of 50

# The event files of one second are numbered so that their names sort, as those of processes that take longer do.
EVENT_FILES = event_file_writer.AtomicCounter(100_000)

RunCLI = Callable[..., int]
Start = Callable[..., BaseProcess]
Fork: TypeAlias = ForkServerContext
Found = TypeVar("Found")

SHORT = ["--trainer.max_epochs=1", "--model.hidden_dim=17", "--test_after_fit=false"]
RUN = Path("lightning_logs/version_0")


@pytest.fixture(autouse=True)
def _each_test_is_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """One seed, small data, and no network."""
    torch.manual_seed(0)
    monkeypatch.setattr(synthetic, "SIZES", SMALL)
    # Nothing listens on port 9 of this machine: a download fails at once.
    monkeypatch.setattr(MNIST, "mirrors", ["http://127.0.0.1:9/"])
    monkeypatch.setattr(event_file_writer, "_global_uid", EVENT_FILES)


@pytest.fixture(autouse=True, scope="session")
def _parsers_are_made_once() -> Iterator[None]:
    """To make one takes as long as to train on the small data. It depends on the command and the classes alone."""
    made: dict[Any, dict[str, Any]] = {}
    make, results = CLI.setup_parser, ("parser", "_subcommand_parsers", "_subcommand_method_arguments")

    def setup_parser(self: CLI, *args: Any) -> None:
        key = (*sys.argv[1:2], type(self), self.model_class, self.datamodule_class, str(args))
        if key not in made:
            make(self, *args)
            made[key] = {name: getattr(self, name) for name in results}
        for parser in (made[key]["parser"], *made[key]["_subcommand_parsers"].values()):
            vars(parser).pop("print_config", None)  # of a command that failed before it printed it
        vars(self).update(made[key])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CLI, "setup_parser", setup_parser)
        yield


@pytest.fixture(autouse=True, scope="session")
def _packages_are_looked_through_once() -> Iterator[None]:
    """For callbacks that come with them, which takes most of the time of making a Trainer."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry, "entry_points", functools.cache(entry_points))
        yield


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with small stand-in files, for reading only."""
    path = tmp_path_factory.mktemp("data")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(synthetic, "SIZES", SMALL)
        MNISTDataModule("synthetic", str(path)).prepare_data()
    return path


@pytest.fixture
def fake_mnist(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with the same small files in the place of MNIST's, and with their MD5 sums known as MNIST's."""
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    sums = {}
    for name in files.MNIST_MD5:
        content = (root / "synthetic" / "raw" / name).read_bytes()
        (raw / name).write_bytes(content)
        sums[name] = calculate_md5(raw / name)
    monkeypatch.setattr(files, "MNIST_MD5", sums)
    return tmp_path


@pytest.fixture(scope="session")
def mnist_root() -> str:
    """The directory of the real files, from the environment."""
    if "MNIST_ROOT" not in os.environ:
        pytest.skip("MNIST_ROOT does not name a directory with MNIST's files")
    return os.environ["MNIST_ROOT"]


@pytest.fixture(params=[errno.ENOTSUP, errno.ENOLCK])
def no_locks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system on which nothing can be locked."""

    def flock(*_: object) -> None:
        raise OSError(request.param, "no locks here")

    monkeypatch.setattr(fcntl, "flock", flock)


@pytest.fixture
def data(root: Path) -> MNISTDataModule:
    """The small synthetic digits, read."""
    return prepare("synthetic", root)


def prepare(dataset: str, root: Path) -> MNISTDataModule:
    """A data module with its files on disk and everything read."""
    data = MNISTDataModule(dataset, str(root), val_size=VAL_SIZE)  # type: ignore[arg-type]
    data.prepare_data()
    data.setup("fit")
    data.setup("test")
    return data


@pytest.fixture
def run_cli(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunCLI:
    """Run the command line in `tmp_path` on the small data; return its exit code."""
    monkeypatch.chdir(tmp_path)

    def run(command: str, *arguments: str, data: bool = True, classes: tuple[type, ...] = ()) -> int:
        small = ["--data.dataset=synthetic", f"--data.root={root}"]
        if command != "export":
            small.append(f"--data.val_size={VAL_SIZE}")
        monkeypatch.setattr(sys, "argv", ["mnist_lightning", command, *(small if data else []), *arguments])
        from mnist_lightning.__main__ import main

        return main(*classes)

    return run


@pytest.fixture
def short_run(run_cli: RunCLI, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of `SHORT` in the working directory, trained once for all tests."""
    kept = tmp_path_factory.getbasetemp() / "short_run"
    if not kept.exists():
        with contextlib.redirect_stdout(io.StringIO()):
            assert run_cli("fit", *SHORT) == 0
        (tmp_path / "lightning_logs").rename(kept)
    shutil.copytree(kept, tmp_path / "lightning_logs")
    return RUN


@pytest.fixture(autouse=True)
def _blank_figures(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "figures" not in request.keywords:
        leave_figures_blank(monkeypatch.setattr)


def leave_figures_blank(replace: Callable[..., None]) -> None:
    """To draw them takes longer than to train on the small data; tests that look at them are marked `figures`."""

    def save(_: Figure, path: str, **__: Any) -> None:
        Image.new("RGB", (1, 1)).save(path, "PNG")

    replace(Figure, "savefig", save)
    replace(RunLogger, "log_graph", lambda *_: None)
    for module, name in (
        (plots, "digit_grid"),
        (plots, "confusion_matrix"),
        (plots, "training_curves"),
        (network_figures, "draw_weights"),
    ):
        replace(module, name, lambda *_: Figure())


def slow(*values: Any) -> Any:
    """Values of a test's parameters, for a slow test."""
    return pytest.param(*values, marks=pytest.mark.slow)


def newest_run(directory: Path) -> Path:
    return max((directory / "lightning_logs").iterdir(), key=lambda path: int(path.name.removeprefix("version_")))


def events(run: Path) -> EventAccumulator:
    """What TensorBoard shows of a run."""
    return EventAccumulator(str(run), {"scalars": 0, "tensors": 0, "images": 0}).Reload()


def steps(run: Path, tag: str) -> list[int]:
    return [event.step for event in events(run).Scalars(tag)]


def load(run: Path, name: str = "last") -> dict[str, Any]:
    checkpoint: dict[str, Any] = torch.load(run / "checkpoints" / f"{name}.ckpt", weights_only=True)
    return checkpoint


def results(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "results.json").read_text())
    return found


def everything(run: Path) -> dict[str, Any]:
    """What must not depend on how often the run died: weights, optimizer, curves, results."""
    left: dict[str, Any] = {}
    for name in ("best", "last"):
        checkpoint = load(run, name)
        left[f"{name}: weights"] = {key: value.tolist() for key, value in checkpoint["state_dict"].items()}
        left[f"{name}: optimizer"] = [
            {key: value.tolist() for key, value in state.items()}
            for state in checkpoint["optimizer_states"][0]["state"].values()
        ]
        history = checkpoint["callbacks"]["Report"]
        left[f"{name}: progress"] = checkpoint["global_step"], checkpoint["epoch"], history["train"], history["val"]
    curves = events(run)
    for tag in curves.Tags()["scalars"]:
        curve = [(event.step, event.value) for event in curves.Scalars(tag)]
        # A run that dies after its test tests again, and Lightning logs the epoch with each point.
        left[tag] = sorted(set(curve)) if tag == "epoch" or tag.startswith("test/") else curve
    left["results"] = {key: value for key, value in results(run).items() if key != "train_seconds"}
    return left


def assert_the_same(run: Path, other: Path) -> None:
    expected, found = everything(run), everything(other)
    assert [key for key in expected if expected[key] != found.get(key)] == []
    assert expected.keys() == found.keys()


def run_in_process(directory: Path, arguments: list[str], output_name: str, environment: dict[str, str]) -> None:
    os.chdir(directory)
    os.environ.update(environment)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which the background jobs of a shell ignore
    output = os.open(output_name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.argv = ["mnist_lightning", *arguments]
    from mnist_lightning import datamodule
    from mnist_lightning.__main__ import main

    synthetic.SIZES = SMALL
    if "FIGURES" not in environment:
        leave_figures_blank(setattr)
    if "OMP_NUM_THREADS" in environment:  # which PyTorch, loaded before the fork, does not see
        torch.set_num_threads(int(environment["OMP_NUM_THREADS"]))
    if "MNIST_MD5" in environment:
        files.MNIST_MD5 = json.loads(environment["MNIST_MD5"])
    datamodule.EVAL_BATCH_SIZE = int(environment.get("EVAL_BATCH_SIZE", datamodule.EVAL_BATCH_SIZE))
    sys.exit(main())


@pytest.fixture(scope="session")
def fork() -> Fork:
    """Makes processes that have the libraries imported already: a run starts in a second, not in seven."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        [
            "mnist_lightning.engine.cli",
            "mnist_lightning.figures",
            "torch.utils.tensorboard",
            "tensorboard.backend.event_processing.event_accumulator",
            "matplotlib.figure",
            "pytest",
            "torchvision.datasets",
        ]
    )
    return context


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """First those that fork: one of pytest's workers gets them all, and imports the libraries for its forks once."""
    items.sort(key=lambda item: "fork" not in getattr(item, "fixturenames", ()))


@pytest.fixture
def start(fork: Fork) -> Iterator[Start]:
    """Start the command line in a process of its own, its output in `output.txt`."""
    started = []

    def start(
        directory: Path,
        arguments: list[str],
        output: str = "output.txt",
        environment: dict[str, str] | None = None,
    ) -> BaseProcess:
        directory.mkdir(exist_ok=True)
        (directory / output).touch()
        process = fork.Process(target=run_in_process, args=(directory, arguments, output, environment or {}))
        process.start()
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()


def small(root: Path) -> list[str]:
    return ["fit", "--data.dataset=synthetic", f"--data.root={root}", "--data.val_size=200"]


def poll(look: Callable[[], Found | None], what: str) -> Found:
    """What `look` finds, once it finds something."""
    deadline = time.monotonic() + 300
    while not (found := look()):
        assert time.monotonic() < deadline, f"there is no {what}"
        time.sleep(0.01)
    return found


def wait_for(directory: Path, pattern: str) -> None:
    poll(lambda: list(directory.glob(pattern)), pattern)
