"""Fixtures: small data sets in MNIST's file format, and the command line run in this process."""

import multiprocessing
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torchvision.datasets import MNIST
from torchvision.datasets.utils import calculate_md5

from mnist_lightning import files, synthetic
from mnist_lightning.cli import main
from mnist_lightning.datamodule import MNISTDataModule

SMALL = {"train": 1250, "t10k": 230}
VAL_SIZE = 200  # leaves 1,050 training digits: 11 minibatches of 100, the last one of 50

RunCLI = Callable[..., int]

# Processes that have the libraries imported already: a run starts in a second, not in seven.
fork = multiprocessing.get_context("forkserver")
fork.set_forkserver_preload(["mnist_lightning.cli"])


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing listens on port 9 of this machine: a download fails at once."""
    monkeypatch.setattr(MNIST, "mirrors", ["http://127.0.0.1:9/"])


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(synthetic, "SIZES", SMALL)


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


@pytest.fixture
def data(root: Path) -> MNISTDataModule:
    """The small stand-in digits."""
    return MNISTDataModule("synthetic", str(root), val_size=VAL_SIZE)


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

    def run(command: str, *arguments: str, data: bool = True) -> int:
        small = ["--data.dataset=synthetic", f"--data.root={root}", f"--data.val_size={VAL_SIZE}"]
        monkeypatch.setattr(sys, "argv", ["mnist_lightning", command, *(small if data else []), *arguments])
        try:
            return main()
        except SystemExit as exit_:  # `--help` and `--print_config`
            return int(exit_.code or 0)

    return run


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
