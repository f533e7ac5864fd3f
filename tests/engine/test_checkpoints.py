"""`best.ckpt` and `last.ckpt`, the signals that save, and what ends a run whose numbers are not finite."""

import contextlib
import functools
import math
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from conftest import RunCLI, load
from engine.test_loop import PER_EPOCH, Foreign, Run, Settings, fit, loader
from engine.test_resumption import resume
from lightning.pytorch.callbacks import ModelCheckpoint

from mnist_lightning import MNISTClassifier, Trainer
from mnist_lightning.engine.checkpoints import BestAndLast, CheckpointIO
from mnist_lightning.engine.checks import NotFiniteError
from mnist_lightning.engine.console import Stopped

Act = Callable[[Any], None]


@contextlib.contextmanager
def at_iteration(iteration: int, act: Act, kind: Any = MNISTClassifier) -> Iterator[None]:
    """Call `act` once, with the module, in an iteration, counted from 1, of the runs in this process."""
    step, acts = kind.training_step, [act]

    @functools.wraps(step)
    def training_step(module: Any, *args: Any, **kwargs: Any) -> Any:
        if module.global_step + 1 == iteration and acts:
            acts.pop()(module)
        return step(module, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kind, "training_step", training_step)
        yield


def stop(*_: Any) -> None:
    signal.raise_signal(signal.SIGTERM)


def train(path: Path, best_and_last: BestAndLast, module: Any = Foreign, **settings: Any) -> Run:
    settings = {"enable_checkpointing": True, "log_every_n_steps": 50} | settings
    return fit(Trainer, path, module, loader, lambda: [best_and_last], settings)


# Best and last

NAN = math.nan


@pytest.mark.parametrize(
    ("mode", "scores", "epoch"),
    [("max", [1, 3, 3, 2], 2), ("min", [3, 1, 1, 2], 2), ("max", [-3], 1), ("min", [NAN, 2, NAN, 1], 4)],
)
def test_best_is_the_first_of_the_best(mode: str, scores: list[float], epoch: int, tmp_path: Path) -> None:
    class Scored(Foreign):
        def on_validation_epoch_end(self) -> None:
            self.log("score", torch.tensor(float(scores[self.current_epoch])))

    train(tmp_path / "run", BestAndLast(0, "score", mode), Scored, max_epochs=len(scores), num_sanity_val_steps=0)
    steps = {name: load(tmp_path / "run", name)["global_step"] for name in ("best", "last")}
    assert steps == {"best": epoch * PER_EPOCH, "last": len(scores) * PER_EPOCH}


@pytest.mark.parametrize(
    ("every", "settings", "expected"),
    [
        (0, {}, [0, 11, 22]),
        (5, {}, [0, 5, 10, 11, 15, 20, 22]),
        (4, {"log_every_n_steps": 3, "val_check_interval": 7}, [0, 4, 8, 11, 12, 16, 20, 22]),
        (4, {"accumulate_grad_batches": 2}, [0, 4, 6, 8, 12]),
        (0, {"max_steps": 15}, [0, 11, 15]),
        (0, {"fast": False}, [0, 11, 22]),
    ],
)
def test_last_is_saved_when_it_is_due(
    every: int, settings: Settings, expected: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved, save = [], Trainer.save_checkpoint

    def note(trainer: Trainer, path: Path, *args: Any, **kwargs: Any) -> None:
        saved.extend([trainer.global_step] * (Path(path).name == "last.ckpt"))
        save(trainer, path, *args, **kwargs)

    monkeypatch.setattr(Trainer, "save_checkpoint", note)
    train(tmp_path / "run", BestAndLast(every, "val_loss", "min"), **settings)
    assert saved == expected


# Signals


@pytest.mark.parametrize(
    ("iteration", "settings", "saved"),
    [
        (1, {}, 1),
        (5, {}, 6),  # one without hooks: in the next one
        (5, {"log_every_n_steps": 0}, 6),
        (5, {"log_every_n_steps": 5}, 5),
        (5, {"fast": False}, 5),
        (11, {}, 11),
        (4, {"val_check_interval": 4}, 4),
        (22, {}, 22),
        (5, {"accumulate_grad_batches": 2}, 5),
    ],
)
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_iteration_and_saves(
    signum: signal.Signals, iteration: int, settings: Settings, saved: int, tmp_path: Path
) -> None:
    handlers = [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)]
    with at_iteration(iteration, lambda _: signal.raise_signal(signum), Foreign), pytest.raises(Stopped) as stopped:
        train(tmp_path / "run", BestAndLast(), **settings)
    assert stopped.value.args[0] == signum
    assert f"Stopped and saved at iteration {saved}; to resume:" in str(stopped.value)
    assert load(tmp_path / "run")["global_step"] == saved
    assert [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)] == handlers


def test_a_signal_in_an_epochs_last_iteration_lets_the_epoch_end(tmp_path: Path) -> None:
    ended = []

    class Ends(Foreign):
        def on_train_epoch_end(self) -> None:
            ended.append(self.current_epoch)

    with at_iteration(PER_EPOCH, stop, Ends), pytest.raises(Stopped):
        train(tmp_path / "run", BestAndLast(), Ends, limit_val_batches=0)
    resume(tmp_path / "2nd", Ends, loader, {"limit_val_batches": 0}, tmp_path / "run/checkpoints/last.ckpt")
    assert ended == [0, 1]


@pytest.mark.parametrize("name", ["SIGUSR1", "SIGHUP"])
@pytest.mark.parametrize("before", [signal.SIG_DFL, signal.SIG_IGN, Mock()], ids=["default", "ignored", "the user's"])
def test_signals_of_clusters_and_terminals_save_where_nobody_has_taken_them(
    name: str, before: Any, tmp_path: Path
) -> None:
    signum = getattr(signal, name)
    others = signal.signal(signum, before)
    stops = pytest.raises(Stopped) if before == signal.SIG_DFL else contextlib.nullcontext()
    try:
        with at_iteration(5, lambda _: signal.raise_signal(signum), Foreign), stops:
            train(tmp_path / "run", BestAndLast())
        assert signal.getsignal(signum) == before
    finally:
        signal.signal(signum, others)
    assert load(tmp_path / "run")["global_step"] == (6 if before == signal.SIG_DFL else 22)


def test_a_thread_trains_without_signals(tmp_path: Path) -> None:
    thread = threading.Thread(target=train, args=(tmp_path / "run", BestAndLast()))
    thread.start()
    thread.join()
    assert load(tmp_path / "run")["global_step"] == 22


# Numbers that are not finite


def make_losses(value: float) -> Act:
    """Break the network so that its losses are `value` from here on; an infinite one leaves all gradients finite."""

    def act(module: MNISTClassifier) -> None:
        module.mlp.output.bias.data[3] = -value

    return act


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_logged_loss_that_is_not_finite_ends_the_run_and_leaves_the_best(
    run_cli: RunCLI, tmp_path: Path, capsys: pytest.CaptureFixture[str], value: float
) -> None:
    with at_iteration(15, make_losses(value)):
        assert run_cli("fit", "--trainer.max_epochs=5", "--trainer.log_every_n_steps=8") == 1
    err = capsys.readouterr().err
    assert err.startswith(f"mnist_lightning: the loss is {value} at iteration 16;")
    assert err.count("\n") == 1
    assert load(tmp_path / "lightning_logs/version_0", "best")["global_step"] == 11
    assert run_cli("test", "--ckpt_path=best") == 0


def test_weights_that_are_not_finite_are_not_saved(tmp_path: Path) -> None:
    class Breaks(Foreign):
        def on_validation_start(self) -> None:
            next(self.parameters()).data.fill_(math.nan)

    with pytest.raises(NotFiniteError, match="weights are not finite after iteration 11"):
        train(tmp_path / "run", BestAndLast(0, "val_loss", "min"), Breaks, num_sanity_val_steps=0)
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == ["last.ckpt"]


# What may be removed


def test_only_checkpoints_beside_the_saved_ones_are_removed_and_never_what_a_link_leads_to(tmp_path: Path) -> None:
    plugin = CheckpointIO()
    plugin.save_checkpoint({}, tmp_path / "run/one.ckpt")
    kept = {"run/keep.txt", "victim/thesis.ckpt", "run/folder.ckpt/thesis.txt"}
    for name in kept:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("mine")
    for named in ("run/keep.txt", "run/../victim", "run/../victim/thesis.ckpt", "run/folder.ckpt"):
        plugin.remove_checkpoint(str(tmp_path / named))
        plugin.remove_checkpoint(f"local://{tmp_path / named}")
    link = tmp_path / "run/last.ckpt"
    for target in ("run/one.ckpt", "victim/thesis.ckpt", "nothing"):
        link.symlink_to(tmp_path / target)
        plugin.remove_checkpoint(link)
        assert not link.is_symlink()
    files = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert files == kept | {"run/one.ckpt"}
    plugin.remove_checkpoint(str(tmp_path / "run/one.ckpt"))
    assert not (tmp_path / "run/one.ckpt").exists()


def test_last_as_a_link_loses_no_kept_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ModelCheckpoint, "CHECKPOINT_NAME_LAST", "{epoch}-last")
    callback = ModelCheckpoint(tmp_path, "{epoch}", save_last="link", save_top_k=-1)
    settings: Settings = {"enable_checkpointing": True, "plugins": [CheckpointIO()], "max_epochs": 3}
    fit(Trainer, tmp_path / "run", Foreign, loader, lambda: [callback], settings)
    kept = {path.name: torch.load(path, weights_only=True)["global_step"] for path in tmp_path.glob("*.ckpt")}
    assert kept == {"epoch=0.ckpt": 11, "epoch=1.ckpt": 22, "epoch=2.ckpt": 33, "epoch=2-last.ckpt": 33}
    assert (tmp_path / "epoch=2-last.ckpt").is_symlink()
