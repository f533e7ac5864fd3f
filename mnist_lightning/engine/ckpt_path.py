"""What `--ckpt_path` means: a checkpoint by its name, and the settings that it brings along."""

import sys
from enum import Enum
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch.cli import LightningArgumentParser

from .checkpoint_file import load_checkpoint, plain_values
from .console import UsageError, say
from .runs import CheckpointError, find_checkpoint, find_unfinished
from .tensorboard import plain_config


def find(command: str, config: Any, runs: Path) -> Path | None:
    """The checkpoint that a command's `ckpt_path` names, if it names one.

    Args:
        command: One of LightningCLI's. Only `fit` knows `auto`, and does without one.
        config: The command's settings.
        runs: Directory of the runs.

    Raises:
        UsageError: There is no such checkpoint.
    """
    if config.ckpt_path == "auto" and command == "fit":
        path = find_unfinished(runs, plain_config(config))
        say(f"ckpt_path auto: {f'resumes {path}' if path else 'starts, as no run with these settings is unfinished'}")
        return path
    if not config.ckpt_path:
        if command == "fit":
            return None
        raise UsageError("ckpt_path: which weights? Give `best` or `last` of the newest run, or a path")
    try:
        return find_checkpoint(config.ckpt_path, runs)
    except CheckpointError as error:
        raise UsageError(f"ckpt_path: {error}") from error


def take_settings(path: Path, command: str, parser: LightningArgumentParser, config: Any, run: Path | None) -> Any:
    """Parse the command line again, over the settings of a checkpoint's run, module and data.

    Args:
        path: The checkpoint.
        command: One of LightningCLI's.
        parser: LightningCLI's.
        config: What it parsed before.
        run: Directory of the run that is resumed, if `fit` resumes one in its own directory.

    Raises:
        UsageError: The checkpoint is not of this program, or a setting contradicts it.
    """
    try:
        checkpoint = load_checkpoint(path)
        if command == "fit" and "optimizer_states" not in checkpoint:
            raise CheckpointError(f"{path} holds only weights, from which no run can be resumed")
    except CheckpointError as error:
        raise UsageError(f"ckpt_path: {error}") from error
    saved = {"model": checkpoint["hyper_parameters"], "data": checkpoint["datamodule_hyper_parameters"]}
    known = {
        group: {
            name: _as_parsed(value, config[command][group][name])
            for name, value in values.items()
            if name in config[command].get(group, {})
        }
        for group, values in saved.items()
    }
    known["data"].pop("seed", None)  # it is `seed_everything`
    files = [run / "config.yaml"] if run else []
    configs = [*(str(file) for file in files if file.is_file()), yaml.safe_dump(known)]
    config = parser.parse_args([command, *(f"--config={each}" for each in configs), *sys.argv[2:]])
    for name in known["model"]:
        given, value = config[command].model[name], saved["model"][name]
        if plain_values(given, name) != value:
            ways = "; leave that out, or give it to a new run, without --ckpt_path" if command == "fit" else ""
            raise UsageError(f"model.{name} is {given}, but the checkpoint was trained with {value}{ways}")
    return config


def _as_parsed(value: Any, default: Any) -> Any:
    """A checkpoint's value as it is given on a command line: an enumeration by name."""
    return type(default)(value).name if isinstance(default, Enum) else value
