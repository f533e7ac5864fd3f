"""Wrong commands, configs and files: one line on stderr, the right exit code, and nothing left behind."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import RunCLI

README = Path(__file__).parent.parent / "README.md"


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["fit", "--data.batch_sizes=3"], "data.batch_sizes"),
        (["fit", "--data.batch_size=many"], "data.batch_size"),
        (["fit", "--data.batch_size=0"], "batch_size"),
        (["fit", "--data.steps_per_execution=0"], "steps_per_execution"),
        (["fit", "--data.val_size=60000"], "val_size"),
        (["fit", "--data.val_size=-1"], "val_size"),
        (["fit", "--data.dataset=cifar"], "data.dataset"),
        (["fit", "--model.hidden_dim=0"], "hidden_dim"),
        (["fit", "--model.learning_rate=nan"], "learning_rate"),
        (["fit", "--seed_everything=-1"], "seed_everything"),
        (["fit", "--seed_everything=true"], "seed"),
        (["fit", "--test_weights=first"], "test_weights"),
        (["fit", "--config=nowhere.yaml"], "nowhere.yaml"),
        (["fit", "--trainer.gradient_clip_val=0.5"], "trainer.gradient_clip_val"),
        (["fit", "--trainer.accumulate_grad_batches=2"], "trainer.accumulate_grad_batches"),
        (["fit", "--trainer.accelerator=abacus"], "abacus"),
        (["fit", "--ckpt_path=last"], "last.ckpt"),
        (["test", "--ckpt_path=best"], "best.ckpt"),
        (["test", "--ckpt_path=nowhere.ckpt"], "nowhere.ckpt"),
        (["test", f"--ckpt_path={README}"], "README.md"),
        (["test"], "ckpt_path"),
        (["fit", f"--config={README.parent / 'LICENSE'}"], "config"),
        (["fit", f"--config={README.parent / '.github/assets/misclassified.png'}"], "config"),
        (["fit", "--trainer.max_epochs=two"], "trainer.max_epochs"),
        (["fit", "--trainer.devices=2"], "trainer.devices"),
        (["learn"], "learn"),
        (["data", "--data.val_size=0"], "val_size"),
    ],
)
def test_wrong_commands_are_refused(
    run_cli: RunCLI, tmp_path: Path, capfd: pytest.CaptureFixture[str], arguments: list[str], named: str
) -> None:
    assert run_cli(arguments[0], *arguments[1:], data=arguments[0] != "learn") == 2
    err = capfd.readouterr().err
    assert err.startswith("mnist_lightning: ")
    assert err.count("\n") == 1
    assert named in err
    assert not list(tmp_path.iterdir())


def test_damaged_data_fails_before_there_is_a_run(
    run_cli: RunCLI, fake_mnist: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = fake_mnist / "MNIST/raw/train-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:-1])
    assert run_cli("fit", f"--data.root={fake_mnist}", "--data.dataset=auto", data=False) == 1
    err = capfd.readouterr().err
    assert err.startswith("mnist_lightning: ")
    assert err.count("\n") == 1
    assert str(path) in err
    assert not (fake_mnist / "lightning_logs").exists()


def test_directories_of_other_names_are_no_runs(
    run_cli: RunCLI, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    checkpoint = tmp_path / "lightning_logs/version_0_backup/checkpoints/best.ckpt"
    checkpoint.parent.mkdir(parents=True)
    checkpoint.write_bytes(b"")
    assert run_cli("test", "--ckpt_path=best") == 2
    assert "no best.ckpt" in capfd.readouterr().err


def test_the_debug_variable_brings_the_traceback(run_cli: RunCLI, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MNIST_LIGHTNING_DEBUG", "1")
    with pytest.raises(Exception, match="nowhere"):
        run_cli("test", "--ckpt_path=nowhere.ckpt")


def test_runs_as_a_module_from_a_fresh_process(root: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mnist_lightning", "fit", "--trainer.max_epochs=1", "--data.val_size=200"]
    done = subprocess.run(
        [*command, "--data.dataset=synthetic", f"--data.root={root}"], cwd=tmp_path, capture_output=True, text=True
    )
    # The manifest says which files are whole, so this process takes the small ones for the real stand-in.
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert done.stdout.splitlines()[-2] == "Run: lightning_logs/version_0"


@pytest.mark.parametrize(
    "command", sorted(set(re.findall(r"python -m mnist_lightning (\w+[^`\n]*)", README.read_text())))
)
def test_the_readmes_commands_are_valid(run_cli: RunCLI, monkeypatch: pytest.MonkeyPatch, command: str) -> None:
    name, *arguments = command.split("#")[0].split()
    # Settings only: there is no GPU to train on and no run whose checkpoint could be named.
    arguments = [argument for argument in arguments if argument not in ("best", "last", "--ckpt_path")]
    monkeypatch.chdir(README.parent)
    assert run_cli(name, *arguments, "--print_config", data=False) == 0


def test_importing_the_package_undoes_lightnings_costly_default() -> None:
    import mnist_lightning  # noqa: F401

    assert os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] == "0"
