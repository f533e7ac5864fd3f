"""A notebook: a real kernel trains and shows figures, and its `!python -m mnist_lightning` works."""

import re
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

TRAINS = """
from lightning.pytorch.callbacks import TQDMProgressBar
from mnist_lightning import MNISTClassifier, MNISTDataModule, Trainer
data = MNISTDataModule("synthetic", {root!r}, val_size=200)
nothing = dict.fromkeys(("logger", "enable_checkpointing", "enable_model_summary"), False)
# Lightning's other progress bar, Rich's, needs `ipywidgets` here, and says so.
trainer = Trainer(max_epochs=2, accelerator="cpu", callbacks=[TQDMProgressBar()], **nothing)
trainer.fit(MNISTClassifier(8), datamodule=data)
"""
SHOWS = """
from mnist_lightning.digits import plots
plots.digit_grid(data.train[0][:9].float() / 255, ["a digit"] * 9, "training digits")
"""
RUNS = """
import sys
from mnist_lightning.__main__ import main
sys.argv[1:] = ["fit", "--data.dataset=synthetic", "--data.root={root}", "--data.val_size=200"]
sys.argv += ["--trainer.max_epochs=1", "--model.hidden_dim=8"]
assert main() == 0
"""
COMMANDS = "!{sys.executable} -m mnist_lightning data --data.dataset=synthetic --data.root={root} --data.val_size=200"


def text(outputs: list[Any]) -> str:
    return "".join(output.get("text", "") + output.get("data", {}).get("text/plain", "") for output in outputs)


@pytest.mark.slow
def test_a_kernel_trains_and_shows(root: Path, tmp_path: Path) -> None:
    cells = TRAINS.format(root=str(root)), SHOWS, RUNS.format(root=root), COMMANDS.replace("{root}", str(root))
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in cells])
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    trained, shown, ran, command = (cell.outputs for cell in notebook.cells)
    assert re.search(r"Epoch 1: 100%.* 11/11 ", text(trained))
    assert "image/png" in shown[-1]["data"]
    assert "Test loss: " in text(ran)
    assert "Figure: digits.png" in text(command)
    assert "Traceback" not in text(command)
