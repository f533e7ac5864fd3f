from pathlib import Path

import pytest
import torch
from conftest import SMALL, VAL_SIZE, prepare

from mnist_lightning.datamodule import MNISTDataModule


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


@pytest.mark.parametrize(
    "settings", [{"batch_size": 0}, {"steps_per_execution": 0}, {"val_size": 0}, {"val_size": 60_000}, {"seed": -1}]
)
def test_settings_out_of_range_are_refused(settings: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=next(iter(settings))):
        MNISTDataModule(**settings)  # type: ignore[arg-type]
