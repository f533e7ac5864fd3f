"""Checkpoints of strangers: nothing in them runs, and one line says what was expected and what was found."""

import contextlib
import math
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import RunCLI
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from PIL import Image
from test_loop import Foreign, fit, loader

from mnist_lightning.classifier import MNISTClassifier
from mnist_lightning.datamodule import MNISTDataModule
from mnist_lightning.distortions import Distortions
from mnist_lightning.engine import checkpoint_file
from mnist_lightning.engine.checkpoint_file import CheckpointError
from mnist_lightning.engine.checkpoint_io import CheckpointIO
from mnist_lightning.engine.guard import ExactResumption


def read(path: Path) -> dict[str, Any]:
    return checkpoint_file.load_checkpoint(path, MNISTClassifier)


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
            CheckpointIO(MNISTClassifier).load_checkpoint(name, weights_only=False)
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
        (lambda c: {**c, "datamodule_hyper_parameters": 7}, "not of this program: .*settings must be a dictionary"),
        (
            lambda c: {**c, "state_dict": {key: value * math.nan for key, value in c["state_dict"].items()}},
            "refused: expected weights that are finite numbers",
        ),
        (
            lambda c: {**c, "state_dict": {key: value.int() for key, value in c["state_dict"].items()}},
            "of another network",
        ),
        (
            lambda c: without(c, "pytorch-lightning_version"),
            "not of this program: expected .*pytorch-lightning_version",
        ),
    ],
)
def test_checkpoints_of_something_else_are_named(
    checkpoint: dict[str, Any], tmp_path: Path, change: Callable[[dict[str, Any]], Any], message: str
) -> None:
    torch.save(change(checkpoint), tmp_path / "other.ckpt")
    with pytest.raises(CheckpointError, match=f"other.ckpt is (of )?{message}"):
        read(tmp_path / "other.ckpt")


class Masked(Foreign):
    """Without hyperparameters, and with a buffer that is not finite."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mask", torch.full((3, 3), -torch.inf).triu(1))


def test_a_module_without_hyperparameters_and_with_an_infinite_buffer_is_read(tmp_path: Path) -> None:
    fit(Trainer, tmp_path / "run", Masked, loader, list, {"max_epochs": 1})
    path = tmp_path / "run/end.ckpt"
    checkpoint = checkpoint_file.load_checkpoint(path, Masked)
    assert checkpoint["hyper_parameters"] == {}
    assert checkpoint["state_dict"]["mask"].isinf().any()
    checkpoint["state_dict"]["net.0.bias"][1] = math.inf
    torch.save(checkpoint, path)
    with pytest.raises(CheckpointError, match="expected weights that are finite numbers"):
        checkpoint_file.load_checkpoint(path, Masked)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("trained") / "five_steps.ckpt"


@pytest.fixture
def five_steps(trained: Path, run_cli: RunCLI) -> Path:
    """A checkpoint of five steps of 7 hidden units, trained once for all tests."""
    if not trained.exists():
        assert run_cli("fit", "--trainer.max_steps=5", "--model.hidden_dim=7", "--test_after_fit=false") == 0
        Path("lightning_logs/version_0/checkpoints/last.ckpt").rename(trained)
        shutil.rmtree("lightning_logs")
    return trained


def listed(checkpoint: dict[str, Any], names: list[Any]) -> None:
    """Name the parameters of the optimizer's group."""
    checkpoint["optimizer_states"][0]["param_groups"][0]["params"] = names


def first(checkpoint: dict[str, Any], **state: Any) -> None:
    """Change the state of the optimizer's first parameter, (7, 784)."""
    checkpoint["optimizer_states"][0]["state"][0] |= state


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: listed(c, [3, 2, 1, 0]), "expected the optimizer's exp_avg"),
        (lambda c: listed(c, [1, 0, 2, 3]), "expected the optimizer's exp_avg"),
        (lambda c: listed(c, [0, 0, 0, 0]), "expected the optimizer's exp_avg"),
        (lambda c: listed(c, [0]), "not of this program"),
        (lambda c: listed(c, [0, 1, 2, 3, 0]), "not of this program"),
        (lambda c: listed(c, [[0], 1, 2, 3]), "not of this program"),
        (lambda c: first(c, exp_avg=torch.zeros(1)), "of shape (7, 784), found (1,)"),
        (lambda c: first(c, exp_avg_sq=torch.zeros(1).expand(7, 784)), "expected the optimizer's exp_avg_sq"),
        (lambda c: first(c, exp_avg=torch.zeros(7, 784, dtype=torch.int8)), "expected the optimizer's exp_avg"),
        (lambda c: first(c, step=torch.zeros(0)), "expected the optimizer's step of shape ()"),
        (lambda c: first(c, max_exp_avg_sq=torch.zeros(0)), "expected the optimizer's max_exp_avg_sq"),
        (lambda c: c.update(optimizer_states=[{}]), "param_groups"),
        (lambda c: c.update(optimizer_states=[]), "not of this program"),
        (lambda c: c["optimizer_states"].append(c["optimizer_states"][0]), "not of this program"),
    ],
)
def test_an_optimizers_state_of_another_size_is_not_resumed(
    run_cli: RunCLI,
    five_steps: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    change: Callable[[dict[str, Any]], Any],
    message: str,
) -> None:
    """A fused kernel would write outside of it. The weights are whole, and load for all other commands."""
    settings, checkpoint = ["--model.hidden_dim=7", "--test_after_fit=false"], read(five_steps)
    change(checkpoint)
    torch.save(checkpoint, tmp_path / "changed.ckpt")
    capsys.readouterr()
    assert run_cli("fit", "--ckpt_path=changed.ckpt", "--trainer.max_steps=8", *settings) in (1, 2)
    err = capsys.readouterr().err
    assert err.startswith("mnist_lightning: ")
    assert "changed.ckpt is not of this program" in err
    assert message in err
    assert err.count("\n") == 1
    assert run_cli("test", "--ckpt_path=changed.ckpt") == 0


def test_the_same_checkpoint_saved_again_is_resumed(run_cli: RunCLI, five_steps: Path, tmp_path: Path) -> None:
    torch.save(read(five_steps), tmp_path / "same.ckpt")
    settings = ["--trainer.max_steps=8", "--model.hidden_dim=7", "--test_after_fit=false"]
    assert run_cli("fit", "--ckpt_path=same.ckpt", *settings) == 0


def test_only_checkpoints_beside_the_saved_ones_are_ever_removed(tmp_path: Path) -> None:
    plugin = CheckpointIO(MNISTClassifier)
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
    trainer = Trainer(
        accelerator="cpu", max_epochs=3, logger=False, enable_checkpointing=False, callbacks=[ExactResumption()]
    )
    with pytest.raises(MisconfigurationException, match="is for none, that of the checkpoint for 22 iterations"):
        trainer.fit(MNISTClassifier(), datamodule=data, ckpt_path=checkpoint)


# Checkpoints of the versions before 0.2, which took several minibatches in each call of `training_step`.


def of_old(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """What the old program would have saved where this one saved a checkpoint between two epochs."""
    steps, epochs = checkpoint["global_step"], checkpoint["epoch"] + 1 if checkpoint["global_step"] else 0
    calls = dict.fromkeys(("ready", "completed", "started", "processed"), epochs)  # one call is an epoch here
    counts, none = {"ready": steps, "completed": steps}, {"ready": 0, "completed": 0}
    four = dict.fromkeys(calls, 0)
    optimizer = {
        "step": {"total": none, "current": none},
        "zero_grad": {"total": {**none, "started": 0}, "current": {**none, "started": 0}},
    }
    data = checkpoint["datamodule_hyper_parameters"]
    settings = {"steps_per_execution": 50} | data
    fit_loop = checkpoint["loops"]["fit_loop"] | {
        "state_dict": {"combined_loader": [{"done": 0, "steps_per_execution": 50}]},
        "epoch_loop.state_dict": {"_batches_that_stepped": steps},
        "epoch_loop.batch_progress": {
            "total": calls,
            "current": dict.fromkeys(calls, 1) if epochs else four,
            "is_last_batch": epochs > 0,
        },
        "epoch_loop.scheduler_progress": {"total": none, "current": none},
        "epoch_loop.automatic_optimization.optim_progress": {"optimizer": optimizer},
        "epoch_loop.manual_optimization.state_dict": {},
        "epoch_loop.manual_optimization.optim_step_progress": {"total": counts, "current": counts},
    }
    report = {name: checkpoint["callbacks"]["Report"][name] for name in ("train", "val", "train_seconds")}
    return {
        **{name: checkpoint[name] for name in ("epoch", "global_step", "pytorch-lightning_version", "state_dict")},
        "loops": checkpoint["loops"] | {"fit_loop": fit_loop},
        "callbacks": {"Report": report, "BestAndLast": checkpoint["callbacks"]["BestAndLast"]},
        **{name: checkpoint[name] for name in ("optimizer_states", "lr_schedulers", "hyper_parameters")},
        "hparams_name": "kwargs",
        "datamodule_hparams_name": None,
        "datamodule_hyper_parameters": settings,
        "MNISTDataModule": {**data, "iterations_per_epoch": 11},
        "rng_states": torch.get_rng_state()[None],
    }


@pytest.fixture
def old_run(run_cli: RunCLI, tmp_path: Path) -> Path:
    """The directory of a run of the old program, whose `config.yaml` has settings that are gone."""
    assert run_cli("fit", "--trainer.max_epochs=2", "--model.hidden_dim=7", "--test_after_fit=false") == 0
    run = tmp_path / "lightning_logs/version_0"
    for name in ("best", "last"):
        path = run / f"checkpoints/{name}.ckpt"
        torch.save(of_old(read(path)), path)
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["model"]["fused_step"] = True
    config["data"] |= {"steps_per_execution": 50, "images": None}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    return run


def test_a_new_checkpoint_with_a_setting_of_old_ones_is_resumed(
    run_cli: RunCLI, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As a data module of the user's may have one of this name, and a module manual optimization."""
    assert run_cli("fit", "--trainer.max_epochs=1", "--model.hidden_dim=7", "--test_after_fit=false") == 0
    path = tmp_path / "lightning_logs/version_0/checkpoints/last.ckpt"
    checkpoint = read(path)
    checkpoint["datamodule_hyper_parameters"]["steps_per_execution"] = 5
    fit_loop = checkpoint["loops"]["fit_loop"]
    fit_loop["epoch_loop.manual_optimization.optim_step_progress"]["total"]["completed"] = 3
    torch.save(checkpoint, path)
    assert run_cli("fit", "--ckpt_path=last", "--trainer.max_epochs=2", "--test_after_fit=false") == 0
    assert "after iteration 11" in capsys.readouterr().out


@pytest.mark.parametrize("by_name", [True, False])
def test_an_old_checkpoints_weights_load_for_all_commands_but_fit(
    run_cli: RunCLI, old_run: Path, tmp_path: Path, root: Path, capsys: pytest.CaptureFixture[str], by_name: bool
) -> None:
    if by_name:
        best, last = "best", "last"
    else:
        best, last = (str((old_run / f"checkpoints/{name}.ckpt").rename(f"{name}.ckpt")) for name in ("best", "last"))
    weights = read(tmp_path / last if not by_name else old_run / "checkpoints/last.ckpt")["state_dict"]
    files = {path: path.read_bytes() for path in old_run.rglob("*") if path.is_file()}

    capsys.readouterr()
    for more in ([], ["--trainer.max_epochs=5"], ["--model.hidden_dim=7"], ["--checkpoint_every=3"]):
        assert run_cli("fit", f"--ckpt_path={last}", *more) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert err.startswith("mnist_lightning: ckpt_path: ")
        assert "older version" in err
        assert err.count("\n") == 1
    assert {path: path.read_bytes() for path in old_run.rglob("*") if path.is_file()} == files
    assert [path.name for path in (tmp_path / "lightning_logs").iterdir()] == ["version_0"]

    for command in ("validate", "test", "predict"):
        assert run_cli(command, f"--ckpt_path={last}") == 0
        out, err = capsys.readouterr()
        assert "Weights of iteration 22, trained on" in out
        assert err == ""
    picture = tmp_path / "digit.png"
    Image.new("L", (28, 28)).save(picture)
    assert run_cli("read", str(picture), f"--ckpt_path={best}", data=False) == 0
    assert run_cli("demo", f"--ckpt_path={last}", "--no-open", data=False) == 0
    assert run_cli("export", "--format=torchscript", f"--ckpt_path={last}", "--output=old.pt") == 0
    classifier = MNISTClassifier(hidden_dim=7)
    classifier.load_state_dict(weights)
    images = torch.rand(5, 784)
    torch.testing.assert_close(torch.jit.load("old.pt")(images), classifier.eval()(images))


def test_an_old_config_is_refused_by_the_setting_that_is_gone(
    run_cli: RunCLI, old_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As the old program told to resume a run that a signal had ended."""
    capsys.readouterr()
    for resume in ([], ["--ckpt_path", str(old_run / "checkpoints/last.ckpt")]):
        assert run_cli("fit", "--config", str(old_run / "config.yaml"), *resume) == 2
        err = capsys.readouterr().err
        assert err.count("\n") == 1
        assert "fused_step" in err or "steps_per_execution" in err


def test_an_old_checkpoint_from_before_the_first_iteration_is_refused_too(
    run_cli: RunCLI, old_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The old program saved one as training began."""
    path = old_run / "checkpoints/last.ckpt"
    checkpoint = read(path)
    checkpoint |= {"global_step": 0, "epoch": 0}
    checkpoint["optimizer_states"][0]["state"] = {}
    checkpoint["callbacks"] |= {"Report": {"train": [], "val": [], "train_seconds": 0.0, "dataset": "synthetic"}}
    fit_loop = checkpoint["loops"]["fit_loop"]
    for part in ("total", "current"):
        for progress in ("epoch_progress", "epoch_loop.val_loop.batch_progress"):
            fit_loop[progress][part] = dict.fromkeys(fit_loop[progress][part], 0)
        fit_loop["epoch_progress"][part]["ready"] = 1
    torch.save(of_old(checkpoint), path)
    torch.save(of_old(checkpoint), "elsewhere.ckpt")
    capsys.readouterr()
    for name in ("elsewhere.ckpt", "last"):
        assert run_cli("fit", f"--ckpt_path={name}") == 2
        err = capsys.readouterr().err
        assert "older version" in err
        assert err.count("\n") == 1
    assert run_cli("test", "--ckpt_path=last") == 0


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c["loops"]["fit_loop"].update({"epoch_loop.manual_optimization.optim_step_progress": 3}),
        lambda c: c["loops"]["fit_loop"]["state_dict"].update(combined_loader=[{"done": 5}]),
        lambda c: c["loops"]["fit_loop"]["state_dict"].update(random_states=[None, torch.zeros(1, 3)]),
        lambda c: c["loops"]["fit_loop"]["state_dict"].update(random_states=[None, torch.zeros(1, 9).byte()]),
        lambda c: c["loops"]["fit_loop"]["state_dict"].update(random_states=[None]),
        lambda c: c["callbacks"]["Report"].pop("train"),
        lambda c: c.update(lr_schedulers=[{}]),
        lambda c: c.update(lr_schedulers=[{"total_steps": "\x1b[2J"}]),
        lambda c: c.update(iterations_per_epoch=12),
        lambda c: c["datamodule_hyper_parameters"].update(dataset="evil"),
        lambda c: c["datamodule_hyper_parameters"].update(dataset=["mnist"]),
    ],
)
def test_a_checkpoint_that_no_version_saved_ends_in_one_line(
    run_cli: RunCLI,
    five_steps: Path,
    root: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    change: Callable[[dict[str, Any]], Any],
) -> None:
    settings, checkpoint = ["--model.hidden_dim=7", "--test_after_fit=false"], read(five_steps)
    change(checkpoint)
    torch.save(checkpoint, tmp_path / "changed.ckpt")
    Image.new("L", (28, 28)).save(tmp_path / "digit.png")
    capsys.readouterr()
    auto = ["--data.dataset=auto", f"--data.root={root}", "--data.val_size=200"]  # the checkpoint's dataset
    codes = [
        run_cli("fit", "--ckpt_path=changed.ckpt", "--trainer.max_epochs=2", *auto, *settings, data=False),
        run_cli("test", "--ckpt_path=changed.ckpt"),
        run_cli("read", "digit.png", "--ckpt_path=changed.ckpt", data=False),
    ]
    out, err = capsys.readouterr()
    lines = [line for line in err.splitlines() if line.startswith("mnist_lightning: ")]
    # Which data a checkpoint names only chooses what `auto` is; the state of the data module decides.
    names_other_data = checkpoint["datamodule_hyper_parameters"].get("dataset") in ("evil", ["mnist"])
    assert codes[0] in ((0, 1, 2) if names_other_data else (1, 2))
    assert len(lines) == sum(code > 0 for code in codes)
    assert "Traceback" not in err
    assert "\x1b[2J" not in out + err
