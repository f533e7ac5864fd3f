"""The split as in the tutorial, and the minibatches of each part."""

from pathlib import Path

import pytest
import torch
from conftest import SMALL, VAL_SIZE, prepare
from engine.test_loop import digits

from mnist_lightning import MNISTDataModule
from mnist_lightning.distortions import Distortions
from mnist_lightning.engine.data import DeviceLoader


def test_validation_is_the_beginning_of_the_training_file(root: Path) -> None:
    data = prepare("synthetic", root)
    content = (root / "synthetic" / "raw" / "train-images-idx3-ubyte").read_bytes()[16:]
    images = torch.frombuffer(bytearray(content), dtype=torch.uint8).reshape(-1, 784)
    labels = torch.tensor(list((root / "synthetic" / "raw" / "train-labels-idx1-ubyte").read_bytes()[8:])).byte()
    assert torch.equal(data.val[0], images[:VAL_SIZE])
    assert torch.equal(data.val[1], labels[:VAL_SIZE])
    assert torch.equal(data.train[0], images[VAL_SIZE:])
    assert torch.equal(data.train[1], labels[VAL_SIZE:])
    assert data.test[0].shape == (SMALL["t10k"], 784)
    assert (data.train[0].min().item(), data.train[0].max().item()) == (0, 255)
    assert data.dataset_name == "synthetic digits (not MNIST)"


def read(root: Path, distortions: bool | Distortions = False) -> MNISTDataModule:
    data = digits(root, distortions=distortions)
    data.prepare_data()
    data.setup("fit")
    return data


def rows(loader: DeviceLoader) -> tuple[torch.Tensor, torch.Tensor]:
    images, labels = zip(*loader, strict=True)
    return torch.cat(images), torch.cat(labels)


def test_a_minibatch_is_a_pair(root: Path) -> None:
    loader = read(root).train_dataloader()
    minibatches = list(loader)
    assert len(loader) == len(minibatches) == 11
    assert [images.shape for images, _ in minibatches] == [(100, 784)] * 10 + [(50, 784)]
    for images, labels in minibatches:
        assert (images.dtype, labels.dtype) == (torch.float32, torch.int64)
        assert (images.min().item(), images.max().item()) == (0, 1)
        assert labels.shape == images.shape[:1]


@pytest.mark.parametrize("distortions", [False, True])
def test_loaders_hand_out_their_splits_in_file_order(root: Path, distortions: bool) -> None:
    data = read(root, distortions)
    for loader, (pixels, labels) in [
        (data.val_dataloader(), data.val),
        (data.test_dataloader(), data.test),
        (data.predict_dataloader(), data.test),
    ]:
        found = rows(loader)
        assert torch.equal(found[0], pixels.float() / 255)
        assert torch.equal(found[1], labels.long())


@pytest.mark.parametrize("distortions", [False, True])
def test_training_is_shuffled_and_distorted_where_asked_for(root: Path, distortions: bool) -> None:
    data = read(root, distortions)
    images, labels = rows(data.train_dataloader())
    assert not torch.equal(labels, data.train[1].long())
    assert torch.equal(labels.bincount(), data.train[1].bincount())
    pixels = (data.train[0].float() / 255).unique(dim=0)
    assert torch.equal(images.unique(dim=0), pixels) is not distortions


def test_splits_real_mnist_as_the_tutorial_does(mnist_root: str) -> None:
    data = MNISTDataModule("mnist", mnist_root)
    data.prepare_data()
    data.setup("fit")
    assert [len(labels) for _, labels in (data.train, data.val, data.test)] == [55_000, 5_000, 10_000]
    assert data.val[1][:5].tolist() == [5, 0, 4, 1, 9]
    assert data.test[1][:5].tolist() == [7, 2, 1, 0, 4]
    assert len(data.train_dataloader()) == 550
    assert [len(labels) for _, labels in data.val_dataloader()] == [1000] * 5
    assert len(data.test_dataloader()) == 10
    assert data.dataset_name == "MNIST"


def test_hyperparameters_are_plain_and_do_not_say_where_the_files_lie(root: Path) -> None:
    strengths = Distortions(rotation=5)
    assert dict(read(root, strengths).hparams) == {
        "dataset": "synthetic",
        "dataset_name": "synthetic digits (not MNIST)",
        "batch_size": 100,
        "val_size": VAL_SIZE,
        "seed": 0,
        "distortions": vars(strengths),
    }
