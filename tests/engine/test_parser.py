"""The argument parser: config files in any encoding, and errors in one telling line."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Literal

import pytest
from jsonargparse import ActionConfigFile  # type: ignore[attr-defined]
from jsonargparse.typing import ClosedUnitInterval, PositiveInt

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
    parser.add_argument("--share", type=ClosedUnitInterval)
    parser.add_argument("--mode", type=Literal["max", "min"])
    return parser


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_config_files_in_any_unicode_encoding(parser: Parser, tmp_path: Path, encoding: str) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("data:\n  root: données/日本\n", encoding=encoding)
    assert parser.parse_args([f"--config={path}"]).data.root == "données/日本"
    path.write_text("data:\n  root: données\n  size: 0\n", encoding=encoding)
    with pytest.raises(UsageError, match=r"a\.yaml: data\.size: Not of type PositiveInt"):
        parser.parse_args([f"--config={path}"])


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_config_files_where_the_locale_has_another_encoding(tmp_path: Path, encoding: str) -> None:
    (tmp_path / "a.yaml").write_text("root: données\n", encoding=encoding)
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
    assert said == "'donn\\xe9es'\n"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"data:\n  size: 3\n bad: [\n", "line 3, column 2: expected <block end>, but found "),
        (b"data:\n\tsize: 3\n", "line 2, column 1: found character '\\t' that cannot start any token"),
        (b"- 1\n", "Unexpected config: - 1"),
        (b"", "Unexpected config:"),
        (b"\x89PNG", "'utf-8' codec can't decode byte 0x89 in position 0: invalid start byte"),
        ("root: é\n".encode("latin-1"), "'utf-8' codec can't decode byte 0xe9 in position 6: invalid continuation"),
        (b'data:\n  root: "C:\\Users"\n', "line 2, column 14: expected escape sequence of 8 hexadecimal numbers"),
        (b'data:\n  root: "D:\\digits"\n', "line 2, column 13: found unknown escape character 'd'; in double quotes a"),
        (
            b"data:\n  size: many\n",
            "data.size: Not of type PositiveInt: invalid literal for int() with base 10: 'many'",
        ),
    ],
)
def test_wrong_config_files(parser: Parser, tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "wrong.yaml"
    path.write_bytes(content)
    with pytest.raises(UsageError) as error:
        parser.parse_args([f"--config={path}"])
    line = str(error.value)
    assert line.startswith(f"{path}: {said}")
    assert "\n" not in line
    assert ("give the path in single quotes" in line) is (b'"' in content)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--data.siz=3"], "there is no setting data.siz; did you mean data.size?"),
        (["--nonsense=3"], "there is no setting nonsense"),
        (["more"], "unrecognized arguments: more"),
        (["--config=nowhere.yaml"], "config: File does not exist: '"),
        (["--data.size=0"], "data.size: Not of type PositiveInt: does not conform to restriction v>0"),
        (["--share=2"], "share: Not of type ClosedUnitInterval: 2 does not conform to restriction v>=0 and v<=1"),
        (["--mode=sideways"], "mode: Expected a Literal['max', 'min']. Got value: sideways"),
        (["--data.shape=maybe"], "data.shape: expected one of bool, Shape; got maybe"),
        (["--data.shape.rotation=far"], "data.shape: rotation: Expected a float. Got value: far"),
        (["--data.shape.rotatoin=5"], "data.shape: Option 'rotatoin' is not accepted"),
        (["--data.shape.names=x"], "data.shape: names: expected one of list[str], null; got x"),
    ],
)
def test_a_wrong_setting_is_said_in_one_telling_line(parser: Parser, arguments: list[str], said: str) -> None:
    with pytest.raises(UsageError) as error:
        parser.parse_args(arguments)
    assert str(error.value).startswith(said)
    assert "\n" not in str(error.value)
    assert "Subtypes" not in str(error.value)
