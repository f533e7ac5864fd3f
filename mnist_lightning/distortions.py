"""Distorted digits: new training images out of old ones."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mnist_lightning.model import SIDE


@dataclass(frozen=True)
class Distortions:
    """Affine and elastic distortions after Simard, Steinkraus and Platt (2003).

    Each image gets a distortion of its own; torchvision's transforms apply one to a whole batch. Their Gaussian
    blur alone takes 10 s for the fields of 55,000 images on two CPU cores; all that is done here takes 1.0 s.

    Args:
        rotation: Largest angle to either side, in degrees, 0 or above.
        scale: Largest stretch or shrinkage, as a share of the size, of width and height each on its own, 0 up to 1.
        shear: Largest shear to either side, in pixels along x for each pixel along y, 0 or above.
        shift: Largest shift along each axis, in pixels, 0 or above.
        elastic: Factor of the elastic field, in pixels, 0 or above: each pixel's uniform noise from -1 to 1 is smoothed
            and then multiplied by it. With the defaults a pixel in the middle moves by 0.8 along each axis (standard
            deviation), and one at an edge by less.
        smoothness: Standard deviation of the Gaussian that smooths the noise, in pixels, above 0.

    Raises:
        ValueError: A strength is out of its range.
    """

    rotation: float = 10
    scale: float = 0.15
    shear: float = 0.15
    shift: float = 1.5
    elastic: float = 20
    smoothness: float = 4

    # Random numbers that an image takes: six for the affine map, two for each pixel. A type would make it a setting.
    draws = 6 + 2 * SIDE**2

    def __post_init__(self) -> None:
        """Check the strengths."""
        for name, value in vars(self).items():
            if not 0 <= value < math.inf:
                raise ValueError(f"distortions.{name} must be a finite number, 0 or above, not {value}")
        if self.scale >= 1:
            raise ValueError(f"distortions.scale must be below 1, not {self.scale}")
        if self.smoothness == 0:
            raise ValueError("distortions.smoothness must be above 0; to have no elastic field, set elastic to 0")

    @classmethod
    def of(cls, setting: "bool | Distortions | dict[str, float]") -> "Distortions | None":
        """What a setting asks for: `True` for those with the defaults; a checkpoint has them as a dictionary."""
        return cls(**setting) if isinstance(setting, dict) else cls() if setting is True else setting or None

    def __call__(self, images: Tensor, noise: Tensor) -> Tensor:
        """Distort images.

        Args:
            images: (B, 784) pixels in [0, 1].
            noise: (B, `draws`) uniform random numbers in [-1, 1) on the same device.

        Returns:
            (B, 784) pixels in [0, 1]; what comes from outside of an image is 0.
        """
        # Half precision would misplace pixels by much of their size.
        dtype = torch.promote_types(images.dtype, torch.float32)
        with torch.autocast(images.device.type, enabled=False):
            affine, field = noise.to(dtype).split([6, 2 * SIDE**2], dim=1)
            # Where in the original each pixel comes from, (B, 2, 28, 28) of x and y. PyTorch lets an image reach from
            # -1 to 1, edge to edge, so that a pixel is 2 / 28 wide.
            x = torch.arange(1 - SIDE, SIDE, 2, dtype=dtype, device=images.device) / SIDE
            y = x[:, None]
            # On a CPU, `affine_grid`, a product of small matrices for each image, takes about as long as all else here.
            by_x, by_y, shift = self._affine(affine)[..., None, None].unbind(2)
            source = (by_x * x + shift) + by_y * y  # the bracket is only (B, 2, 1, 28)
            if self.elastic:
                source += self._elastic(field.reshape(-1, 2, SIDE, SIDE))
            originals = images.to(dtype).view(-1, 1, SIDE, SIDE)
            distorted = F.grid_sample(originals, source.permute(0, 2, 3, 1), align_corners=False)
            return distorted.view_as(images).to(images.dtype)

    def _affine(self, noise: Tensor) -> Tensor:
        """(B, 2, 3) matrices from (B, 6) noise."""
        turn, wider, taller, slant, right, down = noise.unbind(1)
        angle = turn * math.radians(self.rotation)
        width, height, shear = 1 + self.scale * wider, 1 + self.scale * taller, self.shear * slant
        shift = torch.stack([right, down], 1) * self.shift * 2 / SIDE
        cos, sin = angle.cos(), angle.sin()
        rows = [
            torch.stack([cos * width, (cos * shear - sin) * height], 1),
            torch.stack([sin * width, (sin * shear + cos) * height], 1),
        ]
        return torch.cat([torch.stack(rows, 1), shift[:, :, None]], 2)

    def _elastic(self, noise: Tensor) -> Tensor:
        """(B, 2, 28, 28) displacements from noise of the same shape."""
        # Along rows, then along columns: products with the matrix of the Gaussian between each two positions, which
        # on a CPU are faster than convolutions with kernels of this width. Outside of the image there is no noise.
        position = torch.arange(SIDE, dtype=noise.dtype, device=noise.device)
        smooth = torch.exp(-((position - position[:, None]) ** 2) / (2 * self.smoothness**2))
        smooth /= self.smoothness * math.sqrt(2 * math.pi)
        across = (noise @ smooth).transpose(2, 3)
        return (across @ (smooth * (self.elastic * 2 / SIDE))).transpose(2, 3)
