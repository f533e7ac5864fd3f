"""Fetch MNIST from its mirrors, which may stall, break off, or serve something else."""

import errno
import socket
import time
from multiprocessing.pool import ThreadPool
from pathlib import Path

# A mirror that sends nothing for so long is given up, and so is the whole download.
MIRROR_TIMEOUT, DOWNLOAD_TIMEOUT = 10.0, 25.0


def fetch(names: list[str], directory: str) -> str:
    """Fetch and unpack files, unless their gzipped form is in the directory already; say what went wrong, if anything.

    Raises:
        OSError: The disk is full.
    """
    # torchvision sets no time limit, and no socket's would cover looking up a name or a host with many addresses.
    default = socket.getdefaulttimeout()
    socket.setdefaulttimeout(MIRROR_TIMEOUT)
    try:
        result = ThreadPool(1).apply_async(_fetch_all, (names, directory))
        size, since = -1, time.monotonic()
        while not result.ready() and time.monotonic() - since < DOWNLOAD_TIMEOUT:
            result.wait(0.1)
            now = sum(path.stat().st_size for path in Path(directory).iterdir())
            if now != size:
                size, since = now, time.monotonic()
    finally:
        socket.setdefaulttimeout(default)
    return result.get() if result.ready() else f"nothing arrived for {DOWNLOAD_TIMEOUT:.0f} s"


def _fetch_all(names: list[str], directory: str) -> str:
    return next(filter(None, (_from_mirrors(f"{name}.gz", directory) for name in names)), "")


def _from_mirrors(name: str, directory: str) -> str:
    from torchvision.datasets import MNIST  # takes a second, and mostly nothing is to be downloaded
    from torchvision.datasets.utils import download_and_extract_archive

    failures = []
    for mirror in MNIST.mirrors:
        if not Path(directory).exists():  # `fetch` has given up
            break
        try:
            download_and_extract_archive(f"{mirror}{name}", directory, filename=name, md5=dict(MNIST.resources)[name])
            return ""
        except Exception as error:  # whatever a mirror may answer
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise
            failures.append(f"{mirror}{name}: {' '.join(str(error).split()) or type(error).__name__}")
    return ", ".join(failures)
