"""The report: console lines and `results.json`, whatever is trained."""

import re
from pathlib import Path
from typing import Any

import pytest
from conftest import RUN, RunCLI, events, results, steps
from engine.test_loop import Foreign, fit, loader
from torchmetrics.classification import MulticlassAccuracy

from mnist_lightning import MNISTClassifier, Trainer
from mnist_lightning.engine.report import Report


class OtherNames(MNISTClassifier):
    """Lightning's own names, some by the step and by the epoch; no accuracy, as a regression has none."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.measure(batch)[1]
        self.log("train_loss", loss, on_epoch=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("valid_loss", self.measure(batch)[1], on_step=True)

    def test_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        self.log_dict({"test_loss": self.measure(batch)[1], "step_size": 3.0})


@pytest.mark.parametrize("weights", ["best", "last"])
def test_metrics_of_any_name_are_printed_and_kept(
    run_cli: RunCLI, capsys: pytest.CaptureFixture[str], weights: str
) -> None:
    settings = ["--trainer.max_epochs=2", "--monitor=valid_loss", "--mode=min", f"--test_weights={weights}"]
    assert run_cli("fit", *settings, "--trainer.log_every_n_steps=10", classes=(OtherNames,)) == 0
    said, found = capsys.readouterr().out, results(RUN)
    assert [*found][8:-1] == ["valid_loss", "test_loss", "step_size"]
    assert re.findall(r"(?m)^iter (\d+): train_loss: [\d.]+$", said) == ["10", "20"]
    assert f"\nEpoch: 2, valid_loss: {found['valid_loss']:.3g}\n" in said
    assert f"\ntest_loss: {found['test_loss']:.3g}, step_size: 3\n" in said
    assert run_cli("validate", "--ckpt_path=best", classes=(OtherNames,)) == 0
    assert f"\nvalid_loss: {found['valid_loss']:.3g}\n" in capsys.readouterr().out


def test_a_loader_that_is_given_to_fit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fit(Trainer, tmp_path / "run", Foreign, loader, lambda: [Report()], {})
    assert results(tmp_path / "run")["iterations"] == 22
    assert re.match(r"Training on the given loader; 123 parameters on cpu, \d", capsys.readouterr().out)


class ByTheEpoch(MNISTClassifier):
    """Its accuracy is that of the whole epoch, in a metric of torchmetrics'."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.accuracy = MulticlassAccuracy(10)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        logits, loss, _ = self.measure(batch)
        self.accuracy(logits, batch[1])
        self.log("train/loss", loss)
        self.log("train/acc", self.accuracy, on_step=False, on_epoch=True)
        return loss


def test_an_accuracy_of_the_last_epoch_is_not_taken_for_that_of_an_iteration(
    run_cli: RunCLI, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = ["--trainer.max_epochs=2", "--trainer.log_every_n_steps=5", "--model.hidden_dim=8"]
    assert run_cli("fit", *settings, classes=(ByTheEpoch,)) == 0
    printed = re.findall(r"(?m)^iter (\d+): train/loss: [\d.]+$", out := capsys.readouterr().out)
    assert (printed, out.count("iter ")) == (["5", "10", "15", "20"], 4)
    assert steps(RUN, "train/loss") == [4, 9, 14, 19]
    assert len(steps(RUN, "train/acc")) == 2


def test_a_run_shorter_than_a_logging_interval_has_no_training_curve(
    run_cli: RunCLI, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = ["--trainer.max_epochs=2", "--model.hidden_dim=8"]
    assert run_cli("fit", *settings, "--trainer.log_every_n_steps=23") == 0
    out, err = capsys.readouterr()
    assert "iter " not in out
    assert err == ""
    assert "train/loss" not in events(RUN).Tags()["scalars"]
    assert not (RUN / "figures/training_curves.png").exists()


def test_which_weights_are_tested(run_cli: RunCLI) -> None:
    rate = "--model.learning_rate=0.1"  # so high that the best epoch is rarely the last
    assert run_cli("fit", "--trainer.max_epochs=3", "--test_weights=last", rate) == 0
    assert run_cli("fit", "--trainer.max_epochs=2", "--test_after_fit=false", rate) == 0
    curve = [event.value for event in events(RUN).Scalars("val/acc")]
    assert results(RUN)["val/acc"] == pytest.approx(curve[-1])
    assert curve[-1] < max(curve), "the test needs another seed"
    untested = RUN.with_name("version_1")
    assert "test/acc" not in results(untested)
    assert not (untested / "figures").exists()
    assert run_cli("fit", "--trainer.max_epochs=3", "--ckpt_path=last", "--test_after_fit=true") == 0
    best = max(event.value for event in events(untested).Scalars("val/acc"))
    assert results(untested)["val/acc"] == pytest.approx(best)


@pytest.mark.parametrize("weights", ["best", "last"])
def test_a_moving_average_is_validated_saved_and_tested(run_cli: RunCLI, weights: str) -> None:
    averages = "--trainer.callbacks=EMAWeightAveraging", "--trainer.callbacks.decay=0.5"
    assert run_cli("fit", "--trainer.max_epochs=2", *averages, f"--test_weights={weights}") == 0
    assert run_cli("test", f"--ckpt_path={weights}") == 0
    run, again = results(RUN), results(RUN.with_name("version_1"))
    for name in ("val/loss", "val/acc", "test/loss", "test/acc"):
        assert run[name] == pytest.approx(again[name], abs=1e-6), name


def test_an_average_that_nobody_validated_is_not_paired_with_another_networks_validation(run_cli: RunCLI) -> None:
    averages = ["--trainer.callbacks=StochasticWeightAveraging", "--trainer.callbacks.swa_lrs=0.01"]
    averages.append("--trainer.callbacks.swa_epoch_start=1")
    for weights in ("last", "best"):
        assert run_cli("fit", "--trainer.max_epochs=2", *averages, f"--test_weights={weights}") == 0
    last, best = results(RUN), results(RUN.with_name("version_1"))
    assert "test/acc" in last
    assert "val/acc" not in last
    assert "val/acc" in best
    assert last["test/loss"] != best["test/loss"]
