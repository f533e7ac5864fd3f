"""What makes a command start and end sooner: Python's garbage collector stays out of the way of imports."""

import atexit
import contextlib
import gc
from collections.abc import Iterator

# At exit the interpreter would go through a million objects of imported modules once more: 1.8 s, and 0.3 s without.
atexit.register(gc.freeze)


@contextlib.contextmanager
def fast_imports() -> Iterator[None]:
    """Import in it: else the garbage collector goes through all modules again and again, a third of the time."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if was_enabled:
            gc.enable()
