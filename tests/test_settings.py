"""Settings that users give: Lightning's callbacks and loggers, one seed, and what a run leaves of them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import yaml
from conftest import RunCLI, assert_the_same, everything
from test_run import events, steps

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
