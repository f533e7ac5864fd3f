"""Whole commands in processes of their own: `speed.py --whole` and `speed.py --beside`."""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path

SCRIPT = Path(__file__).with_name("plain.py")
FIT = [sys.executable, "-u", "-m", "mnist_lightning", "fit"]
FUSED = "--model.fused=true"

# What a part of `fit` ends with, on the console.
PARTS = {"start": "Training on ", "training": "Epoch: 10,", "test": "Test loss", "figures": "Run: "}


def whole(options: argparse.Namespace) -> None:
    """`fit` with validation, figures, curves, checkpoints and results, beside a script that only trains and tests.

    Each as its users run it: `fit` on one thread, the script on as many as PyTorch takes. Processor time is
    user and system time, of the process and its children.
    """
    root = str(Path(options.root).resolve())
    commands = {
        "bare PyTorch script (reference)": [sys.executable, str(SCRIPT), root, "10"],
        "`fit`": [*FIT, f"--data.root={root}"],
        f"`fit {FUSED}`": [*FIT, f"--data.root={root}", FUSED],
    }
    taken: dict[str, list[dict[str, float]]] = {name: [] for name in commands}
    for _ in range(options.rounds):
        for name, command in commands.items():
            taken[name].append(_measured(command))
            print(f"{name}: {taken[name][-1]['seconds']:.1f} s", file=sys.stderr, flush=True)
    print("\n| | seconds | of the reference | processor seconds | of the reference |\n" + "| --- " * 5 + "|")
    base, *_ = taken.values()
    for name, rounds in taken.items():
        cells = []
        for kind in ("seconds", "processor"):
            ratios = [each[kind] / reference[kind] for each, reference in zip(rounds, base, strict=True)]
            cells += [f"{statistics.median(each[kind] for each in rounds):.1f}", f"{statistics.median(ratios):.2f}"]
        print(f"| {name} |", " | ".join(cells), "|")
    print("\n| of `fit` | seconds |\n| --- | --- |")
    ends = ["", *PARTS, "seconds"]
    for before, part in pairwise(ends):
        spans = [each[part] - each.get(before, 0) for each in taken["`fit`"]]
        print(f"| {'exit' if part == 'seconds' else part} | {statistics.median(spans):.1f} |")


def _measured(command: list[str]) -> dict[str, float]:
    """Seconds until each line of `PARTS` and until the end, and the seconds of processor time."""
    found: dict[str, float] = {}
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as directory:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=directory)
        assert process.stdout
        for line in process.stdout:
            found |= {part: time.perf_counter() - start for part, begin in PARTS.items() if line.startswith(begin)}
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"failed: {' '.join(command)}")
    return found | {"seconds": time.perf_counter() - start, "processor": used.ru_utime + used.ru_stime}


def beside(options: argparse.Namespace) -> None:
    """Seconds an epoch of `fit` beside other processes, and of those alone."""
    rows: dict[str, list[str]] = {"`fit`": [], f"`fit {FUSED}`": [FUSED], "`fit --threads=0`": ["--threads=0"]}
    columns = {"alone": (0, 1), "beside a busy process": (1, 1), "two `fit`s at once": (0, 2)}
    taken: dict[tuple[str, str], list[float]] = {(row, column): [] for row in rows for column in columns}
    for _ in range(options.rounds):
        for row, settings in rows.items():
            for column, (busy, fits) in columns.items():
                others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(busy)]
                seconds = seconds_an_epoch([f"--data.root={options.root}", *settings], 3, fits)
                for other in others:
                    other.kill()
                taken[row, column].append(seconds)
                print(f"{row}, {column}: {seconds:.2f} s", file=sys.stderr, flush=True)
    print("\n| seconds an epoch, of those alone |", " | ".join(columns), "|\n" + "| --- " * 4 + "|")
    for row in rows:
        alone = taken[row, "alone"]
        cells = []
        for column in columns:
            ratios = [seconds / base for seconds, base in zip(taken[row, column], alone, strict=True)]
            cells.append(f"{statistics.median(taken[row, column]):.2f}, {statistics.median(ratios):.2f}")
        print(f"| {row} |", " | ".join(cells), "|")


def seconds_an_epoch(settings: list[str], epochs: int, fits: int = 1) -> float:
    """The mean of so many `fit`s at once, validation included; by their `results.json`."""
    with tempfile.TemporaryDirectory() as directory:
        more = [f"--trainer.default_root_dir={directory}", f"--trainer.max_epochs={epochs}", "--test_after_fit=false"]
        processes = [subprocess.Popen([*FIT, *settings, *more], stdout=subprocess.DEVNULL) for _ in range(fits)]
        codes = [process.wait() for process in processes]
        if any(codes):
            raise SystemExit(f"failed: fit {' '.join(settings)}")
        results = [json.loads(path.read_text()) for path in Path(directory).rglob("results.json")]
    seconds: float = statistics.mean(result["train_seconds"] for result in results) / epochs
    return seconds
