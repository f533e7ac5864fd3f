"""The table of exact resumption: `python tests/benchmarks/exact.py`, for our Trainer and for Lightning's.

Each row trains two epochs of 11 iterations and saves in mid-epoch (8) and at the end of the first; each of these is
resumed in a new process, with other random states before. A row differs from the plain one, which neither shuffles nor
draws, in what it names alone.
"""

import logging
import multiprocessing
import os
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import CombinedLoader
from torch.utils.data import DataLoader, WeightedRandomSampler
from torchdata.stateful_dataloader import StatefulDataLoader

sys.path.insert(0, str(Path(__file__).parents[1]))

from engine import test_resumption as resumption
from engine.test_hooks import Manual
from engine.test_loop import Foreign, Schedules, SchedulesBySteps, TwoLoaders, differences, loader, pair
from engine.test_processes import free_port, torchrun

from mnist_lightning import Trainer

KINDS = {"ours": Trainer, "Lightning's": pl.Trainer}
SAVED = {"mid-epoch": "checkpoints/step=8.ckpt", "end": "checkpoints/end of epoch=0.ckpt"}


def in_order() -> DataLoader[Any]:
    return loader(shuffle=False)


def over(examples: Any = None, kind: Any = DataLoader, **settings: Any) -> Any:
    return lambda: kind(examples or loader().dataset, 8, **settings)


def generator() -> DataLoader[Any]:
    return DataLoader(loader().dataset, 8, shuffle=True, generator=torch.Generator().manual_seed(3))


# Module, data, and settings of the Trainer.
ROWS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "plain: nothing is drawn": (Foreign, in_order, {}),
    "`DataLoader(shuffle=True)`": (Foreign, loader, {}),
    "with worker processes": (Foreign, over(num_workers=2, shuffle=True), {}),
    "a sampler": (Foreign, over(sampler=WeightedRandomSampler(torch.arange(1.0, 86).tolist(), 85)), {}),
    "a `generator` of its own": (Foreign, generator, {}),
    "random transforms": (Foreign, over(resumption.Noisy()), {}),
    "random transforms in workers": (Foreign, over(resumption.Noisy(), num_workers=2), {}),
    "an `IterableDataset`": (Foreign, over(resumption.Shuffled()), {}),
    "`StatefulDataLoader`": (Foreign, over(kind=StatefulDataLoader, shuffle=True), {}),
    "two loaders": (TwoLoaders, lambda: CombinedLoader(pair(), "min_size"), {}),
    "dropout": (Foreign, in_order, {}),
    "a `training_step` that draws": (resumption.DrawsInSteps, in_order, {}),
    "manual optimization": (Manual, in_order, {}),
    "accumulated gradients": (Foreign, in_order, {"accumulate_grad_batches": 2}),
    "a schedule by steps": (SchedulesBySteps, in_order, {}),
    "a schedule by epochs": (Schedules, in_order, {}),
    "two processes, workers": (Foreign, over(num_workers=1, shuffle=True), {"devices": 2, "strategy": "ddp"}),
}


def in_new_processes(count: int, function: Any, *arguments: Any) -> None:
    port, fork = free_port(), multiprocessing.get_context("fork")
    processes = [fork.Process(target=function, args=(rank, count, port, *arguments)) for rank in range(count)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0


def life(rank: int, count: int, port: int, path: Path, row: str, kind: str, ckpt_path: Path | None) -> None:
    """Train without interruption, or go on, and save the weights."""
    if count > 1:
        os.environ.update(torchrun(rank, count, port))
        path = path / str(rank)
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    module_class, data, settings = ROWS[row]

    def module() -> Any:
        made = module_class()
        for layer in made.modules():
            if isinstance(layer, torch.nn.Dropout) and row != "dropout":
                layer.p = 0.0
        return made

    if ckpt_path:
        run = resumption.resume(path, module, data, settings, ckpt_path, KINDS[kind])
    else:
        run = resumption.train(path, module, data, settings, KINDS[kind])
    torch.save(run.module.state_dict(), path / "weights.pt")


def cells(directory: Path, row: str, kind: str) -> list[str]:
    count = ROWS[row][2].get("devices", 1)
    first = "0" * (count > 1)
    whole = directory / "whole"
    in_new_processes(count, life, whole, row, kind, None)
    found = []
    for when, file in SAVED.items():
        in_new_processes(count, life, directory / when, row, kind, whole / first / file)
        left = [torch.load(path / first / "weights.pt") for path in (whole, directory / when)]
        found.append("differs" if differences(*left) else "exact")
    return found


def main() -> None:
    """Print the table."""
    print("| resumed |", " | ".join(f"{kind}, {when}" for kind in KINDS for when in SAVED), "|\n" + "| --- " * 5 + "|")
    for row in ROWS:
        with tempfile.TemporaryDirectory() as directory:
            found = [cell for kind in KINDS for cell in cells(Path(directory, kind), row, kind)]
        print(f"| {row} |", " | ".join(found), "|", flush=True)


if __name__ == "__main__":
    main()
