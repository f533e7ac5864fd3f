"""People's own files in MNIST's format, and MNIST's in other places and under other names."""

import gzip
import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SMALL, VAL_SIZE, RunCLI, newest_run, prepare
from lightning.pytorch.loggers import CSVLogger
from matplotlib.figure import Figure
from torch import Tensor

from mnist_lightning import MNISTClassifier, MNISTDataModule, Trainer
from mnist_lightning.digits import idx, plots
from mnist_lightning.digits.idx import DataError

FILES = ["--data.dataset=files", f"--data.val_size={VAL_SIZE}", "--trainer.max_epochs=1"]
DOTTED = {name: name.replace("-idx", ".idx") for name in idx.NAMES}  # Kaggle's names, say


@pytest.fixture
def own(root: Path, tmp_path: Path) -> Path:
    """A directory of four files, directly in it."""
    for name in idx.NAMES:
        (tmp_path / "kmnist").mkdir(exist_ok=True)
        shutil.copy(root / "synthetic/raw" / name, tmp_path / "kmnist")
    return tmp_path / "kmnist"


def move_to_raw(root: Path) -> None:
    raw = root / "MNIST/raw"
    raw.mkdir(parents=True)
    for name in idx.NAMES:
        (root / name).rename(raw / name)


def rename(root: Path) -> None:
    for name, other in DOTTED.items():
        (root / name).rename(root / other)


def pack(root: Path, level: int = 9) -> None:
    for name in idx.NAMES:
        (root / f"{name}.gz").write_bytes(gzip.compress((root / name).read_bytes(), level))
        (root / name).unlink()


@pytest.mark.parametrize("change", [lambda root: None, move_to_raw, rename, pack])
def test_own_files_are_taken_from_where_they_lie(own: Path, root: Path, change: Callable[[Path], None]) -> None:
    change(own)
    data, expected = prepare("files", own), prepare("synthetic", root)
    for ours, theirs in ((data.train, expected.train), (data.val, expected.val), (data.test, expected.test)):
        assert torch.equal(ours[0], theirs[0])
        assert torch.equal(ours[1], theirs[1])
    assert data.dataset_name == "files in kmnist"


def test_files_in_root_come_before_mnist_below_it(own: Path, fake_mnist: Path, root: Path) -> None:
    shutil.copytree(fake_mnist / "MNIST", own / "MNIST")
    labels = own / "t10k-labels-idx1-ubyte"
    labels.write_bytes(labels.read_bytes()[:8] + bytes(SMALL["t10k"]))
    assert prepare("files", own).test[1].max() == 0
    assert prepare("mnist", own).test[1].max() == 9


def test_own_files_are_named_in_the_console_the_figures_and_results(
    own: Path, run_cli: RunCLI, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    headings = []

    def grid(images: Tensor, titles: list[str], heading: str) -> Figure:
        headings.append(heading)
        return Figure()

    monkeypatch.setattr(plots, "digit_grid", grid)
    assert run_cli("fit", "--figures.network=false", *FILES, f"--data.root={own}", data=False) == 0
    assert "Training on files in kmnist: 1,050 images, 200 for validation" in capsys.readouterr().out
    assert all(heading.startswith("files in kmnist\n") for heading in headings)
    assert len(headings) == 2
    assert json.loads((newest_run(tmp_path) / "results.json").read_text())["dataset"] == "files in kmnist"
    assert run_cli("demo", data=False) == 0
    assert "trained on files in kmnist, 11 iterations" in capsys.readouterr().out


def test_a_run_goes_on_where_the_same_files_were_moved_and_not_with_others(
    own: Path, run_cli: RunCLI, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stop = ["--trainer.max_steps=3", "--test_after_fit=false"]
    assert run_cli("fit", *FILES, *stop, f"--data.root={own}", data=False) == 0
    moved = own.rename(tmp_path / "elsewhere")
    resume = ["fit", "--ckpt_path=last", f"--data.root={moved}", "--trainer.max_steps=5"]
    assert run_cli(*resume, data=False) == 0, capsys.readouterr().err
    labels = moved / "t10k-labels-idx1-ubyte"
    content = labels.read_bytes()
    labels.write_bytes(content[:-1] + bytes([(content[-1] + 1) % 10]))
    assert run_cli(*resume[:-1], "--trainer.max_steps=7", data=False) == 2
    assert "data.fingerprint is 1,250 and 230 images, labels" in capsys.readouterr().err


def test_a_checkpoint_trained_on_own_files_makes_a_data_module_of_them(own: Path, tmp_path: Path) -> None:
    data = prepare("files", own)
    trainer = Trainer(max_steps=1, accelerator="cpu", logger=CSVLogger(tmp_path), enable_progress_bar=False)
    trainer.fit(MNISTClassifier(hidden_dim=4), datamodule=MNISTDataModule("files", str(own), val_size=VAL_SIZE))
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    again = MNISTDataModule.load_from_checkpoint(tmp_path / "a.ckpt", root=str(own), weights_only=True)
    again.prepare_data()
    again.setup("fit")
    assert torch.equal(again.train[0], data.train[0])
    assert again.dataset_name == "files in kmnist"


def header(path: Path, place: int, value: int) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: 4 * place] + struct.pack(">I", value) + content[4 * place + 4 :])


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])


def label(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[:18] + b"\x0a" + content[19:])


def one_less(path: Path) -> None:
    header(path, 1, SMALL["train"] - 1)
    path.write_bytes(path.read_bytes()[:-1])


IMAGES, LABELS, TEST_IMAGES, TEST_LABELS = idx.NAMES


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        (
            IMAGES,
            lambda p: header(p, 0, 0xD03),
            "bytes 00000d03, an IDX file of images with 00000803",
        ),
        (IMAGES, lambda p: header(p, 2, 32), r"its images are 32x28 \(bytes 8 to 15\); expected 28x28"),
        (TEST_IMAGES, cut, r"for the 230 of its header \(bytes 4 to 7\) it would have 180,336 bytes; it has 180,331"),
        (TEST_IMAGES, lambda p: p.write_bytes(p.read_bytes() + b"\0"), "it would have 180,336 bytes; it has 180,337"),
        (LABELS, label, r"the label of image 10, counted from 0 \(byte 18\), is 10; expected 0 to 9"),
        (LABELS, one_less, "has 1,249 labels, but .*train-images-idx3-ubyte 1,250 images"),
        (TEST_LABELS, lambda p: p.write_bytes(b""), "it begins with the bytes 00000000"),
        (TEST_LABELS, lambda p: p.unlink(), "is missing; expected .*also gzipped"),
    ],
)
def test_what_is_wrong_is_named_by_file_and_place(
    own: Path, name: str, damage: Callable[[Path], Any], message: str
) -> None:
    damage(own / name)
    with pytest.raises(DataError, match=f"{name}.*{message}"):
        prepare("files", own)


@pytest.mark.parametrize("damage", [lambda c: c[:-9], lambda c: b"<html>", lambda c: c[:50] + b"\xff" * 9 + c[59:]])
def test_a_damaged_gzipped_file_is_named(own: Path, damage: Callable[[bytes], bytes]) -> None:
    pack(own)
    path = own / "t10k-images-idx3-ubyte.gz"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DataError, match=r"t10k-images-idx3-ubyte\.gz is damaged: "):
        prepare("files", own)


def test_images_are_the_file_itself_and_writing_to_them_does_not_change_it(root: Path) -> None:
    raw = root / "synthetic/raw"
    path = raw / "train-images-idx3-ubyte"
    content = path.read_bytes()
    images, labels = idx.load(raw, "train")
    assert (images.dtype, images.shape) == (torch.uint8, (SMALL["train"], 784))
    assert (labels.dtype, labels.shape) == (torch.uint8, (SMALL["train"],))
    assert images.numpy().tobytes() == content[16:]
    assert bytes(labels.tolist()) == (raw / "train-labels-idx1-ubyte").read_bytes()[8:]
    mapped = Path("/proc/self/maps")  # Linux has it
    assert not mapped.exists() or str(path) in mapped.read_text()
    images.fill_(7)
    assert path.read_bytes() == content
    assert idx.load(raw, "train")[0].max() == 255
