"""A run's directory, its `config.yaml`, and what TensorBoard shows of it."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import yaml
from conftest import RUN, SHORT, RunCLI, events
from torch import Tensor

from mnist_lightning import MNISTClassifier
from mnist_lightning.engine.tensorboard import RunLogger


@pytest.mark.parametrize("kind", ["a file", "a dangling link"])
def test_where_the_directory_of_the_runs_is_something_else(
    run_cli: RunCLI, tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    runs = tmp_path / "lightning_logs"
    runs.touch() if kind == "a file" else runs.symlink_to(tmp_path / "nowhere")
    assert run_cli("fit", *SHORT) == 1
    ways = "is no directory; move it away, or give another --trainer.default_root_dir"
    assert capsys.readouterr().err == f"mnist_lightning: lightning_logs {ways}\n"


def test_runs_that_start_at_once_get_directories_of_their_own(tmp_path: Path) -> None:
    loggers = [RunLogger(tmp_path, name="runs") for _ in range(8)]
    assert {logger.version for logger in loggers} == {0}
    threads = [threading.Thread(target=lambda logger=logger: logger.experiment) for logger in loggers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(logger.version for logger in loggers) == list(range(8))
    assert len(list((tmp_path / "runs").iterdir())) == 8


def test_a_run_that_has_not_begun_leaves_nothing(run_cli: RunCLI, short_run: Path, tmp_path: Path) -> None:
    assert run_cli("fit", *SHORT, "--trainer.limit_train_batches=0.01") == 2
    assert run_cli("fit", "--trainer.fast_dev_run=true") == 0
    assert [path.name for path in (tmp_path / "lightning_logs").iterdir()] == ["version_0"]


# The graph


class Images(MNISTClassifier):
    """Its example has the shape of images, (B, 1, 28, 28), and so may its batches."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.example_input_array = torch.zeros(1, 1, 28, 28)

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images.flatten(1))


class Misfit(MNISTClassifier):
    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.example_input_array = torch.zeros(1, 3)


@pytest.mark.figures
@pytest.mark.parametrize(
    ("kind", "has_graph"),
    [(MNISTClassifier, True), (Images, True), (Misfit, False)],
)
def test_a_graph_never_ends_a_run(
    run_cli: RunCLI, capsys: pytest.CaptureFixture[str], kind: type[MNISTClassifier], has_graph: bool
) -> None:
    assert run_cli("fit", *SHORT, classes=(kind,)) == 0
    assert events(RUN).Tags()["graph"] is has_graph
    assert capsys.readouterr().out.count("\nNo graph in TensorBoard: ") == (not has_graph)


# Settings


class Lists(MNISTClassifier):
    """Its settings are no numbers or texts."""

    def __init__(self, widths: list[int] = [3, 4], name: str | None = None, **settings: Any) -> None:  # noqa: B006
        super().__init__(**settings)
        self.save_hyperparameters()


@pytest.mark.parametrize("kind", [MNISTClassifier, Lists])
def test_the_hparams_tab(run_cli: RunCLI, kind: type[MNISTClassifier]) -> None:
    assert run_cli("fit", *SHORT, classes=(kind,)) == 0
    plugin = events(RUN).summary_metadata
    start = plugin["_hparams_/session_start_info"].plugin_data.content
    names = [b"dataset", b"learning_rate", b"hidden_dim", b"batch_size", b"seed"]
    for name in names if kind is MNISTClassifier else [*names, b"[3, 4]", b"None"]:
        assert name in start
    assert b"test/acc" in plugin["_hparams_/experiment"].plugin_data.content


@pytest.mark.parametrize("logger", ["--trainer.logger=", "--trainer.logger+="], ids=["one", "a list"])
def test_a_users_logger_shows_no_metric_that_was_not_measured(run_cli: RunCLI, logger: str) -> None:
    assert run_cli("fit", *SHORT, f"{logger}TensorBoardLogger", "--trainer.logger.save_dir=there") == 0
    shown = events("there" / RUN)
    assert "val/acc" in shown.Tags()["scalars"]
    assert "hp_metric" not in [*shown.Tags()["scalars"], *shown.summary_metadata]


class Odd(pl.Callback):
    """Its default has no text."""

    def __init__(self, call: Callable[[int], int] = lambda number: number, times: int = 1) -> None:
        self.called = [call(number) for number in range(times)]


CALLBACKS: dict[str, tuple[list[str], dict[str, Any]]] = {
    "StochasticWeightAveraging": (["swa_lrs=0.01"], {"device": "cpu"}),
    "Timer": (["duration=00:01:00:00"], {"interval": "step"}),
    "ModelPruning": (["pruning_fn=l1_unstructured"], {"pruning_fn": "l1_unstructured"}),
    "test_tensorboard.Odd": (["times=3"], {"times": 3}),
}


@pytest.mark.parametrize("name", CALLBACKS)
def test_a_config_with_any_callback_can_be_read_again(
    run_cli: RunCLI, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    settings, left = CALLBACKS[name]
    more = [f"--trainer.callbacks.{setting}" for setting in settings]
    assert run_cli("fit", "--trainer.max_epochs=2", *SHORT[1:], f"--trainer.callbacks={name}", *more) == 0
    (callback,) = yaml.safe_load((RUN / "config.yaml").read_text())["trainer"]["callbacks"]
    assert left.items() <= callback["init_args"].items()
    assert run_cli("fit", f"--config={RUN / 'config.yaml'}", data=False) == 0
    assert run_cli("fit", "--ckpt_path=last", "--trainer.max_epochs=3") == 0
    assert capsys.readouterr().err == ""
