"""What all code of a process shares. As a script: what importing our modules changes of it."""

import ast
import contextlib
import gc
import importlib.util
import inspect
import logging
import os
import pkgutil
import signal
import socket
import sys
import threading
import warnings
from pathlib import Path
from typing import Any

LIBRARIES = ("lightning", "jsonargparse", "yaml", "PIL", "torchvision")


def state() -> dict[str, Any]:
    """Everything by its name; two states are compared by `changes`."""
    names = [
        None,
        *(name for name, each in logging.root.manager.loggerDict.items() if isinstance(each, logging.Logger)),
    ]
    loggers = {str(name): logging.getLogger(name) for name in names}
    found: dict[str, Any] = {
        "environment": dict(os.environ),
        "signals": {number: signal.getsignal(number) for number in signal.valid_signals()},
        "hooks": [sys.excepthook, threading.excepthook, sys.unraisablehook, sys.displayhook],
        "streams": [sys.stdout, sys.stderr],
        "warnings": list(warnings.filters),
        "garbage collector": [gc.isenabled(), gc.get_threshold(), gc.get_freeze_count() > 0],
        "others": [sys.path[:], sys.argv[:], Path.cwd(), socket.getdefaulttimeout()],
    }
    for name, logger in loggers.items():
        handlers = [(handler, handler.level, handler.filters[:]) for handler in logger.handlers]
        found[f"logger {name}"] = [logger.level, logger.propagate, logger.disabled, logger.filters[:], handlers]
    if torch := sys.modules.get("torch"):
        # As bits: a process that takes denormal numbers for zeros also finds them equal to zeros.
        found["denormals"] = torch.tensor(1e-310, dtype=torch.double).mul(1).view(torch.int64).item()
        found["torch"] = [torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled()]
        found["torch"] += [torch.are_deterministic_algorithms_enabled(), torch.get_float32_matmul_precision()]
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] in LIBRARIES and module:
            found |= _globals(name, vars(module))
    return found


def _globals(where: str, variables: Any) -> dict[str, Any]:
    """The variables of a module, those of its classes, and the annotations of its functions."""
    found: dict[str, Any] = {}
    for name, value in list(variables.items()):
        if name.startswith("__") and name not in ("__init__", "__annotations__"):
            continue
        found[f"{where}.{name}"] = value.copy() if type(value) in (dict, list, set) else id(value)
        if inspect.isfunction(value):
            found[f"{where}.{name}: annotations"] = dict(value.__annotations__)
        elif inspect.isclass(value) and value.__module__ == where:
            found |= _globals(f"{where}.{name}", vars(value))
    return found


def changes(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """What is not as it was; not what has come since, as with a library that was imported."""
    return [name for name, value in before.items() if name not in after or after[name] != value]


def _import_libraries(package: Path) -> None:
    """Import what our modules import from elsewhere at their top."""
    for file in package.rglob("*.py"):
        for node in ast.parse(file.read_text()).body:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
            module = "." * node.level + (node.module or "") if isinstance(node, ast.ImportFrom) else ""
            for name in names if not module.startswith((".", package.name)) else []:
                with contextlib.suppress(ImportError):  # a class, say
                    importlib.import_module(f"{module}.{name}".removeprefix("."))


if __name__ == "__main__":
    spec = importlib.util.find_spec("mnist_lightning")
    assert spec
    assert spec.submodule_search_locations
    (directory,) = spec.submodule_search_locations
    _import_libraries(Path(directory))
    after = state()
    for each in ["mnist_lightning", *(found.name for found in pkgutil.walk_packages([directory], "mnist_lightning."))]:
        importlib.import_module(each)
        before, after = after, state()
        for change in changes(before, after):
            print(each, "changes", change)
