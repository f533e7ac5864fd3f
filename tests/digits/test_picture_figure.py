from pathlib import Path

import numpy as np
from digits.samples import DIGITS, as_picture, save
from PIL import Image

from mnist_lightning.digits import picture_figure
from mnist_lightning.digits.picture_predictions import classify
from mnist_lightning.digits.pictures import preprocess
from mnist_lightning.model import MLP


def test_ink_is_coloured_by_its_attribution(tmp_path: Path) -> None:
    mlp = MLP(20, init_std=0.1).eval().requires_grad_(False)
    save(tmp_path / "0.png", as_picture(DIGITS[0]))
    save(tmp_path / "thin.png", Image.new("L", (3000, 12)))
    inputs = {path: preprocess(path) for path in (tmp_path / "0.png", tmp_path / "thin.png")}
    probabilities, _ = classify(mlp, inputs)
    picture_figure.draw(str(tmp_path / "figure.png"), inputs, probabilities, mlp)
    with Image.open(tmp_path / "figure.png") as figure:
        red, _, blue = np.asarray(figure, dtype=int)[picture_figure.HEADING + picture_figure.TILE + 60 :].transpose(
            2, 0, 1
        )
    # Its ink in two colours, below the network's input.
    assert ((blue - red) > 50).sum() > 100
    assert ((red - blue) > 50).sum() > 100
