from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import prepare
from digits.samples import DIGITS, as_picture, enlarge, likeness, on_paper, save
from PIL import Image, ImageDraw

from mnist_lightning.digits.ink import VIEW, find_ink
from mnist_lightning.digits.picture_predictions import stack
from mnist_lightning.digits.pictures import normalise, preprocess


def test_a_digit_of_mnist_stays_as_it_is(mnist_root: str) -> None:
    images = prepare("mnist", Path(mnist_root)).test[0][:100].numpy() / 255
    seen = stack([normalise(find_ink(as_picture(image.reshape(28, 28)))) for image in images])
    assert np.abs(seen - images).mean() < 0.015
    assert np.median([likeness(*pair) for pair in zip(seen, images, strict=True)]) > 0.99


@pytest.mark.parametrize(
    ("paper", "pen"),
    [
        (255, 0),
        (0, 255),
        (230, 150),
        (60, 110),
        ((250, 240, 200), (20, 40, 160)),  # ink on cream
        ((20, 60, 30), (240, 240, 210)),  # chalk on green
        ((220, 40, 40), (40, 132, 60)),  # green on equally bright red
    ],
)
def test_dark_on_light_and_light_on_dark(paper: Any, pen: Any) -> None:
    for digit in DIGITS:
        ink = enlarge(digit, 140)
        assert likeness(normalise(find_ink(Image.fromarray(on_paper(ink, paper, pen)))), normalise(ink)) > 0.97


@pytest.mark.parametrize("margin", [0, 1, 5])
@pytest.mark.parametrize("side", [28, 140])
def test_a_tightly_cropped_digit(side: int, margin: int) -> None:
    for digit in DIGITS:
        ink = enlarge(digit, side)
        rows, columns = (np.flatnonzero((ink > 0.3).any(axis)) for axis in (1, 0))
        ink = np.pad(ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1], margin)
        for picture in (as_picture(ink), as_picture(1 - ink)):
            assert likeness(normalise(find_ink(picture)), normalise(ink)) > 0.8


def test_a_digit_at_the_edge() -> None:
    for digit in DIGITS:
        ink = enlarge(digit, 140)
        ink = np.pad(ink[:, np.flatnonzero((ink > 0.3).any(0))[0] :], ((90, 60), (0, 150)))
        assert likeness(normalise(find_ink(as_picture(1 - ink))), normalise(ink)) > 0.9


@pytest.mark.parametrize("inset", [0, 12])
def test_a_frame_is_no_ink(inset: int) -> None:
    for digit in DIGITS:
        ink = np.pad(enlarge(digit, 84), 60)
        page = as_picture(1 - ink)
        ImageDraw.Draw(page).rectangle((inset, inset, 203 - inset, 203 - inset), outline=0, width=3)
        assert likeness(normalise(find_ink(page)), normalise(ink)) > 0.9


def test_squared_paper_is_no_ink() -> None:
    for digit in DIGITS:
        ink = np.pad(enlarge(digit, 84), 60)
        lines = np.zeros_like(ink)
        lines[8::25] = lines[:, 13::25] = 0.3
        assert likeness(normalise(find_ink(as_picture(1 - np.maximum(ink, lines)))), normalise(ink)) > 0.9


@pytest.mark.parametrize("side", [26, 60, 300, 1200])
def test_sizes(side: int) -> None:
    for digit in DIGITS[:4]:
        ink = enlarge(digit, side)
        picture = Image.fromarray(on_paper(ink))
        assert likeness(normalise(find_ink(picture)), normalise(ink)) > 0.93
    assert max(find_ink(picture).shape) <= VIEW


def test_a_small_digit_on_a_large_page() -> None:
    ink = enlarge(DIGITS[3], 60)
    page = np.pad(ink, ((1500, 300), (200, 900)))
    assert likeness(normalise(find_ink(as_picture(1 - page))), normalise(ink)) > 0.9


def test_specks_and_shadows_are_not_ink() -> None:
    for digit in DIGITS:
        ink = enlarge(digit, 140)
        paper = on_paper(ink).astype(float)
        paper[:, :60] *= 0.6  # beside the digit
        paper *= np.linspace(1, 0.7, len(paper))[:, None]
        paper[5:8, 5:8] = paper[-9:-6, -30:-26] = 0
        assert likeness(normalise(find_ink(Image.fromarray(paper.astype(np.uint8)))), normalise(ink)) > 0.95


def test_blank_pictures(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    shade = np.linspace(250, 150, 400)[:, None] + np.zeros(300)
    noisy = [shade + random.normal(0, deviation, shade.shape) for deviation in (8, 40)]
    for picture in (np.full((400, 300), 255), shade, *noisy, np.zeros((1, 1))):
        assert preprocess(save(tmp_path / "blank.png", Image.fromarray(picture.clip(0, 255).astype(np.uint8)))) is None
    assert preprocess(save(tmp_path / "clear.png", Image.new("RGBA", (50, 50), (0, 0, 0, 0)))) is None
