"""Memory and start-up of `fit`: on MNIST, and on more images than that.

    python tests/benchmarks/memory.py --root data                            # on MNIST
    python tests/benchmarks/memory.py --root data --images 2000000 --to big  # and on distorted digits, 0.8 kB an image

It starts `fit` as a command and looks at it every 20 ms. Anonymous memory (`RssAnon` of Linux) counts no pages of
files, which processes share. What importing torch and Lightning takes is taken off.
"""

import argparse
import contextlib
import os
import shutil
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from mnist_lightning import MNISTDataModule
from mnist_lightning.digits import idx
from mnist_lightning.distortions import Distortions
from mnist_lightning.engine.data import uniform_noise

IMPORTS = "import torch, lightning.pytorch, time; print('ready', flush=True); time.sleep(60)"
CHUNK = 10_000


def make(data: MNISTDataModule, directory: Path, images: int) -> None:
    """Write a training file of distorted digits, and the test file as it is."""
    directory.mkdir(parents=True, exist_ok=True)
    for name in idx.NAMES[2:]:
        shutil.copy(idx.locate(data.raw, name), directory / name)
    pixels, labels = (torch.cat([held_out, rest]) for held_out, rest in zip(data.val, data.train, strict=True))
    distort = Distortions()
    with (directory / idx.NAMES[0]).open("wb") as of_images, (directory / idx.NAMES[1]).open("wb") as of_labels:
        of_images.write(struct.pack(">4I", 0x803, images, 28, 28))
        of_labels.write(struct.pack(">2I", 0x801, images))
        for start in range(0, images, CHUNK):
            index = torch.arange(start, min(start + CHUNK, images)) % len(labels)
            noise = uniform_noise(len(index), distort.draws, seed=start)
            distorted = distort(pixels[index].float() / 255, noise)
            of_images.write((255 * distorted).round().byte().numpy().tobytes())
            of_labels.write(labels[index].numpy().tobytes())


def anonymous(process: int) -> float:
    """MB of memory that belongs to a process alone, where the system is Linux: mapped files are not counted."""
    with contextlib.suppress(OSError), Path(f"/proc/{process}/status").open() as lines:
        return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("RssAnon")), 0)
    return float("nan")


def imports() -> float:
    with subprocess.Popen([sys.executable, "-c", IMPORTS], stdout=subprocess.PIPE) as process:
        assert process.stdout
        process.stdout.readline()
        memory = anonymous(process.pid)
        process.kill()
    return memory


def fit(settings: list[str]) -> tuple[float, float, float]:
    """Seconds until it trains, ms an iteration, and MB of anonymous memory at most."""
    with tempfile.TemporaryDirectory() as directory:
        command = [sys.executable, "-m", "mnist_lightning", "fit", f"--trainer.default_root_dir={directory}", *settings]
        command += ["--test_after_fit=false", "--trainer.limit_val_batches=0", "--data.val_size=5000"]
        environment = os.environ | {"PYTHONUNBUFFERED": "1"}
        began = time.perf_counter()
        run = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
        peak, points = 0.0, []
        assert run.stdout
        os.set_blocking(run.stdout.fileno(), False)
        while run.poll() is None:
            peak = max(peak, anonymous(run.pid))
            line = run.stdout.readline()
            if line.startswith("iter "):
                points.append((int(line.split()[1].rstrip(":")), time.perf_counter()))
            time.sleep(0.02)
    (first, then), (last, now) = points[0], points[-1]
    return then - began, 1000 * (now - then) / (last - first), peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", default="data", help="directory of MNIST, as --data.root")
    parser.add_argument("--images", type=int, default=0, help="training images of the large files; 0 for none")
    parser.add_argument("--to", default="big", help="directory for the large files")
    parser.add_argument("--steps", type=int, default=3000, help="iterations to measure")
    options = parser.parse_args()
    data = MNISTDataModule("mnist", options.root)
    data.prepare_data()
    data.setup("fit")
    steps = [f"--trainer.max_steps={options.steps}", "--trainer.max_epochs=-1"]
    rows = {"MNIST": ["--data.dataset=mnist", f"--data.root={options.root}", *steps]}
    if options.images:
        if not (Path(options.to) / idx.NAMES[1]).is_file():
            make(data, Path(options.to), options.images)
        large = ["--data.dataset=files", f"--data.root={options.to}", *steps]
        rows[f"{options.images:,} images"] = large
        rows[f"{options.images:,} images, distorted anew"] = [*large, "--data.distortions=true"]
    base = imports()
    print(f"Importing torch and Lightning: {base:.0f} MB\n")
    print("| `fit` on | s until iteration 100 | ms an iteration | MB above the imports |\n" + "| --- " * 4 + "|")
    for name, settings in rows.items():
        start, iteration, peak = fit(settings)
        print(f"| {name} | {start:.1f} | {iteration:.2f} | {peak - base:.0f} |", flush=True)


if __name__ == "__main__":
    main()
