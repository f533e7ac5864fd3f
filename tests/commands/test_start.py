"""How soon commands start: what each of them must not import."""

import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import VAL_SIZE
from PIL import Image

from mnist_lightning import commands
from mnist_lightning.datamodule import MNISTDataModule
from mnist_lightning.engine.cli import CLI
from mnist_lightning.engine.console import TRAINER_COMMANDS

# Prints what a command imported, after all that the command itself prints.
PROGRAM = """
import sys
from mnist_lightning.__main__ import main

code = main()
print("imported:", *sorted({name.partition(".")[0] for name in sys.modules}))
sys.exit(code)
"""

TRAINING = {"lightning", "torchmetrics", "torchvision"}
DRAWING = {"matplotlib", "PIL"}
OTHERS = {"tensorboard", "onnx", "onnxscript", "onnxruntime"}


@pytest.mark.slow
def test_no_command_imports_what_it_does_not_use(short_run: Path, tmp_path: Path, root: Path) -> None:
    Image.new("L", (28, 28), 255).save(tmp_path / "digit.png")
    small = ["--data.dataset=synthetic", f"--data.root={root}"]
    unused = {
        (): {"torch"} | TRAINING | DRAWING,
        ("--help",): {"torch"} | TRAINING | DRAWING,
        ("fti",): {"torch"} | TRAINING | DRAWING,
        ("data", *small, f"--data.val_size={VAL_SIZE}"): TRAINING,
        ("read", "digit.png"): TRAINING | {"matplotlib", "scipy"},
        ("demo",): TRAINING | DRAWING,
        ("export", "--format=safetensors", *small): TRAINING | DRAWING,
        ("fit", "--data.ruut=x"): set(),
    }
    started = {
        command: subprocess.Popen([sys.executable, "-c", PROGRAM, *command], stdout=subprocess.PIPE, text=True)
        for command in unused
    }
    for command, process in started.items():
        output, _ = process.communicate(timeout=200)
        imported = set(output.rpartition("imported:")[2].split())
        assert "mnist_lightning" in imported, command
        assert process.returncode == (2 if command in ((), ("fti",), ("fit", "--data.ruut=x")) else 0), command
        assert not imported & (unused[command] | OTHERS), command


def test_what_is_written_twice_is_the_same() -> None:
    """Here, since each command would have to import Lightning for it."""
    assert inspect.signature(MNISTDataModule).parameters["val_size"].default == commands.VAL_SIZE
    assert CLI.subcommands().keys() == TRAINER_COMMANDS.keys()
    assert not commands.COMMANDS.keys() & TRAINER_COMMANDS.keys()


def test_runs_as_a_module_from_a_fresh_process(root: Path, tmp_path: Path) -> None:
    """Where a notebook has set a backend of Matplotlib that this version does not know."""
    small = ["--data.dataset=synthetic", f"--data.root={root}", "--data.val_size=200", "--trainer.max_epochs=1"]
    command = [sys.executable, "-m", "mnist_lightning", "fit", *small]
    environment = os.environ | {"MPLBACKEND": "inlined"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    # The manifest says which files are whole, so this process takes the small ones for the real stand-in.
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[-2] == "Run: lightning_logs/version_0"
