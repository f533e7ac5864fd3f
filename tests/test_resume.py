"""A run that goes on from any checkpoint ends where one that was never interrupted does, to the bit."""

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from conftest import VAL_SIZE, slow
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from test_loop import Foreign, Run, classifier, differences, every, fit, loader
from torch import Tensor, nn
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.data import DataLoader, Dataset

from mnist_lightning import MNISTDataModule, Trainer
from mnist_lightning.engine.checkpoint_io import CheckpointIO
from mnist_lightning.engine.guard import ExactResumption

Settings = dict[str, Any]
PER_EPOCH = 11


class AtTheStart(pl.Callback):
    """Saves before the first iteration."""

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if trainer.global_step == 0:
            trainer.save_checkpoint(f"{trainer.default_root_dir}/start.ckpt")


class Draws(pl.Callback):
    """Draws random numbers where someone may: before each epoch and after each validation."""

    def on_train_epoch_start(self, *args: Any) -> None:
        torch.rand(2)

    def on_validation_end(self, *args: Any) -> None:
        torch.rand(3)


class Noisy(Dataset[Any]):
    """A random transform, as a data set's author writes it."""

    def __init__(self) -> None:
        self.data: Any = loader().dataset

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Any:
        inputs, label = self.data[index]
        return inputs + 0.3 * torch.randn(6), label


def at_the_ends() -> ModelCheckpoint:
    """After each epoch's training, without a validation that had the last word."""
    return ModelCheckpoint(save_top_k=-1, filename="end of {epoch}", save_on_train_epoch_end=True)


def after_validation() -> ModelCheckpoint:
    return ModelCheckpoint(
        monitor="val_loss", save_top_k=-1, filename="validated {step}", save_on_train_epoch_end=False
    )


def life(
    path: Path, module: Any, data: Any, settings: Settings, ckpt_path: Path | None = None, trainer_class: Any = Trainer
) -> Run:
    """Start or go on, saving often."""

    class Going(trainer_class):
        def fit(self, *args: Any, **kwargs: Any) -> None:
            super().fit(*args, ckpt_path=ckpt_path, **kwargs)

    more = settings.pop("more", list)
    savers = [AtTheStart(), every(4), at_the_ends(), *more()] if ckpt_path is None else more()
    settings = {"max_epochs": 3, "enable_checkpointing": True, **settings}
    return fit(Going, path, module, data, lambda: savers, settings)


def lasting(run: Run) -> dict[str, Any]:
    """What must be the same at the end, however often it was interrupted."""
    end = run.left["end.ckpt"]
    left = {name: end[name] for name in ("global_step", "state_dict", "optimizer_states", "lr_schedulers")}
    if run.visits:  # one that goes on from the very end does nothing
        left |= {"epoch": end["epoch"], "random": torch.get_rng_state()}
        left["logged at"] = end["loops"]["fit_loop"]["epoch_loop.state_dict"]["_batches_that_stepped"]
        left["metrics"] = {name: value for name, value in run.left["callback_metrics"].items() if "val" in name}
    return left


def goes_on_from_each(path: Path, module: Any, data: Any, settings: Settings, again: Settings) -> list[str]:
    """Start once, go on from each checkpoint that it left; return the checkpoints' names."""
    whole = life(path / "whole", module, data, dict(settings))
    expected, wrong = lasting(whole), []
    assert whole.quiet > 3 or "accumulate_grad_batches" in settings
    names = [name for name in whole.left if name.endswith(".ckpt") and name != "end.ckpt"]
    for name in names:
        torch.manual_seed(99)
        run = life(path / name.replace("/", " "), module, data, {**settings, **again}, path / "whole" / name)
        left = lasting(run)
        found = differences({key: expected[key] for key in left}, left)
        found = [
            line for line in found if not line.startswith("/metrics") or "missing" not in line
        ]  # not validated again
        wrong += [f"{name} {line[:80]}" for line in found]
    assert wrong == []
    return [Path(name).name for name in names]


@pytest.fixture
def digits(root: Path) -> Callable[..., MNISTDataModule]:
    def make(**settings: Any) -> MNISTDataModule:
        return MNISTDataModule("synthetic", str(root), val_size=VAL_SIZE, **settings)

    return make


def test_digits(digits: Callable[..., MNISTDataModule], tmp_path: Path) -> None:
    names = goes_on_from_each(
        tmp_path,
        lambda: classifier(learning_rate_schedule="one_cycle", dropout=0.2),
        lambda: digits(distortions=True),
        {"max_epochs": 2},
        {"log_every_n_steps": 3},
    )
    assert {"start.ckpt", "step=4.ckpt", "step=20.ckpt", "end of epoch=1.ckpt"} <= {*names}


class BiasesFirst(Foreign):
    """Two groups, so that the optimizer has its parameters in another order than the module."""

    def configure_optimizers(self) -> Any:
        weights, biases = ([p for p in self.parameters() if (p.ndim == 1) is bias] for bias in (False, True))
        groups: list[Settings] = [{"params": biases, "weight_decay": 0}, {"params": weights}]
        return torch.optim.AdamW(groups, lr=0.02)


class Masked(Foreign):
    """Without hyperparameters, and with a buffer that is not finite."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mask", torch.full((3, 3), -torch.inf).triu(1))


class ChannelsLast(Foreign):
    """Its weights and their moments are not contiguous, but lie alike."""

    def __init__(self) -> None:
        super().__init__()
        layers = nn.Unflatten(1, (2, 3, 1)), nn.Conv2d(2, 4, (2, 1)), nn.Flatten(), nn.Linear(8, 3)
        self.net = nn.Sequential(*layers).to(memory_format=torch.channels_last)


class Momentum(torch.optim.Optimizer):
    """An optimizer of someone who counts steps in a plain number."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = closure()
        for parameter in self.param_groups[0]["params"]:
            state = self.state[parameter]
            state["step"] = state.get("step", 0) + 1
            state.setdefault("exp_avg", torch.zeros_like(parameter)).lerp_(parameter.grad, 0.5)
            parameter.sub_(state["exp_avg"], alpha=1 / (10 + state["step"]))
        return loss


class OwnOptimizer(Foreign):
    def configure_optimizers(self) -> Any:
        return Momentum(self.parameters(), {})


class OneCycle(Foreign):
    interval, frequency = "epoch", 1

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        schedule = OneCycleLR(optimizer, 0.5, total_steps=40)
        config = {"scheduler": schedule, "interval": self.interval, "frequency": self.frequency}
        return {"optimizer": optimizer, "lr_scheduler": config}


class OneCycleBySteps(OneCycle):
    interval, frequency = "step", 2


def guarded(module: Any) -> Settings:
    """All that a project may take to resume safely."""
    return {"more": lambda: [ExactResumption()], "plugins": [CheckpointIO(module)], "max_epochs": 2}


CASES: dict[str, tuple[Any, Any, Settings, Settings]] = {
    "plain": (Foreign, loader, {}, {"log_every_n_steps": 50}),
    "random transform": (Foreign, lambda: DataLoader(Noisy(), 8, shuffle=True), {"max_epochs": 2}, {}),
    "in double": (Foreign, loader, {"precision": "64-true", "max_epochs": 2}, {"log_every_n_steps": 7}),
    "max_steps": (Foreign, loader, {"max_steps": 18, "max_epochs": -1}, {"log_every_n_steps": 2}),
    "max_steps, fused": (classifier, None, {"max_steps": 29, "max_epochs": -1}, {}),
    "draws": (Foreign, loader, {"more": lambda: [Draws()], "max_epochs": 2}, {}),
    "validates within": (
        Foreign,
        loader,
        {"val_check_interval": 4, "max_epochs": 2, "more": lambda: [after_validation()]},
        {},
    ),
    "no validation": (
        Foreign,
        loader,
        {"limit_val_batches": 0, "more": lambda: [every(PER_EPOCH)]},
        {},
    ),
    "accumulates": (Foreign, loader, {"accumulate_grad_batches": 2, "log_every_n_steps": 3, "max_epochs": 2}, {}),
    **{
        module.__name__: (module, loader, guarded(module), {})
        for module in (BiasesFirst, Masked, ChannelsLast, OwnOptimizer, OneCycleBySteps)
    },
    "OneCycle": (OneCycle, loader, {**guarded(OneCycle), "max_epochs": 3}, {}),
}


QUICK = [
    "plain",
    "no validation",
    "random transform",
    "max_steps, fused",
    "validates within",
    "accumulates",
    "ChannelsLast",
    "OneCycle",
]


@pytest.mark.parametrize("case", [case if case in QUICK else slow(case) for case in CASES])
def test_goes_on(case: str, digits: Callable[..., MNISTDataModule], tmp_path: Path) -> None:
    module, data, settings, again = CASES[case]
    goes_on_from_each(tmp_path, module, data or digits, settings, again)


def test_twice_interrupted(tmp_path: Path) -> None:
    """A run that went on is as good a start as the first."""
    settings = {"max_epochs": 3, "more": lambda: [every(7)]}
    whole = life(tmp_path / "whole", Foreign, loader, {"max_epochs": 3})
    life(tmp_path / "2nd", Foreign, loader, dict(settings), tmp_path / "whole/checkpoints/step=8.ckpt")
    third = life(tmp_path / "3rd", Foreign, loader, dict(settings), tmp_path / "2nd/checkpoints/step=14.ckpt")
    assert differences(lasting(whole), lasting(third)) == []


@pytest.mark.parametrize(("first", "second"), [(pl.Trainer, Trainer), (Trainer, pl.Trainer)])
@pytest.mark.parametrize("step", [4, 8, 12])
def test_each_goes_on_from_the_others(
    first: Any, second: Any, step: int, digits: Callable[..., MNISTDataModule], tmp_path: Path
) -> None:
    """Where nothing is drawn, Lightning's Trainer is exact too."""
    life(tmp_path / "first", classifier, digits, {"max_epochs": 2}, trainer_class=first)
    whole = fit(Trainer, tmp_path / "whole", classifier, digits, list, {"max_epochs": 2})
    file = tmp_path / f"first/checkpoints/step={step}.ckpt"
    run = life(tmp_path / "second", classifier, digits, {"max_epochs": 2}, file, second)
    for name in ("state_dict", "optimizer_states", "global_step"):
        assert differences(whole.left["end.ckpt"][name], run.left["end.ckpt"][name]) == []


def test_curves_go_on(tmp_path: Path) -> None:
    """Their points stand at the same iterations as those of a run that was not interrupted."""
    whole = life(tmp_path / "whole", Foreign, loader, {"max_epochs": 2})
    file = tmp_path / "whole/checkpoints/step=8.ckpt"
    again = life(tmp_path / "again", Foreign, loader, {"max_epochs": 2}, file)

    def points(run: Run) -> list[str]:
        assert isinstance(run.trainer.logger, CSVLogger)
        header, *rows = run.left["curves"]
        return [row for row in rows if int(dict(zip(header.split(","), row.split(","), strict=True))["step"]) > 8]

    assert points(again) == points(whole) != []


def test_timed_checkpoint_goes_on(tmp_path: Path) -> None:
    """One that was saved wherever the clock was."""

    class Slow(Foreign):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            torch.rand(1)
            loss: Tensor = super().training_step(batch, batch_idx)
            return loss

    def timed() -> list[pl.Callback]:
        every_time = timedelta(microseconds=1)
        return [ModelCheckpoint(train_time_interval=every_time, save_top_k=-1, filename="timed {step}")]

    goes_on_from_each(tmp_path, Slow, loader, {"more": timed, "max_epochs": 1}, {"more": list})


class WithoutTest(pl.LightningDataModule):
    """A data module as a textbook has it."""

    def setup(self, stage: str) -> None:
        if stage == "fit":
            self.train = loader()

    def train_dataloader(self) -> Any:
        return self.train

    def val_dataloader(self) -> Any:
        return loader(30, shuffle=False)


class TestLater(WithoutTest):
    """Its test split is there only where it is tested."""

    __test__ = False

    def setup(self, stage: str) -> None:
        super().setup(stage)
        if stage == "test":
            self.test = loader(shuffle=False)

    def test_dataloader(self) -> Any:
        return self.test


@pytest.mark.parametrize("data", [WithoutTest, TestLater])
def test_a_fit_needs_no_test_split(data: Any, tmp_path: Path) -> None:
    run = fit(Trainer, tmp_path / "a", Foreign, data, lambda: [ExactResumption()], {})
    assert run.trainer.global_step == 2 * PER_EPOCH
