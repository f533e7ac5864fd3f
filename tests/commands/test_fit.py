"""`fit`: the contract of a run's directory, and the same bits as a plain loop with the same recipe."""

import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from conftest import RUN, SHORT, VAL_SIZE, RunCLI, assert_the_same, events, load, results, slow, steps
from torch.optim import AdamW
from torch.optim.lr_scheduler import OneCycleLR

from mnist_lightning.digits import idx
from mnist_lightning.distortions import Distortions
from mnist_lightning.model import MLP

CONFIGS = Path(__file__).parents[2] / "configs"
SECOND = RUN.with_name("version_1")


def test_a_run_keeps_its_contract(run_cli: RunCLI, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_cli("fit", "--trainer.max_epochs=3", "--trainer.log_every_n_steps=5", "--seed_everything=4") == 0
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert not err
    data = "Training on synthetic digits (not MNIST): 1,050 images, 200 for validation"
    assert lines[0] == f"{data}; 159,010 parameters on cpu, 1 thread, seed 4"
    assert [line for line in lines if re.fullmatch(r"iter 5: Loss=\d\.\d\d, Training Accuracy=\d+\.0%", line)]
    epoch = r"Epoch: 3, validation loss: \d\.\d\d, validation accuracy: \d+\.\d%"
    assert [line for line in lines if re.fullmatch(epoch, line)]
    assert re.fullmatch(r"Test loss: \d\.\d\d, test accuracy: \d+\.\d%", lines[-3])
    assert lines[-2:] == ["Run: lightning_logs/version_0", "Look at it: tensorboard --logdir lightning_logs"]

    val_acc = assert_curves()
    found = results(RUN)
    assert found.keys() == {
        *("dataset", "seed", "iterations", "train_seconds", "device", "precision", "threads", "processes"),
        *("val/loss", "val/acc", "test/loss", "test/acc", "versions"),
    }
    assert (found["dataset"], found["seed"], found["iterations"]) == ("synthetic digits (not MNIST)", 4, 33)
    assert (found["device"], found["precision"], found["threads"], found["processes"]) == ("cpu", "32-true", 1, 1)
    assert 0 < found["train_seconds"] < 60
    assert found["val/acc"] == pytest.approx(max(val_acc))
    assert found["test/acc"] == pytest.approx(events(RUN).Scalars("test/acc")[0].value)
    for name, epochs in {"best": val_acc.index(max(val_acc)) + 1, "last": 3}.items():
        checkpoint = load(RUN, name)
        assert checkpoint["global_step"] == 11 * epochs
        assert checkpoint["datamodule_hyper_parameters"]["dataset"] == "synthetic"
        # Those of the console count from 1.
        history = checkpoint["callbacks"]["Report"]
        assert [row[0] for row in history["train"]] == [n for n in (5, 10, 15, 20, 25, 30) if n <= 11 * epochs]
        assert [row[0] for row in history["val"]] == [11, 22, 33][:epochs]
    assert yaml.safe_load((RUN / "config.yaml").read_text())["seed_everything"] == 4
    names = {path.name.partition(".tfevents")[0] for path in RUN.iterdir()}
    assert names == {"config.yaml", "hparams.yaml", "events.out", "checkpoints", "figures", "results.json"}


def assert_curves() -> list[float]:
    """Lightning's own steps, which count from 0; return the accuracies of validation."""
    curves = {f"{split}/{name}" for split in ("train", "val", "test") for name in ("loss", "acc")}
    assert set(events(RUN).Tags()["scalars"]) == curves | {"lr-AdamW", "epoch"}
    for curve in ("train/loss", "train/acc", "lr-AdamW"):
        assert steps(RUN, curve) == [4, 9, 14, 19, 24, 29]
    assert all(event.value == pytest.approx(0.001) for event in events(RUN).Scalars("lr-AdamW"))
    assert steps(RUN, "val/loss") == steps(RUN, "val/acc") == [10, 21, 32]
    points = [(event.step, event.value) for event in events(RUN).Scalars("epoch")]
    assert points == [(step, step // 11) for step in (4, 9, 10, 14, 19, 21, 24, 29, 32)]
    # The test stands right below the validation of the same weights.
    val_acc = [event.value for event in events(RUN).Scalars("val/acc")]
    assert steps(RUN, "test/loss") == steps(RUN, "test/acc") == [10 + 11 * val_acc.index(max(val_acc))]
    return val_acc


@pytest.mark.parametrize(
    "recipe",
    [
        ["--model.hidden_dim=30", "--seed_everything=7", "--data.batch_size=64", "--threads=2"],
        ["--data.distortions.rotation=5", "--model.learning_rate_schedule=one_cycle", "--model.dropout=0.2"],
    ],
    ids=["plain", "distorted"],
)
def test_config_yaml_repeats_the_run(run_cli: RunCLI, recipe: list[str]) -> None:
    assert run_cli("fit", "--trainer.max_epochs=2", "--trainer.log_every_n_steps=5", *recipe) == 0
    assert run_cli("fit", f"--config={RUN / 'config.yaml'}", data=False) == 0
    assert_the_same(RUN, SECOND)


# What a resumed run keeps


PATIENT = [
    *("--trainer.callbacks=EarlyStopping", "--trainer.callbacks.monitor=val/loss"),
    *("--trainer.callbacks.patience=1", "--trainer.callbacks.min_delta=0.5"),
]


@pytest.mark.parametrize("interval", [[], ["--trainer.val_check_interval=4"]], ids=["at the end", "in mid-epoch"])
def test_a_run_that_early_stopping_ended_is_done_and_can_go_on_without_it(
    run_cli: RunCLI, capsys: pytest.CaptureFixture[str], interval: list[str]
) -> None:
    settings = [*SHORT, "--trainer.max_epochs=4", *interval]
    assert run_cli("fit", *settings) == 0
    assert run_cli("fit", *settings, *PATIENT) == 0
    last = SECOND / "checkpoints/last.ckpt"
    before, ended_at = last.read_bytes(), load(SECOND)["global_step"]
    assert ended_at == (8 if interval else 22)
    capsys.readouterr()
    assert run_cli("fit", "--ckpt_path=last") == 0
    line = capsys.readouterr().out.splitlines()[0]
    assert line.startswith(f"This run is done, at iteration {ended_at}; Monitored metric val/loss did not improve")
    assert line.endswith("To train longer, leave EarlyStopping out")
    assert last.read_bytes() == before
    assert run_cli("fit", "--ckpt_path=last", "--trainer.callbacks=null") == 0
    assert_the_same(RUN, SECOND)


def test_resuming_a_run_of_another_place_leaves_the_runs_here_alone(
    run_cli: RunCLI, short_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree("lightning_logs", "there/lightning_logs")
    before = (tmp_path / "there" / RUN / "checkpoints/last.ckpt").read_bytes()
    other = tmp_path / RUN / "checkpoints/last.ckpt"
    unbeatable = load(tmp_path / RUN)
    unbeatable["callbacks"]["BestAndLast"]["best"] = 1.0
    torch.save(unbeatable, other)
    monkeypatch.chdir(tmp_path / "there")
    assert run_cli("fit", *SHORT, "--trainer.max_epochs=2", f"--ckpt_path={other}") == 0
    assert (RUN / "checkpoints/last.ckpt").read_bytes() == before
    assert load(SECOND)["global_step"] == load(SECOND, "best")["global_step"] == 22


# The recipe


@pytest.mark.figures
@pytest.mark.parametrize("precision", ["bf16-mixed", slow("64-true"), slow("bf16-true")])
def test_precisions_run_with_everything_on(run_cli: RunCLI, precision: str) -> None:
    assert run_cli("fit", "--trainer.max_epochs=2", f"--trainer.precision={precision}") == 0
    assert events(RUN).Tags()["graph"]
    assert results(RUN)["precision"] == precision


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


ONE_CYCLE = ["--model.learning_rate_schedule=one_cycle", "--model.weight_decay=0.1"]
RECIPES: dict[str, tuple[list[str], dict[str, Any]]] = {
    "default": ([], {}),
    "one_cycle": (ONE_CYCLE, {"decay": 0.1, "one_cycle": True}),
    "fused": (["--model.fused=true", *ONE_CYCLE], {"decay": 0.1, "one_cycle": True}),
    "distorted": (["--data.distortions=true"], {"distorted": True}),
    "clipped": (["--trainer.gradient_clip_val=0.02"], {"clip": 0.02}),
    "accumulated": (["--trainer.accumulate_grad_batches=3"], {"accumulate": 3}),
    "both": (
        ["--trainer.gradient_clip_val=0.02", "--trainer.accumulate_grad_batches=2"],
        {"clip": 0.02, "accumulate": 2},
    ),
}


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("fast", ["true", "false"])
def test_a_run_is_the_plain_loop_bit_for_bit(run_cli: RunCLI, root: Path, name: str, fast: str) -> None:
    arguments, recipe = RECIPES[name]
    settings = ["--trainer.max_epochs=2", "--model.hidden_dim=20", "--model.learning_rate=0.003", "--seed_everything=5"]
    settings += ["--test_after_fit=false", "--trainer.log_every_n_steps=4", f"--trainer.fast={fast}", "--threads=0"]
    assert run_cli("fit", *settings, *arguments) == 0
    mlp, optimizer = plain_loop(root, 2, rate=0.003, **recipe)
    last = load(RUN)
    weights = {name: value for name, value in last["state_dict"].items() if name.startswith("mlp.")}
    assert weights.keys() == {f"mlp.{name}" for name in mlp.state_dict()}
    assert [name for name, value in mlp.state_dict().items() if not torch.equal(value, weights[f"mlp.{name}"])] == []
    expected, found = optimizer.state_dict()["state"], last["optimizer_states"][0]["state"]
    for index, state in expected.items():
        assert all(torch.equal(value, found[index][name]) for name, value in state.items())
    assert last["global_step"] == {1: 22, 2: 12, 3: 8}[recipe.get("accumulate", 1)]


@pytest.mark.parametrize("config", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_what_the_configs_evaluate(run_cli: RunCLI, capsys: pytest.CaptureFixture[str], config: Path) -> None:
    assert run_cli("fit", "--config", str(config), "--print_config", data=False) == 0
    trainer = yaml.safe_load(capsys.readouterr().out)["trainer"]
    sizes = {"limit_val_batches": 5000, "limit_test_batches": 10_000}
    images = [round(size * (1.0 if trainer[limit] is None else trainer[limit])) for limit, size in sizes.items()]
    assert images == ([1000, 1000] if config.stem == "tutorial" else [5000, 10_000])
