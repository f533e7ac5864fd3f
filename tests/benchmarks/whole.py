"""Whole commands in processes of their own: `speed.py --whole` and `speed.py --beside`."""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path

SCRIPTS = Path(__file__).parent
PYTHON = [sys.executable, "-u"]
OTHERS = {"jax": "jax_scan.py", "keras": "keras_fit.py", "sklearn": "scikit_learn.py"}

# What a part of `fit` ends with, on the console.
PARTS = {"start": "Training on ", "training": "Epoch: 10,", "test": "Test loss", "figures": "Run: ", "exit": ""}

POLICIES = {
    "ours": {},
    "PyTorch's own": {"GOMP_SPINCOUNT": "300000"},  # libgomp's default
    "`OMP_WAIT_POLICY=PASSIVE`": {"OMP_WAIT_POLICY": "PASSIVE"},
    "one thread": {"OMP_NUM_THREADS": "1"},
}


def whole(options: argparse.Namespace) -> None:
    """`fit` with validation, figures, curves, checkpoints and results, beside scripts that only train and test."""
    root = str(Path(options.root).resolve())
    commands = {
        "bare PyTorch script (reference)": [*PYTHON, str(SCRIPTS / "plain.py"), root, "10"],
        "`fit`, all of it": [*PYTHON, "-m", "mnist_lightning", "fit", f"--data.root={root}"],
    }
    commands |= {
        name: [*PYTHON, str(SCRIPTS / name), root, "10"] for library, name in OTHERS.items() if find_spec(library)
    }
    taken: dict[str, list[list[float]]] = {name: [] for name in commands}
    for _ in range(options.rounds):
        for name, command in commands.items():
            taken[name].append(_seconds_until(command))
            print(f"{name}: {taken[name][-1][-1]:.1f} s", file=sys.stderr, flush=True)
    base = [ends[-1] for ends in taken["bare PyTorch script (reference)"]]
    print("\n| | seconds | of the reference |\n| --- | --- | --- |")
    for name, rounds in taken.items():
        all_ = [ends[-1] for ends in rounds]
        ratio = statistics.median(seconds / reference for seconds, reference in zip(all_, base, strict=True))
        print(f"| {name} | {statistics.median(all_):.1f} | {ratio:.2f} |")
    print("\n| of `fit` | seconds |\n| --- | --- |")
    for number, part in enumerate(PARTS):
        spans = [ends[number] - (ends[number - 1] if number else 0) for ends in taken["`fit`, all of it"]]
        print(f"| {part} | {statistics.median(spans):.1f} |")


def beside(options: argparse.Namespace) -> None:
    """Seconds an epoch of `fit` beside other processes, with several ways for idle threads to wait."""
    columns = ("alone", "beside a busy process", "beside two", "two `fit`s at once")
    taken: dict[tuple[str, str], list[float]] = {}
    for _ in range(options.rounds):
        for policy, environment in POLICIES.items():
            for column, busy, fits in zip(columns, (0, 1, 2, 0), (1, 1, 1, 2), strict=True):
                others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(busy)]
                taken.setdefault((policy, column), []).append(
                    seconds_an_epoch([f"--data.root={options.root}"], 3, environment, fits)
                )
                for other in others:
                    other.kill()
                print(f"{policy}, {column}: {taken[policy, column][-1]:.2f} s", file=sys.stderr, flush=True)
    print("\n| idle threads |", " | ".join(columns), "|\n" + "| --- " * 5 + "|")
    for policy in POLICIES:
        print(f"| {policy} |", " | ".join(f"{statistics.median(taken[policy, c]):.2f}" for c in columns), "|")


def _seconds_until(command: list[str]) -> list[float]:
    """Seconds until each line of `PARTS` was printed, and until the process ended."""
    ends = []
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as directory:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=directory)
        assert process.stdout
        for line in process.stdout:
            ends += [time.perf_counter() - start for part in PARTS.values() if part and line.startswith(part)]
        if process.wait():
            raise SystemExit(f"failed: {' '.join(command)}")
        return [*ends, time.perf_counter() - start]


def seconds_an_epoch(settings: list[str], epochs: int, environment: dict[str, str], fits: int = 1) -> float:
    """The mean of so many `fit`s at once, validation included; by their `results.json`."""
    with tempfile.TemporaryDirectory() as directory:
        more = [f"--trainer.default_root_dir={directory}", f"--trainer.max_epochs={epochs}", "--test_after_fit=false"]
        command = [*PYTHON, "-m", "mnist_lightning", "fit", *settings, *more]
        processes = [
            subprocess.Popen(command, env=os.environ | environment, stdout=subprocess.DEVNULL) for _ in range(fits)
        ]
        codes = [process.wait() for process in processes]
        if any(codes):
            raise SystemExit(f"failed: {' '.join(command)}")
        results = [json.loads(path.read_text()) for path in Path(directory).rglob("results.json")]
    seconds: float = statistics.mean(result["train_seconds"] for result in results) / epochs
    return seconds
