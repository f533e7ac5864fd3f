"""The commands without a Trainer: `data`, `read` for pictures, `demo` and `export`."""

import sys
import webbrowser
from pathlib import Path
from typing import Any, get_args

import torch.nn.functional as F
from jsonargparse import ActionConfigFile  # type: ignore[attr-defined]
from rich.console import Console
from rich.progress import track

from mnist_lightning.classifier import MNISTClassifier
from mnist_lightning.datamodule import MNISTDataModule
from mnist_lightning.digits import files, pictures, plots, reading
from mnist_lightning.engine.checkpoint_io import CheckpointError, find
from mnist_lightning.engine.checkpoint_io import read as read_checkpoint
from mnist_lightning.engine.cli import RUNS
from mnist_lightning.engine.parser import Parser, UsageError, shorter
from mnist_lightning.engine.run import printable, say
from mnist_lightning.model import CLASSES, MLP
from mnist_lightning.share.demo import page
from mnist_lightning.share.export import Format, export

# Test digits that an exported network has to read as PyTorch does.
COMPARED = 1000


def data(arguments: list[str]) -> None:
    """Get and verify the data, and print what the tutorial prints of them."""
    parser = _parser("data", "Get and verify the data without training.")
    parser.add_lightning_class_args(MNISTDataModule, "data")
    parser.add_argument("--figure", type=str, default="digits.png", help="PNG file for a figure of training digits")
    config = parser.parse_args(arguments)
    data = _read_data(parser, config)
    print(f"Dataset: {data.dataset_name}")
    for name, (images, labels) in {"Training": data.train, "Validation": data.val, "Test": data.test}.items():
        print(f"{name}: {len(labels):,} digits, images {tuple(images.shape)}, labels {tuple(labels.shape)}")
    print("First five validation labels, one-hot:")
    for label, row in zip(data.val[1][:5], F.one_hot(data.val[1][:5], CLASSES), strict=True):
        print(f"  {label}: {' '.join(map(str, row.tolist()))}")
    images, labels = data.train[0][:9].float() / 255, data.train[1][:9]
    titles = [f"True: {label}" for label in labels]
    plots.digit_grid(images, titles, f"{data.dataset_name}: training digits").savefig(config.figure, dpi=120)
    print(f"Figure: {config.figure}")


def read(arguments: list[str]) -> None:
    """Read pictures: print a table, write a CSV file, and draw the first ones.

    Raises:
        PictureError: Some of the files are no pictures. All others have been read.
    """
    parser = _parser("read", "Read pictures of your own, each of one digit.")
    parser.add_argument("paths", nargs="*", type=str, help="Files, folders (all pictures in them) and globs")
    _add_checkpoint(parser)
    parser.add_argument("--csv", type=str, default="predictions.csv", help="CSV file to write")
    parser.add_argument("--figure", type=str, default="pictures.png", help="PNG file for a figure of the first ones")
    config = parser.parse_args(arguments)
    if not config.paths:
        raise UsageError("read: which pictures? Give files, folders or globs")
    try:
        paths = pictures.find(config.paths)
    except ValueError as error:
        raise UsageError(str(error)) from error
    if Path(config.figure).resolve() in map(Path.resolve, paths):
        raise UsageError(f"figure: {config.figure} is one of the pictures to read; give another --figure")
    mlp, trained_on, checkpoint = _network(config.ckpt_path)
    say(printable(f"Weights: {checkpoint}, {trained_on}"))

    console = Console(stderr=True)
    hidden = len(paths) < pictures.MANY or not console.is_terminal
    found = track(pictures.read_all(paths), "Reading pictures", len(paths), console=console, disable=hidden)
    seen = {}
    for file, result in zip(paths, found, strict=True):
        if isinstance(result, pictures.PictureError):
            print(printable(f"Skipped: {file} {result}"), file=sys.stderr)
        else:
            seen[file] = result
    probabilities, rows = reading.read(mlp, seen)
    say(reading.table(rows))
    if len(rows) > reading.LISTED:
        say(printable(f"and {len(rows) - reading.LISTED:,} more in {config.csv}"))
    reading.write_csv(config.csv, rows)
    say(printable(f"Predictions: {config.csv}"))
    if seen:
        reading.draw(config.figure, seen, probabilities)
        say(printable(f"Figure: {config.figure}"))
    if skipped := len(paths) - len(seen):
        raise pictures.PictureError(f"{skipped:,} of {len(paths):,} files could not be read as pictures")


def demo(arguments: list[str]) -> None:
    """Write a page to draw on, and open it in the browser."""
    parser = _parser("demo", "Write a page to draw digits on, and open it.")
    _add_checkpoint(parser)
    parser.add_argument("--output", type=str, default="demo.html", help="HTML file to write")
    parser.add_argument("--open", type=bool, default=True, help="Open it in the browser")
    config = parser.parse_args(["--open=false" if argument == "--no-open" else argument for argument in arguments])
    mlp, trained_on, _ = _network(config.ckpt_path)
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
    mlp, trained_on, _ = _network(config.ckpt_path)
    images = _read_data(parser, config).test[0][:COMPARED].float() / 255
    path, difference = export(mlp, config.format, config.output, images, trained_on)
    print(f"Network: {path}, {path.stat().st_size / 1e6:.1f} MB, trained on {trained_on}")
    print(f"Read back: the logits of {len(images):,} test digits differ from PyTorch's by {difference:.1e} at most")


COMMANDS = {"data": data, "read": read, "demo": demo, "export": export_network}


def _parser(name: str, description: str) -> Parser:
    parser = Parser(prog=f"mnist_lightning {name}", description=description)
    parser.add_argument("-c", "--config", action=ActionConfigFile, help="Path to a configuration file in yaml format")
    return parser


def _read_data(parser: Parser, config: Any) -> MNISTDataModule:
    try:
        data: MNISTDataModule = parser.instantiate_classes(config).data
    except ValueError as error:
        raise UsageError(shorter(str(error))) from error
    data.prepare_data()
    data.setup("fit")
    return data


def _add_checkpoint(parser: Parser) -> None:
    parser.add_argument(
        "--ckpt_path", type=str, default="best", help="Weights: `best` or `last` of the newest run, or a path"
    )


def _network(name: str) -> tuple[MLP, str, Path]:
    """The network of a checkpoint, in float32 and for reading only; in words what it was trained on; and its file."""
    try:
        path = find(name, Path(RUNS))
        checkpoint = read_checkpoint(path, MNISTClassifier)
    except CheckpointError as error:
        raise UsageError(f"ckpt_path: {error}") from error
    classifier = MNISTClassifier(**checkpoint["hyper_parameters"])
    classifier.load_state_dict(checkpoint["state_dict"])
    dataset = checkpoint.get("datamodule_hyper_parameters", {}).get("dataset")
    trained_on = f"{files.NAMES.get(dataset, dataset)}, {checkpoint['global_step']:,} iterations"
    return classifier.mlp.float().eval().requires_grad_(False), printable(trained_on), path
