import csv
import io
import os
import re
import sys
import time
import warnings
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import RunCLI, prepare
from digits.paste import paste
from digits.samples import DIGITS, as_picture, enlarge, on_paper, save
from digits.test_pictures import bomb
from PIL import Image
from torch import Tensor

from mnist_lightning.commands import _network
from mnist_lightning.digits.picture_predictions import find_pictures, preprocess_all, stack
from mnist_lightning.digits.pictures import PictureError, preprocess
from mnist_lightning.engine.console import UsageError


def test_finds_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = ["b.png", "a.JPG", "notes.txt", "more/c.webp", "more/d [1].png", "e.HEIC", "no/f.txt"]
    for name in (*names, "._b.png", ".cache/b.png"):
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).touch()
    for paths, found in {
        (".", "more"): ["a.JPG", "b.png", "e.HEIC", "more/c.webp", "more/d [1].png"],
        ("*.png", "b.png", "./notes.txt", "._b.png"): ["b.png", "notes.txt", "._b.png"],
        (f"{tmp_path}/**/d*",): [f"{tmp_path}/more/d [1].png"],
        ("more/d [1].png",): ["more/d [1].png"],
    }.items():
        assert list(map(str, find_pictures(paths))) == found
    for nothing in ("no", "none.png", "*.tif"):
        with pytest.raises(UsageError, match=f"there is no picture {re.escape(nothing)}$"):
            find_pictures([".", nothing])


@pytest.fixture
def trained(run_cli: RunCLI, short_run: Path) -> RunCLI:
    """The command line where there is a run, and whose data nobody needs."""
    return partial(run_cli, data=False)


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8", errors="surrogateescape") as file:
        return list(csv.DictReader(file))


def test_read_reads_pictures(trained: RunCLI, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine").mkdir()
    for index, digit in enumerate(DIGITS[:3]):
        save(tmp_path / f"mine/{index}.png", Image.fromarray(on_paper(enlarge(digit, 140))))
    save(tmp_path / "mine/blank.png", Image.new("L", (50, 50), 200))

    filters = [*warnings.filters]
    assert trained("read", "mine") == 0
    assert warnings.filters == filters
    captured = capsys.readouterr()
    assert captured.err == ""
    best_path = "lightning_logs/version_0/checkpoints/best.ckpt"
    lines = captured.out.splitlines()
    assert lines[0] == f"Weights: {best_path}, trained on synthetic digits (not MNIST), 11 iterations"
    assert lines[-2:] == ["Predictions: predictions.csv", "Figure: pictures.png"]
    rows = rows_of(tmp_path / "predictions.csv")
    assert list(rows[0]) == ["file", "digit", "probability", "runner_up", "runner_up_probability"]
    assert [row["file"] for row in rows] == ["mine/0.png", "mine/1.png", "mine/2.png", "mine/blank.png"]
    assert list(rows[-1].values())[1:] == ["blank", "", "", ""]
    mlp, _ = _network(str(tmp_path / best_path), "")
    inputs = stack([preprocess(tmp_path / row["file"]) for row in rows[:3]])
    (best, runner_up), (digit, second) = (pair.T for pair in mlp(inputs).softmax(1).topk(2))
    for index, row in enumerate(rows[:3]):
        assert (row["digit"], row["runner_up"]) == (str(int(digit[index])), str(int(second[index])))
        assert float(row["probability"]) == pytest.approx(float(best[index]), abs=1e-4)
        assert float(row["runner_up_probability"]) == pytest.approx(float(runner_up[index]), abs=1e-4)
        assert f"{float(row['probability']):.1%}" in captured.out
    assert (tmp_path / "pictures.png").stat().st_size > 10_000
    assert [path.name for path in (tmp_path / "lightning_logs").iterdir()] == ["version_0"]


def test_read_skips_what_is_no_picture(trained: RunCLI, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine").mkdir()
    save(tmp_path / "mine/0.png", as_picture(DIGITS[0]))
    save(tmp_path / "mine/blank.png", Image.new("L", (50, 50), 200))
    (tmp_path / "mine/note\x1b.png").write_text("no picture")
    bomb(tmp_path / "mine/bomb.png")
    assert trained("read", "mine/0.png", "mine/[bn]*") == 1
    captured = capsys.readouterr()
    assert "Skipped: mine/bomb.png cannot be read: Image size" in captured.err
    assert "Skipped: mine/note?.png is none of" in captured.err
    assert captured.err.splitlines()[-1] == "mnist_lightning: 2 of 4 files could not be read as pictures"
    assert [row["file"] for row in rows_of(tmp_path / "predictions.csv")] == ["mine/0.png", "mine/blank.png"]
    assert "Figure: pictures.png" in captured.out

    (tmp_path / "pictures.png").unlink()
    assert trained("read", "mine/note*") == 1
    captured = capsys.readouterr()
    assert captured.err.splitlines()[-1] == "mnist_lightning: 1 of 1 files could not be read as pictures"
    assert "Figure" not in captured.out
    assert rows_of(tmp_path / "predictions.csv") == []
    assert not (tmp_path / "pictures.png").exists()


def test_read_takes_names_that_are_no_text_and_other_settings(
    trained: RunCLI, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = os.fsdecode(b"\xe9.png")  # Latin-1
    save(tmp_path / name, as_picture(DIGITS[0]))
    settings = ["--ckpt_path=last", "--csv=mine.csv", "--figure", "mine.png"]
    assert trained("read", "?.png", *settings) == 0
    assert b"\xe9.png," in (tmp_path / "mine.csv").read_bytes()
    out = capsys.readouterr().out
    assert "checkpoints/last.ckpt, " in out
    assert "?.png" in out
    assert out.endswith("Predictions: mine.csv\nFigure: mine.png\n")
    assert (tmp_path / "mine.png").exists()
    # A name that begins as a setting does, and a checkpoint whose name is no text either.
    (tmp_path / "-x.png").write_bytes((tmp_path / name).read_bytes())
    (tmp_path / "lightning_logs/version_0/checkpoints/best.ckpt").rename(f"{name}.ckpt")
    assert trained("read", f"--ckpt_path={name}.ckpt", f"--csv={name}.csv", "--", "-x.png", name) == 0
    assert capsys.readouterr().out.startswith(
        "Weights: ?.png.ckpt, trained on synthetic digits (not MNIST), 11 iterations\n"
    )
    assert [row["file"] for row in rows_of(tmp_path / f"{name}.csv")] == ["-x.png", name]


def test_a_console_that_lacks_a_names_characters(
    trained: RunCLI, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    for name in ("数字.png", "\N{GRINNING FACE}.png", "é.png"):
        save(tmp_path / name, as_picture(DIGITS[0]))
    console = io.TextIOWrapper(io.BytesIO(), encoding="cp1252", write_through=True)
    monkeypatch.setattr(sys, "stdout", console)
    assert trained("read", ".", "--csv=数.csv") == 0
    out = console.buffer.getvalue().decode("cp1252")
    assert all(f" {name} " in out for name in ("??.png", "?.png", "é.png"))
    assert "Predictions: ?.csv" in out
    assert len({len(line) for line in out.splitlines() if line.startswith("|")}) == 1
    assert (tmp_path / "pictures.png").exists()
    assert not recwarn.list


def test_ten_thousand_paths_are_parsed_at_once(run_cli: RunCLI, capsys: pytest.CaptureFixture[str]) -> None:
    start = time.process_time()
    assert run_cli("read", *(f"{index}.png" for index in range(10_000)), data=False) == 2
    assert time.process_time() - start < 3
    assert "there is no picture 0.png" in capsys.readouterr().err


def test_of_many_pictures_the_first_hundred_are_listed(
    trained: RunCLI, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine").mkdir()
    for index in range(120):
        save(tmp_path / f"mine/{index:03}.png", as_picture(DIGITS[index % 10]))
    for terminal in ("1", ""):
        monkeypatch.setenv("FORCE_COLOR", terminal)
        assert trained("read", "mine") == 0
        captured = capsys.readouterr()
        assert ("Classifying pictures" in captured.err) is bool(terminal)
        assert "\nand 20 more\nPredictions: predictions.csv\n" in captured.out
        assert captured.out.count("mine/") == 100
    assert len(rows_of(tmp_path / "predictions.csv")) == 120


# 99.2% of 1,455 were classified correctly with 1,500 digits, which takes minutes.
PASTED = 300


@pytest.mark.soak
def test_nearly_all_pasted_digits_are_classified_correctly(run_cli: RunCLI, mnist_root: str, tmp_path: Path) -> None:
    assert run_cli("fit", f"--data.root={mnist_root}", "--test_after_fit=false", data=False) == 0
    mlp, _ = _network("best", "lightning_logs")
    pixels, labels = (part[:PASTED] for part in prepare("mnist", Path(mnist_root)).test)
    images = pixels.float() / 255

    def correct(pixels: Tensor) -> Tensor:
        with torch.no_grad():
            return torch.eq(mlp(pixels).argmax(1), labels)

    clean = correct(images)
    random = np.random.default_rng(0)
    for index, image in enumerate(images):
        paste(image.reshape(28, 28).numpy(), random).save(
            tmp_path / f"{index:04}.jpg", quality=int(random.integers(50, 96))
        )
    inputs = [
        pixels for pixels in preprocess_all(sorted(tmp_path.glob("*.jpg"))) if not isinstance(pixels, PictureError)
    ]
    pasted = correct(stack(inputs))
    print(f"{pasted[clean].float().mean():.2%} of {clean.sum():,} are classified correctly")
    assert pasted[clean].float().mean() >= 0.96
