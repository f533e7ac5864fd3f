import gzip
import shutil
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from conftest import SMALL, VAL_SIZE
from torchvision.datasets import MNIST
from torchvision.datasets.utils import calculate_md5

from mnist_lightning import files, synthetic
from mnist_lightning.datamodule import MNISTDataModule
from mnist_lightning.files import DataError, UnreachableError


def prepare(dataset: str, root: Path) -> MNISTDataModule:
    data = MNISTDataModule(dataset, str(root), val_size=VAL_SIZE)  # type: ignore[arg-type]
    data.prepare_data()
    data.setup("fit")
    data.setup("test")
    return data


@pytest.fixture
def stalling_mirror(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A mirror that takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setattr(MNIST, "mirrors", [f"http://127.0.0.1:{server.getsockname()[1]}/"] * 2)
        yield


def test_validation_is_the_beginning_of_the_training_file(root: Path) -> None:
    data = prepare("synthetic", root)
    content = (root / "synthetic" / "raw" / "train-images-idx3-ubyte").read_bytes()[16:]
    images = torch.frombuffer(bytearray(content), dtype=torch.uint8).reshape(-1, 784) / 255
    labels = torch.tensor(list((root / "synthetic" / "raw" / "train-labels-idx1-ubyte").read_bytes()[8:]))
    assert torch.equal(data.val[0], images[:VAL_SIZE])
    assert torch.equal(data.val[1], labels[:VAL_SIZE])
    assert torch.equal(data.train[0], images[VAL_SIZE:])
    assert torch.equal(data.train[1], labels[VAL_SIZE:])
    assert data.test[0].shape == (SMALL["t10k"], 784)
    assert data.train[0].dtype == torch.float32
    assert data.train[0].min() == 0
    assert data.train[0].max() == 1


def test_splits_real_mnist_as_the_tutorial_does(mnist_root: str) -> None:
    data = MNISTDataModule("mnist", mnist_root)
    data.prepare_data()
    data.setup("fit")
    data.setup("test")
    assert [len(labels) for _, labels in (data.train, data.val, data.test)] == [55_000, 5_000, 10_000]
    assert data.val[1][:5].tolist() == [5, 0, 4, 1, 9]
    assert data.test[1][:5].tolist() == [7, 2, 1, 0, 4]
    assert data.train[0].max() == 1
    assert len(data.train_dataloader()) == 11
    assert data.dataset_name == "MNIST"


def test_valid_files_are_not_downloaded_again(fake_mnist: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MNIST, "download", lambda self: pytest.fail("downloads"))
    for dataset in ("auto", "mnist"):
        assert prepare(dataset, fake_mnist).hparams["dataset"] == "mnist"


def test_without_network_auto_falls_back_with_a_warning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = prepare("auto", tmp_path)
    assert data.hparams["dataset"] == "synthetic"
    assert data.dataset_name == "stand-in digits (not MNIST)"
    assert len(data.test[1]) == SMALL["t10k"]
    warning = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert "NOT MNIST" in warning
    assert "Connection refused" in warning
    assert "not MNIST results" in warning
    assert "--data.dataset mnist" in warning
    assert not list(tmp_path.glob(".*"))


def test_mnist_never_falls_back(tmp_path: Path) -> None:
    with pytest.raises(UnreachableError, match="MNIST is not there, and the download failed"):
        prepare("mnist", tmp_path)
    assert not (tmp_path / "synthetic").exists()


@pytest.mark.parametrize("name", list(files.MNIST_MD5))
@pytest.mark.parametrize("damage", ["flip", "truncate", "delete"])
def test_damaged_files_are_an_error_and_never_a_reason_to_fall_back(fake_mnist: Path, name: str, damage: str) -> None:
    path = fake_mnist / "MNIST" / "raw" / name
    content = path.read_bytes()
    if damage == "flip":
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif damage == "truncate":
        path.write_bytes(content[:-1])
    else:
        path.unlink()
    with pytest.raises(DataError, match=f"{name} is .*(damaged|missing)") as raised:
        prepare("auto", fake_mnist)
    assert not isinstance(raised.value, UnreachableError)
    path.write_bytes(content)
    assert prepare("auto", fake_mnist).dataset_name == "MNIST"


def test_a_damaged_file_is_unpacked_again_from_its_gzipped_form(
    fake_mnist: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = fake_mnist / "MNIST" / "raw"
    resources = []
    for name in files.MNIST_MD5:
        with gzip.open(raw / f"{name}.gz", "wb") as file:
            file.write((raw / name).read_bytes())
        resources.append((f"{name}.gz", calculate_md5(raw / f"{name}.gz")))
    monkeypatch.setattr(MNIST, "resources", resources)
    expected = (raw / "t10k-labels-idx1-ubyte").read_bytes()
    (raw / "t10k-labels-idx1-ubyte").write_bytes(b"<html>")
    prepare("mnist", fake_mnist)
    assert (raw / "t10k-labels-idx1-ubyte").read_bytes() == expected


def test_a_mirror_that_stalls_is_given_up(
    tmp_path: Path, stalling_mirror: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert files.DOWNLOAD_TIMEOUT < 30
    monkeypatch.setattr(files, "MIRROR_TIMEOUT", 60.0)
    monkeypatch.setattr(files, "DOWNLOAD_TIMEOUT", 0.5)
    start = time.monotonic()
    with pytest.raises(UnreachableError, match="nothing arrived"):
        prepare("mnist", tmp_path)
    assert time.monotonic() - start < 5
    assert socket.getdefaulttimeout() is None


def test_the_mirrors_sockets_time_out(tmp_path: Path, stalling_mirror: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "MIRROR_TIMEOUT", 0.2)
    with pytest.raises(UnreachableError, match="timed out"):
        prepare("mnist", tmp_path)


def test_a_directory_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for dataset in ("auto", "mnist", "synthetic"):
        with pytest.raises(DataError, match=r"file.*data\.root"):
            prepare(dataset, tmp_path / "file")


def test_the_stand_in_is_made_once(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(synthetic, "make", lambda directory: pytest.fail("makes them again"))
    prepare("synthetic", root)


@pytest.mark.parametrize("change", ["version", "damage"])
def test_the_stand_in_is_remade_when_it_is_old_or_damaged(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    shutil.copytree(root, tmp_path, dirs_exist_ok=True)
    raw = tmp_path / "synthetic" / "raw"
    labels = raw / "t10k-labels-idx1-ubyte"
    expected = labels.read_bytes()
    labels.write_bytes(expected[:-1] + b"\xff")
    if change == "version":
        monkeypatch.setattr(synthetic, "VERSION", synthetic.VERSION + 1)
    assert not synthetic.is_complete(raw)
    prepare("synthetic", tmp_path)
    assert synthetic.is_complete(raw)
    assert labels.read_bytes() == expected


def test_the_data_may_be_made_twice_at_once(tmp_path: Path) -> None:
    with ThreadPoolExecutor() as pool:
        for data in pool.map(prepare, ["synthetic"] * 3, [tmp_path] * 3):
            assert len(data.test[1]) == SMALL["t10k"]
    assert synthetic.is_complete(tmp_path / "synthetic" / "raw")


@pytest.mark.parametrize(
    "settings", [{"batch_size": 0}, {"steps_per_execution": 0}, {"val_size": 0}, {"val_size": 60_000}, {"seed": -1}]
)
def test_settings_out_of_range_are_refused(settings: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=next(iter(settings))):
        MNISTDataModule(**settings)  # type: ignore[arg-type]
