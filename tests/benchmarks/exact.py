"""The table of exact resumption: `python tests/benchmarks/exact.py`, for our Trainer and for Lightning's.

A case of `tests/engine/test_resumption.py` trains two epochs of 11 iterations and saves in
mid-epoch (8) and at the end of the first; each of these is resumed in a new process, with other random states before.
"""

import logging
import multiprocessing
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from engine import test_resumption as table
from engine.test_loop import differences

from mnist_lightning import Trainer

KINDS = {"ours": Trainer, "Lightning's": pl.Trainer}
SAVED = {"mid-epoch": "checkpoints/step=8.ckpt", "end": "checkpoints/end of epoch=0.ckpt"}
CASES = table.CASES | table.SLOW
NAMES = ["plain", "workers", "sampler", "own generator", "random transform", "draws in steps", "iterable", "stateful"]
NAMES += ["two loaders", "manual", "accumulates", "SchedulesBySteps", "Schedules"]


def in_new_process(function: Any, *arguments: Any) -> None:
    process = multiprocessing.get_context("fork").Process(target=function, args=arguments)
    process.start()
    process.join()
    assert process.exitcode == 0


def life(path: Path, name: str, kind: str, ckpt_path: Path | None) -> None:
    """Train without interruption, or go on, and save the weights."""
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    module, data, settings, _ = CASES[name]
    settings = settings | {"max_epochs": 2}
    if ckpt_path:
        run = table.resume(path, module, data, settings, ckpt_path, KINDS[kind])
    else:
        run = table.train(path, module, data, settings, KINDS[kind])
    torch.save(run.left["end.ckpt"]["state_dict"], path / "weights.pt")


def cells(directory: Path, name: str, kind: str) -> list[str]:
    whole = directory / "whole"
    in_new_process(life, whole, name, kind, None)
    found = []
    for when, file in SAVED.items():
        in_new_process(life, directory / when, name, kind, whole / file)
        left = [torch.load(path / "weights.pt") for path in (whole, directory / when)]
        found.append("differs" if differences(*left) else "exact")
    return found


def main() -> None:
    """Print a row a case."""
    print("| resumed |", " | ".join(f"{kind}, {when}" for kind in KINDS for when in SAVED), "|\n" + "| --- " * 5 + "|")
    for name in NAMES:
        with tempfile.TemporaryDirectory() as directory:
            row = [cell for kind in KINDS for cell in cells(Path(directory, kind), name, kind)]
        print(f"| {name} |", " | ".join(row), "|", flush=True)


if __name__ == "__main__":
    main()
