"""Wrong commands, configs and files: one line on stderr, the right exit code, and nothing left behind."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import RunCLI

README = Path(__file__).parent.parent / "README.md"
ASSET = README.parent / ".github/assets/misclassified.png"


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["fit", "--data.batch_sizes=3"], "no setting data.batch_sizes; did you mean data.batch_size?"),
        (["fit", "--data.batch_size=many"], "data.batch_size"),
        (["fit", "--data.batch_size=0"], "batch_size"),
        (["fit", "--data.steps_per_execution=50"], "there is no setting data.steps_per_execution"),
        (["fit", "--data.val_size=60000"], "val_size"),
        (["fit", "--data.val_size=-1"], "val_size"),
        (["fit", "--data.dataset=cifar"], "data.dataset"),
        (["fit", "--model.hidden_dim=0"], "hidden_dim"),
        (["fit", "--model.learning_rate=nan"], "learning_rate"),
        (["fit", "--seed_everything=-1"], "seed_everything"),
        (["fit", "--seed_everything=true"], "seed"),
        (["fit", "--test_weights=first"], "test_weights"),
        (["fit", "--config=nowhere.yaml"], "nowhere.yaml"),
        (["fit", "--trainer.gradient_clip_val=-1"], "trainer.gradient_clip_val must be at least 0, not -1"),
        (["fit", "--trainer.gradient_clip_algorithm=size"], "gradient_clip_algorithm"),
        (["fit", "--trainer.accumulate_grad_batches=0"], "trainer.accumulate_grad_batches must be at least 1, not 0"),
        (["fit", "--trainer.fast=maybe"], "trainer.fast"),
        (["fit", "--trainer.accelerator=abacus"], "abacus"),
        (["fit", "--ckpt_path=last"], "last.ckpt"),
        (["test", "--ckpt_path=best"], "best.ckpt"),
        (["test", "--ckpt_path=nowhere.ckpt"], "nowhere.ckpt"),
        (["test", f"--ckpt_path={README}"], "README.md"),
        (["test"], "ckpt_path"),
        (["fit", f"--config={README.parent / 'LICENSE'}"], "LICENSE"),
        (["fit", f"--config={ASSET}"], ASSET.name),
        (["fit", "--trainer.max_epochs=two"], "trainer.max_epochs"),
        (["fit", "--trainer.max_epochs=0"], "trainer.max_epochs must be at least 1, or -1 for no limit, not 0"),
        (["fit", "--trainer.max_epochs=-2"], "trainer.max_epochs"),
        (["fit", "--trainer.max_steps=0"], "trainer.max_steps"),
        (["fit", "--trainer.log_every_n_steps=-1"], "trainer.log_every_n_steps must be at least 0, not -1"),
        (["fit", "--trainer.check_val_every_n_epoch=0"], "trainer.check_val_every_n_epoch"),
        (["fit", "--trainer.num_sanity_val_steps=-2"], "trainer.num_sanity_val_steps"),
        (["fit", "--trainer.val_check_interval=0"], "val_check_interval must be above 0"),
        (["fit", "--trainer.val_check_interval=12"], "val_check_interval"),
        (["fit", "--trainer.limit_train_batches=0.01"], "limit_train_batches"),
        (["fit", "--trainer.limit_test_batches=0.1"], "limit_test_batches"),
        (["fit", "--trainer.limit_train_batches=-1"], "limit_train_batches"),
        (["fit", "--checkpoint_every=-1"], "checkpoint_every"),
        (["fit", "--trainer.max_epoch=3"], "no setting trainer.max_epoch; did you mean trainer.max_epochs?"),
        (["fit", "--modle.hidden_dim=3"], "did you mean model.hidden_dim?"),
        (["data", "--data.rot=x"], "did you mean data.root?"),
        (["fit", "--model.learning_rate=inf"], "learning_rate"),
        (["fit", "--model.learning_rate=-0.1"], "learning_rate"),
        (["fit", "--model.init_std=nan"], "init_std"),
        (["fit", "--model.dropout=1"], "dropout must be from 0 up to 1, not 1"),
        (["fit", "--model.learning_rate_schedule=cosine"], "learning_rate_schedule"),
        (["fit", "--data.distortions=maybe"], 'key "data.distortions": This value is not allowed: maybe'),
        (["fit", "--data.distortions.rotatoin=5"], "no setting rotatoin; did you mean rotation?"),
        (["fit", "--data.distortions.rotation=abc"], 'key "rotation": Expected a float. Got value: abc'),
        (["fit", "--data.distortions.scale=2"], ": distortions.scale must be below 1, not 2"),
        (["fit", "--trainer.devices=3"], "100 does not divide by 3; give 99 or 102"),
        (["fit", "--trainer.devices=3", "--data.batch_size=2"], "2 does not divide by 3; give 3"),
        (["fit", "--trainer.devices=2", "--trainer.strategy=ddp_fork"], "trainer.strategy: for several processes"),
        (["fit", "--trainer.strategy=fsdp", "--trainer.devices=2"], "fsdp"),
        (["fti"], "there is no command fti; did you mean fit?"),
        (["exprot"], "there is no command exprot; did you mean export?"),
        (["learn"], "there is no command learn; give fit, validate, test, predict, data, read, demo or export"),
        ([""], "a command is missing; give fit, validate, test, predict, data, read, demo or export"),
        (["data", "--data.val_size=0"], "data.val_size must be 1 to"),
        (["raed"], "there is no command raed; did you mean read?"),
        (["read"], "read: which pictures? Give files, folders or globs"),
        (["read", "nowhere.png"], "there is no picture nowhere.png"),
        (["read", str(ASSET)], "ckpt_path: there is no best.ckpt of any run"),
        (["read", str(ASSET), "--ckpt_path=nowhere.ckpt"], "ckpt_path: there is no checkpoint nowhere.ckpt"),
        (["read", str(ASSET), f"--ckpt_path={README}"], "README.md"),
        (["read", str(ASSET), f"--figure={ASSET}"], "is one of the pictures to read"),
        (["read", "--cvs=x.csv"], "there is no setting cvs; did you mean csv?"),
        (["read", "--data.root=data"], "there is no setting data.root"),
    ],
)
def test_wrong_commands_are_refused(
    run_cli: RunCLI, tmp_path: Path, capfd: pytest.CaptureFixture[str], arguments: list[str], named: str
) -> None:
    assert run_cli(*arguments, data=arguments[0] != "read") == 2
    err = capfd.readouterr().err
    assert err.startswith("mnist_lightning: ")
    assert err.count("\n") == 1
    assert named in err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"trainer:\n  max_epochs: 3\n bad: [\n", "wrong.yaml: line 3, column 2: did not find expected key"),
        (b"trainer:\n\tmax_epochs: 3\n", "wrong.yaml: line 2, column 1: "),
        (b"- 1\n", "wrong.yaml: "),
        (b"\x89PNG\xff", "wrong.yaml: "),
        (b"data:\n  batch_size: many\n", 'wrong.yaml: Parser key "data.batch_size"'),
        (b"trainer:\n  max_epoch: 3\n", "there is no setting trainer.max_epoch; did you mean trainer.max_epochs?"),
        (b"trainer:\n  max_epochs: 0\n", "trainer.max_epochs must be at least 1"),
        (b"model:\n  learning_rate: .nan\n", "learning_rate must be a finite number above 0"),
    ],
)
def test_wrong_configs_are_refused(
    run_cli: RunCLI, tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes, message: str
) -> None:
    Path("wrong.yaml").write_bytes(content)
    assert run_cli("fit", "--config=wrong.yaml") == 2
    err = capsys.readouterr().err
    assert err.startswith(f"mnist_lightning: {message}")
    assert err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["wrong.yaml"]


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
    "command", sorted(set(re.findall(r"-m mnist_lightning (\w+[^`\n]*)", README.read_text().replace("\\\n", ""))))
)
def test_the_readmes_commands_are_valid(run_cli: RunCLI, monkeypatch: pytest.MonkeyPatch, command: str) -> None:
    name, *arguments = command.split("#")[0].split()
    # Settings only: there is no GPU to train on and no run whose checkpoint could be named.
    arguments = [argument for argument in arguments if argument not in ("best", "last", "--ckpt_path")]
    monkeypatch.chdir(README.parent)
    assert run_cli(name, *arguments, "--print_config", data=False) == 0


def test_help_offers_the_engines_setting(run_cli: RunCLI, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_cli("fit", "--help", data=False) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "--trainer.fast {true,false} Run iterations quietly." in out
    assert "(type: bool, default: True) --trainer.accelerator" in out


@pytest.mark.slow
def test_one_minibatch_is_not_all_of_them_whatever_was_imported_before(tmp_path: Path) -> None:
    # `typing` may take another module's `Optional[Union[float, int]]` for Lightning's: 1 would be read as 1.0.
    code = "import sys, mnist_lightning.digits.synthetic; from mnist_lightning.__main__ import main; sys.exit(main())"
    arguments = ["fit", "--trainer.limit_val_batches=1", "--trainer.limit_test_batches=1.0", "--print_config"]
    out = subprocess.check_output([sys.executable, "-c", code, *arguments], cwd=tmp_path, text=True)
    assert "  limit_val_batches: 1\n" in out
    assert "  limit_test_batches: 1.0\n" in out


def test_importing_the_package_undoes_lightnings_costly_default() -> None:
    import mnist_lightning  # noqa: F401

    assert os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] == "0"
