import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from conftest import RunCLI
from torch import Tensor

from mnist_lightning.commands import _network
from mnist_lightning.model import MLP
from mnist_lightning.share.export import INPUT, ExportError, export


@pytest.fixture
def trained(run_cli: RunCLI, tmp_path: Path) -> Path:
    assert run_cli("fit", "--trainer.max_epochs=1", "--model.hidden_dim=17", "--test_after_fit=false") == 0
    return tmp_path / "lightning_logs/version_0/checkpoints/best.ckpt"


READERS = {
    "onnx": "import onnxruntime; s = onnxruntime.InferenceSession(path); "
    "read = lambda x: s.run(None, {'images': x.numpy()})[0].tolist(); "
    "notes = s.get_modelmeta().custom_metadata_map",
    "safetensors": "import safetensors; f = safetensors.safe_open(path, 'pt'); notes = f.metadata(); "
    "w = {k: f.get_tensor(k) for k in f.keys()}; "
    "read = lambda x: ((x @ w['hidden.weight'].T + w['hidden.bias']).relu() @ w['output.weight'].T"
    " + w['output.bias']).tolist()",
}


def test_the_files_read_as_the_network_does(
    trained: Path, run_cli: RunCLI, tmp_path: Path, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = {"onnx": "mnist.onnx", "safetensors": "a"}
    # In a process of its own, which knows nothing of this program.
    code = "import json, torch\n"
    for form, name in names.items():
        capsys.readouterr()
        path = [] if name.startswith("mnist") else [f"--output={name}"]
        data = ["--data.dataset=synthetic", f"--data.root={root}"]
        assert run_cli("export", f"--format={form}", *path, *data, data=False) == 0
        out = capsys.readouterr().out
        assert f"\nNetwork: {name}, 0.1 MB, trained on synthetic digits (not MNIST), 11 iterations\n" in out
        assert "Read back: the logits of 230 test digits" in out
        code += f"path = {name!r}; {READERS[form]}; torch.manual_seed(0)\n"
        code += "print(json.dumps([notes, *(read(torch.rand(n, 784)) for n in (1, 7))]))\n"

    output = subprocess.check_output([sys.executable, "-c", code], text=True, cwd=tmp_path)
    mlp, _ = _network(str(trained), "lightning_logs")
    for form, line in zip(names, output.splitlines()[-2:], strict=True):
        notes, *logits = json.loads(line)
        assert form == "onnx" or notes["format"] == "pt"  # which other readers ask for
        assert notes["input"] == INPUT
        assert notes["trained_on"] == "synthetic digits (not MNIST), 11 iterations"
        torch.manual_seed(0)
        for size, rows in zip((1, 7), logits, strict=True):
            torch.testing.assert_close(torch.tensor(rows), mlp(torch.rand(size, 784)), atol=1e-4, rtol=0)


def test_a_file_that_reads_differently_is_no_success(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save = safetensors.torch.save_file

    def write(tensors: dict[str, Tensor], *arguments: Any) -> None:
        save({name: tensor + 0.01 for name, tensor in tensors.items()}, *arguments)

    monkeypatch.setattr(safetensors.torch, "save_file", write)
    (tmp_path / "x").write_text("the last one")
    with pytest.raises(ExportError, match="differ from PyTorch's"):
        export(MLP(17), "safetensors", str(tmp_path / "x"), torch.rand(5, 784), "nothing")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["the last one"]


def test_a_network_of_nan_is_no_success(tmp_path: Path) -> None:
    mlp = MLP(17)
    mlp.output.bias.data[3] = torch.nan
    with pytest.raises(ExportError, match="nan"):
        export(mlp, "safetensors", str(tmp_path / "x"), torch.rand(5, 784), "nothing")


@pytest.mark.parametrize(("form", "library"), [("onnx", "onnxscript"), ("safetensors", "safetensors.torch")])
def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, form: Any, library: str) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(ExportError, match=rf'{library} is not installed; get it with: pip install -e "\.\[export\]"'):
        export(MLP(17), form, str(tmp_path / "x"), torch.rand(5, 784), "nothing")
    assert not (tmp_path / "x").exists()


def test_demo_writes_the_page(
    trained: Path, run_cli: RunCLI, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_cli("demo", data=False) == 0
    out = capsys.readouterr().out
    assert f"\nPage: {(tmp_path / 'demo.html').as_uri()}, 0.1 MB; open it in a browser\n" in out
    assert "trained on synthetic digits (not MNIST), 11 iterations" in out
    assert "synthetic digits (not MNIST), 11 iterations" in (tmp_path / "demo.html").read_text()
    # A checkpoint that was trained without a data module.
    checkpoint = torch.load(trained)
    del checkpoint["datamodule_hyper_parameters"]
    torch.save(checkpoint, tmp_path / "a.ckpt")
    assert run_cli("demo", "--ckpt_path=a.ckpt", "--output=mine.html", data=False) == 0
    assert "other data, 11 iterations" in (tmp_path / "mine.html").read_text()
