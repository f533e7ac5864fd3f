"""What `--ckpt_path` means, and which settings come with a checkpoint."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import SHORT, RunCLI, load, newest_run

from mnist_lightning import MNISTDataModule

# Settings of the data


def test_the_data_are_the_checkpoints_and_what_is_given_wins(
    run_cli: RunCLI, root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes, val_dataloader = [], MNISTDataModule.val_dataloader

    def note(data: MNISTDataModule) -> Any:
        sizes.append(len(data.val[1]))
        return val_dataloader(data)

    monkeypatch.setattr(MNISTDataModule, "val_dataloader", note)
    data = ["--data.dataset=synthetic", f"--data.root={root}"]
    assert run_cli("fit", *SHORT, *data, "--data.val_size=500", data=False) == 0
    Path("mine.yaml").write_text("data: {val_size: 400}\n")
    for given, size in {"--data.batch_size=7": 500, "--data.val_size=300": 300, "--config=mine.yaml": 400}.items():
        sizes.clear()
        for command in ("validate", "test", "predict"):
            assert run_cli(command, "--ckpt_path=best", f"--data.root={root}", given, data=False) == 0
        assert sizes == [size]
        config = yaml.safe_load((newest_run(Path()) / "config.yaml").read_text())["data"]
        assert (config["dataset"], config["val_size"], config["root"]) == ("synthetic", size, str(root))
    assert "Reading synthetic digits" in capsys.readouterr().out  # not what `auto` would find


def test_own_files_need_their_place(
    run_cli: RunCLI, root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A checkpoint keeps no path."""
    shutil.copytree(root / "synthetic/raw", tmp_path / "mine")
    data = ["--data.dataset=files", "--data.root=mine", "--data.val_size=500"]
    assert run_cli("fit", *SHORT, *data, data=False) == 0
    for given in (["--data.root=mine"], data):
        assert run_cli("test", "--ckpt_path=best", *given, data=False) == 0
        assert "Reading files in mine" in capsys.readouterr().out
    assert run_cli("fit", "--ckpt_path=last", "--trainer.max_epochs=2", data=False) == 0  # as its config.yaml says
    capsys.readouterr()
    assert run_cli("test", "--ckpt_path=best", data=False) != 0
    err = capsys.readouterr().err
    assert "data/train-images-idx3-ubyte is missing" in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("--model.learning_rate=0.5", "model.learning_rate is 0.5, but the checkpoint was trained with 0.001; leave"),
        ("--model.hidden_dim=9", "model.hidden_dim is 9, but the checkpoint was trained with 17"),
        ("--data.batch_size=50", "data.batch_size is 50, but the checkpoint was trained with 100"),
        ("--data.val_size=300", "data.val_size is 300, but the checkpoint was trained with 200"),
        ("--data.distortions=true", "data.distortions is {"),
        ("--trainer.limit_train_batches=5", "iterations in an epoch is 5, but the checkpoint was trained with 11"),
        ("--seed_everything=3", "data.seed is 3, but the checkpoint was trained with 0"),
    ],
)
def test_other_settings_are_refused_and_leave_the_run_as_it_was(
    run_cli: RunCLI, short_run: Path, capsys: pytest.CaptureFixture[str], setting: str, message: str
) -> None:
    before = {path: path.read_bytes() for path in short_run.rglob("*") if path.is_file()}
    assert run_cli("fit", "--ckpt_path=last", "--trainer.max_epochs=2", setting) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1
    left = {path: path.read_bytes() for path in short_run.rglob("*") if path.is_file()}
    assert {path for path in left if "tfevents" not in path.name} <= before.keys()
    assert {path: left[path] for path in before} == before


# Auto


def test_auto_leaves_a_finished_run_alone(run_cli: RunCLI, capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(2):
        assert run_cli("fit", *SHORT, "--ckpt_path=auto") == 0
        line = "ckpt_path auto: starts, as no run with these settings is unfinished"
        assert capsys.readouterr().out.splitlines()[0] == line
        assert newest_run(Path()).name == f"version_{number}"
        assert not (newest_run(Path()) / "unfinished").exists()


@pytest.mark.parametrize(
    ("setting", "is_resumed"),
    [
        ("--trainer.max_epochs=2", True),
        ("--trainer.accelerator=auto", True),
        ("--threads=2", True),
        ("--model.hidden_dim=9", False),
        ("--data.batch_size=99", False),
        ("--seed_everything=1", False),
        ("--trainer.default_root_dir=other", False),
    ],
)
def test_auto_resumes_the_run_with_the_same_model_data_and_seed(
    run_cli: RunCLI, short_run: Path, capsys: pytest.CaptureFixture[str], setting: str, is_resumed: bool
) -> None:
    (short_run / "unfinished").touch()  # as if power had failed before its test
    assert run_cli("fit", *SHORT, "--ckpt_path=auto", setting) == 0
    line = capsys.readouterr().out.splitlines()[0]
    assert (line == f"ckpt_path auto: resumes {short_run}/checkpoints/last.ckpt") is is_resumed
    assert (short_run / "unfinished").exists() is not is_resumed
    assert load(short_run)["global_step"] == (22 if "max_epochs" in setting else 11)
    assert short_run.with_name("version_1").exists() is (not is_resumed and "root_dir" not in setting)
