"""The data's files: download MNIST, verify it, make its stand-in where there is no network, and read either."""

import errno
import math
import shutil
import socket
import struct
import threading
import time
from concurrent.futures import Future
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor

from mnist_lightning.digits import synthetic
from mnist_lightning.model import SIDE

Dataset: TypeAlias = Literal["auto", "mnist", "synthetic"]

NAMES = {"mnist": "MNIST", "synthetic": "stand-in digits (not MNIST)"}

# MD5 sums of the unpacked files; torchvision knows those of the gzipped ones.
MNIST_MD5 = {
    "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
    "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
    "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
    "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
}

# A mirror that sends nothing for so long is given up, and so is the whole download.
MIRROR_TIMEOUT, DOWNLOAD_TIMEOUT = 10.0, 25.0


class DataError(RuntimeError):
    """Files that are damaged, missing or cannot be written; the message names them and says what to do."""


class UnreachableError(DataError):
    """There is nothing of MNIST on disk, and it could not be downloaded either."""


def get(dataset: Dataset, root: Path) -> Path:
    """Have whole and verified files on disk; return the directory that they lie in.

    Args:
        dataset: `mnist` downloads what is missing or damaged. `synthetic` makes the stand-in once. `auto` is `mnist`,
            or `synthetic` with a warning where nothing of MNIST is on disk and it cannot be downloaded.
        root: Where MNIST lies in `MNIST/raw/`, as `torchvision.datasets.MNIST` has it, and the stand-in beside it.

    Raises:
        DataError: The files are damaged or missing and cannot be fetched, or the directory cannot be written.
    """
    try:
        if dataset != "synthetic":
            try:
                return _get_mnist(root)
            except UnreachableError as error:
                if dataset == "mnist":
                    raise
                _warn_of_stand_in(error)
        return _get_synthetic(root)
    except OSError as error:
        cause = f"{error.filename or root}: {error.strerror or error}"
        raise DataError(f"{cause}; mend that or give another --data.root") from error


def find(dataset: Dataset, root: Path) -> Path:
    """The directory of the files that `get` had: MNIST's, or the stand-in's where `auto` found nothing of MNIST."""
    mnist = root / "MNIST" / "raw"
    is_there = all((mnist / name).exists() for name in MNIST_MD5)
    return mnist if dataset == "mnist" or (dataset == "auto" and is_there) else root / "synthetic" / "raw"


def dataset_in(raw: Path) -> str:
    """Which dataset a directory holds: `mnist`, `synthetic`, or another one of torchvision's in the same format."""
    return raw.parent.name.lower()


def read(raw: Path, file: Literal["train", "t10k"]) -> tuple[Tensor, Tensor]:
    """Read images, (N, 784) uint8, and labels, (N,) int64, of the training or the test file.

    The images are the file itself, mapped into memory and shared with other processes. Write to a copy of them.

    Raises:
        DataError: A file's header does not fit it.
    """
    images = _values(raw / f"{file}-images-idx3-ubyte", SIDE, SIDE)
    return images.flatten(1), _values(raw / f"{file}-labels-idx1-ubyte").long()


def _values(path: Path, *shape: int) -> Tensor:
    """The values of an IDX file of bytes, (N, *shape) uint8."""
    header = struct.Struct(f">{2 + len(shape)}I")
    count, rest = divmod(max(0, path.stat().st_size - header.size), math.prod(shape))
    with path.open("rb") as file:
        if rest or file.read(header.size) != header.pack(0x801 + len(shape), count, *shape):
            raise DataError(f"{path} is damaged: its header does not fit its {path.stat().st_size:,} bytes")
    # Copy-on-write: PyTorch has no read-only tensors, and no mistake may change the file.
    return torch.from_numpy(np.memmap(path, np.uint8, "c", header.size, (count, *shape)))


def _get_mnist(root: Path) -> Path:
    raw = root / "MNIST" / "raw"
    bad = [name for name, md5 in MNIST_MD5.items() if synthetic.md5_sum(raw / name) != md5]
    if not bad:
        return raw
    present = [path for name in MNIST_MD5 for path in (raw / name, raw / f"{name}.gz") if path.exists()]
    raw.mkdir(parents=True, exist_ok=True)
    # Everything is made in a directory of its own and moved when it is whole: a killed download leaves nothing that
    # could be taken for MNIST, and two downloads at once do not meet.
    with TemporaryDirectory(dir=root, prefix=".download-", ignore_cleanup_errors=True) as directory:
        for name in bad:
            if (raw / f"{name}.gz").exists():
                shutil.copy(raw / f"{name}.gz", directory)
        failure = _download(bad, directory)
        for name in bad:
            if synthetic.md5_sum(Path(directory, name)) != MNIST_MD5[name]:
                if not present:
                    raise UnreachableError(f"{raw}: MNIST is not there, and the download failed: {failure}")
                # Of the two forms of a file the gzipped one is at fault where both are there: it mends the other.
                culprit = next((p for p in (raw / f"{name}.gz", raw / name) if p in present), None)
                state = f"{culprit} is damaged" if culprit else f"{raw / name} is missing"
                raise DataError(f"{state}, and the download failed: {failure}; go online, or put a good copy there")
        for name in bad:
            Path(directory, name).replace(raw / name)
    return raw


def _download(names: list[str], directory: str) -> str:
    """Fetch and unpack files, unless their gzipped form is in the directory already; say what went wrong, if anything.

    Raises:
        OSError: The disk is full.
    """
    result: Future[str] = Future()
    given_up = threading.Event()

    def fetch() -> None:
        try:
            failures = (_from_mirrors(f"{name}.gz", directory, given_up) for name in names)
            result.set_result(next(filter(None, failures), ""))
        except Exception as error:
            result.set_exception(error)

    # torchvision sets no time limit, and no socket's would cover looking up a name or a host with many addresses.
    thread = threading.Thread(target=fetch, daemon=True)
    default = socket.getdefaulttimeout()
    socket.setdefaulttimeout(MIRROR_TIMEOUT)
    try:
        thread.start()
        size, since = -1, time.monotonic()
        while thread.is_alive() and time.monotonic() - since < DOWNLOAD_TIMEOUT:
            thread.join(0.1)
            now = sum(path.stat().st_size for path in Path(directory).iterdir())
            if now != size:
                size, since = now, time.monotonic()
    finally:
        socket.setdefaulttimeout(default)
        given_up.set()
    return f"nothing arrived for {DOWNLOAD_TIMEOUT:.0f} s" if thread.is_alive() else result.result()


def _from_mirrors(name: str, directory: str, given_up: threading.Event) -> str:
    from torchvision.datasets import MNIST  # takes a second, and mostly nothing is to be downloaded
    from torchvision.datasets.utils import download_and_extract_archive

    failures = []
    for mirror in MNIST.mirrors:
        if given_up.is_set():
            break
        try:
            download_and_extract_archive(f"{mirror}{name}", directory, filename=name, md5=dict(MNIST.resources)[name])
            return ""
        except Exception as error:  # whatever a mirror may answer
            if isinstance(error, OSError) and error.errno == errno.ENOSPC:
                raise
            failures.append(f"{mirror}{name}: {' '.join(str(error).split()) or type(error).__name__}")
    return ", ".join(failures)


def _get_synthetic(root: Path) -> Path:
    raw = root / "synthetic" / "raw"
    if not synthetic.is_complete(raw):
        raw.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=root, prefix=".make-") as directory:
            synthetic.make(Path(directory))
            for path in Path(directory).iterdir():
                path.replace(raw / path.name)
    return raw


def _warn_of_stand_in(error: UnreachableError) -> None:
    from rich.console import Console
    from rich.panel import Panel

    Console(stderr=True).print(
        Panel(
            f"{error}\n\n"
            "Training on digits made on this machine instead. [bold]Results on them are not MNIST results.[/bold]\n\n"
            "To get MNIST, go online and run [bold]python -m mnist_lightning data --data.dataset mnist[/bold], or copy "
            "its four files to MNIST/raw/ under --data.root.",
            title="[bold]NOT MNIST[/bold]",
            border_style="bold red",
        )
    )
