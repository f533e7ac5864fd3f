"""`config.yaml`: what a run was made of, written so that it can be read again."""

from enum import Enum
from typing import Any

import jsonargparse
import lightning.pytorch as pl
import yaml
from lightning.pytorch.cli import SaveConfigCallback

from .checkpoint_file import write_whole
from .run import run_directory

# What jsonargparse writes, with a warning, in the place of a value that it knows no text for.
NO_TEXT = "Unable to serialize instance "


class SaveConfig(SaveConfigCallback):
    """Saves `config.yaml` when training begins: a run that cannot be resumed keeps its own."""

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Save at once where nothing is trained."""
        if stage == "fit":
            self.already_saved = True  # also for the test that comes after
        super().setup(trainer, pl_module, stage)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save, in one step: a resumed run needs its config."""
        if run := run_directory(trainer):
            write_whole(run / "config.yaml", self.parser.dump(self.config, skip_none=False).encode())


def readable(value: Any) -> Any:
    """What a parser can read again: a device, say, as its name. An object without a text is left to its default."""
    if isinstance(value, dict):
        return {key: readable(part) for key, part in value.items() if not str(part).startswith(f"{NO_TEXT}<")}
    if isinstance(value, list):
        return [readable(part) for part in value]
    if isinstance(value, Enum):
        return value.value
    return value.removeprefix(NO_TEXT) if isinstance(value, str) else value


jsonargparse.set_dumper("yaml", lambda data: yaml.safe_dump(readable(data), sort_keys=False, allow_unicode=True))
