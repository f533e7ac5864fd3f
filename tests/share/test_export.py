import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from conftest import RunCLI
from onnxruntime import InferenceSession
from torch import Tensor

from mnist_lightning.commands import _network
from mnist_lightning.model import MLP
from mnist_lightning.share.export import INPUT, ExportError, export

Read = tuple[dict[str, str], Callable[[Tensor], Tensor]]


def onnx(path: Path) -> Read:
    session = InferenceSession(path)
    notes: dict[str, str] = session.get_modelmeta().custom_metadata_map
    return notes, lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


def tensors(path: Path) -> Read:
    with safetensors.safe_open(path, "pt") as file:
        notes, w = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert notes["format"] == "pt"  # which other readers ask for
    hidden, output = ((w[f"{layer}.weight"].T, w[f"{layer}.bias"]) for layer in ("hidden", "output"))
    return notes, lambda images: (images @ hidden[0] + hidden[1]).relu() @ output[0] + output[1]


@pytest.mark.parametrize(("form", "path", "read"), [("onnx", None, onnx), ("safetensors", "a", tensors)])
def test_the_file_reads_as_the_network_does(
    short_run: Path, run_cli: RunCLI, root: Path, capsys: pytest.CaptureFixture[str],
    form: str, path: str | None, read: Callable[[Path], Read],
) -> None:  # fmt: skip
    """By another library, and as its notes say."""
    data = ["--data.dataset=synthetic", f"--data.root={root}"]
    given = [f"--output={path}"] if path else []
    assert run_cli("export", f"--format={form}", *given, *data, data=False) == 0
    path, out = path or f"mnist.{form}", capsys.readouterr().out
    assert f"\nNetwork: {path}, 0.1 MB, trained on synthetic digits (not MNIST), 11 iterations\n" in out
    assert "Read back: the logits of 230 test digits" in out
    notes, logits = read(Path(path))
    assert notes["input"] == INPUT
    assert notes["trained_on"] == "synthetic digits (not MNIST), 11 iterations"
    mlp, _ = _network("best", "lightning_logs")
    for images in (torch.rand(1, 784), torch.rand(7, 784)):
        torch.testing.assert_close(logits(images), mlp(images), atol=1e-4, rtol=0)


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
    short_run: Path, run_cli: RunCLI, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_cli("demo", data=False) == 0
    out = capsys.readouterr().out
    assert f"\nPage: {(tmp_path / 'demo.html').as_uri()}, 0.1 MB; open it in a browser\n" in out
    assert "trained on synthetic digits (not MNIST), 11 iterations" in out
    assert "synthetic digits (not MNIST), 11 iterations" in (tmp_path / "demo.html").read_text()
    # A checkpoint that was trained without a data module.
    checkpoint = torch.load(short_run / "checkpoints/best.ckpt")
    del checkpoint["datamodule_hyper_parameters"]
    torch.save(checkpoint, tmp_path / "a.ckpt")
    assert run_cli("demo", "--ckpt_path=a.ckpt", "--output=mine.html", data=False) == 0
    assert "other data, 11 iterations" in (tmp_path / "mine.html").read_text()
