"""TensorBoard: a run's directory without a race, its settings, its pictures, and curves that go on."""

import contextlib
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import TensorBoardLogger

from .checkpoint_file import write_whole

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


class RunLogger(TensorBoardLogger):
    """A TensorBoard logger whose `version_N` directories are numbered without a race, and marked as unfinished."""

    unfinished: tuple[str, str] | None = None
    """Name and content of a file to put there at once, if it is not there."""

    _number: int | None = None
    _is_made = False

    @property
    def version(self) -> int | str:
        """Lightning's next free number or, once the directory is made, its own."""
        return super().version if self._number is None else self._number

    @property
    @rank_zero_experiment
    def experiment(self) -> "SummaryWriter":
        """The writer; the first use makes the run's directory."""
        # Lightning takes the next free number long before: of runs that start at once, several would take the same.
        while not self._is_made and isinstance(number := self.version, int):
            try:
                Path(self.log_dir).mkdir(parents=True)
                self._is_made = True
            except FileExistsError:
                self._number = number + 1
        if self.unfinished and not (path := Path(self.log_dir, self.unfinished[0])).exists():
            write_whole(path, self.unfinished[1].encode())
        writer: SummaryWriter = super().experiment
        return writer

    def discard(self) -> None:
        """Remove the directory, if it was made here: its run has not begun."""
        if self._is_made:
            shutil.rmtree(self.log_dir, ignore_errors=True)
            with contextlib.suppress(OSError):  # there are other runs
                Path(self.root_dir).rmdir()


def rewind(trainer: pl.Trainer) -> None:
    """Take back what was logged after the checkpoint that is being resumed."""
    from tensorboard.compat.proto.event_pb2 import Event, SessionLog

    restart = SessionLog(status=SessionLog.START)
    for writer in _writers(trainer):
        writer.file_writer.add_event(Event(step=trainer.global_step, session_log=restart))


def log_settings(trainer: pl.Trainer, settings: Mapping[str, Any]) -> None:
    """Tell the HParams tab which settings to compare, and by which metrics."""
    from torch.utils.tensorboard.summary import hparams

    plain = {name: str(value) if isinstance(value, dict) else value for name, value in settings.items()}
    for writer in _writers(trainer):
        for summary in hparams(plain, dict.fromkeys(("test/acc", "test/loss", "val/acc", "val/loss"))):
            writer.file_writer.add_summary(summary)


def log_picture(trainer: pl.Trainer, tag: str, path: Path, step: int) -> None:
    """Show a PNG file as it is: `add_figure` would draw the figure once more, `add_image` compress it once more."""
    from PIL import Image
    from tensorboard.compat.proto.summary_pb2 import Summary

    with Image.open(path) as picture:
        width, height = picture.size
    image = Summary.Image(width=width, height=height, colorspace=4, encoded_image_string=path.read_bytes())
    for writer in _writers(trainer):
        writer.file_writer.add_summary(Summary(value=[Summary.Value(tag=tag, image=image)]), step)


def _writers(trainer: pl.Trainer) -> Iterator[Any]:
    loggers = trainer.loggers if trainer.is_global_zero else []
    return (logger.experiment for logger in loggers if isinstance(logger, TensorBoardLogger))
