"""The data's files: MNIST, downloaded and verified; synthetic digits where there is no network; or the user's own."""

import errno
import itertools
import socket
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal, TypeAlias

from mnist_lightning.digits import disk, idx, synthetic
from mnist_lightning.digits.idx import DataError
from mnist_lightning.engine.checkpoint_file import replace

Dataset: TypeAlias = Literal["auto", "mnist", "synthetic", "files"]

MIRROR_TIMEOUT = 10.0  # seconds; a mirror that sends nothing for so long is given up

# MD5 sums of the unpacked files; torchvision knows those of the gzipped ones.
MNIST_MD5 = {
    "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
    "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
    "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
    "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
}


class UnreachableError(DataError):
    """There is nothing of MNIST on disk, and it could not be downloaded either."""


def get(dataset: Dataset, root: Path) -> Path:
    """Have whole and verified files on disk; return the directory that they lie in.

    Args:
        dataset: `mnist` downloads what is missing or damaged. `synthetic` draws synthetic digits, once. `auto` is
            `mnist`, or `synthetic` with a warning where nothing of MNIST is on disk and it cannot be downloaded.
            `files` are the user's own, under MNIST's names.
        root: Where MNIST lies in `MNIST/raw/`, as `torchvision.datasets.MNIST` has it, or directly, and synthetic
            digits in `synthetic/raw/`.

    Raises:
        DataError: The files are damaged or missing and cannot be fetched, or the directory cannot be written.
    """
    try:
        if dataset != "synthetic":
            try:
                return _get_files(root) if dataset == "files" else _get_mnist(root)
            except UnreachableError as error:
                if dataset == "mnist":
                    raise
                _warn_of_stand_in(error)
        return _get_synthetic(root)
    except OSError as error:
        cause = f"{error.filename or root}: {error.strerror or error}"
        raise DataError(f"{cause}; mend that or give another --data.root") from error


def find(dataset: Dataset, root: Path) -> Path:
    """The directory of the files that `get` had: MNIST's, the user's, or synthetic digits where `auto` found no MNIST.

    Of `root` and `MNIST/raw/` it is the one that holds most of the four files.
    """
    places = [root / "MNIST" / "raw", root]
    raw = min(reversed(places) if dataset == "files" else places, key=lambda place: len(idx.missing(place)))
    is_synthetic = dataset == "synthetic" or (dataset == "auto" and idx.missing(raw))
    return root / "synthetic" / "raw" if is_synthetic else raw


def describe(dataset: Dataset, root: Path, raw: Path) -> dict[str, str]:
    """What a checkpoint keeps of the data: which ones were taken, and of the user's own files a fingerprint.

    The `dataset_name` is `MNIST`, `synthetic digits (not MNIST)`, `files in DIRECTORY` or, of another data set of
    torchvision's in the same format, that of its directory.
    """
    is_in_root = raw in (root, root / "MNIST" / "raw")
    if dataset == "files":
        place = (root if is_in_root else raw).resolve()
        name = place.parent.name if place.name == "raw" else place.name
        return {"dataset": dataset, "dataset_name": f"files in {name}", "fingerprint": idx.fingerprint(raw)}
    if is_in_root:
        return {"dataset": "mnist", "dataset_name": "MNIST"}
    if raw == root / "synthetic" / "raw":
        return {"dataset": "synthetic", "dataset_name": "synthetic digits (not MNIST)"}
    return {"dataset": dataset, "dataset_name": raw.parent.name}


def _get_files(root: Path) -> Path:
    raw = find("files", root)
    if missing := idx.missing(raw):
        disk.check_directory(root / "MNIST" / "raw")
        raise DataError(
            f"{raw / missing[0]} is missing; expected {', '.join(idx.NAMES)} in {root} or {root / 'MNIST' / 'raw'}, "
            "also gzipped or as train-images.idx3-ubyte and so on; give their --data.root"
        )
    for file in idx.FILES:
        idx.load(raw, file)
    return raw


def _get_mnist(root: Path) -> Path:
    raw = find("mnist", root)
    if _wrong_files(raw):  # else it may lie where nothing can be written
        with disk.locked(raw):  # of several processes that start at once, one downloads
            if names := _wrong_files(raw):
                _refuse_own_files(names, raw)
                _replace_files(names, raw)
    return raw


def _wrong_files(raw: Path) -> list[str]:
    return [name for name in MNIST_MD5 if not _is_mnist(idx.locate(raw, name), name)]


def _is_mnist(path: Path, name: str) -> bool:
    return idx.md5_sum(path) == MNIST_MD5[name]


def _replace_files(names: list[str], raw: Path) -> None:
    nothing_is_there = len(idx.missing(raw)) == len(idx.NAMES)
    # Everything is made in a directory of its own and moved when it is whole: a killed download leaves nothing that
    # could be taken for MNIST.
    with TemporaryDirectory(dir=raw, prefix=".download-", ignore_cleanup_errors=True) as directory:
        for name in names:
            packed = next((path for path in idx.candidates(raw, name) if _is_mnist(path, name)), None)
            if packed:  # and what was unpacked from it is damaged
                Path(directory, name).write_bytes(idx.read_bytes(packed).data)
            elif failure := _download(name, directory):
                path = idx.locate(raw, name)
                fault = f"{path} is {'damaged' if path.is_file() else 'missing'}, and the download failed: {failure}"
                error = UnreachableError if nothing_is_there else DataError
                raise error(f"{fault}; go online, or put a good copy there")
        for name in names:
            if (path := raw / name).exists():  # it may be the user's
                aside = next(aside for n in itertools.count(1) if not (aside := raw / f"{name}.aside{n}").exists())
                replace(path, aside)
                print(f"{path} was not MNIST's file, and is kept as {aside.name}", file=sys.stderr)
            replace(Path(directory, name), path)


def _download(name: str, directory: str) -> str:
    """Fetch a file of MNIST's and unpack it; return what went wrong with each mirror, or ""."""
    from torchvision.datasets import MNIST  # takes a second, and mostly nothing is to be downloaded
    from torchvision.datasets.utils import download_and_extract_archive

    failures = []
    default = socket.getdefaulttimeout()
    socket.setdefaulttimeout(MIRROR_TIMEOUT)  # torchvision sets none
    try:
        for mirror in MNIST.mirrors:
            url = f"{mirror}{name}.gz"
            try:
                download_and_extract_archive(url, directory, md5=dict(MNIST.resources)[f"{name}.gz"])
                return ""
            except Exception as error:  # whatever a mirror may answer
                if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                    raise
                failures.append(f"{url}: {' '.join(str(error).split()) or type(error).__name__}")
    finally:
        socket.setdefaulttimeout(default)
    return ", ".join(failures)


def _refuse_own_files(names: list[str], raw: Path) -> None:
    """Tell somebody's own files, a whole pair of them, from damaged ones."""
    for file in idx.FILES:
        images, labels = (name for name in MNIST_MD5 if name.startswith(file))
        if images in names and labels in names and _is_whole(raw, file):
            raise DataError(
                f"{idx.locate(raw, images)} holds images that are not MNIST's; to train on them, give --data.dataset "
                "files; to get MNIST, move the files away or give another --data.root"
            )


def _is_whole(raw: Path, file: Literal["train", "t10k"]) -> bool:
    try:
        idx.load(raw, file)
    except (DataError, OSError):
        return False
    return True


def _get_synthetic(root: Path) -> Path:
    raw = find("synthetic", root)
    if not all(_is_whole(raw, file) for file in idx.FILES):  # else it may lie where nothing can be written
        # Aside and then moved, as above: some file systems have no locks.
        with disk.locked(raw), TemporaryDirectory(dir=raw, prefix=".make-") as directory:
            if not all(_is_whole(raw, file) for file in idx.FILES):
                synthetic.make(Path(directory))
                for path in Path(directory).iterdir():
                    replace(path, raw / path.name)
    return raw


def _warn_of_stand_in(error: UnreachableError) -> None:
    from rich.console import Console
    from rich.panel import Panel

    text = (
        f"{error}\n\n"
        "Training on synthetic digits instead. [bold]Results on them are not MNIST results.[/bold]\n\n"
        "To get MNIST, go online and run [bold]python -m mnist_lightning data --data.dataset mnist[/bold], or copy its "
        "four files to MNIST/raw/ under --data.root."
    )
    Console(stderr=True).print(Panel(text, title="[bold]NOT MNIST[/bold]", border_style="bold red"))
