"""How soon commands start: what each of them must not import."""

import gc
import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import VAL_SIZE, RunCLI
from PIL import Image

from mnist_lightning import commands
from mnist_lightning.datamodule import MNISTDataModule
from mnist_lightning.engine.cli import CLI
from mnist_lightning.engine.main import TRAINER_COMMANDS
from mnist_lightning.engine.startup import fast_imports

# Prints what a command imported, after all that the command itself prints.
PROGRAM = """
import sys
from mnist_lightning.__main__ import main

try:
    code = main()
finally:
    print("imported:", *sorted({name.partition(".")[0] for name in sys.modules}))
sys.exit(code)
"""

TRAINING = {"lightning", "torchmetrics", "torchvision"}
DRAWING = {"matplotlib", "PIL"}
OTHERS = {"tensorboard", "onnx", "onnxscript", "onnxruntime"}


@pytest.mark.slow
def test_no_command_imports_what_it_does_not_use(run_cli: RunCLI, tmp_path: Path, root: Path) -> None:
    assert run_cli("fit", "--trainer.max_epochs=1", "--model.hidden_dim=7", "--test_after_fit=false") == 0
    Image.new("L", (28, 28), 255).save(tmp_path / "digit.png")
    unused = {
        (): {"torch"} | TRAINING | DRAWING,
        ("--help",): {"torch"} | TRAINING | DRAWING,
        ("fti",): {"torch"} | TRAINING | DRAWING,
        ("data", "--data.dataset=synthetic", f"--data.root={root}", f"--data.val_size={VAL_SIZE}"): TRAINING,
        ("read", "digit.png"): TRAINING | {"matplotlib", "scipy"},
        ("demo", "--no-open"): TRAINING | DRAWING,
        ("export", "--format=safetensors", "--data.dataset=synthetic", f"--data.root={root}"): TRAINING | DRAWING,
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


@pytest.mark.parametrize(
    ("given", "spins"),
    [({}, "500"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "PASSIVE"}, "None")],
)
def test_idle_threads_spin_less_unless_the_user_says_how_much(given: dict[str, str], spins: str) -> None:
    before = {name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    program = "import os, mnist_lightning; print(os.environ.get('GOMP_SPINCOUNT'))"
    command = [sys.executable, "-c", program]
    assert subprocess.check_output(command, env=before | given, text=True).strip() == spins


@pytest.mark.parametrize("enabled", [True, False])
def test_the_garbage_collector_is_left_as_it_was(enabled: bool) -> None:
    try:
        gc.enable() if enabled else gc.disable()
        with fast_imports():
            assert not gc.isenabled()
        assert gc.isenabled() is enabled
    finally:
        gc.enable()
        gc.unfreeze()
