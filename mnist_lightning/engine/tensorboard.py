"""TensorBoard and `config.yaml`: a run's directory without a race, its settings, its pictures, its curves."""

import contextlib
import shutil
from collections.abc import Iterator, Mapping
from datetime import timedelta
from enum import Enum
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import torch
import yaml
from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only

from .checkpoint_file import write_whole
from .console import JobError, say_if_it_fails
from .runs import run_directory

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

NO_TEXT = object()


class RunLogger(TensorBoardLogger):
    """A TensorBoard logger whose `version_N` directories are numbered without a race."""

    _number: int | None = None
    """Of the directory, once it is made here."""

    @property
    def version(self) -> int | str:
        """Lightning's next free number or, once the directory is made, its own."""
        return super().version if self._number is None else self._number

    @property
    @rank_zero_experiment
    def experiment(self) -> "SummaryWriter":
        """The writer; the first use makes the run's directory."""
        if self._number is None and isinstance(self.version, int):
            self._number = _make_directory(Path(self.root_dir), self.version)
        writer: SummaryWriter = super().experiment
        return writer

    @rank_zero_only
    def log_graph(self, model: Any, input_array: Any = None) -> None:
        """Draw the network's graph from the module's `example_input_array`, if it has one that fits."""
        if input_array is None and model.example_input_array is None:
            return
        with say_if_it_fails("No graph in TensorBoard"):
            example = model.trainer.precision_plugin.convert_input(model.example_input_array)
            super().log_graph(model, example if input_array is None else input_array)

    def discard(self) -> None:
        """Remove the directory, if it was made here: its run has not begun."""
        if self._number is not None:
            shutil.rmtree(self.log_dir, ignore_errors=True)
            with contextlib.suppress(OSError):  # there are other runs
                Path(self.root_dir).rmdir()


def _make_directory(root: Path, number: int) -> int:
    """Make the first `version_N` from a number on that is free; return its number."""
    with contextlib.suppress(FileExistsError):  # it may be a file, or a link to nothing
        root.mkdir(parents=True, exist_ok=True)
    if not root.is_dir():
        raise JobError(f"{root} is no directory; move it away, or give another --trainer.default_root_dir")
    # Lightning takes the next free number long before: of runs that start at once, several would take the same.
    while True:
        with contextlib.suppress(FileExistsError):
            (root / f"version_{number}").mkdir()
            return number
        number += 1


class SaveConfig(SaveConfigCallback):
    """Saves `config.yaml` when training begins: a run that cannot be resumed keeps its own."""

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Save at once where nothing is trained."""
        if stage != "fit" and not self.already_saved:
            self.on_train_start(trainer, pl_module)
        self.already_saved = True  # also for the test that comes after a fit

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save, in one step: a resumed run needs its config."""
        if run := run_directory(trainer):
            text = yaml.safe_dump(plain_config(self.config), sort_keys=False, allow_unicode=True)
            write_whole(run / "config.yaml", text.encode())


def plain_config(config: Any) -> dict[str, Any]:
    """A command's settings as `config.yaml` has them; an object that has no text is left to its default."""
    plain: dict[str, Any] = _plain(config.as_dict())
    plain.pop("config", None)  # files that are read already
    plain["data"].pop("seed", None)  # it is `seed_everything`
    return plain


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        parts = {key: _plain(part) for key, part in value.items()}
        return {key: part for key, part in parts.items() if part is not NO_TEXT}
    if isinstance(value, list | tuple | set):
        return [_plain(part) for part in value]
    if isinstance(value, Enum):
        return value.name  # as it is parsed
    if isinstance(value, torch.device | timedelta | PurePath):
        return str(value)
    for kind in (bool, int, float, str):
        if isinstance(value, kind):
            return kind(value)  # jsonargparse's types and NumPy's are subclasses
    return None if value is None else NO_TEXT


def purge_after(trainer: pl.Trainer) -> None:
    """Take back what was logged after the checkpoint that is being resumed."""
    from tensorboard.compat.proto.event_pb2 import Event, SessionLog

    restart = SessionLog(status=SessionLog.START)
    for writer in _writers(trainer):
        writer.file_writer.add_event(Event(step=trainer.global_step, session_log=restart))


def log_settings(trainer: pl.Trainer, settings: Mapping[str, Any]) -> None:
    """Tell the HParams tab which settings to compare, and by which metrics."""
    from torch.utils.tensorboard.summary import hparams

    plain = {
        name: value if isinstance(value, bool | int | float | str) else str(value) for name, value in settings.items()
    }
    for writer in _writers(trainer):
        for summary in hparams(plain, dict.fromkeys(("test/acc", "test/loss", "val/acc", "val/loss"))):
            writer.file_writer.add_summary(summary)


def log_pictures(trainer: pl.Trainer, pictures: Mapping[str, Path], step: int) -> None:
    """Show PNG files in TensorBoard, and in other loggers that have Lightning's `log_image`, as W&B's has."""
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            for tag, path in pictures.items():
                logger.experiment.file_writer.add_summary(_image(tag, path.read_bytes()), step)
        elif log_image := getattr(logger, "log_image", None):
            with say_if_it_fails(f"No pictures in {type(logger).__name__}"):
                for tag, path in pictures.items():
                    log_image(key=tag, images=[str(path)], step=step)


def _image(tag: str, png: bytes) -> Any:
    # The file as it is: `add_figure` would draw the figure once more, `add_image` compress it once more, for 0.06 s.
    from tensorboard.compat.proto.summary_pb2 import Summary

    width, height = (int.from_bytes(png[at : at + 4], "big") for at in (16, 20))
    image = Summary.Image(width=width, height=height, colorspace=4, encoded_image_string=png)
    return Summary(value=[Summary.Value(tag=tag, image=image)])


def _writers(trainer: pl.Trainer) -> Iterator[Any]:
    loggers = trainer.loggers if trainer.is_global_zero else []
    return (logger.experiment for logger in loggers if isinstance(logger, TensorBoardLogger))
