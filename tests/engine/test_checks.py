"""What cannot be resumed exactly is refused in one line, and so is a checkpoint whose values are in the wrong place."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from conftest import RunCLI, load
from engine.test_loop import Foreign, Settings, differences, fit, loader
from engine.test_resumption import every, resume, saver
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import StochasticWeightAveraging
from PIL import Image

from mnist_lightning import Trainer
from mnist_lightning.engine.checks import Checks
from mnist_lightning.engine.runs import RunLock

Checkpoint = dict[str, Any]


def checked() -> list[pl.Callback]:
    return [Checks(RunLock())]


# Another run


class UsesSGD(Foreign):
    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


class TwoOptimizers(Foreign):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def configure_optimizers(self) -> Any:
        return [super().configure_optimizers(), UsesSGD.configure_optimizers(self)]  # type: ignore[arg-type]


class OneCycle(Foreign):
    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Cosine(Foreign):
    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=self.trainer.max_epochs or 1)]


SCHEDULE = "the schedule of the learning rate is"
STEPS = re.escape("lr_schedulers[0].total_steps")


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        (Foreign, UsesSGD, "the optimizer is SGD, but the checkpoint was trained with Adam; give the same"),
        (UsesSGD, Foreign, "the optimizer is Adam, but the checkpoint was trained with SGD"),
        (Foreign, TwoOptimizers, "the optimizer is Adam, SGD, but the checkpoint was trained with Adam"),
        (Foreign, OneCycle, f"{SCHEDULE} OneCycleLR, but the checkpoint was trained with none; give the same"),
        (OneCycle, Foreign, f"{SCHEDULE} none, but the checkpoint was trained with OneCycleLR"),
        (OneCycle, OneCycle, f"{STEPS} is 33, but the checkpoint was trained with 22; give the same schedule, max_ep"),
        (Cosine, Cosine, "T_max is 3, but the checkpoint was trained with 2"),
    ],
)
def test_another_run_is_refused(first: Any, second: Any, message: str, tmp_path: Path) -> None:
    fit(Trainer, tmp_path / "first", first, loader, checked, {})
    with pytest.raises(MisconfigurationException, match=message):
        resume(tmp_path / "2nd", second, loader, {"more": checked, "max_epochs": 3}, tmp_path / "first/end.ckpt")


def test_averaging_of_epochs_is_resumed_between_epochs_only(tmp_path: Path) -> None:
    def averaging() -> list[Any]:
        ends = saver("end of {epoch}", save_on_train_epoch_end=True)
        return [*checked(), StochasticWeightAveraging(0.01, 2), every(5), ends]

    settings: Settings = {"max_epochs": 4, "enable_checkpointing": True}
    whole = fit(Trainer, tmp_path / "whole", Foreign, loader, averaging, settings)
    for file in (tmp_path / "whole/checkpoints").iterdir():
        resuming = tmp_path / file.stem, Foreign, loader, settings | {"more": averaging}, file
        if "step" in file.name:
            with pytest.raises(MisconfigurationException, match="StochasticWeightAveraging cannot be resumed in mid-"):
                resume(*resuming)
        elif "epoch=3" not in file.name:
            assert differences(whole.module.state_dict(), resume(*resuming).module.state_dict()) == [], file


def test_a_run_is_resumed_with_the_batch_size_that_lightnings_finder_has_found(run_cli: RunCLI) -> None:
    finder = ["--trainer.callbacks+=BatchSizeFinder", "--trainer.callbacks.init_val=64"]
    assert run_cli("fit", "--trainer.max_epochs=1", *finder, "--trainer.callbacks.max_trials=2") == 0
    assert load(Path("lightning_logs/version_0"))["datamodule_hyper_parameters"]["batch_size"] > 100
    assert run_cli("fit", "--trainer.max_epochs=2", "--ckpt_path=last") == 0


# Values in the wrong place


@pytest.fixture
def five_steps(run_cli: RunCLI, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of five steps of 7 hidden units, trained once for all tests."""
    path = tmp_path_factory.getbasetemp() / "five_steps.ckpt"
    if not path.exists():
        assert run_cli("fit", "--trainer.max_steps=5", "--model.hidden_dim=7", "--test_after_fit=false") == 0
        Path("lightning_logs/version_0/checkpoints/last.ckpt").rename(path)
        shutil.rmtree("lightning_logs")
    return path


def listed(checkpoint: Checkpoint, names: list[Any]) -> None:
    """Name the parameters of the optimizer's group."""
    checkpoint["optimizer_states"][0]["param_groups"][0]["params"] = names


def first(checkpoint: Checkpoint, **state: Any) -> None:
    """Change the state of the optimizer's first parameter, (7, 784)."""
    checkpoint["optimizer_states"][0]["state"][0] |= state


# A fused kernel would write outside of the first ones.
CHANGES: list[tuple[Callable[[Checkpoint], Any], str]] = [
    (lambda c: listed(c, [3, 2, 1, 0]), "expected the optimizer's exp_avg"),
    (lambda c: listed(c, [1, 0, 2, 3]), "expected the optimizer's exp_avg"),
    (lambda c: listed(c, [0, 0, 0, 0]), "expected the optimizer's exp_avg"),
    (lambda c: first(c, exp_avg=torch.zeros(1)), "of shape (7, 784), found (1,)"),
    (lambda c: first(c, exp_avg_sq=torch.zeros(1).expand(7, 784)), "expected the optimizer's exp_avg_sq"),
    (lambda c: first(c, exp_avg=torch.zeros(7, 784, dtype=torch.int8)), "expected the optimizer's exp_avg"),
    (lambda c: first(c, step=torch.zeros(0)), "expected the optimizer's step of shape ()"),
    (lambda c: first(c, max_exp_avg_sq=torch.zeros(0)), "expected the optimizer's max_exp_avg_sq"),
    (lambda c: listed(c, [0]), "is not of this program"),
    (lambda c: listed(c, [0, 1, 2, 3, 0]), "is not of this program"),
    (lambda c: listed(c, [[0], 1, 2, 3]), "is not of this program"),
    (lambda c: c.update(optimizer_states=[{}]), "param_groups"),
    (lambda c: c.update(optimizer_states=[]), "is not of this program"),
    (lambda c: c["optimizer_states"].append(c["optimizer_states"][0]), "is not of this program"),
    (lambda c: c.update(settings=3), "settings must be a dictionary"),
    (lambda c: c["settings"].update({"the optimizer": "\x1b[2J"}), "trained with ?[2J"),
    (lambda c: c["settings"].update({"the number of iterations in an epoch": 12}), "was trained with 12"),
    (lambda c: c.update(random_states=3), "cannot be loaded"),
    (lambda c: c["random_states"][0]["now"].update(torch=b"123"), "cannot be loaded"),
    (lambda c: c["random_states"][0].pop("before_epoch"), "cannot be loaded"),
    (lambda c: c["loops"]["fit_loop"].update({"epoch_loop.batch_progress": 3}), "cannot be loaded"),
    (lambda c: c["loops"]["fit_loop"]["state_dict"].update(combined_loader=[{"done": 5}]), "cannot be loaded"),
    (lambda c: c["callbacks"]["Report"].pop("train"), "cannot be loaded"),
    (lambda c: c["callbacks"].update(BestAndLast=3), "cannot be loaded"),
]


@pytest.mark.parametrize("number", range(len(CHANGES)))
def test_values_in_the_wrong_place_end_in_one_line(
    run_cli: RunCLI, five_steps: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], number: int
) -> None:
    change, message = CHANGES[number]
    checkpoint = torch.load(five_steps, weights_only=True)
    change(checkpoint)
    torch.save(checkpoint, tmp_path / "changed.ckpt")
    capsys.readouterr()
    settings = ["--ckpt_path=changed.ckpt", "--trainer.max_steps=8", "--model.hidden_dim=7", "--test_after_fit=false"]
    assert run_cli("fit", *settings) in (1, 2)
    out, err = capsys.readouterr()
    assert err.startswith("mnist_lightning: ")
    assert message in err
    assert err.count("\n") == 1
    assert "\x1b[2J" not in out + err


def test_a_changed_checkpoints_weights_are_whole(
    run_cli: RunCLI, five_steps: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """All other commands than `fit` take them. An unchanged checkpoint is resumed, when it is saved again."""
    checkpoint = torch.load(five_steps, weights_only=True)
    torch.save(checkpoint, "same.ckpt")
    settings = ["--trainer.max_steps=8", "--model.hidden_dim=7", "--test_after_fit=false"]
    assert run_cli("fit", "--ckpt_path=same.ckpt", *settings) == 0
    first(checkpoint, exp_avg=torch.zeros(1))
    torch.save(checkpoint, "changed.ckpt")
    Image.new("L", (28, 28)).save("digit.png")
    assert run_cli("test", "--ckpt_path=changed.ckpt") == 0
    assert run_cli("read", "digit.png", "--ckpt_path=changed.ckpt", data=False) == 0
