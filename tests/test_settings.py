"""Settings that users give: Lightning's callbacks and loggers, one seed, and what a run leaves of them."""

import json
import logging
import re
import runpy
import shlex
import subprocess
import sys
import threading
import webbrowser
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import yaml
from conftest import VAL_SIZE, RunCLI, assert_the_same, everything
from lightning.pytorch.callbacks import RichProgressBar
from PIL import Image
from rich.progress import Progress
from test_run import events, steps

from mnist_lightning.__main__ import main
from mnist_lightning.engine import progress
from mnist_lightning.engine.progress import EpochBar
from mnist_lightning.engine.training import SILENT

ROOT = Path(__file__).parent.parent

SHORT = ["--model.hidden_dim=8", "--test_after_fit=false"]


@pytest.mark.parametrize("arguments", [["--data.seed=5"], ["--config=seed.yaml"]])
def test_there_is_one_seed(run_cli: RunCLI, capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    Path("seed.yaml").write_text("data:\n  seed: 5\n")
    assert run_cli("fit", *arguments) == 2
    assert "data.seed is not set by itself; give seed_everything" in capsys.readouterr().err


class Odd(pl.Callback):
    """Its default has no text."""

    def __init__(self, call: Callable[[int], int] = lambda number: number, times: int = 1) -> None:
        self.called = [call(number) for number in range(times)]


@pytest.mark.parametrize(
    ("callback", "left"),
    [
        (["StochasticWeightAveraging", "--trainer.callbacks.swa_lrs=0.01"], {"device": "cpu"}),
        (["Timer", "--trainer.callbacks.duration=00:01:00:00"], {"interval": "step"}),
        (["ModelPruning", "--trainer.callbacks.pruning_fn=l1_unstructured"], {"pruning_fn": "l1_unstructured"}),
        (["test_settings.Odd", "--trainer.callbacks.times=3"], {"times": 3}),
    ],
    ids=lambda value: value[0].removeprefix("test_settings.") if isinstance(value, list) else "",
)
def test_a_config_with_any_callback_can_be_read_again(
    run_cli: RunCLI, tmp_path: Path, capsys: pytest.CaptureFixture[str], callback: list[str], left: dict[str, Any]
) -> None:
    settings = ["--trainer.max_epochs=2", "--model.hidden_dim=8"]
    assert run_cli("fit", *settings, "--trainer.callbacks", *callback) == 0
    config = tmp_path / "lightning_logs/version_0/config.yaml"
    ((written,),) = [yaml.safe_load(config.read_text())["trainer"]["callbacks"]]
    assert left.items() <= written["init_args"].items()
    assert "Unable" not in config.read_text()
    assert run_cli("fit", f"--config={config}", data=False) == 0
    assert run_cli("fit", "--ckpt_path=last", "--trainer.max_epochs=3") == 0
    assert capsys.readouterr().err == ""


PATIENT = [
    "--trainer.callbacks=EarlyStopping",
    "--trainer.callbacks.monitor=val/loss",
    "--trainer.callbacks.patience=1",
]
PATIENT.append("--trainer.callbacks.min_delta=0.5")


@pytest.mark.parametrize("interval", [[], ["--trainer.val_check_interval=4"]], ids=["at the end", "in mid-epoch"])
def test_a_run_that_early_stopping_ended_is_done_and_can_go_on_without_it(
    run_cli: RunCLI, tmp_path: Path, capsys: pytest.CaptureFixture[str], interval: list[str]
) -> None:
    settings = ["--trainer.max_epochs=4", *SHORT, *interval]
    assert run_cli("fit", *settings) == 0
    assert run_cli("fit", *settings, *PATIENT) == 0
    whole, run = (tmp_path / f"lightning_logs/version_{i}" for i in (0, 1))
    last = run / "checkpoints/last.ckpt"
    before = last.read_bytes()
    ended_at = torch.load(last, weights_only=True)["global_step"]
    assert ended_at == (8 if interval else 22)
    capsys.readouterr()
    assert run_cli("fit", "--ckpt_path=last") == 0
    said = (
        f"This run is done, at iteration {ended_at}; Monitored metric val/loss did not improve in the last 1 records."
    )
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith(said)
    assert out[0].endswith("To train longer, leave EarlyStopping out")
    assert last.read_bytes() == before
    assert run_cli("fit", "--ckpt_path=last", "--trainer.callbacks=null") == 0
    assert_the_same(whole, run)


def test_early_stopping_waits_for_min_epochs_in_a_resumed_run_too(run_cli: RunCLI, tmp_path: Path) -> None:
    settings = ["--trainer.max_epochs=4", *SHORT, *PATIENT, "--trainer.min_epochs=3"]
    assert run_cli("fit", *settings) == 0
    assert run_cli("fit", *settings, "--trainer.limit_val_batches=1", "--trainer.max_epochs=2") == 0
    assert run_cli("fit", "--ckpt_path=last", "--trainer.max_epochs=4", "--trainer.limit_val_batches=null") == 0
    whole, resumed = (tmp_path / f"lightning_logs/version_{i}" for i in (0, 1))
    assert steps(whole, "val/acc") == steps(resumed, "val/acc") == [10, 21, 32]
    assert_the_same(whole, resumed)


@pytest.mark.parametrize("end", [["--trainer.max_steps=13"], ["--trainer.callbacks=test_settings.StopsAt13"]])
def test_a_run_that_ends_inside_an_epoch_goes_on_exactly(run_cli: RunCLI, tmp_path: Path, end: list[str]) -> None:
    settings = ["--trainer.max_epochs=3", *SHORT]
    assert run_cli("fit", *settings) == 0
    assert run_cli("fit", *settings, *end) == 0
    runs = [tmp_path / f"lightning_logs/version_{i}" for i in (0, 1)]
    assert torch.load(runs[1] / "checkpoints/last.ckpt", weights_only=True)["global_step"] == 13
    assert run_cli("fit", "--ckpt_path=last", "--trainer.max_steps=-1", "--trainer.callbacks=null") == 0
    whole, resumed = map(everything, runs)
    for name in ("best", "last"):
        for part in ("weights", "optimizer"):
            assert whole[f"{name}: {part}"] == resumed[f"{name}: {part}"]
    # Lightning validates once more, where a callback ends the epoch.
    assert [point for point in resumed["val/loss"] if point[0] != 12] == whole["val/loss"]


class StopsAt13(pl.Callback):
    """As `max_time` does, which sets `should_stop` after an iteration."""

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        trainer.should_stop = trainer.global_step == 13


def results(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "results.json").read_text())
    return found


@pytest.mark.parametrize("weights", ["best", "last"])
def test_a_moving_average_is_validated_saved_and_tested(run_cli: RunCLI, tmp_path: Path, weights: str) -> None:
    averages = "--trainer.callbacks=EMAWeightAveraging", "--trainer.callbacks.decay=0.5"
    assert run_cli("fit", "--trainer.max_epochs=2", *averages, f"--test_weights={weights}") == 0
    assert run_cli("test", f"--ckpt_path={weights}") == 0
    run, again = (results(tmp_path / f"lightning_logs/version_{i}") for i in (0, 1))
    for name in ("val/loss", "val/acc", "test/loss", "test/acc"):
        assert run[name] == pytest.approx(again[name], abs=1e-6), name


def test_an_average_that_nobody_validated_is_not_paired_with_another_networks_validation(
    run_cli: RunCLI, tmp_path: Path
) -> None:
    averages = ["--trainer.callbacks=StochasticWeightAveraging", "--trainer.callbacks.swa_lrs=0.01"]
    averages.append("--trainer.callbacks.swa_epoch_start=1")
    for weights in ("last", "best"):
        assert run_cli("fit", "--trainer.max_epochs=2", *averages, f"--test_weights={weights}") == 0
    last, best = (results(tmp_path / f"lightning_logs/version_{i}") for i in (0, 1))
    assert "test/acc" in last
    assert "val/acc" not in last
    assert "val/acc" in best
    assert last["test/loss"] != best["test/loss"]


def test_a_run_shorter_than_a_logging_interval_has_a_curve(
    run_cli: RunCLI, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = ["--trainer.max_epochs=2", "--model.hidden_dim=8"]
    assert run_cli("fit", *settings) == 0
    assert "iter 22: Loss=" in capsys.readouterr().out
    assert run_cli("fit", *settings, "--trainer.max_steps=13") == 0
    whole, run = (tmp_path / f"lightning_logs/version_{i}" for i in (0, 1))
    assert steps(run, "train/loss") == steps(run, "train/acc") == [13]
    assert (run / "figures/training_curves.png").exists()
    assert run_cli("fit", "--ckpt_path=last", "--trainer.max_steps=-1") == 0
    assert steps(whole, "train/loss") == steps(run, "train/loss") == [22]
    assert run_cli("fit", *settings, "--trainer.log_every_n_steps=0") == 0
    assert "train/loss" not in events(tmp_path / "lightning_logs/version_2").Tags()["scalars"]


def test_another_learning_rate_is_refused_with_two_ways(run_cli: RunCLI, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_cli("fit", "--trainer.max_epochs=1", *SHORT) == 0
    assert run_cli("fit", "--ckpt_path=last", "--model.learning_rate=0.1") == 2
    error = capsys.readouterr().err
    assert "trained with 0.001; leave that out, or give it to a new run, without --ckpt_path" in error


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ["--trainer.callbacks=EarlyStopping"],
            "EarlyStopping needs monitor; give it with --trainer.callbacks.monitor",
        ),
        (
            ["--trainer.callbacks+=EarlyStopping"],
            "EarlyStopping needs monitor; give it with --trainer.callbacks.monitor",
        ),
        (["--trainer.callbacks=[EarlyStopping,Timer]"], "the following arguments are required: monitor"),
        (
            ["--trainer.callbacks=EarlyStopping", "--trainer.callbacks.monitr=x"],
            "no setting monitr; did you mean monitor?",
        ),
        (["--config=callbacks.yaml"], "callbacks.yaml: Parser key "),
        (["--config=callbacks.yaml"], "there is no setting monitr; did you mean monitor?"),
        ([*PATIENT, "--trainer.callbacks.patience=abc"], 'key "patience": Expected a int. Got value: abc'),
        ([*PATIENT, "--trainer.callbacks.mode=sideways"], "`mode` can be min, max, got sideways"),
        (["--trainer.callbacks=EarlyStoppin"], 'key "trainer.callbacks": This value is not allowed: EarlyStoppin'),
        (["--trainer.logger=CSVLogger"], "CSVLogger needs save_dir; give it with --trainer.logger.save_dir"),
        (["--trainer.logger.save_dir=."], "of which lightning.pytorch.loggers.Logger? Name its class first"),
        (["--trainer.logger=MLFlowLogger"], "Try running `pip install -U 'mlflow>=1.0.0'`"),
        (["--trainer.logger=[MLFlowLogger]"], "Try running `pip install -U 'mlflow>=1.0.0'`"),
        (["--trainer.logger=nowhere.Logger"], "No module named 'nowhere'"),
        (["--trainer.profiler=SimpleProfiler", "--trainer.profiler.x=3"], "there is no setting x"),
        (
            ["--trainer.plugins=MixedPrecision"],
            "MixedPrecision needs precision, device; give it with --trainer.plugins",
        ),
        (["--data.batch_size+=3"], "data.batch_size is no list that + could add to; give --data.batch_size"),
    ],
)
def test_errors_name_their_cause(
    run_cli: RunCLI, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    Path("callbacks.yaml").write_text(
        "trainer: {callbacks: [{class_path: EarlyStopping, init_args: {monitr: val/loss}}]}\n"
    )
    assert run_cli("fit", *arguments) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert "Namespace" not in error
    assert "NestedArg" not in error
    assert [path.name for path in tmp_path.iterdir()] == ["callbacks.yaml"]


@pytest.mark.parametrize("arguments", [["--config=a.yaml", "fit"], ["--seed_everything", "3", "fit"], ["-c", "a.yaml"]])
def test_the_command_comes_first(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["mnist_lightning", *arguments])
    assert main() == 2
    setting = arguments[0]
    assert capsys.readouterr().err.endswith(f": the command comes first, and its settings after it: fit {setting}\n")


def test_text_where_a_list_is_wanted(run_cli: RunCLI, capsys: pytest.CaptureFixture[str]) -> None:
    Path("read.yaml").write_text("paths: a.png\n")
    assert run_cli("read", "--config=read.yaml", data=False) == 2
    assert "read.yaml: paths: a list is wanted" in capsys.readouterr().err


def test_a_tilde_is_the_home_directory_everywhere(
    run_cli: RunCLI, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    home, here = tmp_path / "home", tmp_path / "here"
    home.mkdir()
    here.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(here)
    (home / "root.yaml").write_text("trainer:\n  default_root_dir: ~/runs\n  max_epochs: 1\n")
    Image.new("L", (28, 28), 255).save(home / "digit.png")
    settings = ["--config=~/root.yaml", *SHORT]
    assert run_cli("fit", *settings) == 0
    assert run_cli("fit", *settings, "--ckpt_path=last", "--trainer.max_epochs=2") == 0
    assert run_cli("test", "--ckpt_path=~/runs/lightning_logs/version_0/checkpoints/last.ckpt") == 0
    runs = "--runs=~/runs/lightning_logs"
    assert run_cli("demo", runs, "--no-open", "--output=~/page.html", data=False) == 0
    read = ["--csv=~/read.csv", "--figure=~/read.png"]
    assert run_cli("read", "~/*.png", runs, *read, data=False) == 0
    assert run_cli("export", runs, "--format=safetensors", "--output=~/weights") == 0
    assert run_cli("data", "--figure=~/digits.png") == 0
    assert capsys.readouterr().err == ""
    assert {path.name for path in home.iterdir()} == {
        *("root.yaml", "digit.png", "runs", "page.html", "read.csv", "read.png", "weights", "digits.png")
    }
    assert [path.name for path in here.iterdir()] == ["lightning_logs"]  # of the test


@pytest.mark.parametrize(
    "place",
    [
        ["--trainer.default_root_dir=there"],
        ["--trainer.logger=CSVLogger", "--trainer.logger.save_dir=there"],
        ["--trainer.logger=TensorBoardLogger", "--trainer.logger.save_dir=there", "--trainer.logger.name=mine"],
    ],
    ids=["default_root_dir", "CSVLogger", "TensorBoardLogger"],
)
def test_runs_are_looked_for_where_they_are_written(
    run_cli: RunCLI, capsys: pytest.CaptureFixture[str], place: list[str]
) -> None:
    assert run_cli("fit", "--trainer.max_epochs=1", "--model.hidden_dim=7", "--test_after_fit=false") == 0
    assert run_cli("fit", "--trainer.max_epochs=2", *SHORT, *place) == 0
    (best,) = Path("there").glob("*/version_0/checkpoints/best.ckpt")
    capsys.readouterr()
    assert run_cli("test", "--ckpt_path=best", *place) == 0
    assert re.match(rf"Weights of iteration \d+, trained on .*: {best}\n", capsys.readouterr().out)
    for command in (["demo", "--no-open"], ["export", "--format=safetensors"]):
        assert run_cli(*command, f"--runs={best.parents[2]}", data=command[0] != "demo") == 0
        assert re.match(rf"Weights: {best}, trained on .* iterations\n", capsys.readouterr().out)
    assert run_cli("fit", "--ckpt_path=last", "--trainer.max_epochs=3", *place) == 0
    assert f"Resuming {best.with_name('last.ckpt')} after iteration 22" in capsys.readouterr().out


def test_best_is_not_that_of_an_older_run(run_cli: RunCLI, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_cli("fit", "--trainer.max_epochs=1", *SHORT) == 0
    assert run_cli("fit", "--trainer.max_steps=5", *SHORT) == 0
    assert run_cli("test", "--ckpt_path=last") == 0
    for command in (["demo", "--no-open"], ["read", str(ROOT / ".github/assets/misclassified.png")]):
        capsys.readouterr()
        assert run_cli(*command, data=False) == 2
        none = "there is no lightning_logs/version_1/checkpoints/best.ckpt: the newest run has not come to it"
        assert f"ckpt_path: {none}; give `last`, or a path for another run's\n" in capsys.readouterr().err
        assert run_cli(*command, "--ckpt_path=last", data=False) == 0


@pytest.mark.parametrize(("name", "opens"), [("/usr/bin/w3m", False), ("lynx", False), ("firefox", True)])
def test_demo_does_not_open_a_browser_in_the_terminal(
    run_cli: RunCLI, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str, opens: bool
) -> None:
    assert run_cli("fit", "--trainer.max_epochs=1", *SHORT) == 0
    opened: list[str] = []
    monkeypatch.setattr(webbrowser, "get", lambda: webbrowser.GenericBrowser(name))

    def note(url: str) -> bool:
        opened.append(url)
        return True

    monkeypatch.setattr(webbrowser, "open", note)
    assert run_cli("demo", data=False) == 0
    assert opened == [Path("demo.html").resolve().as_uri()] * opens
    assert ("No graphical browser was found" in capsys.readouterr().out) is not opens


def test_a_second_run_in_one_process_adds_no_filter(run_cli: RunCLI) -> None:
    def added() -> tuple[int, Any]:
        handlers = logging.getLogger("lightning.pytorch").handlers
        return sum(len(handler.filters) for handler in handlers), threading.excepthook

    run_cli("fit", "--print_config")
    before = added()
    run_cli("fit", "--print_config")
    assert added() == before


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [["data"], ["fit", "--help"]], ids=["data", "help"])
def test_the_reader_of_the_output_may_leave(root: Path, tmp_path: Path, arguments: list[str]) -> None:
    data = ["--data.dataset=synthetic", f"--data.root={root}", f"--data.val_size={VAL_SIZE}"]
    small = [] if "--help" in arguments else data
    command = shlex.join([sys.executable, "-m", "mnist_lightning", *arguments, *small])
    pipe = ["bash", "-c", f"{command} | head -1; exit ${{PIPESTATUS[0]}}"]
    done = subprocess.run(pipe, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("\n") == 1


@pytest.mark.parametrize("module", ["cli", "commands"])
def test_a_module_that_is_no_program_says_which_one_is(
    module: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delitem(sys.modules, f"mnist_lightning.{module}", raising=False)
    with pytest.raises(SystemExit, match="run `python -m mnist_lightning`"):
        runpy.run_module(f"mnist_lightning.{module}", run_name="__main__")


@pytest.mark.parametrize(("limit", "described"), [("2", "Epoch 1/2"), ("-1", "Epoch 1 ")])
def test_the_progress_bar_counts_epochs_as_the_lines_do(
    run_cli: RunCLI, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], limit: str, described: str
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    seen: list[str] = []
    refresh = Progress.refresh

    def note(self: Progress) -> None:
        seen.extend(task.description.strip() for task in self.tasks)
        refresh(self)

    monkeypatch.setattr(Progress, "refresh", note)
    assert run_cli("fit", f"--trainer.max_epochs={limit}", "--trainer.max_steps=15", *SHORT) == 0
    assert described.rstrip() in seen
    assert f"Epoch 2{described.strip()[7:]}" in seen


def test_the_progress_bar_is_seldom_drawn_while_it_trains(monkeypatch: pytest.MonkeyPatch) -> None:
    now, drawn = [0.0], list[float]()
    trainer = SimpleNamespace(training=True)
    monkeypatch.setattr(RichProgressBar, "refresh", lambda *_: drawn.append(now[0]))
    monkeypatch.setattr(EpochBar, "trainer", trainer)
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: now[0]))
    bar = EpochBar()
    for now[0] in (10, 10.2, 10.4, 10.6, 10.8, 11, 11.2):
        bar.refresh()
    assert drawn == [10, 10.6, 11.2]
    bar.refresh(hard=True)
    trainer.training = False
    bar.refresh()
    assert drawn == [10, 10.6, 11.2, 11.2, 11.2]


def test_the_progress_bar_shows_what_the_module_logs(monkeypatch: pytest.MonkeyPatch) -> None:
    logged: dict[str, Any] = {"v_num": 3, "train/loss": 0.5}
    monkeypatch.setattr(RichProgressBar, "get_metrics", lambda *_: logged)
    assert EpochBar().get_metrics(pl.Trainer(), pl.LightningModule()) == {"train/loss": 0.5}


def test_what_users_ask_to_be_told_is_told(
    run_cli: RunCLI, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("lightning.pytorch"), "propagate", True)
    asked = ["--trainer.profiler=simple", "--trainer.callbacks=EarlyStopping", "--trainer.callbacks.monitor=val/loss"]
    asked += ["--trainer.callbacks.verbose=true", "--trainer.callbacks+=ModelSummary"]
    caplog.set_level(logging.INFO)
    assert run_cli("fit", "--trainer.max_epochs=1", *SHORT, *asked) == 0
    assert run_cli("fit", "--trainer.max_epochs=-1", *SHORT, "--trainer.max_time=00:00:00:01") == 0
    # What `SILENT` does not match is printed.
    told = [record.getMessage() for record in caplog.records if not SILENT.search(record.getMessage())]
    for words in ("FIT Profiler Report", "Metric val/loss improved", "Total params", "Time limit reached"):
        assert any(words in message for message in told), words
