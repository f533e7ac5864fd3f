"""The commands without a Trainer: `data`, `read` for pictures, `demo` and `export`. They start without Lightning."""

import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from jsonargparse import ActionConfigFile  # type: ignore[attr-defined]

from mnist_lightning.engine.console import Command, UsageError, printable, say
from mnist_lightning.engine.parser import Parser
from mnist_lightning.engine.runs import RUNS, CheckpointError, find_checkpoint

if TYPE_CHECKING:
    from mnist_lightning.model import MLP

VAL_SIZE = 5000  # what `MNISTDataModule` holds out for validation by default


def data(arguments: list[str]) -> None:
    """Get and verify the data, and print what the tutorial prints of them."""
    parser = _parser("data", "Get and verify the data without training.")
    _add_data(parser)
    parser.add_argument("--data.val_size", type=int, default=VAL_SIZE, help="Images held out for validation")
    parser.add_argument("--figure", type=str, default="digits.png", help="PNG file for a figure of training digits")
    config = parser.parse_args(arguments)
    import torch.nn.functional as F

    from mnist_lightning.digits import files, idx, plots
    from mnist_lightning.model import CLASSES

    root = Path(config.data.root)
    raw = files.get(config.data.dataset, root)
    name = files.describe(config.data.dataset, root, raw)["dataset_name"]
    images, labels = idx.load(raw, "train")
    held_out = config.data.val_size
    if not 1 <= held_out < len(labels):
        raise UsageError(f"data.val_size must be 1 to {len(labels) - 1:,} of the training file, not {held_out:,}")
    train, valid = (images[held_out:], labels[held_out:]), (images[:held_out], labels[:held_out])
    say(f"Dataset: {name}")
    for split, (x, y) in {"train": train, "valid": valid, "test": idx.load(raw, "t10k")}.items():
        say(f"{split}: {len(y):,} digits, x_{split} {tuple(x.shape)}, y_{split} {tuple(y.shape)}")
    say("Shapes: a row of x is an image, its columns are the 28 x 28 pixels, row by row; y has a label for each image")
    say("One-hot labels, y_valid[:5]: a 1 at the digit's place, and 0 at the others")
    for label in valid[1][:5].long():
        say(f"  {label}: {' '.join(map(str, F.one_hot(label, CLASSES).tolist()))}")
    titles = [f"True: {label}" for label in train[1][:9]]
    plots.digit_grid(train[0][:9], titles, f"{name}: training digits").savefig(config.figure, dpi=120)
    say(f"Figure: {config.figure}")


def read(arguments: list[str]) -> None:
    """Classify your own pictures: print a table, write a CSV file, and draw the first ones.

    Raises:
        PictureError: Some of the files are not pictures. All others have been classified.
    """
    parser = _parser("read", "Classify your own pictures, each of one digit.")
    parser.add_argument("paths", nargs="+", type=str, help="Files, folders (all pictures in them) and globs")
    _add_checkpoint(parser)
    parser.add_argument("--csv", type=str, default="predictions.csv", help="CSV file to write")
    parser.add_argument("--figure", type=str, default="pictures.png", help="PNG file for a figure of the first ones")
    config = parser.parse_args(arguments)
    from mnist_lightning.digits import picture_predictions

    paths = picture_predictions.find_pictures(config.paths)
    for name in ("csv", "figure"):
        if Path(config[name]).resolve() in map(Path.resolve, paths):
            raise UsageError(f"{name}: {config[name]} is one of the pictures to read; give another --{name}")
    mlp, _ = _network(config.ckpt_path, config.runs)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"PIL\.")  # of broken metadata, which no user can mend
        _classify(mlp, paths, config.csv, config.figure)


def _classify(mlp: "MLP", paths: list[Path], csv: str, figure: str) -> None:
    from mnist_lightning.digits import picture_figure, picture_predictions, pictures

    inputs = {}
    for file, result in zip(paths, picture_predictions.preprocess_all(paths), strict=True):
        if isinstance(result, pictures.PictureError):
            print(printable(f"Skipped: {file} {result}"), file=sys.stderr)
        else:
            inputs[file] = result
    probabilities, rows = picture_predictions.classify(mlp, inputs)
    say(picture_predictions.table(rows))
    picture_predictions.write_csv(csv, rows)
    say(printable(f"Predictions: {csv}"))
    if inputs:
        picture_figure.draw(figure, inputs, probabilities, mlp)
        say(printable(f"Figure: {figure}"))
    if skipped := len(paths) - len(inputs):
        raise pictures.PictureError(f"{skipped:,} of {len(paths):,} files could not be read as pictures")


def demo(arguments: list[str]) -> None:
    """Write a page to draw digits on."""
    parser = _parser("demo", "Write a page to draw digits on.")
    _add_checkpoint(parser)
    parser.add_argument("--output", type=str, default="demo.html", help="HTML file to write")
    config = parser.parse_args(arguments)
    mlp, trained_on = _network(config.ckpt_path, config.runs)
    from mnist_lightning.share.demo import page

    output = Path(config.output)
    output.write_text(page(mlp, trained_on), encoding="utf-8")
    say(printable(f"Page: {output.resolve().as_uri()}, {output.stat().st_size / 1e6:.1f} MB; open it in a browser"))


def export_network(arguments: list[str]) -> None:
    """Write a network for another runtime, load it there, and compare its logits."""
    parser = _parser("export", "Write a trained network for another runtime, load it there, and compare.")
    _add_data(parser)
    _add_checkpoint(parser)
    from mnist_lightning.digits import files, idx
    from mnist_lightning.share.export import Format, export

    parser.add_argument("--format", type=Format, required=True, help=f"One of {', '.join(get_args(Format))}")
    parser.add_argument("--output", type=str, help="File to write; by default mnist.onnx or mnist.safetensors")
    config = parser.parse_args(arguments)
    mlp, trained_on = _network(config.ckpt_path, config.runs)
    images, _ = idx.load(files.get(config.data.dataset, Path(config.data.root)), "t10k")
    pixels = images[:1000].float() / 255  # on which it is compared with PyTorch
    path, difference = export(mlp, config.format, config.output, pixels, trained_on)
    say(f"Network: {path}, {path.stat().st_size / 1e6:.1f} MB, trained on {trained_on}")
    say(f"Read back: the logits of {len(pixels):,} test digits differ from PyTorch's by {difference:.1e} at most")


COMMANDS: dict[str, Command] = {"data": data, "read": read, "demo": demo, "export": export_network}

# Why they are not there for classes of the user's.
ONLY_HERE = {
    "data": "only for the files of MNISTDataModule itself; `fit` gets and reads those of another data module",
    "read": "only for the shipped network; `predict` classifies the images of your predict_dataloader",
    "demo": "only for the shipped network, whose two layers the page computes by itself",
    "export": "only for the shipped network; `torch.onnx.export` writes another one",
}


def commands_for(classes: Sequence[type]) -> Mapping[str, Command]:
    """The commands, or where the user's classes are trained, errors that say why these are not there for them."""

    def without(name: str) -> Command:
        def refuse(_: list[str]) -> None:
            raise UsageError(f"{name}: {ONLY_HERE[name]}")

        refuse.__doc__ = f"Not here: {ONLY_HERE[name]}"
        return refuse

    if not classes:
        return COMMANDS
    from mnist_lightning.datamodule import MNISTDataModule

    refused = {name: without(name) for name in COMMANDS}
    return refused if any(issubclass(each, MNISTDataModule) for each in classes) else refused | {"data": data}


def _parser(name: str, description: str) -> Parser:
    parser = Parser(prog=f"mnist_lightning {name}", description=description)
    parser.add_argument("-c", "--config", action=ActionConfigFile, help="Path to a configuration file in yaml format")
    return parser


def _add_data(parser: Parser) -> None:
    from mnist_lightning.digits.files import Dataset

    parser.add_argument("--data.dataset", type=Dataset, default="auto", help="As for `fit`")
    parser.add_argument("--data.root", type=str, default="data", help="Directory for the files")


def _add_checkpoint(parser: Parser) -> None:
    parser.add_argument(
        "--ckpt_path", type=str, default="best", help="Weights: `best` or `last` of the newest run, or a path"
    )
    parser.add_argument("--runs", type=str, default=RUNS, help="Directory of the runs")


def _network(ckpt_path: str, runs: str) -> tuple["MLP", str]:
    """A checkpoint's network, in float32 and without gradients; and what it was trained on, in words."""
    import torch
    from torch import nn

    from mnist_lightning.engine.checkpoint_file import load_checkpoint
    from mnist_lightning.model import MLP

    try:
        path = find_checkpoint(ckpt_path, Path(runs))
        checkpoint = load_checkpoint(path)
    except CheckpointError as error:
        raise UsageError(f"ckpt_path: {error}") from error
    try:
        # `MNISTClassifier.load_from_checkpoint` would do, but imports Lightning. On the device `meta` a network has no
        # memory yet, however large a damaged file says that it is.
        with torch.device("meta"):
            mlp = MLP(checkpoint["hyper_parameters"]["hidden_dim"])
        nn.ModuleDict({"mlp": mlp}).load_state_dict(checkpoint["state_dict"], assign=True)
        if not all(weight.isfinite().all() for weight in mlp.parameters()):
            raise ValueError("expected weights that are finite numbers, found some that are not")
    except Exception as error:  # whatever values may lead to that are in the wrong place
        raise UsageError(f"ckpt_path: {path} is not of this network: {error}") from error
    mlp.float().eval().requires_grad_(False)
    dataset = checkpoint["datamodule_hyper_parameters"].get("dataset_name", "other data")
    trained_on = printable(f"{dataset}, {checkpoint['global_step']:,} iterations")
    say(printable(f"Weights: {path}, trained on {trained_on}"))
    return mlp, trained_on
