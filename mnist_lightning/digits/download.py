"""Fetch MNIST from its mirrors, which may stall, break off, or serve something else."""

import errno
import socket
import threading
import time
from concurrent.futures import Future
from pathlib import Path

# A mirror that sends nothing for so long is given up, and so is the whole download.
MIRROR_TIMEOUT, DOWNLOAD_TIMEOUT = 10.0, 25.0


def fetch(names: list[str], directory: str) -> str:
    """Fetch and unpack files, unless their gzipped form is in the directory already; say what went wrong, if anything.

    Raises:
        OSError: The disk is full.
    """
    result: Future[str] = Future()
    given_up = threading.Event()

    def fetch_all() -> None:
        try:
            failures = (_from_mirrors(f"{name}.gz", directory, given_up) for name in names)
            result.set_result(next(filter(None, failures), ""))
        except Exception as error:
            result.set_exception(error)

    # torchvision sets no time limit, and no socket's would cover looking up a name or a host with many addresses.
    thread = threading.Thread(target=fetch_all, daemon=True)
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
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise
            failures.append(f"{mirror}{name}: {' '.join(str(error).split()) or type(error).__name__}")
    return ", ".join(failures)
