"""The commands without a Trainer: `data` gets the data, `demo` and `export` hand a trained network on."""

import webbrowser
from pathlib import Path
from typing import Any, get_args

import torch.nn.functional as F
from jsonargparse import ActionConfigFile  # type: ignore[attr-defined]

from mnist_lightning.checkpoints import CheckpointError, find, read_network
from mnist_lightning.datamodule import MNISTDataModule
from mnist_lightning.digits import plots
from mnist_lightning.model import CLASSES, MLP
from mnist_lightning.parser import Parser, UsageError, shorter
from mnist_lightning.share.demo import page
from mnist_lightning.share.export import Format, export

RUNS = "lightning_logs"

# Test digits that an exported network has to read as PyTorch does.
COMPARED = 1000


def data(arguments: list[str]) -> None:
    """Get and verify the data, and print what the tutorial prints of them."""
    parser = _parser("data", "Get and verify the data without training.")
    parser.add_lightning_class_args(MNISTDataModule, "data")
    parser.add_argument("--figure", type=str, default="digits.png", help="PNG file for a figure of training digits")
    config = parser.parse_args(arguments)
    data = _read_data(parser, config, "fit", "test")
    print(f"Dataset: {data.dataset_name}")
    for name, (images, labels) in {"Training": data.train, "Validation": data.val, "Test": data.test}.items():
        print(f"{name}: {len(labels):,} digits, images {tuple(images.shape)}, labels {tuple(labels.shape)}")
    print("First five validation labels, one-hot:")
    for label, row in zip(data.val[1][:5], F.one_hot(data.val[1][:5], CLASSES), strict=True):
        print(f"  {label}: {' '.join(map(str, row.tolist()))}")
    images, labels = data.train[0][:9], data.train[1][:9]
    plots.digit_grid(images, [f"True: {label}" for label in labels], f"{data.dataset_name}: training digits").savefig(
        config.figure, dpi=120
    )
    print(f"Figure: {config.figure}")


def demo(arguments: list[str]) -> None:
    """Write a page to draw on, and open it in the browser."""
    parser = _parser("demo", "Write a page to draw digits on, and open it.")
    _add_checkpoint(parser)
    parser.add_argument("--output", type=str, default="demo.html", help="HTML file to write")
    parser.add_argument("--open", type=bool, default=True, help="Open it in the browser")
    config = parser.parse_args(["--open=false" if argument == "--no-open" else argument for argument in arguments])
    mlp, trained_on = _network(config.ckpt_path)
    output = Path(config.output)
    output.write_text(page(mlp, trained_on), encoding="utf-8")
    print(f"Page: {output}, {output.stat().st_size / 1e6:.1f} MB; the network in it was trained on {trained_on}")
    if config.open and not webbrowser.open(output.resolve().as_uri()):
        print("No browser was found here; open the file in one")


def export_network(arguments: list[str]) -> None:
    """Write a network for another runtime, and compare what it reads there."""
    parser = _parser("export", "Write a trained network for another runtime, load it there, and compare.")
    parser.add_lightning_class_args(MNISTDataModule, "data")
    _add_checkpoint(parser)
    parser.add_argument("--format", type=Format, required=True, help=f"One of {', '.join(get_args(Format))}")
    parser.add_argument("--output", type=str, help="File to write; by default mnist.onnx, .pt or .safetensors")
    config = parser.parse_args(arguments)
    mlp, trained_on = _network(config.ckpt_path)
    images = _read_data(parser, config, "test").test[0][:COMPARED]
    path, difference = export(mlp, config.format, config.output, images, trained_on)
    print(f"Network: {path}, {path.stat().st_size / 1e6:.1f} MB, trained on {trained_on}")
    print(f"Read back: the logits of {len(images):,} test digits differ from PyTorch's by {difference:.1e} at most")


COMMANDS = {"data": data, "demo": demo, "export": export_network}


def _parser(name: str, description: str) -> Parser:
    parser = Parser(prog=f"mnist_lightning {name}", description=description)
    parser.add_argument("-c", "--config", action=ActionConfigFile, help="Path to a configuration file in yaml format")
    return parser


def _read_data(parser: Parser, config: Any, *stages: str) -> MNISTDataModule:
    try:
        data: MNISTDataModule = parser.instantiate_classes(config).data
    except ValueError as error:
        raise UsageError(shorter(str(error))) from error
    for stage in stages:
        data.setup(stage)
    return data


def _add_checkpoint(parser: Parser) -> None:
    parser.add_argument(
        "--ckpt_path", type=str, default="best", help="Weights: `best` or `last` of the newest run, or a path"
    )


def _network(name: str) -> tuple[MLP, str]:
    try:
        return read_network(find(name, Path(RUNS)))
    except CheckpointError as error:
        raise UsageError(f"ckpt_path: {error}") from error
