"""The argument parser: errors in one line, config files in Unicode, the engine's settings. Lightning is not needed."""

import codecs
import difflib
import itertools
import re
from pathlib import Path
from typing import Any, Literal, NoReturn

import jsonargparse
from jsonargparse.typing import NonNegativeInt, path_type

from .console import UsageError

# The least values that make sense of settings that Lightning does not check.
MINIMA = {"check_val_every_n_epoch": 1, "log_every_n_steps": 0, "accumulate_grad_batches": 1, "gradient_clip_val": 0}

# Errors that only say which type was expected.
VAGUE = re.compile(r"Expected a |Not a valid subclass")


class Parser(jsonargparse.ArgumentParser):
    """jsonargparse's parser, which raises its errors as a `UsageError` of one line."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # A setting that does not exist must not be taken for one that begins in the same way.
        super().__init__(*args, allow_abbrev=False, **kwargs)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise `message` as a `UsageError`, with the nearest name for a setting that does not exist."""
        if unknown := re.search(r"(?:unrecognized arguments: --|does not accept [a-z ]+')([\w.-]+)", message):
            groups = (action.choices.values() for action in self._actions if isinstance(action.choices, dict))
            parsers = [self, *itertools.chain(*groups)]
            known = {action.dest for parser in parsers for action in parser._actions}
            if unknown[1] not in known:
                nearest = difflib.get_close_matches(unknown[1], known, n=1)
                message = f"there is no setting {unknown[1]}{f'; did you mean {nearest[0]}?' if nearest else ''}"
        raise UsageError(one_line(message)) from ex

    def parse_path(self, path: Any, **kwargs: Any) -> Any:
        """Parse a config file in UTF-8 or, with a byte-order mark, UTF-16, whatever the locale; errors name it."""
        content = Path(path).read_bytes()
        encoding = "utf-16" if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig"
        try:
            with path_type("fr")(path).relative_path_context():
                config = self.parse_string(content.decode(encoding), **kwargs)
            if config.get("data.seed") is not None:
                raise UsageError("data.seed is ignored: give seed_everything")
            return config
        except (UsageError, ValueError) as error:
            raise UsageError(f"{path}: {error}") from error


def one_line(message: str) -> str:
    """jsonargparse's message in one line, with one of the errors where a value is of none of several types."""
    message = re.sub(r"<class '(?:\w+\.)*(\w+)'>|typing\.", r"\1", re.sub(r'^Parser key "(.*?)":', r"\1:", message))
    union = re.match(r"(?s)([\w.]+:\s|).*?\n *Errors:(\n *- )(.*)\n *Given value type:.*\n *Given value: (.*)", message)
    if union:
        setting, bullet, errors, value = union.groups()
        # The one that says more than which type was expected, if there is one.
        telling = [each for each in errors.split(bullet) if not VAGUE.match(each) or "Got value" in each]
        message = setting + (one_line(telling[0]) if telling else f"{errors.replace(bullet, ' or ')} (given: {value})")
    return " ".join(message.split())


def add_settings(parser: jsonargparse.ArgumentParser, threads: int) -> None:
    """Add the engine's own settings; `threads` is the default of PyTorch's number of threads."""
    number = f"PyTorch's threads on a CPU; 0: PyTorch's own number (default: OMP_NUM_THREADS or {threads})"
    parser.add_argument("--threads", type=NonNegativeInt | None, default=None, help=number)
    monitor = "Metric whose best value over the validations chooses best.ckpt"
    parser.add_argument("--monitor", type=str, default="val/acc", help=monitor)
    mode = "Whether its best value is the largest (max) or the smallest (min)"
    parser.add_argument("--mode", type=Literal["max", "min"], default="max", help=mode)
    every = "Save last.ckpt also after every so many iterations; 0 does not"
    parser.add_argument("--checkpoint_every", type=NonNegativeInt, default=0, help=every)
    test = "Whether `fit` tests at its end and draws the figures"
    parser.add_argument("--test_after_fit", type=bool, default=True, help=test)
    weights = "Weights that `fit` tests: those of the best validation, or the last"
    parser.add_argument("--test_weights", type=Literal["best", "last"], default="best", help=weights)


def check_values(config: Any) -> None:
    """Raise a `UsageError` where the seed, or a number that Lightning does not check, is out of range."""
    seed, trainer = config.seed_everything, config.trainer
    if isinstance(seed, bool) or not 0 <= seed < 2**32:
        raise UsageError(f"seed_everything must be a whole number from 0 to {2**32 - 1}, not {seed}")
    for name in ("max_epochs", "max_steps", "val_check_interval"):
        if trainer[name] == 0:
            raise UsageError(f"trainer.{name} must not be 0")
    for name, least in MINIMA.items():
        if trainer[name] is not None and trainer[name] < least:
            raise UsageError(f"trainer.{name} must be at least {least}, not {trainer[name]}")
    if config.get("lr_scheduler") and not config.get("optimizer"):  # Lightning would ignore it
        raise UsageError("lr_scheduler: give --optimizer, too")
