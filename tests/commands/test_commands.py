"""Whole commands: what each of them does, and wrong ones in one line on stderr, with nothing left behind."""

import csv
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import RUN, SMALL, VAL_SIZE, RunCLI, prepare, results, steps

from mnist_lightning import MNISTClassifier, MNISTDataModule, commands

ROOT = Path(__file__).parents[2]
PICTURE = ROOT / ".github/assets/misclassified.png"

WRONG = {
    "fit --data.val_size=60000": "data.val_size must be 1 to 1,249 of the training file, not 60,000",
    "fit --data.val_size=-1": "data.val_size: Not of type PositiveInt: -1",
    "fit --data.batch_size=0": "data.batch_size: Not of type PositiveInt: 0",
    "fit --data.seed=5": 'Linked "data.seed" must be given via "seed_everything"',
    "fit --data.distortions.scale=2": "distortions.scale must be below 1, not 2",
    "fit --data.batch_sizes=3": "there is no setting data.batch_sizes; did you mean data.batch_size?",
    "fit --modle.hidden_dim=3": "there is no setting modle.hidden_dim; did you mean model.hidden_dim?",
    "fit --model.hidden_dim=0": "model.hidden_dim: Not of type PositiveInt: 0",
    "fit --model.learning_rate=nan": "model.learning_rate: Not of type PositiveFloat: nan",
    "fit --model.learning_rate_schedule=one_cycle --trainer.max_epochs=-1": "one_cycle needs an end: give max_epochs",
    "fit --seed_everything=-1": "seed_everything must be a whole number from 0 to 4294967295, not -1",
    "fit --optimizer=SGD": "there is no setting optimizer",
    "fit --threads=-1": "threads: Not of type NonNegativeInt",
    f"fit --config={ROOT / 'LICENSE'}": "LICENSE: Problems parsing config: mapping values are not allowed",
    "fit --trainer.max_epochs=0": "trainer.max_epochs must not be 0",
    "fit --trainer.max_steps=-2": "`max_steps` must be a non-negative integer or -1",
    "fit --trainer.log_every_n_steps=-1": "trainer.log_every_n_steps must be at least 0, not -1",
    "fit --trainer.check_val_every_n_epoch=0": "trainer.check_val_every_n_epoch must be at least 1",
    "fit --trainer.gradient_clip_val=-1": "trainer.gradient_clip_val must be at least 0, not -1",
    "fit --trainer.accumulate_grad_batches=0": "trainer.accumulate_grad_batches must be at least 1, not 0",
    "fit --trainer.val_check_interval=0": "trainer.val_check_interval must not be 0",
    "fit --trainer.val_check_interval=12": "`val_check_interval` (12) must be less than or equal to",
    "fit --trainer.limit_train_batches=0.01": "increase the `limit_train_batches` argument",
    "fit --trainer.accelerator=abacus": "You selected an invalid accelerator name",
    "fit --trainer.devices=2 --trainer.strategy=ddp_fork": "trainer.strategy: for several processes, give ddp",
    "fit --trainer.strategy=fsdp --trainer.devices=2": "The strategy `fsdp` requires a GPU accelerator",
    "fit --trainer.callbacks=EarlyStopping": "trainer.callbacks: the following arguments are required: monitor",
    "fit --trainer.callbacks=EarlyStopping --trainer.callbacks.monitr=x": "Option 'monitr' is not accepted",
    "fit --trainer.callbacks=EarlyStopping --trainer.callbacks.monitor=x --trainer.callbacks.mode=y": "`mode` can be",
    "fit --trainer.logger=CSVLogger": "trainer.logger: the following arguments are required: save_dir",
    "fit --trainer.logger=[MLFlowLogger]": "Try running `pip install -U 'mlflow>=1.0.0'`",
    "fit --trainer.logger=nowhere.Logger": "trainer.logger: Problem with given class_path 'nowhere.Logger': No module",
    "fit --ckpt_path=last": "ckpt_path: there is no last.ckpt of any run in lightning_logs yet",
    "test --ckpt_path=nowhere.ckpt": "ckpt_path: there is no checkpoint nowhere.ckpt",
    f"test --ckpt_path={ROOT / 'README.md'}": "README.md is damaged or no checkpoint",
    "test --ckpt_path=auto": "ckpt_path: there is no checkpoint auto",
    "validate": "ckpt_path: which weights? Give `best` or `last` of the newest run, or a path",
    "-c a.yaml": "the command comes first, and its settings after it: fit -c",
    "--seed_everything 3 fit": "the command comes first, and its settings after it: fit --seed_everything",
    "fti": "there is no command fti; give fit, validate, test, predict, data, read, demo or export",
    "": "a command is missing; give fit, validate, test, predict, data, read, demo or export",
    "data --data.val_size=0": "data.val_size must be 1 to 1,249",
    "export --format=onnx": "ckpt_path: there is no best.ckpt of any run in lightning_logs yet",
    "export": "the following arguments are required: format",
    "export --format=tflite": "'onnx', 'safetensors'",
    "demo --outptu=x": "there is no setting outptu; did you mean output?",
    "read": "the following arguments are required: paths",
    "read nowhere.png": "there is no picture nowhere.png",
    f"read {PICTURE}": "ckpt_path: there is no best.ckpt of any run in lightning_logs yet; train one with `fit`",
    f"read {PICTURE} --ckpt_path=nowhere.ckpt": "ckpt_path: there is no checkpoint nowhere.ckpt",
    f"read {PICTURE} --figure={PICTURE}": "is one of the pictures to read; give another --figure",
    f"read {PICTURE} --csv={PICTURE}": "is one of the pictures to read; give another --csv",
    f"read data:image/png;base64,{'iVBORw0KGgo/' * 900}": "no picture data:image/png;base64,iVBORw0KGgo/iVBO",
    "read --data.root=data": "there is no setting data.root",
}


@pytest.mark.parametrize("command", WRONG)
def test_wrong_commands(run_cli: RunCLI, tmp_path: Path, capfd: pytest.CaptureFixture[str], command: str) -> None:
    name, *arguments = command.split() or [""]
    assert run_cli(name, *arguments, data=name not in ("read", "demo")) == 2
    err = capfd.readouterr().err
    assert err.startswith("mnist_lightning: ")
    assert err.count("\n") == 1
    assert len(err) < 400
    assert WRONG[command] in err
    assert not list(tmp_path.iterdir())


class Network(MNISTClassifier):
    pass


class Data(MNISTDataModule):
    pass


def test_other_commands_of_other_classes_say_why_they_are_not_there(
    run_cli: RunCLI, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for classes in ((Network,), (MNISTClassifier, Data), (Network, Data)):
        for name in commands.COMMANDS:
            works = name == "data" and Data not in classes
            assert run_cli(name, classes=classes) == (0 if works else 2)
            line = "" if works else f"mnist_lightning: {name}: {commands.ONLY_HERE[name]}\n"
            assert capsys.readouterr().err == line
    assert [path.name for path in tmp_path.iterdir()] == ["digits.png"]
    assert run_cli("--help", data=False, classes=(Network, Data)) == 0
    assert f"  read      Not here: {commands.ONLY_HERE['read']}\n" in capsys.readouterr().out


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


@pytest.mark.figures
def test_data(run_cli: RunCLI, root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commands, "VAL_SIZE", VAL_SIZE)
    assert run_cli("data") == 0
    out = capsys.readouterr().out
    assert "train: 1,050 digits, x_train (1050, 784), y_train (1050,)" in out
    assert "valid: 200 digits, x_valid (200, 784), y_valid (200,)" in out
    assert "test: 230 digits" in out
    label = int(prepare("synthetic", root).val[1][0])
    assert f"  {label}: {' '.join('1' if i == label else '0' for i in range(10))}" in out
    assert Path("digits.png").stat().st_size > 10_000


def test_best_and_last_mean_the_newest_run(run_cli: RunCLI, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_cli("fit", "--trainer.max_epochs=2", "--model.hidden_dim=17") == 0
    # A run from Python, which leaves checkpoints of other names, is not meant, nor is a directory of another name.
    for name in ("version_1/checkpoints/epoch=1-step=22.ckpt", "version_0_backup/checkpoints/best.ckpt"):
        (path := RUN.parent / name).parent.mkdir(parents=True)
        path.touch()
    test_line = capsys.readouterr().out.splitlines()[-3]
    assert run_cli("test", "--ckpt_path=best") == 0
    assert test_line in capsys.readouterr().out.splitlines()
    assert run_cli("validate", "--ckpt_path=last") == 0
    assert re.search(r"^Validation loss: \d\.\d\d, validation accuracy: \d+\.\d%$", capsys.readouterr().out, re.M)
    assert run_cli("predict", "--ckpt_path=best") == 0
    with (RUN.with_name("version_4") / "predictions.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == SMALL["t10k"]
    assert {row["digit"] for row in rows} <= set("0123456789")


def test_a_test_says_what_was_trained_on_what(
    run_cli: RunCLI, short_run: Path, fake_mnist: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mnist = ["--data.dataset=mnist", f"--data.root={fake_mnist}", "--data.val_size=200"]
    assert run_cli("test", "--ckpt_path=best", *mnist, data=False) == 0
    best = short_run / "checkpoints/best.ckpt"
    weights = f"Weights of iteration 11, trained on synthetic digits (not MNIST): {best}"
    assert capsys.readouterr().out.splitlines()[:2] == [weights, "Reading MNIST"]
    run = short_run.with_name("version_1")
    found = results(run)
    assert (found["dataset"], found["iterations"]) == ("MNIST", 11)
    assert "val/acc" not in found
    assert steps(run, "test/acc") == [10]


@pytest.mark.slow
def test_one_minibatch_is_not_all_of_them_whatever_was_imported_before(tmp_path: Path) -> None:
    # `typing` may take another module's `Optional[Union[float, int]]` for Lightning's: 1 would be read as 1.0.
    code = "import sys, mnist_lightning.digits.synthetic; from mnist_lightning.__main__ import main; sys.exit(main())"
    arguments = ["fit", "--trainer.limit_val_batches=1", "--trainer.limit_test_batches=1.0", "--print_config"]
    out = subprocess.check_output([sys.executable, "-c", code, *arguments], cwd=tmp_path, text=True)
    assert "  limit_val_batches: 1\n" in out
    assert "  limit_test_batches: 1.0\n" in out
