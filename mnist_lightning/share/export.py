"""Export to other runtimes; a file is kept only if its own runtime gives PyTorch's logits."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from mnist_lightning.engine.checkpoint_file import replace
from mnist_lightning.engine.console import JobError
from mnist_lightning.model import MLP, PIXELS

Format: TypeAlias = Literal["onnx", "safetensors"]

INPUT = (
    "images: (batch, 784) float32 from 0 (background) to 1 (ink), 28 rows of 28 pixels, the digit in a box of 20 by 20 "
    "with its centre of mass at pixel 14"
)
OUTPUT = "logits: (batch, 10) float32, the digits from 0 to 9; their softmax is the probabilities"

# Float32 sums in another order differ by a few millionths of a logit of 10.
TOLERANCE = 1e-3


class ExportError(JobError):
    """A library is missing, or the exported network gives other logits than PyTorch; the message says what to do."""


def export(mlp: MLP, format: Format, output: str | None, images: Tensor, trained_on: str) -> tuple[Path, float]:
    """Write a network, read it back, and compare it, all images at once and one alone.

    Args:
        mlp: The network.
        format: `onnx`, by `torch.export`; or `safetensors`, the weights alone.
        output: File to write; None for `mnist` with the format's suffix.
        images: (N, 784) pixels in [0, 1] to compare with.
        trained_on: Goes into the file, as do the input and the output.

    Returns:
        The file, and the largest difference between a logit and PyTorch's.

    Raises:
        ExportError: A library is missing, or the logits differ by more than 0.001.
    """
    write = {"onnx": _onnx, "safetensors": _safetensors}[format]
    path = Path(output or f"mnist.{format}")
    mlp = mlp.eval()
    aside = path.with_name(f"{path.name}.unchecked")
    try:
        exported = write(mlp, aside, {"input": INPUT, "output": OUTPUT, "trained_on": trained_on})
        difference = max((exported(part) - mlp(part)).abs().max().item() for part in (images, images[:1]))
        if not difference <= TOLERANCE:
            raise ExportError(f"{path} is not written: logits would differ from PyTorch's by up to {difference:.1e}")
        replace(aside, path)
    except ModuleNotFoundError as error:
        raise ExportError(f'{error.name} is not installed; get it with: pip install -e ".[export]"') from error
    finally:
        aside.unlink(missing_ok=True)
    return path, difference


def _onnx(mlp: MLP, path: Path, notes: dict[str, str]) -> Callable[[Tensor], Tensor]:
    import onnxscript  # noqa: F401 (PyTorch imports it late, and its error would not name it)
    from onnxruntime import InferenceSession

    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    program = torch.onnx.export(
        mlp,
        (torch.zeros(2, PIXELS),),
        input_names=["images"],
        output_names=["logits"],
        dynamic_shapes={"images": {0: torch.export.Dim("batch")}},
        dynamo=True,
        verbose=False,
    )
    assert program is not None
    program.model.metadata_props.update(notes)
    program.save(path)
    session = InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])


def _safetensors(mlp: MLP, path: Path, notes: dict[str, str]) -> Callable[[Tensor], Tensor]:
    from safetensors.torch import load_file, save_file

    save_file(mlp.state_dict(), path, {"format": "pt", **notes})  # without a format, other readers refuse it
    network = MLP(mlp.hidden.out_features)
    network.load_state_dict(load_file(path))
    return network
