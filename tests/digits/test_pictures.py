import csv
import io
import os
import struct
import sys
import time
import zlib
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from conftest import RunCLI, prepare
from paste import paste
from PIL import Image, ImageDraw
from torch import Tensor

from mnist_lightning.commands import _network
from mnist_lightning.digits import pictures, reading
from mnist_lightning.digits.pictures import PictureError, find_ink, normalise, preprocess
from mnist_lightning.digits.reading import find, preprocess_all
from mnist_lightning.model import MLP

Array = npt.NDArray[Any]


@pytest.fixture(scope="module")
def digits(root: Path) -> Array:
    """Ten stand-in digits, (10, 28, 28) in [0, 1]."""
    images: Array = prepare("synthetic", root).test[0][:10].reshape(-1, 28, 28).numpy() / 255
    return images


def enlarge(digit: Array, side: int) -> Array:
    """Ink, (side, side) in [0, 1]."""
    picture = Image.fromarray((digit * 255).astype(np.uint8)).resize((side, side), Image.Resampling.BICUBIC)
    return np.asarray(picture) / 255


def on_paper(ink: Array, paper: Any = 255, pen: Any = 0) -> Array:
    """A picture, (H, W) or (H, W, 3) bytes, of a digit somewhere on a larger canvas."""
    canvas = np.pad(ink, ((30, 110), (90, 40)))
    paper, pen = np.asarray(paper, dtype=float), np.asarray(pen, dtype=float)
    picture: Array = paper + (pen - paper) * (canvas[..., None] if paper.ndim else canvas)
    return picture.round().astype(np.uint8)


def likeness(one: Array | None, other: Array | None) -> float:
    """Correlation of what the network sees of two pictures; their centres may be rounded to neighbouring pixels."""
    assert one is not None
    assert other is not None
    field = one.reshape(28, 28)
    moved = [np.roll(field, (y, x), (0, 1)).reshape(-1) for y in (-1, 0, 1) for x in (-1, 0, 1)]
    return max(float(np.corrcoef(field, other)[0, 1]) for field in moved)


def stack(readings: Sequence[Array | PictureError | None]) -> Array:
    return np.stack([reading if isinstance(reading, np.ndarray) else np.zeros(784) for reading in readings])


def save(path: Path, picture: Image.Image, **kwargs: Any) -> Path:
    picture.save(path, **kwargs)
    return path


def test_a_digit_of_mnist_stays_as_it_is(mnist_root: str) -> None:
    images = prepare("mnist", Path(mnist_root)).test[0][:300].numpy() / 255
    seen = stack([normalise(find_ink(as_picture(image.reshape(28, 28)))) for image in images])
    assert np.abs(seen - images).mean() < 0.015
    assert np.median([likeness(*pair) for pair in zip(seen, images, strict=True)]) > 0.99


def as_picture(ink: Array) -> Image.Image:
    return Image.fromarray((ink * 255).round().astype(np.uint8))


@pytest.mark.parametrize("suffix", ["png", "jpg", "jfif", "webp", "avif", "gif", "bmp", "tiff"])
def test_formats(digits: Array, tmp_path: Path, suffix: str) -> None:
    for digit in digits:
        ink = enlarge(digit, 140)
        path = save(tmp_path / f"digit.{suffix}", Image.fromarray(on_paper(ink)))
        assert likeness(preprocess(path), normalise(ink)) > 0.97


@pytest.mark.parametrize(("paper", "pen"), [(255, 0), (0, 255), (230, 150), (60, 110)])
def test_dark_on_light_and_light_on_dark(digits: Array, paper: int, pen: int) -> None:
    for digit in digits:
        ink = enlarge(digit, 140)
        assert likeness(normalise(find_ink(Image.fromarray(on_paper(ink, paper, pen)))), normalise(ink)) > 0.97


@pytest.mark.parametrize(
    ("paper", "pen"),
    [((250, 240, 200), (20, 40, 160)), ((20, 60, 30), (240, 240, 210)), ((220, 40, 40), (40, 132, 60))],
    ids=["ink on cream", "chalk on green", "green on equally bright red"],
)
def test_colours(digits: Array, paper: tuple[int, ...], pen: tuple[int, ...]) -> None:
    for digit in digits:
        ink = enlarge(digit, 140)
        assert likeness(normalise(find_ink(Image.fromarray(on_paper(ink, paper, pen)))), normalise(ink)) > 0.97


def transparent(ink: Array) -> Image.Image:
    alpha = Image.fromarray(255 - on_paper(ink))
    return Image.merge("LA", (Image.new("L", alpha.size, 0), alpha))


MODES: dict[str, Callable[[Array], Image.Image]] = {
    "1": lambda ink: Image.fromarray(on_paper(ink)).convert("1", dither=Image.Dither.NONE),
    "P": lambda ink: Image.fromarray(on_paper(ink)).convert("P"),
    "CMYK": lambda ink: Image.fromarray(on_paper(ink)).convert("CMYK"),
    "transparent": transparent,
    "transparent colours": lambda ink: transparent(ink).convert("RGBA"),
    "white on transparent": lambda ink: Image.merge(
        "LA", (Image.new("L", on_paper(ink).shape[::-1], 255), transparent(ink).getchannel("A"))
    ),
    "16 bits": lambda ink: Image.fromarray(on_paper(ink).astype(np.uint16) * 257),
    "12 of 16 bits": lambda ink: Image.fromarray(on_paper(ink).astype(np.uint16) * 16),
    "floats": lambda ink: Image.fromarray(on_paper(ink).astype(np.float32) / 255),
}


@pytest.mark.parametrize("mode", MODES)
def test_modes(digits: Array, tmp_path: Path, mode: str) -> None:
    for digit in digits:
        ink = enlarge(digit, 140)
        suffix = "tiff" if mode in ("CMYK", "floats") else "png"
        assert likeness(preprocess(save(tmp_path / f"digit.{suffix}", MODES[mode](ink))), normalise(ink)) > 0.9


def test_what_the_camera_turned(digits: Array, tmp_path: Path) -> None:
    ink = enlarge(digits[0], 140)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned clockwise
    turned = Image.fromarray(np.rot90(on_paper(ink)))
    assert likeness(preprocess(save(tmp_path / "digit.jpg", turned, exif=exif)), normalise(ink)) > 0.97


@pytest.mark.parametrize("kind", ["jpg", "png", "webp", "avif"])
def test_metadata_other_than_the_orientation_do_not_matter(digits: Array, tmp_path: Path, kind: str) -> None:
    ink = enlarge(digits[0], 140)
    upright, turned = Image.fromarray(on_paper(ink)), Image.fromarray(np.rot90(on_paper(ink)))
    entry = struct.pack("<HHI4s", 0x0112, 3, 1, struct.pack("<HH", 6, 0))
    odd = struct.pack("<HHII", 0x9286, 2, 0xFFFFFF, 0xFFFFFFF0) + struct.pack("<HHI4s", 0x011A, 77, 9, b"????")
    exif = b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", 3) + entry + odd + bytes(4)
    assert likeness(preprocess(save(tmp_path / f"turned.{kind}", turned, exif=exif)), normalise(ink)) > 0.97
    for name, foreign in {"cut": exif[:20], "other": b"Exif\0\0not EXIF at all"}.items():
        if kind != "avif":  # whose writer looks at it
            assert likeness(preprocess(save(tmp_path / f"{name}.{kind}", upright, exif=foreign)), normalise(ink)) > 0.97


@pytest.mark.parametrize("margin", [0, 1, 5])
@pytest.mark.parametrize("side", [28, 140])
def test_a_tightly_cropped_digit(digits: Array, side: int, margin: int) -> None:
    for digit in digits:
        ink = enlarge(digit, side)
        rows, columns = (np.flatnonzero((ink > 0.3).any(axis)) for axis in (1, 0))
        ink = np.pad(ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1], margin)
        for picture in (as_picture(ink), as_picture(1 - ink)):
            assert likeness(normalise(find_ink(picture)), normalise(ink)) > 0.8


def test_a_digit_at_the_edge(digits: Array) -> None:
    for digit in digits:
        ink = enlarge(digit, 140)
        ink = np.pad(ink[:, np.flatnonzero((ink > 0.3).any(0))[0] :], ((90, 60), (0, 150)))
        assert likeness(normalise(find_ink(as_picture(1 - ink))), normalise(ink)) > 0.9


@pytest.mark.parametrize("inset", [0, 12])
def test_a_frame_is_no_ink(digits: Array, inset: int) -> None:
    for digit in digits:
        ink = np.pad(enlarge(digit, 84), 60)
        page = as_picture(1 - ink)
        ImageDraw.Draw(page).rectangle((inset, inset, 203 - inset, 203 - inset), outline=0, width=3)
        assert likeness(normalise(find_ink(page)), normalise(ink)) > 0.9


def test_squared_paper_is_no_ink(digits: Array) -> None:
    for digit in digits:
        ink = np.pad(enlarge(digit, 84), 60)
        lines = np.zeros_like(ink)
        lines[8::25] = lines[:, 13::25] = 0.3
        assert likeness(normalise(find_ink(as_picture(1 - np.maximum(ink, lines)))), normalise(ink)) > 0.9


@pytest.mark.parametrize("side", [26, 60, 300, 1200])
def test_sizes(digits: Array, side: int) -> None:
    for digit in digits[:4]:
        ink = enlarge(digit, side)
        picture = Image.fromarray(on_paper(ink))
        assert likeness(normalise(find_ink(picture)), normalise(ink)) > 0.93
    assert max(find_ink(picture).shape) <= pictures.VIEW


def test_a_small_digit_on_a_large_page(digits: Array) -> None:
    ink = enlarge(digits[3], 60)
    page = np.pad(ink, ((1500, 300), (200, 900)))
    assert likeness(normalise(find_ink(as_picture(1 - page))), normalise(ink)) > 0.9


def test_specks_and_shadows_are_not_ink(digits: Array) -> None:
    for digit in digits:
        ink = enlarge(digit, 140)
        paper = on_paper(ink).astype(float)
        paper[:, :60] *= 0.6  # beside the digit
        paper *= np.linspace(1, 0.7, len(paper))[:, None]
        paper[5:8, 5:8] = paper[-9:-6, -30:-26] = 0
        assert likeness(normalise(find_ink(Image.fromarray(paper.astype(np.uint8)))), normalise(ink)) > 0.95


def test_blank_pictures(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    shade = np.linspace(250, 150, 400)[:, None] + np.zeros(300)
    for picture in (np.full((400, 300), 255), shade, shade + random.normal(0, 8, shade.shape), np.zeros((1, 1))):
        assert preprocess(save(tmp_path / "blank.png", Image.fromarray(picture.clip(0, 255).astype(np.uint8)))) is None
    assert preprocess(save(tmp_path / "clear.png", Image.new("RGBA", (50, 50), (0, 0, 0, 0)))) is None


def test_normalise() -> None:
    ink = np.zeros((90, 70))
    ink[10:50, 20:30] = 0.5  # a bar of 40 by 10, made 20 by 5
    seen = normalise(ink)
    assert seen is not None
    field = seen.reshape(28, 28)
    assert field.max() == 1
    rows, columns = (np.flatnonzero(field.sum(axis)) for axis in (1, 0))
    assert (rows[0], rows[-1], columns[0], columns[-1]) == (5, 24, 12, 16)  # around pixel 14, rounded up
    assert normalise(np.zeros((5, 5))) is None


def bomb(path: Path) -> Path:
    """A PNG of a few bytes that says it has 2.5 billion pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 50_000, 50_000, 8, 0, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(100))))
    return path


def test_what_is_no_picture(tmp_path: Path, digits: Array) -> None:
    (tmp_path / "note.png").write_text("no picture")
    whole = save(tmp_path / "whole.jpg", Image.fromarray(on_paper(enlarge(digits[0], 140)))).read_bytes()
    (tmp_path / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "empty.png").touch()
    (tmp_path / "photo.heic").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic")
    bomb(tmp_path / "bomb.png")
    for name, says in {
        "note.png": "is none of PNG",
        "cut.jpg": "truncated",
        "empty.png": "is none of PNG",
        "photo.heic": "is none of PNG, JPEG, WEBP, AVIF, GIF, BMP, TIFF; save it as one of them",
        "bomb.png": "more than 89,478,485 pixels",
    }.items():
        with pytest.raises(PictureError, match=says):
            preprocess(tmp_path / name)


def test_a_picture_just_above_the_limit_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = save(tmp_path / "large.png", Image.new("L", (20, 20)))
    monkeypatch.setattr(pictures, "MAX_PIXELS", 400)
    assert preprocess(path) is None
    monkeypatch.setattr(pictures, "MAX_PIXELS", 399)
    with pytest.raises(PictureError, match="399"):
        preprocess(path)


def test_a_large_photo_is_read_at_a_smaller_size(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, digits: Array
) -> None:
    ink = enlarge(digits[0], 4000)
    monkeypatch.setattr(pictures, "MAX_PIXELS", 2_000_000)
    assert likeness(preprocess(save(tmp_path / "photo.jpg", Image.fromarray(on_paper(ink)))), normalise(ink)) > 0.97
    # To decode a progressive one takes memory for all of its pixels.
    progressive = save(tmp_path / "progressive.jpg", Image.fromarray(on_paper(ink)), progressive=True)
    with pytest.raises(PictureError, match="more than 2,000,000 pixels"):
        preprocess(progressive)


def test_find(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    hidden = ("._b.png", ".cache/b.png")
    for name in (
        "b.png",
        "a.JPG",
        "notes.txt",
        "more/c.webp",
        "more/d [1].png",
        "phone/e.HEIC",
        "phone/f.heic",
        *hidden,
    ):
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).touch()
    found, left_out = find(["."])
    assert list(map(str, found)) == ["a.JPG", "b.png", "more/c.webp", "more/d [1].png"]
    assert left_out == "not supported: 2 .heic, 1 .txt; save pictures as JPEG or PNG"
    for paths, names in {
        ("*.png", "b.png", "./notes.txt", "._b.png"): ["b.png", "notes.txt", "._b.png"],
        (f"{tmp_path}/**/d*",): [f"{tmp_path}/more/d [1].png"],
        ("more/d [1].png",): ["more/d [1].png"],
    }.items():
        found, left_out = find(paths)
        assert (list(map(str, found)), left_out) == (names, "")
    with pytest.raises(ValueError, match=r"there is no picture phone.*2 \.heic; save pictures as JPEG"):
        find(["phone"])
    with pytest.raises(ValueError, match=r"there is no picture \*\.tif$"):
        find([".", "*.tif"])
    for nothing in ("none.png", "*.tif"):
        with pytest.raises(ValueError, match="there is no picture"):
            find([nothing])


@pytest.fixture
def trained(run_cli: RunCLI, capsys: pytest.CaptureFixture[str]) -> RunCLI:
    """The command line where there is a run, and whose data nobody needs."""
    assert run_cli("fit", "--trainer.max_epochs=1", "--test_after_fit=false") == 0
    capsys.readouterr()
    return partial(run_cli, data=False)


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8", errors="surrogateescape") as file:
        return list(csv.DictReader(file))


def test_read_reads_pictures(
    trained: RunCLI, tmp_path: Path, digits: Array, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine").mkdir()
    for index, digit in enumerate(digits[:3]):
        save(tmp_path / f"mine/{index}.png", Image.fromarray(on_paper(enlarge(digit, 140))))
    save(tmp_path / "mine/blank.png", Image.new("L", (50, 50), 200))

    assert trained("read", "mine") == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    best_path = "lightning_logs/version_0/checkpoints/best.ckpt"
    lines = captured.out.splitlines()
    assert lines[0] == f"Weights: {best_path}, trained on stand-in digits (not MNIST), 11 iterations"
    assert lines[-2:] == ["Predictions: predictions.csv", "Figure: pictures.png"]
    rows = rows_of(tmp_path / "predictions.csv")
    assert list(rows[0]) == ["file", "digit", "probability", "runner_up", "runner_up_probability", "note"]
    assert [row["file"] for row in rows] == ["mine/0.png", "mine/1.png", "mine/2.png", "mine/blank.png"]
    assert list(rows[-1].values())[1:] == ["blank", "", "", "", ""]
    mlp, _ = _network(str(tmp_path / best_path), "")
    seen = torch.tensor(stack([preprocess(tmp_path / row["file"]) for row in rows[:3]]))
    (best, runner_up), (digit, second) = (pair.T for pair in mlp(seen.float()).softmax(1).topk(2))
    for index, row in enumerate(rows[:3]):
        assert (row["digit"], row["runner_up"]) == (str(int(digit[index])), str(int(second[index])))
        assert float(row["probability"]) == pytest.approx(float(best[index]), abs=1e-4)
        assert float(row["runner_up_probability"]) == pytest.approx(float(runner_up[index]), abs=1e-4)
        assert f"{float(row['probability']):.1%}" in captured.out
    assert (tmp_path / "pictures.png").stat().st_size > 10_000
    assert [path.name for path in (tmp_path / "lightning_logs").iterdir()] == ["version_0"]


def test_read_skips_what_is_no_picture(
    trained: RunCLI, tmp_path: Path, digits: Array, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine").mkdir()
    save(tmp_path / "mine/0.png", as_picture(digits[0]))
    save(tmp_path / "mine/blank.png", Image.new("L", (50, 50), 200))
    (tmp_path / "mine/note\x1b.png").write_text("no picture")
    bomb(tmp_path / "mine/bomb.png")
    assert trained("read", "mine/0.png", "mine/[bn]*") == 1
    captured = capsys.readouterr()
    assert "Skipped: mine/bomb.png has more than" in captured.err
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
    trained: RunCLI, tmp_path: Path, digits: Array, capsys: pytest.CaptureFixture[str]
) -> None:
    name = os.fsdecode(b"\xe9.png")  # Latin-1
    save(tmp_path / name, as_picture(digits[0]))
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
        "Weights: ?.png.ckpt, trained on stand-in digits (not MNIST), 11 iterations\n"
    )
    assert [row["file"] for row in rows_of(tmp_path / f"{name}.csv")] == ["-x.png", name]


def test_a_console_that_lacks_a_names_characters(
    trained: RunCLI, tmp_path: Path, digits: Array, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    for name in ("数字.png", "\N{GRINNING FACE}.png", "é.png"):
        save(tmp_path / name, as_picture(digits[0]))
    console = io.TextIOWrapper(io.BytesIO(), encoding="cp1252", write_through=True)
    monkeypatch.setattr(sys, "stdout", console)
    assert trained("read", ".", "--csv=数.csv") == 0
    out = console.buffer.getvalue().decode("cp1252")
    assert all(f" {name} " in out for name in ("??.png", "?.png", "é.png"))
    assert "Predictions: ?.csv" in out
    assert len({len(line) for line in out.splitlines() if line.startswith("|")}) == 1
    assert (tmp_path / "pictures.png").exists()
    assert not recwarn.list


def test_several_digits_in_one_picture_are_named(
    trained: RunCLI, tmp_path: Path, digits: Array, capsys: pytest.CaptureFixture[str]
) -> None:
    two = np.concatenate([enlarge(digits[0], 140), enlarge(digits[1], 140)], 1)
    save(tmp_path / "one.png", as_picture(digits[0]))
    save(tmp_path / "two.png", Image.fromarray(on_paper(two)))
    assert trained("read", "one.png") == 0
    assert "more than one" not in capsys.readouterr().out
    assert trained("read", "one.png", "two.png") == 0
    assert capsys.readouterr().out.count("* more than one digit? read as one") == 1
    assert [row["note"] for row in rows_of(tmp_path / "predictions.csv")] == ["", "more than one digit? read as one"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "read: which pictures? Give files, folders or globs"),
        (["none.png"], "there is no picture none.png"),
        (["mine.png", "more/*.tif"], "there is no picture more/*.tif"),
        (["mine.png", "--ckpt_path=nowhere.ckpt"], "ckpt_path: there is no checkpoint nowhere.ckpt"),
        (["mine.png"], "ckpt_path: there is no best.ckpt of any run in lightning_logs yet; train one with `fit`"),
        (["mine.png", "--figure=./mine.png"], "figure: ./mine.png is one of the pictures to read"),
        (["mine.png", "--csv=mine.png"], "csv: mine.png is one of the pictures to read"),
        (["mine.png", "--figures=x"], "there is no setting figures; did you mean figure?"),
    ],
)
def test_wrong_read_commands_are_refused(
    run_cli: RunCLI, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], says: str
) -> None:
    save(tmp_path / "mine.png", Image.new("L", (50, 50), 200))
    content = (tmp_path / "mine.png").read_bytes()
    assert run_cli("read", *arguments, data=False) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(f"mnist_lightning: {says}")
    assert captured.err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["mine.png"]
    assert (tmp_path / "mine.png").read_bytes() == content


@pytest.mark.parametrize("arguments", [["predict", "--ckpt_path=best"], ["data"]])
def test_the_data_has_no_pictures(run_cli: RunCLI, capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    assert run_cli(*arguments, "--data.images=[mine]") == 2
    assert "there is no setting data.images" in capsys.readouterr().err


def test_ten_thousand_paths_are_parsed_at_once(run_cli: RunCLI, capsys: pytest.CaptureFixture[str]) -> None:
    start = time.process_time()
    assert run_cli("read", *(f"{index}.png" for index in range(10_000)), data=False) == 2
    assert time.process_time() - start < 3
    assert "there is no picture 0.png" in capsys.readouterr().err


def test_a_progress_bar_from_100_pictures_on(
    trained: RunCLI, tmp_path: Path, digits: Array, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine").mkdir()
    for index in range(120):
        save(tmp_path / f"mine/{index:03}.png", as_picture(digits[index % 10]))
    for pattern, terminal, bar in (("mine/0*", "1", True), ("mine/00*", "1", False), ("mine", "", False)):
        monkeypatch.setenv("FORCE_COLOR", terminal)
        assert trained("read", pattern) == 0
        captured = capsys.readouterr()
        assert ("Reading pictures" in captured.err) is bar
    assert "and 20 more in predictions.csv" in captured.out
    assert captured.out.count("mine/") == 100
    assert len(rows_of(tmp_path / "predictions.csv")) == 120


# 99.0% of 1,455 were read right with 1,500 digits, which takes minutes.
DIGITS = 300


@pytest.mark.soak
def test_nearly_all_pasted_digits_are_read_right(run_cli: RunCLI, mnist_root: str, tmp_path: Path) -> None:
    assert run_cli("fit", f"--data.root={mnist_root}", "--test_after_fit=false", data=False) == 0
    mlp, _ = _network("best", "lightning_logs")
    pixels, labels = (part[:DIGITS] for part in prepare("mnist", Path(mnist_root)).test)
    images = pixels.float() / 255

    def right(pixels: Tensor) -> Tensor:
        with torch.no_grad():
            return torch.eq(mlp(pixels).argmax(1), labels)

    clean = right(images)
    random = np.random.default_rng(0)
    for index, image in enumerate(images):
        paste(image.reshape(28, 28).numpy(), random).save(
            tmp_path / f"{index:04}.jpg", quality=int(random.integers(50, 96))
        )
    seen = list(preprocess_all(sorted(tmp_path.glob("*.jpg"))))
    pasted = right(torch.tensor(stack(seen)).float())
    print(f"{pasted[clean].float().mean():.2%} of {clean.sum():,} are read right")
    assert pasted[clean].float().mean() >= 0.96


def test_the_figure_says_why(tmp_path: Path, digits: Array) -> None:
    mlp = MLP(20, init_std=0.1).eval().requires_grad_(False)
    save(tmp_path / "0.png", as_picture(digits[0]))
    save(tmp_path / "thin.png", Image.new("L", (3000, 12)))
    seen = {path: preprocess(path) for path in (tmp_path / "0.png", tmp_path / "thin.png")}
    probabilities, _ = reading.classify(mlp, seen)
    reading.draw(str(tmp_path / "figure.png"), seen, probabilities, mlp)
    with Image.open(tmp_path / "figure.png") as figure:
        red, _, blue = np.asarray(figure, dtype=int)[reading.HEADING + reading.TILE + 60 :].transpose(2, 0, 1)
    # Its ink in two colours, below the picture as seen.
    assert ((blue - red) > 50).sum() > 100
    assert ((red - blue) > 50).sum() > 100
