"""The argument parser: errors in one line, config files in any Unicode encoding. It starts without Lightning."""

import re
from argparse import ArgumentParser
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NoReturn

import jsonargparse
import yaml
from jsonargparse.typing import NonNegativeInt

from .console import UsageError, did_you_mean

# What Lightning does not check: the least value of what may also be -1, for no limit, and of the others.
OR_UNLIMITED = {"max_epochs": 1, "max_steps": 1, "num_sanity_val_steps": 0}
MINIMA = {"check_val_every_n_epoch": 1, "log_every_n_steps": 0, "accumulate_grad_batches": 1, "gradient_clip_val": 0}

# Errors of a union's types that do not say what is wrong with the value.
VAGUE = re.compile(r"Expected a |Not a valid subclass|Import path .* does not correspond")


class Parser(jsonargparse.ArgumentParser):
    """jsonargparse's parser, which raises its errors as a `UsageError` of one line."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # A setting that does not exist must not be taken for one that begins in the same way.
        super().__init__(*args, allow_abbrev=False, **kwargs)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise the telling line of `message` as a `UsageError`."""
        unknown = re.search(r"(?:unrecognized arguments: --|does not accept [a-z ]+')([\w.-]+)", message)
        known = set(_settings(self))
        if unknown and unknown[1] not in known:
            message = f"there is no setting {unknown[1]}{did_you_mean(unknown[1], known)}"
        raise UsageError(telling_line(message)) from ex

    def parse_path(self, path: Any, *args: Any, **kwargs: Any) -> Any:
        """Parse a config file in UTF-8 or, with a byte-order mark, UTF-16; errors name the file and the line."""
        try:
            text = _decode(Path(path).read_bytes())
            yaml.safe_load(text)
            if text == Path(path).read_text(errors="replace"):
                return super().parse_path(path, *args, **kwargs)
            return self.parse_string(text, *args, **kwargs)  # the locale's encoding is another one
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark
            place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
            raise UsageError(f"{path}: {place}{error.problem}{_backslashes(text)}") from error
        except (UsageError, ValueError) as error:
            raise UsageError(f"{path}: {error}") from error


def telling_line(message: str) -> str:
    """jsonargparse's message in one line: the setting and, of the errors of a union's types, the most telling one."""
    message = re.sub(r"<class '(?:\w+\.)*(\w+)'>|typing\.", r"\1", message)
    setting = re.match(r'Parser key "(.*?)":\s*', message)
    rest = message[setting.end() :] if setting else message
    if union := re.search(
        r"(?s)Subtypes: \[(.*?)\]\n.*?Errors:((\n *- ).*?)\n\s*Given value type:.*?Given value: (.*)", rest
    ):
        types, errors, bullet, value = union.groups()
        telling = [each for each in errors.split(bullet)[1:] if not VAGUE.match(each) or "Got value" in each]
        telling.sort(key=lambda each: bool(VAGUE.match(each)))
        types = re.sub(r"(\w+\.)+", "", types).replace("NoneType", "null")
        rest = telling[0] if telling else f"expected one of {types}; got {value}"
    return " ".join((f"{setting[1]}: {rest}" if setting else rest).split())


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
    for name, least in (OR_UNLIMITED | MINIMA).items():
        value, may_be_unlimited = trainer[name], name in OR_UNLIMITED
        if value is not None and value < least and not (may_be_unlimited and value == -1):
            choice = ", or -1 for no limit" if may_be_unlimited else ""
            raise UsageError(f"trainer.{name} must be at least {least}{choice}, not {value}")
    if trainer.val_check_interval == 0:
        raise UsageError("trainer.val_check_interval must be above 0; trainer.limit_val_batches 0 does not validate")
    if config.get("lr_scheduler") and not config.get("optimizer"):  # Lightning would ignore it
        raise UsageError("lr_scheduler: give --optimizer, too")


def _decode(content: bytes) -> str:
    is_utf16 = content.startswith((b"\xff\xfe", b"\xfe\xff"))
    return content.decode("utf-16" if is_utf16 else "utf-8-sig")


def _backslashes(text: str) -> str:
    hint = "; in double quotes a backslash begins an escape sequence: give the path in single quotes"
    return hint if re.search(r'"[^"\n]*\\', text) else ""


def _settings(parser: ArgumentParser) -> Iterator[str]:
    for action in parser._actions:
        yield action.dest
        if isinstance(action.choices, dict):  # of subcommands
            for subparser in action.choices.values():
                yield from _settings(subparser)
