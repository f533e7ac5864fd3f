"""An argument parser whose errors say in one line which setting is wrong and how. It starts without Lightning."""

import difflib
import inspect
import re
from argparse import ArgumentParser
from collections.abc import Iterable, Iterator
from typing import Any, NoReturn, Union, get_args

import jsonargparse
import yaml

# What Lightning does not check: the least value, and the one that means no limit.
TRAINER_MINIMA = {
    "max_epochs": (1, -1),
    "max_steps": (1, -1),
    "check_val_every_n_epoch": (1, None),
    "num_sanity_val_steps": (0, -1),
    "log_every_n_steps": (0, None),
    "accumulate_grad_batches": (1, None),
    "gradient_clip_val": (0, None),
}


class UsageError(Exception):
    """The command or the config is wrong; the message names the setting and what to do."""


class Parser(jsonargparse.ArgumentParser):
    """Raises errors instead of printing them below the usage text."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # A setting that does not exist must not be taken for one that begins in the same way.
        super().__init__(*args, allow_abbrev=False, **kwargs)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise `message`, shorter and with types as people write them, as a `UsageError`."""
        message = shorter(message)
        unknown = re.search(r"(?i:unrecognized arguments: --|does not accept [a-z ]+'|^option ')([\w.-]+)", message)
        if unknown:
            message = f"there is no setting {unknown[1]}{did_you_mean(unknown[1], _known_keys(self))}"
        raise UsageError(message) from ex

    def parse_path(self, path: Any, *args: Any, **kwargs: Any) -> Any:
        """Parse a config file; errors in its syntax or its values name it and, where it is no YAML, the line."""
        try:
            config = super().parse_path(path, *args, **kwargs)
            for action in self._actions:
                if hasattr(action, "apply_on") and action.target[0] in config:  # a link, which would overrule it
                    raise UsageError(f"{action.target[0]} is not set by itself; give {action.source[0][0]}")
            return config
        except (UsageError, OSError, ValueError) as error:
            cause: BaseException | None = error
            while cause is not None and not isinstance(cause, yaml.MarkedYAMLError):
                cause = cause.__cause__ or cause.__context__
            if cause is not None and (mark := cause.problem_mark):
                error = UsageError(f"line {mark.line + 1}, column {mark.column + 1}: {cause.problem}")
            raise UsageError(f"{path}: {error}") from error


def did_you_mean(name: str, names: Iterable[str], otherwise: str = "") -> str:
    """The end of an error about an unknown name: the nearest of `names`, or `otherwise`."""
    nearest = difflib.get_close_matches(name, names, n=1)
    return f"; did you mean {nearest[0]}?" if nearest else otherwise


def shorter(message: str) -> str:
    """One of jsonargparse's errors, with types as people write them, and but one of the errors of a union's types."""

    def choose(union: re.Match[str]) -> str:
        errors, bullet, value = union.groups()
        *_, last = errors.split(bullet)  # of a group of settings, if it may be one
        is_type = last.startswith(("Expected", "Not a valid"))
        return f"This value is not allowed: {value}" if is_type else last

    message = re.sub(r"<class '(\w+)'>|typing\.", r"\1", message)
    message = re.sub(r"- Expected a path but .*\n\s*- ", "", message)
    message = re.sub(r'Linked "(.*)" must be given via "(.*)"\.', r"\1 is not set by itself; give \2", message)
    return re.sub(
        r"(?s)Does not validate.*?Errors:((\n *- ).*?)\s*Given value type:.*?Given value: (.*)", choose, message
    )


def _known_keys(parser: ArgumentParser) -> Iterator[str]:
    for action in parser._actions:
        yield action.dest
        if isinstance(action.choices, dict):  # of subcommands
            for subparser in action.choices.values():
                yield from _known_keys(subparser)


def check_values(config: Any) -> None:
    """Check what Lightning does not: the seed, and the Trainer's numbers.

    Raises:
        UsageError: One is out of its range.
    """
    seed, trainer = config.seed_everything, config.trainer
    if isinstance(seed, bool) or not 0 <= seed < 2**32:
        raise UsageError(f"seed_everything must be a whole number from 0 to {2**32 - 1}, not {seed}")
    for name, (least, unlimited) in TRAINER_MINIMA.items():
        value = trainer[name]
        if value is not None and value < least and value != unlimited:
            choice = "" if unlimited is None else f", or {unlimited} for no limit"
            raise UsageError(f"trainer.{name} must be at least {least}{choice}, not {value}")
    if trainer.val_check_interval == 0:
        raise UsageError("trainer.val_check_interval must be above 0; trainer.limit_val_batches 0 does not validate")


def keep_limits_whole() -> None:
    """Let Lightning's parser read `limit_val_batches: 1` as one minibatch, not as 1.0, all of them.

    `typing` may take another module's `Optional[Union[float, int]]` for Lightning's `Optional[Union[int, float]]`, to
    which it is equal; which of them depends on the order of imports.
    """
    import lightning.pytorch as pl

    annotations = inspect.unwrap(pl.Trainer.__init__).__annotations__
    for name, hint in annotations.items():
        if {int, float} <= set(get_args(hint)):
            annotations[name] = Union[(int, *(kind for kind in get_args(hint) if kind is not int))]
