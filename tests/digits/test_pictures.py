import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from digits.samples import DIGITS, enlarge, likeness, on_paper, save
from PIL import Image

from mnist_lightning.digits import pictures
from mnist_lightning.digits.ink import Array
from mnist_lightning.digits.pictures import PictureError, normalise, preprocess


@pytest.mark.parametrize("suffix", ["png", "jpg", "jfif", "webp", "avif", "gif", "bmp", "tiff"])
def test_formats(tmp_path: Path, suffix: str) -> None:
    for digit in DIGITS[::3]:
        ink = enlarge(digit, 140)
        path = save(tmp_path / f"digit.{suffix}", Image.fromarray(on_paper(ink)))
        assert likeness(preprocess(path), normalise(ink)) > 0.97


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
def test_modes(tmp_path: Path, mode: str) -> None:
    for digit in DIGITS[::3]:
        ink = enlarge(digit, 140)
        suffix = "tiff" if mode in ("CMYK", "floats") else "png"
        assert likeness(preprocess(save(tmp_path / f"digit.{suffix}", MODES[mode](ink))), normalise(ink)) > 0.9


def test_what_the_camera_turned(tmp_path: Path) -> None:
    ink = enlarge(DIGITS[0], 140)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned clockwise
    turned = Image.fromarray(np.rot90(on_paper(ink)))
    assert likeness(preprocess(save(tmp_path / "digit.jpg", turned, exif=exif)), normalise(ink)) > 0.97


@pytest.mark.parametrize("kind", ["jpg", "png", "webp", "avif"])
def test_metadata_other_than_the_orientation_do_not_matter(tmp_path: Path, kind: str) -> None:
    ink = enlarge(DIGITS[0], 140)
    upright, turned = Image.fromarray(on_paper(ink)), Image.fromarray(np.rot90(on_paper(ink)))
    entry = struct.pack("<HHI4s", 0x0112, 3, 1, struct.pack("<HH", 6, 0))
    odd = struct.pack("<HHII", 0x9286, 2, 0xFFFFFF, 0xFFFFFFF0) + struct.pack("<HHI4s", 0x011A, 77, 9, b"????")
    exif = b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", 3) + entry + odd + bytes(4)
    assert likeness(preprocess(save(tmp_path / f"turned.{kind}", turned, exif=exif)), normalise(ink)) > 0.97
    for name, foreign in {"cut": exif[:20], "other": b"Exif\0\0not EXIF at all"}.items():
        if kind != "avif":  # whose writer looks at it
            assert likeness(preprocess(save(tmp_path / f"{name}.{kind}", upright, exif=foreign)), normalise(ink)) > 0.97


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


def test_what_is_no_picture(tmp_path: Path) -> None:
    (tmp_path / "note.png").write_text("no picture")
    whole = save(tmp_path / "whole.jpg", Image.fromarray(on_paper(enlarge(DIGITS[0], 140)))).read_bytes()
    (tmp_path / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "empty.png").touch()
    (tmp_path / "photo.heic").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic")
    bomb(tmp_path / "bomb.png")
    for name, says in {
        "note.png": "is none of PNG",
        "cut.jpg": "truncated",
        "empty.png": "is none of PNG",
        "photo.heic": "is none of PNG, JPEG, WEBP, AVIF, GIF, BMP, TIFF; save it as one of them",
        "bomb.png": r"cannot be read: Image size \(2500000000 pixels\) exceeds limit of 178956970 pixels",
    }.items():
        with pytest.raises(PictureError, match=says):
            preprocess(tmp_path / name)
    assert Image.MAX_IMAGE_PIXELS == 89_478_485  # Pillow's own


def test_a_large_photo_is_decoded_at_a_smaller_size(tmp_path: Path) -> None:
    ink = enlarge(DIGITS[0], 2000)
    path = save(tmp_path / "photo.jpg", Image.fromarray(on_paper(ink)))
    assert max(pictures.load(path).size) < 1100
    assert likeness(preprocess(path), normalise(ink)) > 0.97
