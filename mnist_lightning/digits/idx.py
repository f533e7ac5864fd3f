"""IDX files, MNIST's format: found under the names that people give them, checked, and mapped into memory."""

import gzip
import hashlib
import math
import struct
import zlib
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mnist_lightning.engine.console import JobError
from mnist_lightning.model import CLASSES, SIDE

FILES: tuple[Literal["train"], Literal["t10k"]] = ("train", "t10k")
NAMES = [f"{file}-{content}-ubyte" for file in FILES for content in ("images-idx3", "labels-idx1")]


class DataError(JobError):
    """Files that are damaged, missing or cannot be written; the message names them and says what to do."""


def candidates(raw: Path, name: str) -> list[Path]:
    """The paths at which a file of MNIST may lie: as `train-images.idx3-ubyte`, too; first plain ones, then gzipped."""
    return [raw / f"{form}{end}" for end in ("", ".gz") for form in (name, name.replace("-idx", ".idx"))]


def locate(raw: Path, name: str) -> Path:
    """The first of its `candidates` that is there, or `raw / name` where none is."""
    return next((path for path in candidates(raw, name) if path.is_file()), raw / name)


def missing(raw: Path) -> list[str]:
    """Those of the four names that have no file in a directory."""
    return [name for name in NAMES if not locate(raw, name).is_file()]


def load(raw: Path, file: Literal["train", "t10k"]) -> tuple[Tensor, Tensor]:
    """Read images, (N, 784) uint8, and labels, (N,) uint8, 0 to 9, of the training or the test file.

    Both are the files themselves, mapped into memory and shared with other processes, or what is in gzipped ones.

    Raises:
        DataError: A file is not of this form, or they do not fit each other; the message names the file and the place.
    """
    images_path, labels_path = (locate(raw, name) for name in NAMES if name.startswith(file))
    images, labels = _values(images_path, SIDE, SIDE).flatten(1), _values(labels_path)
    if len(images) != len(labels):
        raise DataError(f"{labels_path} has {len(labels):,} labels, but {images_path} {len(images):,} images")
    if labels.max() >= CLASSES:
        index = int((labels >= CLASSES).nonzero()[0])
        raise DataError(
            f"{labels_path}: the label of image {index:,}, counted from 0 (byte {8 + index:,}), is {labels[index]}; "
            f"expected 0 to {CLASSES - 1}"
        )
    return images, labels


def fingerprint(raw: Path) -> str:
    """What tells data sets apart: the numbers of images and a checksum (CRC-32) of the labels."""
    train, test = load(raw, "train")[1].numpy(), load(raw, "t10k")[1].numpy()
    checksum = zlib.crc32(test.data, zlib.crc32(train.data))
    return f"{len(train):,} and {len(test):,} images, labels {checksum:08x}"


def md5_sum(path: Path) -> str | None:
    """The MD5 sum of a file, of a gzipped one of what it holds, in hexadecimal; None if it is damaged or missing."""
    try:
        return hashlib.md5(read_bytes(path).data, usedforsecurity=False).hexdigest() if path.is_file() else None
    except DataError:
        return None


def _values(path: Path, *shape: int) -> Tensor:
    """The values of an IDX file of bytes, (N, *shape) uint8."""
    content = read_bytes(path)
    header = struct.Struct(f">{2 + len(shape)}I")
    magic, count, *sides = header.unpack(content[: header.size].tobytes().ljust(header.size, b"\0"))
    size = header.size + count * math.prod(shape)
    if magic != (expected := 0x801 + len(shape)):
        kind = "images" if shape else "labels"
        fault = f"it begins with the bytes {magic:08x}, an IDX file of {kind} with {expected:08x}"
    elif tuple(sides) != shape:
        fault = f"its images are {'x'.join(map(str, sides))} (bytes 8 to {header.size - 1}); expected {SIDE}x{SIDE}"
    elif content.size != size or not count:
        fault = f"for the {count:,} of its header (bytes 4 to 7) it would have {size:,} bytes; it has {content.size:,}"
    else:
        return torch.from_numpy(content[header.size :].reshape(count, *shape))
    raise DataError(f"{path} is damaged or of another kind: {fault}")


def read_bytes(path: Path) -> npt.NDArray[np.uint8]:
    """Return a file's bytes, (N,): mapped into memory, or unpacked into it where the file is gzipped.

    Raises:
        DataError: A gzipped file is damaged.
    """
    if path.suffix != ".gz":
        # Copy-on-write: PyTorch has no read-only tensors, and no mistake may change the file.
        return np.memmap(path, np.uint8, "c") if path.stat().st_size else np.empty(0, np.uint8)
    try:
        with gzip.open(path) as packed:
            return np.frombuffer(bytearray(packed.read()), np.uint8)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{path} is damaged: {error}") from error
