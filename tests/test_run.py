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
import torch.nn.functional as F
import yaml
from conftest import SMALL, VAL_SIZE, RunCLI, assert_the_same, everything, prepare, slow
from lightning.pytorch.callbacks import Callback, RichProgressBar
from lightning.pytorch.loggers import CSVLogger
from matplotlib.figure import Figure
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_loop import Foreign, fit, loader
from test_resume import TestLater
from torch import Tensor
from torch.optim import AdamW
from torch.optim.lr_scheduler import OneCycleLR

from mnist_lightning import MNISTClassifier, MNISTDataModule, Trainer, commands, datamodule
from mnist_lightning.digits import files, idx, plots
from mnist_lightning.digits.predictions import PredictionWriter
from mnist_lightning.distortions import Distortions
from mnist_lightning.engine.report import Report
from mnist_lightning.figures import Figures
from mnist_lightning.model import MLP

CONFIGS = Path(__file__).parent.parent / "configs"


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
        (kind,) = (words for words in ("misclassified", "correct", "why it read that") if words in heading)
        drawn[kind] = images, titles
        assert "stand-in digits (not MNIST)" in heading
        return draw(images, titles, heading)

    monkeypatch.setattr(plots, "digit_grid", record)
    return drawn


@pytest.mark.figures
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
        *("train/learning_rate", "train/examples_per_second", "epoch"),
    }
    # Lightning's own steps, which count from 0.
    for curve in ("loss", "acc", "learning_rate", "examples_per_second"):
        assert steps(run, f"train/{curve}") == [4, 9, 14, 19, 24, 29]
    assert all(event.value == pytest.approx(0.001) for event in events(run).Scalars("train/learning_rate"))
    assert steps(run, "val/loss") == steps(run, "val/acc") == [10, 21, 32]
    points = [(event.step, event.value) for event in events(run).Scalars("epoch")]
    assert points == [(step, step // 11) for step in (4, 9, 10, 14, 19, 21, 24, 29, 32)]
    # The test stands right below the validation of the same weights.
    val_acc = [event.value for event in events(run).Scalars("val/acc")]
    (tested,) = steps(run, "test/loss")
    assert [tested] == steps(run, "test/acc") == [10 + 11 * val_acc.index(max(val_acc))]
    assert events(run).Tags()["graph"]
    names = {"correct", "misclassified", "confusion_matrix", "training_curves", "network", "weights", "why"}
    assert set(events(run).Tags()["images"]) == {f"figures/{name}" for name in names}
    assert {path.name for path in (run / "figures").iterdir()} == {f"{name}.png" for name in names}
    logged = events(run)
    for name in names:
        (shown,) = logged.Images(f"figures/{name}")
        assert shown.step == tested
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
    assert results["val/acc"] == pytest.approx(max(val_acc))
    assert results["test/acc"] == pytest.approx(events(run).Scalars("test/acc")[0].value)

    for name, epochs in {"best": val_acc.index(max(val_acc)) + 1, "last": 3}.items():
        checkpoint = torch.load(run / "checkpoints" / f"{name}.ckpt", weights_only=True)
        assert checkpoint["global_step"] == 11 * epochs
        assert checkpoint["datamodule_hyper_parameters"]["dataset"] == "synthetic"
        # Those of the console count from 1.
        history = checkpoint["callbacks"]["Report"]
        assert [row[0] for row in history["train"]] == [n for n in (5, 10, 15, 20, 25, 30) if n <= 11 * epochs]
        assert [row[0] for row in history["val"]] == [11, 22, 33][:epochs]
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
    pixels, labels = prepare("synthetic", root).test
    images = pixels.float() / 255
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


class Breaks(Callback):
    """Interrupts the first test and the first prediction at their second minibatch."""

    def __init__(self) -> None:
        self.broken: set[str] = set()

    def on_test_batch_end(self, *args: Any) -> None:
        self._once("test", args[4])

    def on_predict_batch_end(self, *args: Any) -> None:
        self._once("predict", args[4])

    def _once(self, what: str, batch_idx: int) -> None:
        if batch_idx == 1 and what not in self.broken:
            self.broken.add(what)
            raise RuntimeError("interrupted")


def test_one_that_broke_off_leaves_nothing_to_the_next(
    data: MNISTDataModule, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datamodule, "EVAL_BATCH_SIZE", 50)
    counted: list[int] = []
    draw = plots.confusion_matrix

    def count(counts: Tensor, heading: str) -> Figure:
        counted.append(int(counts.sum()))
        return draw(counts, heading)

    monkeypatch.setattr(plots, "confusion_matrix", count)
    trainer = Trainer(
        accelerator="cpu",
        logger=CSVLogger(tmp_path, "", ""),
        callbacks=[Figures(), PredictionWriter(), Breaks()],
        enable_checkpointing=False,
        enable_progress_bar=False,
    )
    model = MNISTClassifier(8)
    for command in (trainer.test, trainer.predict):
        with pytest.raises(RuntimeError, match="interrupted"):
            command(model, datamodule=data)
        command(model, datamodule=data)
    assert counted == [SMALL["t10k"]]
    _, *rows = csv.reader((tmp_path / "predictions.csv").read_text().splitlines())
    with torch.no_grad():
        digits = model.eval()(data.test[0].float() / 255).argmax(1).tolist()
    assert [row[:2] for row in rows] == [[str(image), str(digit)] for image, digit in enumerate(digits)]


class OnlyTestLoss(Foreign):
    """It measures no accuracy, as a regression does."""

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test/loss", self.loss(batch))


def test_a_report_of_a_module_without_accuracies(tmp_path: Path) -> None:
    run = fit(Trainer, tmp_path / "run", OnlyTestLoss, TestLater, lambda: [Report()], {})
    run.trainer.validate(run.module, datamodule=run.trainer.datamodule, verbose=False)  # type: ignore[attr-defined]
    run.trainer.test(run.module, datamodule=run.trainer.datamodule, verbose=False)  # type: ignore[attr-defined]
    assert "test/loss" in run.trainer.callback_metrics
    results = json.loads((tmp_path / "run/results.json").read_text())
    assert results["iterations"] == 22
    assert "test/acc" not in results


def test_a_report_where_loaders_are_given_to_fit(tmp_path: Path) -> None:
    run = fit(Trainer, tmp_path / "run", OnlyTestLoss, loader, lambda: [Report()], {})
    run.trainer.test(run.module, loader(shuffle=False), verbose=False)
    assert json.loads((tmp_path / "run/results.json").read_text())["iterations"] == 22


@pytest.mark.figures
@pytest.mark.parametrize("count", [0, 1, 9, 12])
def test_digit_grids_of_any_size_draw(count: int, tmp_path: Path) -> None:
    images = torch.rand(count, 784)
    figure = plots.digit_grid(images, [f"True: {i}" for i in range(count)], "heading")
    figure.savefig(tmp_path / "figure.png")
    (axes,) = figure.axes
    titles = [text.get_text() for text in axes.texts]
    assert titles == ([f"True: {i}" for i in range(min(count, 9))] or ["none"])
    for index, image in enumerate(images[:9]):
        row, column = divmod(index, 3)
        grid = axes.images[0].get_array()
        assert grid is not None
        shown = grid[row * 33 + 5 : (row + 1) * 33, column * 30 + 1 : column * 30 + 29]
        assert (shown == image.view(28, 28).numpy()).all(), index


@pytest.mark.figures
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
    # A run from Python, which leaves checkpoints of other names, is not meant.
    (tmp_path / "lightning_logs/version_1/checkpoints").mkdir(parents=True)
    (tmp_path / "lightning_logs/version_1/checkpoints/epoch=1-step=22.ckpt").touch()
    test_line = capsys.readouterr().out.splitlines()[-3]
    assert run_cli("test", "--ckpt_path=best") == 0
    assert test_line in capsys.readouterr().out.splitlines()
    assert run_cli("validate", "--ckpt_path=last") == 0
    assert re.search(r"^Validation loss: \d\.\d\d, validation accuracy: \d+\.\d%$", capsys.readouterr().out, re.M)
    assert run_cli("predict", "--ckpt_path=best") == 0
    with (tmp_path / "lightning_logs/version_4/predictions.csv").open() as file:
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
    settings = ["--trainer.log_every_n_steps=2"]
    assert run_cli("fit", "--trainer.max_epochs=4", *settings) == 0
    assert run_cli("fit", "--trainer.max_epochs=2", *settings) == 0
    assert run_cli("fit", "--trainer.max_epochs=4", "--ckpt_path=last", *settings) == 0
    assert_same_training(load(whole), load(half))
    assert steps(half, "val/acc") == steps(whole, "val/acc") == [10, 21, 32, 43]
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
    settings = ["--trainer.limit_train_batches=9", "--trainer.max_epochs=3", "--test_after_fit=false"]
    assert run_cli("fit", *settings, *saves) == 0
    checkpoint = f"--ckpt_path=mine/step={3 * every}.ckpt"
    # What Lightning visits, and how, has no part in it.
    for others in ([], ["--trainer.log_every_n_steps=2"], ["--trainer.fast=false"]):
        assert run_cli("fit", *settings, *saves, checkpoint, *others) == 0
    whole, *resumed = (load(tmp_path / f"lightning_logs/version_{i}") for i in range(4))
    assert whole["global_step"] == 27
    for run in resumed:
        assert_same_training(whole, run)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", [[], ["--data.distortions=true", "--model.dropout=0.2"]])
def test_a_run_that_max_steps_ended_in_mid_epoch_goes_on_exactly(
    run_cli: RunCLI, tmp_path: Path, capsys: pytest.CaptureFixture[str], recipe: list[str]
) -> None:
    settings = ["--trainer.log_every_n_steps=5", "--trainer.max_epochs=4", "--test_after_fit=false", *recipe]
    assert run_cli("fit", *settings) == 0
    assert run_cli("fit", *settings, "--trainer.max_steps=17") == 0
    whole, parts = (tmp_path / "lightning_logs" / f"version_{i}" for i in (0, 1))
    assert load(parts)["global_step"] == 17
    assert json.loads((parts / "results.json").read_text())["iterations"] == 17
    ended = (parts / "checkpoints/last.ckpt").read_bytes()
    capsys.readouterr()
    assert run_cli("fit", "--ckpt_path=last") == 0
    done = "This run is done, at iteration 17; to train longer, give a larger --trainer.max_steps"
    assert capsys.readouterr().out.splitlines()[0] == done
    assert (parts / "checkpoints/last.ckpt").read_bytes() == ended
    assert run_cli("fit", "--trainer.max_steps=30", "--ckpt_path=last") == 0
    assert load(parts)["global_step"] == 30
    assert run_cli("fit", "--trainer.max_steps=-1", "--ckpt_path=last") == 0
    assert_the_same(whole, parts)


def test_last_is_saved_at_multiples_of_checkpoint_every(
    run_cli: RunCLI, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved, save = [], Trainer.save_checkpoint

    def note(trainer: Trainer, path: Path, *arguments: Any, **settings: Any) -> None:
        saved.append((Path(path).stem, trainer.global_step))
        save(trainer, path, *arguments, **settings)

    monkeypatch.setattr(Trainer, "save_checkpoint", note)
    assert run_cli("fit", "--trainer.max_epochs=2", "--checkpoint_every=4", "--test_after_fit=false") == 0
    assert [step for name, step in saved if name == "last"] == [0, 4, 8, 11, 12, 16, 20, 22]


def as_older_version(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """The same checkpoint as the older version of this program, with `steps_per_execution`, would have saved it."""
    older = {key: value for key, value in checkpoint.items() if key != "iterations_per_epoch"}
    fit_loop = older["loops"]["fit_loop"]
    done = checkpoint["global_step"]
    fit_loop["state_dict"] = {"combined_loader": [{"done": 0, "steps_per_execution": 50}]}
    fit_loop["epoch_loop.automatic_optimization.optim_progress"] = {
        "optimizer": {
            "step": {key: {"ready": 0, "completed": 0} for key in ("total", "current")},
            "zero_grad": {key: {"ready": 0, "completed": 0, "started": 0} for key in ("total", "current")},
        }
    }
    fit_loop["epoch_loop.manual_optimization.optim_step_progress"] = {
        key: {"ready": done, "completed": done} for key in ("total", "current")
    }
    weights = older["state_dict"]
    older["state_dict"] = {name: value for name, value in weights.items() if name.startswith("mlp.")}
    history = older["callbacks"]["Report"]
    older["callbacks"] = {
        "Report": {key: history[key] for key in ("train", "val", "train_seconds")},
        "BestAndLast": older["callbacks"]["BestAndLast"],
    }
    older["datamodule_hyper_parameters"] |= {"steps_per_execution": 50}
    older["MNISTDataModule"] |= {"iterations_per_epoch": 11}
    older["rng_states"] = torch.get_rng_state()[None]
    return older


def test_checkpoints_of_the_older_version_are_read_but_not_resumed(
    run_cli: RunCLI, tmp_path: Path, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_cli("fit", "--trainer.max_epochs=2", "--model.hidden_dim=17", "--test_weights=last") == 0
    run = tmp_path / "lightning_logs/version_0"
    tested = capsys.readouterr().out.splitlines()[-3]
    older = as_older_version(load(run))
    for name in ("last", "best"):
        torch.save(older, run / f"checkpoints/{name}.ckpt")
    left = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}

    config = ["--config", str(run / "config.yaml")]
    for command in (["--ckpt_path=last"], [*config, "--ckpt_path=best"], [f"--ckpt_path={run}/checkpoints/last.ckpt"]):
        assert run_cli("fit", "--trainer.max_epochs=3", *command) == 2
        error = capsys.readouterr().err
        assert error.startswith("mnist_lightning: ckpt_path: the checkpoint is of an older version of this program")
        assert error.count("\n") == 1
        assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == left
        assert [path.name for path in run.parent.iterdir()] == ["version_0"]

    assert run_cli("test", "--ckpt_path=last") == 0
    captured = capsys.readouterr()
    assert not captured.err
    assert (
        captured.out.splitlines()[0]
        == "Weights of iteration 22, trained on synthetic: lightning_logs/version_0/checkpoints/last.ckpt"
    )
    assert tested in captured.out.splitlines()
    assert run_cli("predict", "--ckpt_path=last") == 0
    picture = Image.fromarray(255 - prepare("synthetic", root).test[0][0].view(28, 28).numpy())
    picture.resize((112, 112)).save(tmp_path / "digit.png")
    for arguments in (["read", "digit.png"], ["demo", "--no-open"]):
        assert run_cli(*arguments, data=False) == 0
        assert "stand-in digits (not MNIST), 22 iterations" in capsys.readouterr().out
    assert run_cli("export", "--format=torchscript") == 0


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


@pytest.mark.figures
@pytest.mark.parametrize("precision", ["bf16-mixed", slow("64-true"), slow("bf16-true")])
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
    best = "lightning_logs/version_0/checkpoints/best.ckpt"
    assert out[:2] == [f"Weights of iteration 11, trained on stand-in digits (not MNIST): {best}", "Reading MNIST"]
    run = tmp_path / "lightning_logs/version_1"
    results = json.loads((run / "results.json").read_text())
    assert (results["dataset"], results["iterations"]) == ("mnist", 11)
    assert "val/acc" not in results
    assert steps(run, "test/acc") == [10]


@pytest.mark.figures
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


def test_the_columns_and_steps_of_the_csv_logger(run_cli: RunCLI, tmp_path: Path) -> None:
    settings = ["--trainer.max_epochs=2", "--trainer.log_every_n_steps=5", "--test_weights=last"]
    assert run_cli("fit", *settings, "--trainer.logger", "CSVLogger", "--trainer.logger.save_dir", ".") == 0
    with (tmp_path / "lightning_logs/version_0/metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    train = {"epoch", "train/loss", "train/acc", "train/learning_rate", "train/examples_per_second"}
    val, test = {"epoch", "val/loss", "val/acc"}, {"test/loss", "test/acc"}
    assert rows[0].keys() == {"step"} | train | val | test
    filled = [(int(row.pop("step")), {name for name, value in row.items() if value}) for row in rows]
    assert filled == [(4, train), (9, train), (10, val), (14, train), (19, train), (21, val), (21, test)]
    assert [row["epoch"] for row in rows] == ["0", "0", "0", "1", "1", "1", ""]


def test_without_a_logger_or_checkpoints_it_still_runs(run_cli: RunCLI) -> None:
    assert (
        run_cli("fit", "--trainer.max_epochs=1", "--trainer.logger=false", "--trainer.enable_checkpointing=false") == 0
    )


def test_fast_dev_run_leaves_nothing_behind(run_cli: RunCLI, tmp_path: Path) -> None:
    assert run_cli("fit", "--trainer.fast_dev_run=true") == 0
    assert not list(tmp_path.iterdir())


@pytest.mark.figures
def test_data_prints_what_the_tutorial_prints(
    run_cli: RunCLI,
    tmp_path: Path,
    root: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(commands, "VAL_SIZE", VAL_SIZE)
    assert run_cli("data") == 0
    out = capsys.readouterr().out
    assert "Training: 1,050 digits, images (1050, 784), labels (1050,)" in out
    assert "Test: 230 digits" in out
    data = prepare("synthetic", root)
    label = int(data.val[1][0])
    assert f"  {label}: {' '.join('1' if i == label else '0' for i in range(10))}" in out
    assert (tmp_path / "digits.png").stat().st_size > 10_000


def test_the_progress_bar_counts_iterations(data: MNISTDataModule) -> None:
    seen = []

    class Spy(RichProgressBar):
        def _update(self, progress_bar_id: Any, current: int, visible: bool = True, hard: bool = False) -> None:
            if self.trainer.training:
                seen.append((current, self.total_train_batches))

    trainer = Trainer(
        accelerator="cpu", max_epochs=2, logger=False, enable_checkpointing=False, callbacks=[Spy()],
        enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(MNISTClassifier(), datamodule=data)
    # How many are shown in between is up to the clock.
    epochs = [seen[: seen.index((11, 11)) + 1], seen[seen.index((11, 11)) + 1 :]]
    for epoch in epochs:
        assert epoch == sorted(set(epoch))
        assert epoch[-1] == (11, 11)


def test_lightnings_own_loop_gives_the_same(run_cli: RunCLI, tmp_path: Path) -> None:
    settings = ["--trainer.max_epochs=2", "--trainer.log_every_n_steps=3", "--checkpoint_every=5"]
    for others in ([], ["--data.distortions=true", "--model.dropout=0.2", "--model.learning_rate_schedule=one_cycle"]):
        assert run_cli("fit", *settings, *others) == 0
        assert run_cli("fit", *settings, *others, "--trainer.fast", "false") == 0
    runs = [tmp_path / "lightning_logs" / f"version_{i}" for i in range(4)]
    assert [yaml.safe_load((run / "config.yaml").read_text())["trainer"]["fast"] for run in runs] == [True, False] * 2
    assert_the_same(*runs[:2])
    assert_the_same(*runs[2:])


def plain_loop(
    root: Path, epochs: int, *, rate: float, decay: float = 0, one_cycle: bool = False, distorted: bool = False,
    clip: float = 0, accumulate: int = 1,
) -> tuple[MLP, AdamW]:  # fmt: skip
    """The recipe of a run, without this project's engine: the order, the noise, the loss and the steps."""
    images, labels = idx.load(root / "synthetic/raw", "train")
    images, labels = images[VAL_SIZE:], labels[VAL_SIZE:]
    torch.manual_seed(5)
    mlp = MLP(20)
    optimizer = AdamW(mlp.parameters(), lr=rate, weight_decay=decay, fused=True)
    per_epoch = -(-len(labels) // 100)
    schedule = OneCycleLR(optimizer, rate, total_steps=epochs * per_epoch, cycle_momentum=False) if one_cycle else None
    for epoch in range(epochs):
        shuffle, *seeds = map(int, np.random.SeedSequence((5, epoch)).generate_state(1 + per_epoch))
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(shuffle))
        for number, (index, seed) in enumerate(zip(order.split(100), seeds, strict=True), 1):
            batch = images.index_select(0, index).float() / 255
            if distorted:
                noise = torch.empty(len(index), Distortions.draws)
                batch = Distortions()(batch, noise.uniform_(-1, 1, generator=torch.Generator().manual_seed(seed)))
            loss = F.cross_entropy(mlp(batch), labels.index_select(0, index))
            (loss / accumulate).backward()
            if number % accumulate and number < per_epoch:
                continue
            if clip:
                assert torch.nn.utils.clip_grad_norm_(mlp.parameters(), clip) > clip
            optimizer.step()
            optimizer.zero_grad()
            if schedule:
                schedule.step()
    return mlp, optimizer


@pytest.mark.parametrize(
    ("arguments", "recipe"),
    [
        ([], {}),
        (
            ["--model.learning_rate_schedule=one_cycle", "--model.weight_decay=0.1"],
            {"decay": 0.1, "one_cycle": True},
        ),
        (["--data.distortions=true"], {"distorted": True}),
        (
            ["--data.distortions=true", "--model.learning_rate_schedule=one_cycle", "--model.weight_decay=0.03"],
            {"distorted": True, "one_cycle": True, "decay": 0.03},
        ),
        (["--trainer.gradient_clip_val=0.02"], {"clip": 0.02}),
        (["--trainer.accumulate_grad_batches=3"], {"accumulate": 3}),
        (["--trainer.gradient_clip_val=0.02", "--trainer.accumulate_grad_batches=2"], {"clip": 0.02, "accumulate": 2}),
    ],
    ids=["default", "one_cycle", "distorted", "distorted one_cycle", "clipped", "accumulated", "both"],
)
@pytest.mark.parametrize("fast", ["true", "false"])
def test_a_run_is_the_plain_loop_bit_for_bit(
    run_cli: RunCLI, tmp_path: Path, root: Path, arguments: list[str], recipe: dict[str, Any], fast: str
) -> None:
    settings = ["--trainer.max_epochs=3", "--model.hidden_dim=20", "--model.learning_rate=0.003", "--seed_everything=5"]
    settings += ["--test_after_fit=false", "--trainer.log_every_n_steps=4", f"--trainer.fast={fast}"]
    assert run_cli("fit", *settings, *arguments) == 0
    mlp, optimizer = plain_loop(root, 3, rate=0.003, **recipe)
    last = load(tmp_path / "lightning_logs/version_0")
    weights = {name: value for name, value in last["state_dict"].items() if name.startswith("mlp.")}
    assert weights.keys() == {f"mlp.{name}" for name in mlp.state_dict()}
    assert [name for name, value in mlp.state_dict().items() if not torch.equal(value, weights[f"mlp.{name}"])] == []
    expected, found = optimizer.state_dict()["state"], last["optimizer_states"][0]["state"]
    for index, state in expected.items():
        assert all(torch.equal(value, found[index][name]) for name, value in state.items())
    assert last["global_step"] == {1: 33, 2: 18, 3: 12}[recipe.get("accumulate", 1)]


def test_clipping_and_accumulating_change_the_run(run_cli: RunCLI, tmp_path: Path) -> None:
    changes: list[list[str]] = [[], ["--trainer.gradient_clip_val=0.02"], ["--trainer.accumulate_grad_batches=2"]]
    for change in changes:
        assert run_cli("fit", "--trainer.max_epochs=1", "--model.hidden_dim=20", *change) == 0
    weights = [load(tmp_path / f"lightning_logs/version_{i}")["state_dict"]["mlp.output.weight"] for i in range(3)]
    assert len({tuple(weight.flatten().tolist()) for weight in weights}) == 3
    # Console lines and curves count optimizer steps from 1.
    accumulated = everything(tmp_path / "lightning_logs/version_2")["last: progress"]
    assert accumulated[0] == 6
    assert all(row[0] > 0 for row in accumulated[2])


def test_overfitting_leaves_distortions_out(run_cli: RunCLI, tmp_path: Path) -> None:
    settings = ["--trainer.max_epochs=3", "--trainer.overfit_batches=2", "--model.hidden_dim=20"]
    for distortions in ("false", "true"):
        assert run_cli("fit", *settings, f"--data.distortions={distortions}") == 0
    plain, distorted = (load(tmp_path / f"lightning_logs/version_{i}") for i in (0, 1))
    assert plain["global_step"] == 6
    assert_same_training(plain, distorted)


@pytest.mark.parametrize("config", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_what_the_configs_evaluate(run_cli: RunCLI, monkeypatch: pytest.MonkeyPatch, config: Path) -> None:
    """Images of validation and test, on files as large as MNIST's; one process on a CPU in place of what it names."""
    sizes = {"train": 60_000, "t10k": 10_000}
    monkeypatch.setattr(files, "get", lambda dataset, root: root / "MNIST/raw")
    blank = {file: (torch.zeros(size, 784, dtype=torch.uint8), torch.arange(size) % 10) for file, size in sizes.items()}
    monkeypatch.setattr(idx, "load", lambda raw, file: blank[file])
    counts = {"validation_step": 0, "test_step": 0}

    def counting(name: str, step: Any) -> Any:
        def count(module: MNISTClassifier, batch: tuple[Tensor, Tensor], batch_idx: int) -> Any:
            counts[name] += len(batch[1])
            return step(module, batch, batch_idx)

        return count

    for name in counts:
        monkeypatch.setattr(MNISTClassifier, name, counting(name, getattr(MNISTClassifier, name)))
    short = ["--trainer.max_epochs=1", "--trainer.limit_train_batches=2", "--trainer.accelerator=cpu"]
    short += ["--trainer.devices=1", "--trainer.strategy=auto"]
    assert run_cli("fit", "--config", str(config), *short, data=False) == 0
    whole = config.stem != "tutorial"
    assert counts == {"validation_step": 5000 if whole else 1000, "test_step": 10_000 if whole else 1000}
