"""What makes a command start and end sooner: Python does not go through all imported modules again and again."""

import atexit
import contextlib
import gc
import os
import sys
from collections.abc import Iterator
from typing import NoReturn

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
