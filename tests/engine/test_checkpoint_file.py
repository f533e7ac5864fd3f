"""Files of checkpoints: always whole on disk, nothing in a stranger's runs, and only what can be loaded is saved."""

import contextlib
import errno
import math
import os
import pickle
import resource
import signal
from collections import OrderedDict
from collections.abc import Callable
from enum import Enum
from pathlib import Path, PurePosixPath
from typing import Any
from unittest.mock import Mock

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import RunCLI, load
from lightning.pytorch import Trainer
from PIL import Image
from torch import Tensor, nn

from mnist_lightning import MNISTClassifier, MNISTDataModule
from mnist_lightning.engine import checkpoint_file
from mnist_lightning.engine.checkpoint_file import load_checkpoint, plain_values, save_checkpoint
from mnist_lightning.engine.checkpoints import CheckpointIO
from mnist_lightning.engine.runs import CheckpointError

Checkpoint = dict[str, Any]


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a network of 7 hidden units."""
    path = tmp_path_factory.mktemp("good") / "good.ckpt"
    trainer = Trainer(accelerator="cpu", max_epochs=1, logger=False)
    trainer.strategy.connect(MNISTClassifier(hidden_dim=7))
    trainer.save_checkpoint(path)
    return path


def read(path: Path) -> Checkpoint:
    return load_checkpoint(path)


# Read


class MakesAFile:
    """Unpickling it would make a file."""

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, ("touch made",)


def test_nothing_in_a_checkpoint_runs(
    good: Path, run_cli: RunCLI, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    torch.save({**read(good), "more": MakesAFile()}, "zipped.ckpt")
    Path("bare.ckpt").write_bytes(pickle.dumps(MakesAFile()))
    for name in ("zipped.ckpt", "bare.ckpt"):
        for command in ("fit", "test", "demo"):
            assert run_cli(command, f"--ckpt_path={name}", data=command != "demo") == 2
            err = capsys.readouterr().err
            assert f"{name} is " in err
            assert name == "bare.ckpt" or "refused: expected tensors and plain values only, found posix.system" in err
            assert err.count("\n") == 1
        with pytest.raises(CheckpointError, match=name):
            CheckpointIO().load_checkpoint(name, weights_only=False)
    assert {path.name for path in tmp_path.iterdir()} == {"zipped.ckpt", "bare.ckpt"}
    torch.load("zipped.ckpt", weights_only=False)
    assert Path("made").exists(), "the file would not have been made anyhow"


def without(checkpoint: Checkpoint, part: str) -> Checkpoint:
    return {name: value for name, value in checkpoint.items() if name != part}


def change_weights(checkpoint: Checkpoint, change: Callable[[Tensor], Tensor]) -> Checkpoint:
    return checkpoint | {"state_dict": {name: change(tensor) for name, tensor in checkpoint["state_dict"].items()}}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: {"model": c["state_dict"]}, r"not of this program: expected state_dict, .*, found \['model'\]"),
        (lambda c: without(c, "loops"), "not of this program: expected .*loops.*, found"),
        (lambda c: without(c, "pytorch-lightning_version"), "not of this program: expected .*lightning_version"),
        (lambda c: [1, 2], "not of this program: expected .*, found list"),
        (lambda c: {**c, "loops": {}}, "not of this program: KeyError: 'fit_loop'"),
        (lambda c: {**c, "global_step": "many"}, "not of this program: .*whole numbers"),
        (lambda c: {**c, "datamodule_hyper_parameters": 7}, "not of this program: .*must be a dictionary"),
        (lambda c: {**c, "hyper_parameters": 7}, "not of this program: .*hyper_parameters must be a dictionary"),
    ],
)
def test_what_something_else_has_saved_is_named(
    good: Path, tmp_path: Path, change: Callable[[Checkpoint], Any], message: str
) -> None:
    torch.save(change(read(good)), tmp_path / "other.ckpt")
    with pytest.raises(CheckpointError, match=f"other.ckpt is {message}"):
        read(tmp_path / "other.ckpt")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: {**c, "hyper_parameters": {"hidden_dim": "wide"}}, "str"),
        (lambda c: {**c, "hyper_parameters": {"hidden_dim": 10**12}}, "size mismatch for mlp.hidden.weight"),
        (lambda c: {**c, "hyper_parameters": {"hidden_dim": 9}}, "size mismatch for mlp.hidden.weight"),
        (lambda c: {**c, "state_dict": {"net.0.weight": torch.ones(2)}}, "net.0.weight"),
        (lambda c: {**c, "state_dict": [1]}, "list"),
        (lambda c: change_weights(c, lambda w: w * math.nan), "expected weights that are finite numbers"),
    ],
)
def test_a_checkpoint_of_another_network_is_named(
    good: Path,
    run_cli: RunCLI,
    change: Callable[[Checkpoint], Any],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    torch.save(change(read(good)), "other.ckpt")
    assert run_cli("demo", "--ckpt_path=other.ckpt", data=False) == 2
    err = capsys.readouterr().err
    assert err.startswith("mnist_lightning: ckpt_path: other.ckpt is not of this network: ")
    assert message in err
    assert err.count("\n") == 1
    if "state_dict" in message or "net.0" in message:
        assert run_cli("test", "--ckpt_path=other.ckpt") == 1
        err = capsys.readouterr().err
        assert err.startswith("mnist_lightning: ckpt_path: the checkpoint cannot be loaded: ")
        assert message in err
        assert err.count("\n") == 1


class NoHyperparameters(pl.LightningModule):
    """As other projects write their modules: layers made late, and a part of the state that is no tensor."""

    def __init__(self, width: int = 8, scale: float = 1.0) -> None:
        super().__init__()
        self.width, self.strict_loading = width, False
        self.register_buffer("mask", torch.full((3, 3), -torch.inf).triu(1))

    def configure_model(self) -> None:
        if not hasattr(self, "net"):
            self.net = nn.Linear(784, 10)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.net(images)
        return logits

    def get_extra_state(self) -> dict[str, int]:
        return {"version": 3}

    def set_extra_state(self, state: dict[str, int]) -> None:
        assert state == {"version": 3}

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.log("val/acc", (self(batch[0]).argmax(1) == batch[1]).float().mean(), on_epoch=True)

    test_step = validation_step

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_any_module_is_tested_and_resumed(run_cli: RunCLI) -> None:
    """Nothing is asked of its hyperparameters: Lightning loads the state into the module that is there."""
    classes = (NoHyperparameters,)
    assert run_cli("fit", "--trainer.max_epochs=2", classes=classes) == 0
    assert run_cli("fit", "--trainer.max_steps=13", classes=classes) == 0
    assert run_cli("fit", "--ckpt_path=last", "--trainer.max_steps=-1", "--trainer.max_epochs=2", classes=classes) == 0
    whole, resumed = (load(Path(f"lightning_logs/version_{number}"))["state_dict"] for number in range(2))
    assert torch.equal(whole["net.weight"], resumed["net.weight"])
    assert run_cli("test", "--ckpt_path=best", classes=classes) == 0


@pytest.mark.parametrize("size", [0, 1, 1000, 0.5, 0.99])
def test_a_part_of_a_file_is_damaged(good: Path, tmp_path: Path, size: float) -> None:
    content = good.read_bytes()
    content = content[: int(size * len(content)) if isinstance(size, float) else size]
    (tmp_path / "part.ckpt").write_bytes(content)
    with pytest.raises(CheckpointError, match=f"part.ckpt is damaged.* found {len(content):,} bytes"):
        read(tmp_path / "part.ckpt")


def test_a_flipped_bit_never_changes_what_is_read(good: Path, tmp_path: Path) -> None:
    content, weights = good.read_bytes(), read(good)["state_dict"]
    damaged = 0
    for at in range(0, len(content), 97):
        (tmp_path / "flipped.ckpt").write_bytes(content[:at] + bytes([content[at] ^ 4]) + content[at + 1 :])
        with contextlib.suppress(CheckpointError):
            flipped = read(tmp_path / "flipped.ckpt")  # the bit was in padding
            assert all(torch.equal(flipped["state_dict"][name], weight) for name, weight in weights.items())
            damaged -= 1
        damaged += 1
    assert damaged > 200


# Write


def test_a_file_is_synced_before_it_replaces_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = []
    replace = Path.replace

    def record(path: Path, target: Path) -> Path:
        done.append(("replace", path.stat().st_size))
        return replace(path, target)

    monkeypatch.setattr(os, "fsync", lambda file: done.append(("sync", os.fstat(file).st_size)))
    monkeypatch.setattr(Path, "replace", record)
    save_checkpoint({"weights": torch.zeros(1000)}, tmp_path / "new/last.ckpt")
    size = (tmp_path / "new/last.ckpt").stat().st_size
    assert done == [("sync", size), ("replace", size)]
    assert len(list((tmp_path / "new").iterdir())) == 1


@pytest.mark.parametrize("error", [errno.EINVAL, errno.ENOSYS, errno.ENOTSUP])
def test_where_a_file_system_cannot_sync_it_is_written_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: int
) -> None:
    monkeypatch.setattr(os, "fsync", Mock(side_effect=OSError(error, "no sync here")))
    checkpoint_file.write_whole(tmp_path / "file", b"content")
    assert (tmp_path / "file").read_bytes() == b"content"


def test_a_full_disk_leaves_what_was_saved_before(
    run_cli: RunCLI, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_cli("fit", "--trainer.max_epochs=1", "--test_after_fit=false") == 0
    checkpoints = tmp_path / "lightning_logs/version_0/checkpoints"
    before = {path.name: path.read_bytes() for path in checkpoints.iterdir()}
    capsys.readouterr()
    # The kernel refuses to let a file grow beyond the limit; a checkpoint takes almost twice as much.
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, limits[1]))
        assert run_cli("fit", "--trainer.max_epochs=2", "--ckpt_path=last") == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, ignored)
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "best.ckpt cannot be saved: File too large" in err
    assert {path.name: path.read_bytes() for path in checkpoints.iterdir()} == before
    assert run_cli("fit", "--trainer.max_epochs=2", "--ckpt_path=last") == 0


# Only plain values


class Width(Enum):
    NARROW = "narrow"
    WIDE = "wide"


@pytest.mark.parametrize(
    ("value", "plain"),
    [
        (Width.WIDE, "wide"),
        (np.float64(0.5), 0.5),
        (np.int32(3), 3),
        (np.bool_(True), True),
        (PurePosixPath("a/b"), "a/b"),
        (OrderedDict(a=[np.int64(1), {Width.WIDE}], b=(1.5, None)), {"a": [1, {"wide"}], "b": (1.5, None)}),
        ({1: b"bytes", "device": torch.device("cpu"), "type": torch.half},) * 2,
    ],
)
def test_plain_values(value: Any, plain: Any, tmp_path: Path) -> None:
    found = plain_values(value, "it")
    assert (found, type(found)) == (plain, type(plain))
    torch.save(found, tmp_path / "file")
    assert torch.load(tmp_path / "file", weights_only=True) == plain


@pytest.mark.parametrize("value", [len, [torch.nn.ReLU()], {"a": {"b": object()}}, np.zeros(2)])
def test_other_values_are_refused_by_name(value: Any, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"^setting\.it\S* is .*a checkpoint cannot keep"):
        save_checkpoint({"hyper_parameters": {"it": value}}, tmp_path / "file.ckpt")
    assert not list(tmp_path.iterdir())


class Settings(MNISTClassifier):
    """Whose settings are no plain values."""

    def __init__(
        self,
        width: Width = Width.NARROW,
        place: Path = Path("here"),
        scale: float = np.float64(0.5),
        **settings: Any,
    ) -> None:
        super().__init__(**{"hidden_dim": {"narrow": 8, "wide": 9}[Width(width).value]} | settings)
        self.save_hyperparameters()


class DataSettings(MNISTDataModule):
    def __init__(self, order: Width = Width.NARROW, source: Path = Path("here"), **settings: Any) -> None:
        super().__init__(**settings)
        self.save_hyperparameters()


class OwnNetwork(MNISTClassifier):
    """Whose base saves settings that it has not itself."""

    def __init__(self, width: int = 8) -> None:
        super().__init__(hidden_dim=width)


class WithFunction(MNISTClassifier):
    def __init__(self, activation: Callable[..., Any] = torch.relu, **settings: Any) -> None:
        super().__init__(**settings)
        self.save_hyperparameters()


def test_settings_that_are_no_plain_values_are_kept_as_such(run_cli: RunCLI, tmp_path: Path) -> None:
    classes = (Settings, DataSettings)
    given = ["--model.width=WIDE", "--model.place=there", "--data.order=WIDE", "--trainer.max_epochs=1"]
    assert run_cli("fit", *given, classes=classes) == 0
    run = tmp_path / "lightning_logs/version_0"
    checkpoint = load(run)
    kept, data = checkpoint["hyper_parameters"], checkpoint["datamodule_hyper_parameters"]
    assert (kept["width"], kept["place"], kept["scale"], data["order"]) == ("wide", "there", 0.5, "wide")
    for command in ("validate", "test", "predict"):
        assert run_cli(command, "--ckpt_path=last", classes=classes) == 0, command
    assert run_cli("fit", "--ckpt_path=last", "--trainer.max_epochs=2", classes=classes) == 0
    assert run_cli("fit", f"--config={run}/config.yaml", classes=classes) == 0
    Image.new("L", (28, 28)).save(tmp_path / "digit.png")
    for arguments in (["read", "digit.png"], ["demo"], ["export", "--format=safetensors"]):
        assert run_cli(*arguments, "--ckpt_path=last", data=arguments[0] == "export") == 0, arguments


def test_settings_of_the_base_are_no_obstacle(run_cli: RunCLI) -> None:
    """As for Lightning's own `load_from_checkpoint`."""
    assert run_cli("fit", "--trainer.max_epochs=1", "--model.width=9", classes=(OwnNetwork,)) == 0
    assert run_cli("fit", "--trainer.max_epochs=2", "--ckpt_path=last", classes=(OwnNetwork,)) == 0


def test_a_setting_that_cannot_be_kept_is_refused_before_the_first_iteration(
    run_cli: RunCLI, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(WithFunction, "training_step", lambda *_: pytest.fail("it trains"))
    assert run_cli("fit", classes=(WithFunction,)) == 1
    err = capsys.readouterr().err
    assert "activation is <built-in method relu" in err
    assert err.count("\n") == 1


def test_weights_alone_can_be_tested_and_shown_but_not_resumed(
    run_cli: RunCLI, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    callback = ["--trainer.callbacks+=ModelCheckpoint", "--trainer.callbacks.save_weights_only=true"]
    callback += ["--trainer.callbacks.dirpath=.", "--trainer.callbacks.filename=weights"]
    assert run_cli("fit", "--trainer.max_epochs=1", "--model.hidden_dim=8", *callback) == 0
    Image.new("L", (28, 28)).save(tmp_path / "digit.png")
    for command in (
        ["validate"],
        ["test"],
        ["predict"],
        ["read", "digit.png"],
        ["demo"],
        ["export", "--format=safetensors"],
    ):
        data = command[0] in ("validate", "test", "predict", "export")
        assert run_cli(*command, "--ckpt_path=weights.ckpt", data=data) == 0, command
    capsys.readouterr()
    assert run_cli("fit", "--ckpt_path=weights.ckpt", "--trainer.max_epochs=2") == 2
    err = capsys.readouterr().err
    assert "weights.ckpt holds only weights" in err
    assert err.count("\n") == 1


def test_a_rename_that_is_refused_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rename, refused = Path.replace, iter(range(3))

    def refuse_at_first(source: Path, target: Path) -> Path:
        if next(refused, None) is not None:
            raise PermissionError(errno.EACCES, "a virus scanner has it open")
        return rename(source, target)

    monkeypatch.setattr(Path, "replace", refuse_at_first)
    (tmp_path / "a").touch()
    checkpoint_file.replace(tmp_path / "a", tmp_path / "b")
    assert [path.name for path in tmp_path.iterdir()] == ["b"]
    refused = iter(range(1000))
    monkeypatch.setattr(checkpoint_file, "RENAME_TIMEOUT", 0.3)
    with pytest.raises(PermissionError):
        checkpoint_file.replace(tmp_path / "b", tmp_path / "a")
