import math
from pathlib import Path

import pytest
import torch
from conftest import prepare
from torch import Tensor
from torchvision.transforms.v2.functional import gaussian_blur

from mnist_lightning.digits import plots
from mnist_lightning.distortions import Distortions
from mnist_lightning.engine.data import uniform_noise

NONE = {"rotation": 0.0, "scale": 0.0, "shear": 0.0, "shift": 0.0, "elastic": 0.0}


def only(**strength: float) -> Distortions:
    return Distortions(**{**NONE, **strength})


def noise(images: Tensor, *affine: float) -> Tensor:
    """Noise that is 0 but for the six numbers of the affine map: angle, width, height, shear, x and y."""
    return torch.cat([torch.tensor(affine), torch.zeros(Distortions.draws - 6)]).repeat(len(images), 1)


def uniform(count: int, seed: int = 0) -> Tensor:
    return uniform_noise(count, Distortions.draws, seed)


@pytest.fixture(scope="module")
def images(root: Path) -> Tensor:
    return prepare("synthetic", root).test[0][:20].float() / 255


def squares(images: Tensor) -> Tensor:
    return images.view(-1, 28, 28)


def test_no_strength_leaves_images_as_they_are(images: Tensor) -> None:
    torch.testing.assert_close(only()(images, uniform(20)), images, rtol=0, atol=1e-4)


def test_shifts_by_pixels(images: Tensor) -> None:
    shifted = squares(only(shift=2)(images, noise(images, 0, 0, 0, 0, 1, -0.5)))
    # Each pixel comes from 2 to the right and 1 above.
    expected = torch.zeros_like(shifted)
    expected[:, 1:, :-2] = squares(images)[:, :-1, 2:]
    torch.testing.assert_close(shifted, expected, rtol=0, atol=1e-4)


def test_rotates_by_degrees(images: Tensor) -> None:
    turned = squares(only(rotation=90)(images, noise(images, 1, 0, 0, 0, 0, 0)))
    torch.testing.assert_close(turned, squares(images).rot90(1, (1, 2)), rtol=0, atol=1e-4)


def test_scales_and_shears_about_the_middle() -> None:
    # Brightness that grows along x shows where each pixel comes from.
    x = (torch.arange(28.0) - 13.5).repeat(28, 1)
    ramp = x.reshape(1, -1)
    middle = (slice(10, 18), slice(10, 18))
    stretched = only(scale=0.2)(ramp, noise(ramp, 0, -1, 0.5, 0, 0, 0)).view(28, 28)
    torch.testing.assert_close(stretched[middle], 0.8 * x[middle], rtol=1e-4, atol=1e-4)
    sheared = only(shear=0.3)(ramp, noise(ramp, 0, 0, 0, 1, 0, 0)).view(28, 28)
    torch.testing.assert_close(sheared[middle], (x + 0.3 * x.t())[middle], rtol=1e-4, atol=1e-4)


def test_the_elastic_field_is_noise_smoothed_by_a_gaussian() -> None:
    x = (torch.arange(28.0) - 13.5).repeat(28, 1)
    numbers = uniform(1)
    for axis, ramp in enumerate((x, x.t())):
        moved = only(elastic=20, smoothness=3)(ramp.reshape(1, -1), numbers).view(28, 28)
        field = numbers[0, 6:].view(2, 1, 28, 28)[axis]
        surrounded = torch.nn.functional.pad(field, [28] * 4)
        smooth = 20 * gaussian_blur(surrounded, [37, 37], [3.0, 3.0])[0, 28:-28, 28:-28]
        middle = (slice(6, 22), slice(6, 22))
        torch.testing.assert_close(moved[middle], (ramp + smooth)[middle], rtol=0, atol=2e-3)


def test_each_image_has_a_distortion_of_its_own(images: Tensor) -> None:
    copies = Distortions()(images[:1].repeat(20, 1), uniform(20))
    assert len({tuple(copy.tolist()) for copy in copies}) == 20
    assert copies.min() >= 0
    assert copies.max() <= 1


@pytest.mark.parametrize("size", [1, 3, 7])
def test_images_do_not_depend_on_those_beside_them(images: Tensor, size: int) -> None:
    numbers = uniform(20)
    parts = [Distortions()(*pair) for pair in zip(images.split(size), numbers.split(size), strict=True)]
    assert torch.equal(torch.cat(parts), Distortions()(images, numbers))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_precisions_are_distorted_alike(images: Tensor, dtype: torch.dtype) -> None:
    expected = Distortions()(images, uniform(20))
    distorted = Distortions()(images.to(dtype), uniform(20))
    assert distorted.dtype == dtype
    torch.testing.assert_close(distorted.float(), expected, rtol=0, atol=1e-2)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(Distortions()(images, uniform(20)), expected)


def test_no_images_are_no_error() -> None:
    assert Distortions()(torch.zeros(0, 784), uniform(0)).shape == (0, 784)


@pytest.mark.parametrize("strength", [{"scale": 1.0}, {"rotation": -1.0}, {"shift": math.nan}, {"smoothness": 0.0}])
def test_strengths_out_of_range_are_refused(strength: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=f"distortions.{next(iter(strength))} must be"):
        Distortions(**strength)


def test_the_figure_puts_copies_beside_their_originals(images: Tensor) -> None:
    copies = images[:6].repeat_interleave(9, dim=0).reshape(6, 9, 784)
    originals, others = plots.distorted_digits(images[:6], copies, "digits").axes
    column = originals.images[0].get_array()
    assert column is not None
    assert column.shape == (6 * 28, 28)
    tiles = others.images[0].get_array()
    assert tiles is not None
    for copy in range(9):
        assert (tiles[:, 28 * copy : 28 * (copy + 1)] == column).all()
