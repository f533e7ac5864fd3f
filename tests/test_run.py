"""Whole runs through the command line: the contract of a run's directory, the console, and the figures."""

import csv
import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from conftest import SMALL, RunCLI, assert_the_same
from lightning.pytorch import Trainer
from matplotlib.figure import Figure
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from mnist_lightning.classifier import MNISTClassifier
from mnist_lightning.datamodule import MNISTDataModule
from mnist_lightning.digits import plots


def events(run: Path) -> EventAccumulator:
    return EventAccumulator(str(run), {"tensors": 0, "images": 0}).Reload()


def steps(run: Path, tag: str) -> list[int]:
    return [event.step for event in events(run).Scalars(tag)]


@pytest.fixture
def grids(monkeypatch: pytest.MonkeyPatch) -> dict[str, tuple[Tensor, list[str]]]:
    """The images and titles of each 3x3 figure drawn, by the first words of its heading."""
    drawn = {}
    draw = plots.digit_grid

    def record(images: Tensor, titles: list[str], heading: str) -> Figure:
        drawn["misclassified" if "misclassified" in heading else "correct"] = images, titles
        assert "stand-in digits (not MNIST)" in heading
        return draw(images, titles, heading)

    monkeypatch.setattr(plots, "digit_grid", record)
    return drawn


def test_a_run_keeps_its_contract(
    run_cli: RunCLI, tmp_path: Path, capsys: pytest.CaptureFixture[str], grids: dict[str, Any]
) -> None:
    assert run_cli("fit", "--trainer.max_epochs=3", "--trainer.log_every_n_steps=5", "--seed_everything=4") == 0
    run = tmp_path / "lightning_logs" / "version_0"
    out, err = capsys.readouterr()

    lines = out.splitlines()
    assert not err
    assert "stand-in digits (not MNIST): 1,050 images, 200 for validation; 159,010 parameters" in lines[0]
    assert [line for line in lines if re.fullmatch(r"iter 5: Loss=\d\.\d\d, Training Accuracy=\d+\.0%", line)]
    epoch = r"Epoch: 3, validation loss: \d\.\d\d, validation accuracy: \d+\.\d%"
    assert [line for line in lines if re.fullmatch(epoch, line)]
    assert re.fullmatch(r"Test loss: \d\.\d\d, test accuracy: \d+\.\d%", lines[-3])
    assert lines[-2:] == ["Run: lightning_logs/version_0", "Look at it: tensorboard --logdir lightning_logs"]

    assert set(events(run).Tags()["scalars"]) == {
        *(f"{split}/{name}" for split in ("train", "val", "test") for name in ("loss", "acc")),
        *("train/learning_rate", "train/examples_per_second"),
    }
    for curve in ("loss", "acc", "learning_rate", "examples_per_second"):
        assert steps(run, f"train/{curve}") == [5, 10, 15, 20, 25, 30]
    assert all(event.value == pytest.approx(0.001) for event in events(run).Scalars("train/learning_rate"))
    assert steps(run, "val/loss") == steps(run, "val/acc") == [11, 22, 33]
    assert steps(run, "test/loss") == steps(run, "test/acc") == [33]
    assert events(run).Tags()["graph"]
    names = {"correct", "misclassified", "confusion_matrix", "training_curves"}
    assert set(events(run).Tags()["images"]) == {f"figures/{name}" for name in names}
    assert {path.name for path in (run / "figures").iterdir()} == {f"{name}.png" for name in names}
    logged = events(run)
    for name in names:
        (shown,) = logged.Images(f"figures/{name}")
        with (
            Image.open(io.BytesIO(shown.encoded_image_string)) as image,
            Image.open(run / f"figures/{name}.png") as png,
        ):
            assert np.array_equal(np.asarray(image), np.asarray(png))

    results = json.loads((run / "results.json").read_text())
    assert results.keys() == {
        *("dataset", "seed", "iterations", "train_seconds", "val/loss", "val/acc", "test/loss", "test/acc", "versions")
    }
    assert (results["dataset"], results["seed"], results["iterations"]) == ("synthetic", 4, 33)
    assert 0 < results["train_seconds"] < 60
    val_acc = [event.value for event in events(run).Scalars("val/acc")]
    assert results["val/acc"] == pytest.approx(max(val_acc))
    assert results["test/acc"] == pytest.approx(events(run).Scalars("test/acc")[0].value)

    for name, epochs in {"best": val_acc.index(max(val_acc)) + 1, "last": 3}.items():
        checkpoint = torch.load(run / "checkpoints" / f"{name}.ckpt", weights_only=True)
        assert checkpoint["global_step"] == 11 * epochs
        assert checkpoint["datamodule_hyper_parameters"]["dataset"] == "synthetic"
    assert yaml.safe_load((run / "config.yaml").read_text())["seed_everything"] == 4


def test_hyperparameters_and_metrics_reach_the_hparams_tab(run_cli: RunCLI, tmp_path: Path) -> None:
    assert run_cli("fit", "--trainer.max_epochs=1") == 0
    plugin = events(tmp_path / "lightning_logs" / "version_0").summary_metadata
    start = plugin["_hparams_/session_start_info"].plugin_data.content
    for name in (b"dataset", b"learning_rate", b"hidden_dim", b"batch_size", b"seed"):
        assert name in start
    assert b"test/acc" in plugin["_hparams_/experiment"].plugin_data.content


def test_the_figures_show_what_they_say(run_cli: RunCLI, tmp_path: Path, root: Path, grids: dict[str, Any]) -> None:
    assert run_cli("fit", "--trainer.max_epochs=2") == 0
    data = MNISTDataModule("synthetic", str(root))
    data.setup("test")
    images, labels = data.test
    checkpoint = tmp_path / "lightning_logs/version_0/checkpoints/best.ckpt"
    model = MNISTClassifier.load_from_checkpoint(checkpoint, weights_only=True)
    with torch.no_grad():
        confidences, predictions = model(images).softmax(1).max(1)

    wrong, right = ((predictions == labels).logical_not().nonzero()[:, 0], (predictions == labels).nonzero()[:, 0])
    for name, which in {"misclassified": wrong, "correct": right}.items():
        assert torch.equal(grids[name][0], images[which[:9]])
        assert grids[name][1] == [f"True: {labels[i]}, Pred: {predictions[i]}" for i in which[:9]]

    assert run_cli("test", "--ckpt_path=best", "--figures.misclassified=confidence") == 0
    surest = wrong[confidences[wrong].argsort(descending=True)][:9]
    assert torch.equal(grids["misclassified"][0], images[surest])


@pytest.mark.parametrize("count", [0, 1, 9, 12])
def test_digit_grids_of_any_size_draw(count: int, tmp_path: Path) -> None:
    figure = plots.digit_grid(torch.rand(count, 784), ["True: 1, Pred: 2"] * count, "heading")
    figure.savefig(tmp_path / "figure.png")
    assert sum(bool(axes.images) for axes in figure.axes) == min(count, 9)


def test_confusion_matrix_shows_the_counts() -> None:
    counts = torch.arange(100).reshape(10, 10)
    axes = plots.confusion_matrix(counts, "heading").axes[0]
    assert [text.get_text() for text in axes.texts] == ["·", *map(str, range(1, 100))]


def test_the_last_weights_can_be_tested_or_none(run_cli: RunCLI, tmp_path: Path) -> None:
    rate = "--model.learning_rate=0.1"  # so high that the best epoch is rarely the last
    assert run_cli("fit", "--trainer.max_epochs=4", "--test_weights=last", rate) == 0
    assert run_cli("fit", "--trainer.max_epochs=4", "--test_after_fit=false", rate) == 0
    runs = [tmp_path / "lightning_logs" / f"version_{i}" for i in (0, 1)]
    results = [json.loads((run / "results.json").read_text()) for run in runs]
    assert results[0]["val/acc"] == pytest.approx(events(runs[0]).Scalars("val/acc")[-1].value)
    assert "test/acc" not in results[1]
    assert not (runs[1] / "figures").exists()


def test_config_yaml_repeats_the_run(run_cli: RunCLI, tmp_path: Path) -> None:
    settings = ["--trainer.max_epochs=2", "--model.hidden_dim=30", "--seed_everything=7", "--data.batch_size=64"]
    assert run_cli("fit", *settings) == 0
    assert run_cli("fit", "--config=lightning_logs/version_0/config.yaml", data=False) == 0
    first, second = (
        torch.load(tmp_path / f"lightning_logs/version_{i}/checkpoints/last.ckpt", weights_only=True)["state_dict"]
        for i in (0, 1)
    )
    for name, value in first.items():
        assert torch.equal(value, second[name])


def test_another_seed_is_another_run(run_cli: RunCLI, tmp_path: Path) -> None:
    for seed in (0, 1):
        assert run_cli("fit", "--trainer.max_epochs=1", f"--seed_everything={seed}", "--test_after_fit=false") == 0
    first, second = (
        torch.load(tmp_path / f"lightning_logs/version_{i}/checkpoints/last.ckpt", weights_only=True)["state_dict"]
        for i in (0, 1)
    )
    assert not torch.equal(first["mlp.output.weight"], second["mlp.output.weight"])


def test_best_and_last_mean_the_newest_run(run_cli: RunCLI, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_cli("fit", "--trainer.max_epochs=2", "--model.hidden_dim=17") == 0
    test_line = capsys.readouterr().out.splitlines()[-3]
    assert run_cli("test", "--ckpt_path=best") == 0
    assert test_line in capsys.readouterr().out.splitlines()
    assert run_cli("validate", "--ckpt_path=last") == 0
    assert re.search(r"^Validation loss: \d\.\d\d, validation accuracy: \d+\.\d%$", capsys.readouterr().out, re.M)
    assert run_cli("predict", "--ckpt_path=best") == 0
    with (tmp_path / "lightning_logs/version_3/predictions.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == SMALL["t10k"]
    assert {row["digit"] for row in rows} <= set("0123456789")


def load(run: Path, name: str = "last") -> dict[str, Any]:
    checkpoint: dict[str, Any] = torch.load(run / "checkpoints" / f"{name}.ckpt", weights_only=True)
    return checkpoint


def assert_same_training(first: dict[str, Any], second: dict[str, Any]) -> None:
    assert first["global_step"] == second["global_step"]
    for name, value in first["state_dict"].items():
        assert torch.equal(value, second["state_dict"][name])
    (a,), (b,) = first["optimizer_states"], second["optimizer_states"]
    for state, other in zip(a["state"].values(), b["state"].values(), strict=True):
        assert all(torch.equal(state[key], other[key]) for key in ("exp_avg", "exp_avg_sq", "step"))


def test_a_resumed_run_goes_on_in_its_directory_as_if_never_stopped(run_cli: RunCLI, tmp_path: Path) -> None:
    whole, half = tmp_path / "lightning_logs/version_0", tmp_path / "lightning_logs/version_1"
    settings = ["--data.steps_per_execution=3", "--trainer.log_every_n_steps=2"]
    assert run_cli("fit", "--trainer.max_epochs=4", *settings) == 0
    assert run_cli("fit", "--trainer.max_epochs=2", *settings) == 0
    assert run_cli("fit", "--trainer.max_epochs=4", "--ckpt_path=last", *settings) == 0
    assert_same_training(load(whole), load(half))
    assert steps(half, "val/acc") == steps(whole, "val/acc") == [11, 22, 33, 44]
    assert steps(half, "train/loss") == steps(whole, "train/loss")
    results = [json.loads((run / "results.json").read_text()) for run in (whole, half)]
    assert all(results[0][key] == results[1][key] for key in results[0] if key != "train_seconds")
    assert yaml.safe_load((half / "config.yaml").read_text())["ckpt_path"] is None


@pytest.mark.parametrize("every", [5, 6])
def test_resuming_in_mid_epoch_goes_on_with_the_next_minibatch(run_cli: RunCLI, tmp_path: Path, every: int) -> None:
    saves = [
        "--trainer.callbacks+=ModelCheckpoint",
        f"--trainer.callbacks.every_n_train_steps={every}",
        "--trainer.callbacks.save_top_k=-1",
        "--trainer.callbacks.dirpath=mine",
        "--trainer.callbacks.filename={step}",
    ]
    settings = ["--trainer.limit_train_batches=9", "--data.steps_per_execution=3", "--trainer.max_epochs=3"]
    assert run_cli("fit", *settings, *saves) == 0
    checkpoint = f"--ckpt_path=mine/step={3 * every}.ckpt"
    assert run_cli("fit", *settings, *saves, checkpoint) == 0
    assert_same_training(*(load(tmp_path / f"lightning_logs/version_{i}") for i in (0, 1)))
    if every == 6:  # lists of 3 there, of 2 here
        assert run_cli("fit", *settings, *saves, checkpoint, "--data.steps_per_execution=2") == 0
        assert run_cli("fit", *settings, *saves, "--ckpt_path=mine/step=6.ckpt", "--data.steps_per_execution=1") == 2


def test_a_run_that_max_steps_ended_in_mid_epoch_is_not_resumed(
    run_cli: RunCLI, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_cli("fit", "--trainer.max_epochs=4", "--trainer.max_steps=17") == 0
    for longer in ("-1", "30"):
        assert run_cli("fit", f"--trainer.max_steps={longer}", "--ckpt_path=last") == 2
        assert "max_steps" in capsys.readouterr().err
    assert run_cli("fit", "--ckpt_path=last") == 0
    assert "it ended within an epoch and cannot be trained longer" in capsys.readouterr().out


def test_the_last_checkpoint_is_the_last_state_also_when_another_was_best(run_cli: RunCLI, tmp_path: Path) -> None:
    assert run_cli("fit", "--trainer.max_epochs=6", "--model.learning_rate=0.2", "--test_after_fit=false") == 0
    run = tmp_path / "lightning_logs/version_0"
    accuracies = [event.value for event in events(run).Scalars("val/acc")]
    best = accuracies.index(max(accuracies)) + 1
    assert best < 6, "the last epoch was the best; the test needs another seed"
    assert (load(run)["global_step"], load(run, "best")["global_step"]) == (66, 11 * best)


def test_resuming_with_other_settings_is_refused(run_cli: RunCLI, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_cli("fit", "--trainer.max_epochs=1", "--model.hidden_dim=30") == 0
    for setting in ("--data.batch_size=50", "--seed_everything=3", "--model.learning_rate=0.5"):
        capsys.readouterr()
        assert run_cli("fit", "--trainer.max_epochs=2", "--ckpt_path=last", setting) == 2
        err = capsys.readouterr().err
        assert err.count("\n") == 1
        assert "checkpoint was trained with" in err


def test_resuming_a_run_of_another_place_leaves_the_runs_here_alone(
    run_cli: RunCLI, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for place in ("here", "there"):
        (tmp_path / place).mkdir()
        monkeypatch.chdir(tmp_path / place)
        assert run_cli("fit", "--trainer.max_epochs=1", "--test_after_fit=false") == 0
    runs = tmp_path / "there/lightning_logs"
    before = (runs / "version_0/checkpoints/last.ckpt").read_bytes()
    other = tmp_path / "here/lightning_logs/version_0/checkpoints/last.ckpt"
    unbeatable = torch.load(other, weights_only=True)
    unbeatable["callbacks"]["BestAndLast"]["best"] = 1.0
    torch.save(unbeatable, other)
    assert run_cli("fit", "--trainer.max_epochs=2", f"--ckpt_path={other}") == 0
    assert (runs / "version_0/checkpoints/last.ckpt").read_bytes() == before
    assert load(runs / "version_1")["global_step"] == load(runs / "version_1", "best")["global_step"] == 22


def test_results_of_the_last_weights_after_resuming(run_cli: RunCLI, tmp_path: Path) -> None:
    assert run_cli("fit", "--trainer.max_epochs=1") == 0
    assert run_cli("fit", "--trainer.max_epochs=3", "--ckpt_path=last", "--test_weights=last") == 0
    run = tmp_path / "lightning_logs/version_0"
    results = json.loads((run / "results.json").read_text())
    assert results["val/acc"] == pytest.approx(events(run).Scalars("val/acc")[-1].value)


def test_a_users_checkpoints_are_not_taken_for_the_best(run_cli: RunCLI, tmp_path: Path) -> None:
    ours = ["--trainer.callbacks+=ModelCheckpoint", "--trainer.callbacks.every_n_train_steps=1"]
    assert run_cli("fit", "--trainer.max_epochs=2", *ours, "--trainer.callbacks.dirpath=mine") == 0
    run = tmp_path / "lightning_logs/version_0"
    results = json.loads((run / "results.json").read_text())
    assert results["val/acc"] == pytest.approx(max(event.value for event in events(run).Scalars("val/acc")))


@pytest.mark.parametrize("precision", ["64-true", "bf16-mixed", "bf16-true"])
def test_precisions_run_with_everything_on(run_cli: RunCLI, tmp_path: Path, precision: str) -> None:
    assert run_cli("fit", "--trainer.max_epochs=2", f"--trainer.precision={precision}") == 0
    assert events(tmp_path / "lightning_logs/version_0").Tags()["graph"]


def test_a_test_says_what_was_trained_on_what(
    run_cli: RunCLI, tmp_path: Path, fake_mnist: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_cli("fit", "--trainer.max_epochs=1") == 0
    mnist = ["--data.dataset=mnist", f"--data.root={fake_mnist}", "--data.val_size=200"]
    capsys.readouterr()
    assert run_cli("test", "--ckpt_path=best", *mnist, data=False) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[:2] == ["Weights of iteration 11, trained on stand-in digits (not MNIST)", "Reading MNIST"]
    run = tmp_path / "lightning_logs/version_1"
    results = json.loads((run / "results.json").read_text())
    assert (results["dataset"], results["iterations"]) == ("mnist", 11)
    assert "val/acc" not in results
    assert steps(run, "test/acc") == [11]


def test_a_distorted_run_shows_its_distortions_and_repeats(
    run_cli: RunCLI, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = ["--data.distortions.rotation=5", "--model.learning_rate_schedule=one_cycle", "--trainer.max_epochs=2"]
    recipe.append("--trainer.log_every_n_steps=5")
    assert run_cli("fit", *recipe) == 0
    assert run_cli("fit", "--config=lightning_logs/version_0/config.yaml", data=False) == 0
    run, again = (tmp_path / "lightning_logs" / f"version_{i}" for i in (0, 1))
    assert_the_same(run, again)
    assert (run / "figures/distortions.png").is_file()
    (figure,) = events(run).Images("figures/distortions")
    assert figure.step == 0
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["data"]["distortions"]["rotation"] == 5
    assert config["data"]["distortions"]["elastic"] == 20
    rates = [event.value for event in events(run).Scalars("train/learning_rate")]
    assert len(rates) == 4
    assert max(rates[:2]) > max(rates[2:])

    assert run_cli("fit", *recipe, "--trainer.max_epochs=3", "--ckpt_path=last") == 2
    error = capsys.readouterr().err
    assert "is for 33 iterations, that of the checkpoint for 22 iterations; give the same" in error


def test_the_users_progress_bar_replaces_ours(run_cli: RunCLI) -> None:
    assert run_cli("fit", "--trainer.max_epochs=1", "--trainer.callbacks+=TQDMProgressBar") == 0


def test_the_csv_logger_gets_the_same_metrics(run_cli: RunCLI, tmp_path: Path) -> None:
    settings = ["--trainer.max_epochs=2", "--trainer.log_every_n_steps=5"]
    assert run_cli("fit", *settings) == 0
    assert run_cli("fit", *settings, "--trainer.logger=CSVLogger", "--trainer.logger.save_dir=csv") == 0
    run = tmp_path / "lightning_logs/version_0"
    with (tmp_path / "csv/lightning_logs/version_0/metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    tags = set(events(run).Tags()["scalars"])
    assert tags < rows[0].keys()
    for tag in tags - {"train/examples_per_second"}:
        logged = {int(row["step"]): float(row[tag]) for row in rows if row[tag]}
        assert logged == pytest.approx({event.step: event.value for event in events(run).Scalars(tag)}, rel=1e-4)


def test_without_a_logger_or_checkpoints_it_still_runs(run_cli: RunCLI) -> None:
    assert (
        run_cli("fit", "--trainer.max_epochs=1", "--trainer.logger=false", "--trainer.enable_checkpointing=false") == 0
    )


def test_fast_dev_run_leaves_nothing_behind(run_cli: RunCLI, tmp_path: Path) -> None:
    assert run_cli("fit", "--trainer.fast_dev_run=true") == 0
    assert not list(tmp_path.iterdir())


def test_data_prints_what_the_tutorial_prints(
    run_cli: RunCLI, tmp_path: Path, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_cli("data") == 0
    out = capsys.readouterr().out
    assert "Training: 1,050 digits, images (1050, 784), labels (1050,)" in out
    assert "Test: 230 digits" in out
    data = MNISTDataModule("synthetic", str(root))
    data.setup("fit")
    label = int(data.val[1][0])
    assert f"  {label}: {' '.join('1' if i == label else '0' for i in range(10))}" in out
    assert (tmp_path / "digits.png").stat().st_size > 10_000


def test_the_progress_bar_counts_iterations(root: Path) -> None:
    from mnist_lightning.callbacks import IterationProgressBar

    seen = []

    class Spy(IterationProgressBar):
        def _update(self, progress_bar_id: Any, current: int, visible: bool = True, hard: bool = False) -> None:
            if self.trainer.training:
                seen.append((current, self.total_train_batches))

    trainer = Trainer(
        accelerator="cpu", max_epochs=2, logger=False, enable_checkpointing=False, callbacks=[Spy()],
        enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(MNISTClassifier(), datamodule=MNISTDataModule("synthetic", str(root), 100, 4, 200))
    assert seen == [(4, 11), (8, 11), (11, 11)] * 2
