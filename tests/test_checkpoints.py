"""Checkpoints of strangers: nothing in them runs, and one line says what was expected and what was found."""

import contextlib
import math
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import RunCLI
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer

from mnist_lightning.checkpoints import CheckpointError, CheckpointIO, read
from mnist_lightning.classifier import MNISTClassifier
from mnist_lightning.datamodule import MNISTDataModule
from mnist_lightning.distortions import Distortions


class MakesAFile:
    """Unpickling it would make a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch {self.path}",)


@pytest.fixture
def checkpoint(root: Path, tmp_path: Path) -> dict[str, Any]:
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    trainer.fit(MNISTClassifier(hidden_dim=7), datamodule=MNISTDataModule("synthetic", str(root), val_size=200))
    trainer.save_checkpoint(tmp_path / "good.ckpt")
    return read(tmp_path / "good.ckpt")


def test_checkpoints_that_hold_code_are_refused_and_nothing_runs(
    checkpoint: dict[str, Any],
    run_cli: RunCLI,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    made = tmp_path / "made"
    torch.save({**checkpoint, "more": MakesAFile(made)}, "zipped.ckpt")
    Path("bare.ckpt").write_bytes(pickle.dumps(MakesAFile(made)))
    for name in ("zipped.ckpt", "bare.ckpt"):
        for command in ("fit", "test"):
            capsys.readouterr()
            assert run_cli(command, f"--ckpt_path={name}") == 2
            err = capsys.readouterr().err
            assert f"{name} is " in err
            assert name == "bare.ckpt" or "refused: expected tensors and plain values only, found posix.system" in err
            assert err.count("\n") == 1
        with pytest.raises(CheckpointError, match=name):
            CheckpointIO().load_checkpoint(name, weights_only=False)
    assert not made.exists()
    assert not (tmp_path / "lightning_logs").exists()
    torch.load("zipped.ckpt", weights_only=False)
    assert made.exists(), "the file would not have been made anyhow"


def without(checkpoint: dict[str, Any], part: str) -> dict[str, Any]:
    return {name: value for name, value in checkpoint.items() if name != part}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: {"model": c["state_dict"]}, r"not of this program: expected state_dict, .*, found \['model'\]"),
        (lambda c: without(c, "loops"), "not of this program: expected .*loops.*, found"),
        (lambda c: [1, 2], "not of this program: expected .*, found list"),
        (lambda c: {**c, "hyper_parameters": {"depth": 3}}, "not of this program: .*depth"),
        (lambda c: {**c, "hyper_parameters": {"learning_rate": -1.0}}, "not of this program: .*learning_rate"),
        (
            lambda c: {**c, "hyper_parameters": {"hidden_dim": 9}},
            r"another network: expected .*mlp.hidden.weight \(9, 784\).*, found .*mlp.hidden.weight \(7, 784\)",
        ),
        (lambda c: {**c, "state_dict": {"net.0.weight": torch.ones(2)}}, "another network: .*net.0.weight"),
        (lambda c: {**c, "state_dict": [1]}, "not of this program"),
        (lambda c: {**c, "loops": {}}, "not of this program: KeyError: 'fit_loop'"),
        (lambda c: {**c, "global_step": "many"}, "not of this program: .*whole numbers"),
        (lambda c: {**c, "datamodule_hyper_parameters": {}}, "not of this program: .*dataset"),
        (lambda c: {**c, "optimizer_states": [{}]}, "not of this program: .*param_groups"),
        (lambda c: {**c, "lr_schedulers": [{}]}, "not of this program: .*total_steps"),
        (lambda c: {**c, "lr_schedulers": [{"total_steps": "x"}]}, "not of this program: .*whole number"),
        (
            lambda c: {**c, "state_dict": {key: value * math.nan for key, value in c["state_dict"].items()}},
            "refused: expected weights that are finite numbers",
        ),
        (
            lambda c: {**c, "state_dict": {key: value.int() for key, value in c["state_dict"].items()}},
            "of another network",
        ),
        (lambda c: {**c, "datamodule_hyper_parameters": {"dataset": "evil"}}, "not of this program: KeyError: 'evil'"),
        (
            lambda c: without(c, "pytorch-lightning_version"),
            "not of this program: expected .*pytorch-lightning_version",
        ),
        (
            lambda c: {
                **c,
                "optimizer_states": [{"param_groups": [{"params": [0]}], "state": {0: {"exp_avg": torch.zeros(1)}}}],
            },
            r"not of this program: .*exp_avg of shape \(7, 784\), found \(1,\)",
        ),
    ],
)
def test_checkpoints_of_something_else_are_named(
    checkpoint: dict[str, Any], tmp_path: Path, change: Callable[[dict[str, Any]], Any], message: str
) -> None:
    torch.save(change(checkpoint), tmp_path / "other.ckpt")
    with pytest.raises(CheckpointError, match=f"other.ckpt is (of )?{message}"):
        read(tmp_path / "other.ckpt")


def test_only_checkpoints_beside_the_saved_ones_are_ever_removed(tmp_path: Path) -> None:
    plugin = CheckpointIO()
    plugin.save_checkpoint({}, tmp_path / "run" / "one.ckpt")
    for name in ("run/keep.txt", "victim/thesis.ckpt", "run/folder.ckpt/thesis.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("mine")
    for named in ("run/keep.txt", "run/../victim", "run/../victim/thesis.ckpt", "run/folder.ckpt"):
        plugin.remove_checkpoint(str(tmp_path / named))
        plugin.remove_checkpoint(f"local://{tmp_path / named}")
    assert len([path for path in tmp_path.rglob("*") if path.is_file()]) == 4
    plugin.remove_checkpoint(str(tmp_path / "run/one.ckpt"))
    assert not (tmp_path / "run/one.ckpt").exists()


@pytest.mark.parametrize("size", [0, 1, 1000, 0.5, 0.99])
def test_truncated_checkpoints_are_damaged(checkpoint: dict[str, Any], tmp_path: Path, size: float) -> None:
    content = (tmp_path / "good.ckpt").read_bytes()
    content = content[: int(size * len(content)) if isinstance(size, float) else size]
    (tmp_path / "part.ckpt").write_bytes(content)
    with pytest.raises(CheckpointError, match=f"part.ckpt is damaged.* found {len(content):,} bytes"):
        read(tmp_path / "part.ckpt")


def test_a_flipped_bit_never_changes_what_is_read(checkpoint: dict[str, Any], tmp_path: Path) -> None:
    content = (tmp_path / "good.ckpt").read_bytes()
    damaged = 0
    for at in range(0, len(content), 97):
        (tmp_path / "flipped.ckpt").write_bytes(content[:at] + bytes([content[at] ^ 4]) + content[at + 1 :])
        with contextlib.suppress(CheckpointError):
            flipped = read(tmp_path / "flipped.ckpt")  # the bit was in padding
            assert all(torch.equal(flipped["state_dict"][key], t) for key, t in checkpoint["state_dict"].items())
            damaged -= 1
        damaged += 1
    assert damaged > 500


def test_a_checkpoint_older_than_a_setting_had_its_default(run_cli: RunCLI, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_cli("fit", "--trainer.max_epochs=1", "--test_after_fit=false") == 0
    checkpoint = read(Path("lightning_logs/version_0/checkpoints/last.ckpt"))
    for name in ("dropout", "label_smoothing", "weight_decay", "learning_rate_schedule"):
        del checkpoint["hyper_parameters"][name]
    for name in ("datamodule_hyper_parameters", "MNISTDataModule"):
        del checkpoint[name]["distortions"]
    torch.save(checkpoint, "old.ckpt")
    capsys.readouterr()
    assert run_cli("fit", "--ckpt_path=old.ckpt", "--model.weight_decay=0.1") == 2
    assert "model.weight_decay is 0.1, but the checkpoint was trained with 0" in capsys.readouterr().err
    assert run_cli("fit", "--ckpt_path=old.ckpt", "--data.distortions=true", "--trainer.max_epochs=2") == 2
    assert run_cli("fit", "--ckpt_path=old.ckpt", "--trainer.max_epochs=2") == 0


def test_a_recipes_checkpoint_loads_without_a_trainer_and_is_no_other_recipes(run_cli: RunCLI, root: Path) -> None:
    recipe = ["--model.learning_rate_schedule=one_cycle", "--data.distortions.shift=1"]
    assert run_cli("fit", *recipe, "--trainer.max_epochs=2", "--test_after_fit=false") == 0
    checkpoint = "lightning_logs/version_0/checkpoints/last.ckpt"
    assert MNISTClassifier.load_from_checkpoint(checkpoint).learning_rate_schedule == "one_cycle"
    data = MNISTDataModule.load_from_checkpoint(checkpoint, root=str(root))
    assert data.distortions == Distortions(shift=1)
    trainer = Trainer(accelerator="cpu", max_epochs=3, logger=False, enable_checkpointing=False)
    with pytest.raises(MisconfigurationException, match="is for none, that of the checkpoint for 22 iterations"):
        trainer.fit(MNISTClassifier(), datamodule=data, ckpt_path=checkpoint)
