"""The data's files: download MNIST, verify it, make its stand-in where there is no network, or take the user's own."""

import itertools
import shutil
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal, TypeAlias

from mnist_lightning.digits import download, idx, synthetic
from mnist_lightning.digits.idx import DataError

Dataset: TypeAlias = Literal["auto", "mnist", "synthetic", "files"]

NAMES = {"mnist": "MNIST", "synthetic": "stand-in digits (not MNIST)"}

# MD5 sums of the unpacked files; torchvision knows those of the gzipped ones.
MNIST_MD5 = {
    "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
    "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
    "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
    "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
}


def full_name(dataset: str) -> str:
    """A data set's name as people read it: `MNIST`, `stand-in digits (not MNIST)`, or another one's as it is."""
    return NAMES.get(dataset, dataset)


class UnreachableError(DataError):
    """There is nothing of MNIST on disk, and it could not be downloaded either."""


def get(dataset: Dataset, root: Path) -> Path:
    """Have whole and verified files on disk; return the directory that they lie in.

    Args:
        dataset: `mnist` downloads what is missing or damaged. `synthetic` makes the stand-in once. `auto` is `mnist`,
            or `synthetic` with a warning where nothing of MNIST is on disk and it cannot be downloaded. `files` are the
            user's own, under MNIST's names; gzipped ones are unpacked.
        root: Where MNIST lies in `MNIST/raw/`, as `torchvision.datasets.MNIST` has it, or directly, and the stand-in in
            `synthetic/raw/`.

    Raises:
        DataError: The files are damaged or missing and cannot be fetched, or the directory cannot be written.
    """
    try:
        if _are_own(dataset):
            return _get_files(root)
        if dataset != "synthetic":
            try:
                return _get_mnist(root)
            except UnreachableError as error:
                if dataset == "mnist":
                    raise
                _warn_of_stand_in(error)
        raw = find("synthetic", root)
        if not synthetic.is_complete(raw):  # else it may lie where nothing can be written
            _make_synthetic(raw, root)
        return raw
    except OSError as error:
        cause = f"{error.filename or root}: {error.strerror or error}"
        raise DataError(f"{cause}; mend that or give another --data.root") from error


def find(dataset: Dataset, root: Path) -> Path:
    """The directory of the files that `get` had: MNIST's, the user's, or the stand-in's where `auto` found no MNIST.

    Of `root` and `MNIST/raw/` it is the one that holds most of the four files.
    """
    places = [root / "MNIST" / "raw", root]
    raw = min(reversed(places) if _are_own(dataset) else places, key=lambda place: len(idx.missing(place)))
    stands_in = dataset == "synthetic" or (dataset == "auto" and idx.missing(raw))
    return root / "synthetic" / "raw" if stands_in else raw


def describe(dataset: str, root: Path, raw: Path) -> dict[str, str]:
    """What a checkpoint keeps of the data: their name and, of the user's own files, a fingerprint.

    The name is `mnist`, `synthetic`, or another one of torchvision's in the same format; or `files in DIRECTORY`.
    """
    is_in_root = raw in (root, root / "MNIST" / "raw")
    if _are_own(dataset):
        place = (root if is_in_root else raw).resolve()
        name = place.parent.name if place.name == "raw" else place.name
        return {"dataset": f"files in {name}", "fingerprint": idx.fingerprint(raw)}
    return {"dataset": "mnist" if is_in_root else raw.parent.name.lower()}


def _are_own(dataset: str) -> bool:
    return dataset == "files" or dataset.startswith("files in ")  # as `describe` has it in checkpoints


def _get_files(root: Path) -> Path:
    raw = find("files", root)
    if missing := idx.missing(raw):
        raise DataError(
            f"{raw / missing[0]} is missing; expected {', '.join(idx.NAMES)} in {root} or {root / 'MNIST' / 'raw'}, "
            f"also gzipped or as train-images.idx3-ubyte and so on; found there: {idx.found(root)}"
        )
    idx.unpack(raw)
    for file in ("train", "t10k"):
        idx.load(raw, file)
    return raw


def _get_mnist(root: Path) -> Path:
    if not _bad(raw := find("mnist", root)):
        return raw
    with idx.alone(root):  # of several processes that start at once, one downloads
        raw = find("mnist", root)
        if bad := _bad(raw):
            _mend(raw, bad, root)
    return raw


def _bad(raw: Path) -> list[str]:
    return [name for name in MNIST_MD5 if not _is_mnist(raw, name) or idx.locate(raw, name).suffix == ".gz"]


def _mend(raw: Path, bad: list[str], root: Path) -> None:
    _refuse_own(raw)
    present = [path for name in MNIST_MD5 for path in idx.forms(raw, name) if path.is_file()]
    raw.mkdir(parents=True, exist_ok=True)
    # Everything is made in a directory of its own and moved when it is whole: a killed download leaves nothing that
    # could be taken for MNIST.
    with TemporaryDirectory(dir=root, prefix=".download-", ignore_cleanup_errors=True) as directory:
        for name in bad:
            for packed in idx.forms(raw, name)[2:]:
                if packed.is_file():
                    shutil.copy(packed, Path(directory, f"{name}.gz"))
        failure = download.fetch(bad, directory)
        for name in bad:
            if synthetic.md5_sum(Path(directory, name)) != MNIST_MD5[name]:
                if not present:
                    raise UnreachableError(
                        f"{raw}: MNIST is not there, and the download failed: {failure}; expected "
                        f"{', '.join(MNIST_MD5)}, found in {root}: {idx.found(root)}"
                    )
                # Of the two forms of a file the gzipped one is at fault where both are there: it mends the other.
                culprit = next((path for path in reversed(idx.forms(raw, name)) if path in present), None)
                state = f"{culprit} is damaged" if culprit else f"{raw / name} is missing"
                raise DataError(f"{state}, and the download failed: {failure}; go online, or put a good copy there")
        for name in bad:
            if (path := raw / name).exists():  # it may be the user's
                aside = next(aside for n in itertools.count(1) if not (aside := raw / f"{name}.aside{n}").exists())
                path.rename(aside)
                print(f"{path} was not MNIST's file, and is kept as {aside.name}", file=sys.stderr)
            Path(directory, name).replace(path)


def _is_mnist(raw: Path, name: str) -> bool:
    path, md5 = idx.locate(raw, name), MNIST_MD5[name]
    if path.suffix == ".gz":
        from torchvision.datasets import MNIST  # takes a second

        md5 = dict(MNIST.resources)[path.name.replace(".idx", "-idx")]
    return synthetic.md5_sum(path) == md5


def _refuse_own(raw: Path) -> None:
    """Tell somebody's own files, a whole pair of them, from damaged ones."""
    for file in ("train", "t10k"):
        pair = [name for name in MNIST_MD5 if name.startswith(file)]
        if not any(_is_mnist(raw, name) for name in pair):
            try:
                images, _ = idx.load(raw, file)
            except (DataError, OSError):
                continue
            raise DataError(
                f"{idx.locate(raw, pair[0])} holds {len(images):,} images that are not MNIST's; to train on them, give "
                "--data.dataset files; to get MNIST, move the files away or give another --data.root"
            )


def _make_synthetic(raw: Path, root: Path) -> None:
    # Aside and then moved, as above: some file systems have no locks.
    with idx.alone(raw), TemporaryDirectory(dir=root, prefix=".make-") as directory:
        if not synthetic.is_complete(raw):
            synthetic.make(Path(directory))
            for path in Path(directory).iterdir():
                path.replace(raw / path.name)


def _warn_of_stand_in(error: UnreachableError) -> None:
    from rich.console import Console
    from rich.panel import Panel

    Console(stderr=True).print(
        Panel(
            f"{error}\n\n"
            "Training on digits made on this machine instead. [bold]Results on them are not MNIST results.[/bold]\n\n"
            "To get MNIST, go online and run [bold]python -m mnist_lightning data --data.dataset mnist[/bold], or copy "
            "its four files to MNIST/raw/ under --data.root.",
            title="[bold]NOT MNIST[/bold]",
            border_style="bold red",
        )
    )
