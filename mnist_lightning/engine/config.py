"""The settings of a run: where they have it written, and `config.yaml`, which can be read again."""

import inspect
from pathlib import Path
from typing import Any

import jsonargparse
import lightning.pytorch as pl
import yaml
from lightning.pytorch.cli import SaveConfigCallback

from .checkpoint_file import write_whole
from .run import RUNS, run_directory

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
            write_whole(run / "config.yaml", self.parser.dump(self.config, skip_unset=False).encode())


def runs_directory(trainer: Any) -> Path:
    """Where runs with these settings are written: by the first logger of the user's, or by ours."""
    loggers = trainer.logger if isinstance(trainer.logger, list) else [trainer.logger]
    given = loggers[0].get("init_args", {}) if loggers and isinstance(loggers[0], jsonargparse.Namespace) else {}
    return Path(given.get("save_dir") or trainer.default_root_dir or ".", given.get("name", RUNS) or "")


def defaults_of(kind: type) -> dict[str, Any]:
    """The defaults of a class's arguments, and of those of its bases, to which it may hand settings on."""
    signatures = (inspect.signature(each).parameters.items() for each in reversed(kind.__mro__[:-1]))
    return {name: parameter.default for signature in signatures for name, parameter in signature}


def readable(value: Any) -> Any:
    """What a parser can read again: a device, say, as its name. An object without a text is left to its default."""
    if isinstance(value, dict):
        return {key: readable(part) for key, part in value.items() if not str(part).startswith(f"{NO_TEXT}<")}
    if isinstance(value, list):
        return [readable(part) for part in value]
    return value.removeprefix(NO_TEXT) if isinstance(value, str) else value


jsonargparse.set_dumper("yaml", lambda data: yaml.safe_dump(readable(data), sort_keys=False, allow_unicode=True))
