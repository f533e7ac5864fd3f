"""Directories and files that several processes may use at once."""

import contextlib
import errno
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

WAIT_IN_SILENCE = 5.0  # seconds


def check_directory(path: Path) -> None:
    """Raise an `OSError` that names what keeps a directory from being there: a broken link, a file, or an address."""
    if re.match(r"\w{2,}:/", path.as_posix()):
        raise OSError(errno.EINVAL, "an address, not a local directory", str(path))
    for place in (*reversed(path.parents), path):
        if place.is_symlink() and not place.exists():
            raise OSError(errno.ENOENT, f"a link to {place.readlink()}, which does not exist", str(place))
        if place.exists() and not place.is_dir():
            raise OSError(errno.ENOTDIR, "a file, not a directory", str(place))


@contextlib.contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Let one process at a time, of all machines that share a directory, do something there; make the directory."""
    check_directory(directory)
    directory.mkdir(parents=True, exist_ok=True)
    lock = FileLock(directory / ".lock")
    with contextlib.suppress(OSError, NotImplementedError):  # where nothing can be locked, or written, go on without
        try:
            lock.acquire(timeout=WAIT_IN_SILENCE)
        except Timeout:
            print(f"waiting for another process, which holds {lock.lock_file}", file=sys.stderr)
            lock.acquire()
    try:
        yield
    finally:
        lock.release()
