"""What a process does before PyTorch is loaded: it lets others run, and does not wait for the garbage collector."""

import atexit
import contextlib
import gc
import os
import sys
from collections.abc import Iterator
from typing import NoReturn

# Idle threads of OpenMP spin, by default for so long that beside another busy process an epoch takes 4 times as long.
# Not to spin at all (`PASSIVE`) costs up to a third of the speed on a quiet machine. The engine's README has a table.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "500")

_code: int | None = None


@contextlib.contextmanager
def fast_imports() -> Iterator[None]:
    """Import in it: the garbage collector, which finds nothing there, would take a third of the time."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if was_enabled:
            gc.enable()


def leave(code: int) -> NoReturn:
    """End the process with `code`, but do not take apart a million objects of imported modules, which takes 1.8 s."""
    global _code
    _code = code
    sys.exit(code)


@atexit.register  # before all others, so that it is called last
def _end() -> None:
    gc.freeze()
    if _code is not None:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        os._exit(_code)
