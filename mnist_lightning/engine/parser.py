"""An argument parser whose errors say in one line which setting is wrong and how. It starts without Lightning."""

import difflib
import os
import re
from argparse import ArgumentParser
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import jsonargparse
import yaml

# What Lightning does not check: the least value of what may also be -1, for no limit, and of the others.
OR_UNLIMITED = {"max_epochs": 1, "max_steps": 1, "num_sanity_val_steps": 0}
MINIMA = {"check_val_every_n_epoch": 1, "log_every_n_steps": 0, "accumulate_grad_batches": 1, "gradient_clip_val": 0}


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
        if unknown and unknown[1] in (known := set(_known_keys(self))):
            message = f"{unknown[1]} is no list that + could add to; give --{unknown[1]}"
        elif unknown:
            message = f"there is no setting {unknown[1]}{did_you_mean(unknown[1], known)}"
        elif "item assignment" in message:
            lists = " and ".join(action.dest for action in self._actions if action.nargs == "*")
            message = f"{lists}: a list is wanted, with - before each of its lines"
        raise UsageError(message) from ex

    def parse_args(self, *args: Any, **kwargs: Any) -> Any:
        """Parse the command line. `~` is the home directory, also where no shell sees it: behind `=`, in a config."""
        return _at_home(super().parse_args(*args, **kwargs))

    def parse_path(self, path: Any, *args: Any, **kwargs: Any) -> Any:
        """Parse a config file; errors in its syntax or its values name it and, where it is no YAML, the line."""
        try:
            config = super().parse_path(path, *args, **kwargs)
            links: list[Any] = [action for action in self._actions if hasattr(action, "apply_on")]
            for action in links:
                if action.target[0] in config:  # which the link would overrule
                    raise UsageError(f"{action.target[0]} is not set by itself; give {action.source[0][0]}")
            return config
        except (UsageError, OSError, ValueError) as error:
            cause: BaseException | None = error
            while cause is not None and not isinstance(cause, yaml.MarkedYAMLError):
                cause = cause.__cause__ or cause.__context__
            if cause is not None and (mark := cause.problem_mark):
                error = UsageError(f"line {mark.line + 1}, column {mark.column + 1}: {cause.problem}")
            raise UsageError(f"{path}: {error}") from error


def _at_home(value: Any) -> Any:
    if isinstance(value, jsonargparse.Namespace | dict):
        for key, part in list(vars(value).items() if isinstance(value, jsonargparse.Namespace) else value.items()):
            value[key] = _at_home(part)
    elif isinstance(value, list):
        return [_at_home(part) for part in value]
    at_home = isinstance(value, str) and value[:2] in ("~", "~/", f"~{os.sep}")
    return str(Path(value).expanduser()) if at_home else value


def did_you_mean(name: str, names: Iterable[str], otherwise: str = "") -> str:
    """The end of an error about an unknown name: the nearest of `names`, or `otherwise`."""
    nearest = difflib.get_close_matches(name, names, n=1)
    return f"; did you mean {nearest[0]}?" if nearest else otherwise


# Of the errors of a union's types, those of types that were never meant tell nothing.
UNTELLING = re.compile(
    r"Expected an? (?!instantiatable|.*Got value)|Not a valid subclass|Import path .* does not correspond"
)


def shorter(message: str) -> str:
    """One of jsonargparse's errors, with types as people write them, and but one of the errors of a union's types."""

    def choose(union: re.Match[str]) -> str:
        errors, bullet, value = union.groups()
        telling = (error for error in errors.split(bullet)[1:] if not UNTELLING.match(error))
        # Neither are jsonargparse's own objects: a class by its name, an argument by its value.
        given = re.search(r"class_path'?[=:] ?'([\w.]+)'", value)
        nested = re.fullmatch(r"NestedArg\(key=.*?, val='(.*)'\)", value)
        name = given[1].rpartition(".")[2] if given else nested[1] if nested else value
        error = next(telling, f"This value is not allowed: {name}")
        one = "arguments are required" in error and value.count("class_path") == 1
        return f"{name} needs {error.rpartition(': ')[2]}" if one else error

    message = re.sub(r"<class '(\w+)'>|typing\.", r"\1", message)
    message = re.sub(r"- Expected a path but .*\n\s*- ", "", message)
    message = re.sub(r'Linked "(.*)" must be given via "(.*)"\.', r"\1 is not set by itself; give \2", message)
    message = re.sub(
        r"Expected an instantiatable class, but (\S+) is abstract", r"of which \1? Name its class first", message
    )
    message = re.sub(
        r"(?s)Does not validate.*?Errors:((\n *- ).*?)\s*Given value type:.*?Given value: (.*)", choose, message
    )
    return re.sub(r'Parser key "(\S+)":\s+(\w+ needs (\w+).*)', r"\2; give it with --\1.\3", message)


def _known_keys(parser: ArgumentParser) -> Iterator[str]:
    for action in parser._actions:
        yield action.dest
        if isinstance(action.choices, dict):  # of subcommands
            for subparser in action.choices.values():
                yield from _known_keys(subparser)


def check_values(config: Any) -> None:
    """Raise a `UsageError` where the seed, or a number that Lightning does not check, is out of range."""
    seed, trainer = config.seed_everything, config.trainer
    if isinstance(seed, bool) or not 0 <= seed < 2**32:
        raise UsageError(f"seed_everything must be a whole number from 0 to {2**32 - 1}, not {seed}")
    for name, least in (OR_UNLIMITED | MINIMA).items():
        value, may_be_unlimited = trainer[name], name in OR_UNLIMITED
        if value is not None and value < least and not (may_be_unlimited and value == -1):
            choice = ", or -1 for no limit" if may_be_unlimited else ""
            raise UsageError(f"trainer.{name} must be at least {least}{choice}, not {value}")
    if trainer.val_check_interval == 0:
        raise UsageError("trainer.val_check_interval must be above 0; trainer.limit_val_batches 0 does not validate")
