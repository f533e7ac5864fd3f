"""The argument parser: config files in any encoding, and errors in one line."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from jsonargparse import ActionConfigFile  # type: ignore[attr-defined]
from jsonargparse.typing import PositiveInt

from mnist_lightning.engine.console import UsageError
from mnist_lightning.engine.parser import Parser


class Shape:
    def __init__(self, rotation: float = 0, names: list[str] | None = None) -> None:
        self.rotation = rotation


@pytest.fixture
def parser() -> Parser:
    parser = Parser()
    parser.add_argument("-c", "--config", action=ActionConfigFile)
    parser.add_argument("--data.root", type=str)
    parser.add_argument("--data.size", type=PositiveInt | None)
    parser.add_argument("--data.shape", type=bool | Shape)
    parser.add_argument("--data.seed", type=int)
    return parser


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_config_files_in_any_unicode_encoding_whatever_the_locale(tmp_path: Path, encoding: str) -> None:
    (tmp_path / "a.yaml").write_text("root: données/日本\n", encoding=encoding)
    program = """
from jsonargparse import ActionConfigFile
from mnist_lightning.engine.parser import Parser
parser = Parser()
parser.add_argument("--config", action=ActionConfigFile)
parser.add_argument("--root", type=str)
assert open("a.yaml").encoding.lower() not in ("utf-8", "utf-16"), "the test needs another locale"
print(ascii(parser.parse_args(["--config=a.yaml"]).root))
"""
    locale = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    said = subprocess.check_output([sys.executable, "-c", program], cwd=tmp_path, env=locale, text=True)
    assert said == f"{'données/日本'!a}\n"


def test_a_config_file_may_name_another_one_beside_it(parser: Parser, tmp_path: Path) -> None:
    parser.add_class_arguments(Shape, "shape")
    (tmp_path / "a.yaml").write_text("shape: shape.yaml\n")
    (tmp_path / "shape.yaml").write_text("rotation: 5\n")
    assert parser.parse_args([f"--config={tmp_path / 'a.yaml'}"]).shape.rotation == 5


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"data:\n  size: 3\n bad: [\n", "line 3, column 2"),
        (b"\x89PNG", "'utf-8' codec can't decode byte 0x89 in position 0: invalid start byte"),
        (b'data:\n  root: "D:\\digits"\n', "found unknown escape character"),
        (b"data:\n  size: many\n", "data.size: Not of type PositiveInt: invalid literal for int()"),
        (b"data:\n  seed: 5\n", "data.seed is ignored: give seed_everything"),
    ],
)
def test_wrong_config_files(parser: Parser, tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "wrong.yaml"
    path.write_bytes(content)
    with pytest.raises(UsageError) as error:
        parser.parse_args([f"--config={path}"])
    line = str(error.value)
    assert line.startswith(f"{path}: ")
    assert said in line
    assert "\n" not in line


@pytest.mark.parametrize(
    ("argument", "said"),
    [
        ("--data.siz=3", "there is no setting data.siz; did you mean data.size?"),
        ("--config=nowhere.yaml", "config: File does not exist: '"),
        ("--data.size=0", "data.size: Not of type PositiveInt: does not conform to restriction v>0"),
        ("--data.shape=maybe", "data.shape: Expected a bool or Expected a dot import path string: maybe"),
        ("--data.shape.rotation=far", "data.shape: rotation: Expected a float. Got value: far"),
        ("--data.shape.names=x", "data.shape: names: Expected a list or Expected a NoneType (given: x)"),
    ],
)
def test_a_wrong_setting_is_said_in_one_line(parser: Parser, argument: str, said: str) -> None:
    with pytest.raises(UsageError) as error:
        parser.parse_args([argument])
    assert str(error.value).startswith(said)
    assert "\n" not in str(error.value)
